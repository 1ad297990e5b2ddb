// Products of small matrices on the tensor cores, by one warp: the instruction mma.m16n8k16 of PTX,
// from sm_80 on.
//     d[i, j] += sum_k a[i, k] * b[k, j],   a [16, 16] and b [16, 8] in bfloat16, d in float32
// A lane holds some entries of each, in pairs: of a word, the low half is the first of the pair.
// With g = lane / 4 and t = lane % 4:
//     a[0]: row g,     columns 2t, 2t + 1       b[0]: rows 2t, 2t + 1, column g
//     a[1]: row g + 8, the same columns         b[1]: rows 2t + 8, 2t + 9, column g
//     a[2]: row g,     columns 2t + 8, 2t + 9   d[0], d[1]: row g,     columns 2t, 2t + 1
//     a[3]: row g + 8, the same columns         d[2], d[3]: row g + 8, the same columns
// A product of two bfloat16 numbers is exact in float32; a sum may be truncated, not rounded.

#if defined(__CUDA_ARCH__)  // elsewhere the runner of the tests has a function of this name
__device__ inline void mma_bf16(float* d, const unsigned* a, const unsigned* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Two numbers rounded to bfloat16: x in the low half.
__device__ inline unsigned narrow_pair(float x, float y) {
    unsigned pair;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
#else
    bf16 low, high;
    narrow(x, low);
    narrow(y, high);
    pair = low.bits | (unsigned)high.bits << 16;
#endif
    return pair;
}

// x = part[0] + part[1] + ..., each part what those before it leave, rounded to bfloat16; the same
// for y, in the high halves.  Three parts are x itself, where |x| < 2**127 and no part is subnormal.
template <int P>
__device__ inline void split_pair(float x, float y, unsigned (&part)[P]) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
        part[p] = narrow_pair(x, y);
        x -= __uint_as_float(part[p] << 16);
        y -= __uint_as_float(part[p] & 0xffff0000u);
    }
}
