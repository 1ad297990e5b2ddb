// Merge what attend_one.cu found in each split of the keys: a block a query head.
//     M = max_s m_s,   y = sum_s exp(m_s - M) * a_s / sum_s exp(m_s - M) * l_s
// Warp w adds splits w, w + 8, ..., and then the warps are added.  A split without keys adds zero,
// so that the number of splits changes no bit.
// Built with HEAD, a multiple of 32 up to 256.

#define WARPS 8

extern "C" __global__ void
__launch_bounds__(WARPS * 32) attend_merge(const float* parts, float* y, i64 n_rows, i64 n_split) {
    __shared__ float sums[WARPS][HEAD], weights[WARPS];
    i64 first = blockIdx.x * n_split;
    const float *a = parts + first * HEAD, *state = parts + n_rows * n_split * HEAD + first * 2;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float m = minus_infinity(), l = 0.0f, sum[HEAD / 32] = {};
    for (i64 split = lane; split < n_split; split += 32) m = fmaxf(m, state[split * 2]);
    m = softmax_shift(warp_reduce_max(m));
    for (i64 split = warp; split < n_split; split += WARPS) {
        float weight = expf(state[split * 2] - m);
        l = fmaf(weight, state[split * 2 + 1], l);
#pragma unroll
        for (int c = 0; c < HEAD / 32; ++c)
            sum[c] = fmaf(weight, a[split * HEAD + lane + 32 * c], sum[c]);
    }
#pragma unroll
    for (int c = 0; c < HEAD / 32; ++c) sums[warp][lane + 32 * c] = sum[c];
    if (lane == 0) weights[warp] = l;
    __syncthreads();
    for (int i = threadIdx.x; i < HEAD; i += WARPS * 32) {
        float total = 0.0f, all = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
            total += sums[w][i];
            all += weights[w];
        }
        y[blockIdx.x * (i64)HEAD + i] = weighted_mean(total, all);
    }
}
