// y[row, i] = weight[i] * x[row, i] / sqrt(mean_j x[row, j]**2 + eps): a block a row, in float32.
// Built with ENTRY = float, bf16 or f16, the type of weight, and PARTS = 0; or 1 or 3, and y is in
// parts [PARTS, n_rows, d_model] (parts.cu).

template <typename W>
__device__ void rms_norm_row(const float* x, const W* weight, Stored* y, i64 d_model, float eps) {
    __shared__ float partial[32];
    i64 first = blockIdx.x * d_model;
    const float* row = x + first;
    float sum = 0.0f;
    for (i64 i = threadIdx.x; i < d_model; i += blockDim.x) sum += row[i] * row[i];
    sum = warp_reduce_add(sum);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
    float root = sqrtf(total / (float)d_model + eps);
    for (i64 i = threadIdx.x; i < d_model; i += blockDim.x)
        store<PARTS>(widen(weight[i]) * (row[i] / root), y, first + i, gridDim.x * d_model);
}

extern "C" __global__ void
rms_norm(const float* x, const ENTRY* weight, Stored* y, i64 d_model, float eps) {
    rms_norm_row<ENTRY>(x, weight, y, d_model, eps);
}
