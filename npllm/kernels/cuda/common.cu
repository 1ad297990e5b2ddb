// Device functions that every kernel here uses.  Prepended to each source; no header is included,
// since NVRTC needs none.
// The subset is small on purpose (static __shared__, full-mask shuffles, 1-D blocks, no return
// before a barrier): tests/cuda_shim.h runs the same text on a CPU.
//
// CuPy compiles with -ftz=true: arithmetic takes a subnormal float32 (below 2**-126) for zero, and
// gives zero in the place of a subnormal result.  Widening is exact for every pattern all the same;
// bfloat16's subnormals are subnormal float32 numbers, of which the next operation makes zero.

#define ALL_LANES 0xffffffffu
typedef long long i64;

// Storage types.  They are widened by hand, since sm_75 has no bfloat16 arithmetic.
struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};
struct i8 {
    signed char value;
};

// 16 bytes, which one load fetches: 4 entries of float, 8 of a 16-bit type, 16 of int8.
template <typename T>
struct alignas(16) Pack {
    static constexpr int N = 16 / sizeof(T);
    T entry[N];
};

__device__ inline float widen(float x) { return x; }

__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline float widen(f16 x) {
    unsigned sign = (unsigned)(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    // The exponent's bias goes from 15 to 127; that of infinity and NaN stays all ones.
    unsigned bits = (rest << 13) + ((rest < 0x7c00u ? 112u : 224u) << 23);
    // Subnormal: 2**-14 * (1 + m / 1024) - 2**-14 is exact, and no number in it is subnormal here.
    float subnormal = __uint_as_float(bits + (1u << 23)) - 6.103515625e-5f;
    return __uint_as_float((rest < 0x400u ? __float_as_uint(subnormal) : bits) | sign);
}

// To the nearest value of a storage type, of two the one whose last bit is 0; NaN stays NaN.
__device__ inline void narrow(float x, float& y) { y = x; }

__device__ inline void narrow(float x, bf16& y) {
    unsigned bits = __float_as_uint(x), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    y.bits = (unsigned short)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u
                                                                  : rounded >> 16);
}

__device__ inline void narrow(float x, f16& y) {
    unsigned sign = __float_as_uint(x) >> 16 & 0x8000u, bits = __float_as_uint(x) & 0x7fffffffu;
    // The bias goes from 127 to 15.  Below 2**-14 the step is 2**-24, that of a float at 0.5.
    unsigned normal = (bits + 0xfffu + (bits >> 13 & 1u) >> 13) - (112u << 10);
    unsigned subnormal = __float_as_uint(fabsf(x) + 0.5f) - 0x3f000000u;
    unsigned rounded = bits < 0x38800000u ? subnormal : normal;
    if (bits >= 0x477ff000u) rounded = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;  // from 65520 on
    y.bits = (unsigned short)(rounded | sign);
}

// 16 bytes of entries of T as they were loaded: 4 registers, where 16 entries would take 16.
template <typename T>
struct alignas(16) Words {
    unsigned word[4];
};

// Entry i, in float32.
__device__ inline float widen_entry(const Words<float>& x, int i) {
    return __uint_as_float(x.word[i]);
}

__device__ inline float widen_entry(const Words<bf16>& x, int i) {
    return __uint_as_float(i % 2 ? x.word[i / 2] & 0xffff0000u : x.word[i / 2] << 16);
}

__device__ inline float widen_entry(const Words<f16>& x, int i) {
    return widen(f16{(unsigned short)(x.word[i / 2] >> (i % 2 * 16))});
}

__device__ inline float widen_entry(const Words<i8>& x, int i) {
    return (float)((int)(x.word[i / 4] << (24 - i % 4 * 8)) >> 24);
}

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// The maximum to subtract: where no key is visible it is -infinity, and 0 serves as well.
__device__ inline float softmax_shift(float m) { return m == minus_infinity() ? 0.0f : m; }

// A weighted sum divided by its weights; a query without visible keys has 0 / 0, and gives 0.
__device__ inline float weighted_mean(float a, float l) { return a / (l == 0.0f ? 1.0f : l); }

__device__ inline float swiglu_of(float gate, float up) {
    float decay = expf(-fabsf(gate));  // of -|gate| only, so that it cannot overflow
    return gate * (gate >= 0.0f ? 1.0f : decay) / (1.0f + decay) * up;
}

__device__ inline float warp_reduce_add(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

__device__ inline float warp_reduce_max(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}
