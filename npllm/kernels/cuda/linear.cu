// y[r, o] = sum_i x[r, i] * weight[o, i] for a few rows x and a 16-bit weight: what a decode step does.
// A warp an output: each lane takes 8 entries of the weight at a time (16 bytes), widens them, and sums in float32.
// Built with ENTRY = bf16 or f16, and ROWS, the most rows of x.  d_in is a multiple of 8, and all begin at multiples of 16 bytes.

template <typename T, int N>
struct alignas(16) Pack { T entry[N]; };

template <typename T, int R>
__device__ void linear_rows(const float* x, const T* weight, float* y, unsigned n_rows, unsigned d_in, unsigned d_out) {
    unsigned warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned out = warp < d_out ? warp : d_out - 1;  // lanes without an output of their own take part in the shuffles
    const T* row = weight + (i64)out * d_in;
    float sum[R];
#pragma unroll
    for (int r = 0; r < R; ++r) sum[r] = 0.0f;
    for (unsigned first = lane * 8; first < d_in; first += 32 * 8) {
        Pack<T, 8> w = *(const Pack<T, 8>*)(row + first);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (r < n_rows) {
                const Pack<float, 4>* values = (const Pack<float, 4>*)(x + (i64)r * d_in + first);
                Pack<float, 4> low = values[0], high = values[1];
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[r] += low.entry[j] * widen(w.entry[j]) + high.entry[j] * widen(w.entry[j + 4]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float total = warp_sum(sum[r]);
        if (lane == 0 && warp < d_out && r < n_rows) y[(i64)r * d_out + out] = total;
    }
}

extern "C" __global__ void linear(const float* x, const ENTRY* weight, float* y, unsigned n_rows, unsigned d_in, unsigned d_out) {
    linear_rows<ENTRY, ROWS>(x, weight, y, n_rows, d_in, d_out);
}
