// bfloat16 parts of float32 entries, for products on the tensor cores: a thread an entry.
//     PARTS = 3:  x[i] = parts[0, i] + parts[1, i] + parts[2, i], exactly: a part is the first 8
//                 significant bits of what the parts before it leave, and x has 24
//     PARTS = 1:  parts[0, i] = bfloat16(x[i]), to nearest, ties to even
// Of infinity and NaN the first part is that, and the others are zero.
//
// Bytes moved: 4 of x and 2 of each part, once.
// Built with PARTS = 1 or 3.

extern "C" __global__ void split(const float* x, bf16* parts, i64 n) {
    i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (i >= n) return;
    float rest = x[i];
    if (PARTS == 1) narrow(rest, parts[i]);
#pragma unroll
    for (int p = 0; p < PARTS && PARTS > 1; ++p) {
        bf16 part = {(unsigned short)(__float_as_uint(rest) >> 16)};
        if (rest != rest) part.bits |= 0x40;  // a NaN whose first bits are those of infinity
        parts[p * n + i] = part;
        float left = rest - widen(part);
        rest = left == left ? left : 0.0f;  // infinity less infinity
    }
}
