// What every kernel here uses.  Prepended to each source; no header is included, so that NVRTC needs none.
// The subset is small on purpose (static __shared__, full-mask shuffles, 1-D blocks, no return before a barrier):
// tests/cuda_shim.h runs the same text on a CPU.

#define ALL_LANES 0xffffffffu
typedef long long i64;

struct f16 { unsigned short bits; };   // storage types: widened by hand, since sm_75 has no bfloat16 arithmetic
struct bf16 { unsigned short bits; };

__device__ inline float widen(float x) { return x; }

__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline float widen(f16 x) {
    unsigned sign = (unsigned)(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    float magnitude = rest >= 0x7c00u ? __uint_as_float(0x7f800000u | (rest << 13))           // inf and NaN
                                      : __uint_as_float(rest << 13) * 5.192296858534828e33f;  // times 2**112: exponent bias 15 to 127
    return __uint_as_float(__float_as_uint(magnitude) | sign);
}

__device__ inline float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}
