// y[row, i] = weight[i] * x[row, i] / sqrt(mean_j x[row, j]**2 + eps): a block a row, in float32.
// Built with ENTRY = float, bf16 or f16, the type of weight.

template <typename W>
__device__ void rms_norm_row(const float* x, const W* weight, float* y, i64 d_model, float eps) {
    __shared__ float partial[32];
    const float* row = x + blockIdx.x * d_model;
    float sum = 0.0f;
    for (i64 i = threadIdx.x; i < d_model; i += blockDim.x) sum += row[i] * row[i];
    sum = warp_reduce_add(sum);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
    float root = sqrtf(total / (float)d_model + eps);
    for (i64 i = threadIdx.x; i < d_model; i += blockDim.x)
        y[blockIdx.x * d_model + i] = widen(weight[i]) * (row[i] / root);
}

extern "C" __global__ void
rms_norm(const float* x, const ENTRY* weight, float* y, i64 d_model, float eps) {
    rms_norm_row<ENTRY>(x, weight, y, d_model, eps);
}
