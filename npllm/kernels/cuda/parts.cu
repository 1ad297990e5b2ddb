// bfloat16 parts of a float32 number, for products on the tensor cores.
//     P = 3:  x = parts[0, i] + parts[1, i] + parts[2, i], exactly: a part is the first 8 significant
//             bits of what the parts before it leave, and x has 24
//     P = 1:  parts[0, i] = bfloat16(x), to nearest, ties to even
// Of infinity and NaN the first part is that, and the others are zero.

template <int P>
__device__ inline void store(float x, bf16* parts, i64 i, i64 n) {
    if (P == 1) {
        narrow(x, parts[i]);
        return;
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
        bf16 part = {(unsigned short)(__float_as_uint(x) >> 16)};
        if (x != x) part.bits |= 0x40;  // a NaN whose first bits are those of infinity
        parts[p * n + i] = part;
        float left = x - widen(part);
        x = left == left ? left : 0.0f;  // infinity less infinity
    }
}

template <int P>  // 0: no parts, the number itself
__device__ inline void store(float x, float* y, i64 i, i64) {
    y[i] = x;
}

#if PARTS == 0
typedef float Stored;
#else
typedef bf16 Stored;
#endif
