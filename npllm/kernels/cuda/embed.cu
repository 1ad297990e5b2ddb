// x[b, i] = weight[token[b], i], in float32: a thread an entry.
// An int8 weight has a scale for every 64 entries of a row: weight[t, i] * scales[t, i / 64].
//
// Bytes moved: a row of the weight, and as many entries of x, for each token.
// Built with ENTRY = float, bf16, f16 or i8.

#define GROUP 64

__device__ inline float entry(const float* x, const float*, i64 row, i64 i, i64 d) {
    return x[row * d + i];
}

__device__ inline float entry(const bf16* x, const float*, i64 row, i64 i, i64 d) {
    return widen(x[row * d + i]);
}

__device__ inline float entry(const f16* x, const float*, i64 row, i64 i, i64 d) {
    return widen(x[row * d + i]);
}

__device__ inline float entry(const i8* x, const float* scales, i64 row, i64 i, i64 d) {
    return (float)x[row * d + i].value * scales[row * ((d + GROUP - 1) / GROUP) + i / GROUP];
}

extern "C" __global__ void embed(const i64* token, const ENTRY* weight, const float* scales,
                                 float* x, i64 n, i64 d_model) {
    i64 at = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (at < n) x[at] = entry(weight, scales, token[at / d_model], at % d_model, d_model);
}
