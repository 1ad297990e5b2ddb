// y[r, o] = sum_i x[r, i] * weight[o, i] + bias[o] for a few rows x, as in a decode step.
//     gain given:      x[r] is divided by sqrt(mean_i x[r, i]**2 + eps) and scaled by gain first
//     residual given:  y[r, o] is added to it
//     half > 0:        rows o and o + half of the weight are gate and up: y = silu(gate) * up
//
// A block has 4 warps, a warp OUTS outputs, and a lane one pack (16 bytes) in every 32 of a row of
// the weight.  A pass over CHUNK entries begins with all of its loads, 8 packs of the weight a
// lane, then puts x into shared memory, then multiplies.  Blocks with the same rows of the weight
// and other rows of x are neighbours, so that the weight comes from DRAM once.
//
// A sum has the same terms in the same order, and so the same bits, for every ROWS: a lane adds its
// entries in ascending order by fused multiply-adds, then lanes are added pairwise.  So it is for
// the squares, of which thread t adds entries 4t ... 4t + 3 of every 512.
//
// Built with ENTRY = float, bf16 or f16, the type of weight, gain and bias, and ROWS = 1, 2, 4 or 8
// rows of x a block.  d_in is a multiple of a pack's entries; rows begin at multiples of 16 bytes.

#define THREADS 128
#define WARPS 4

// Index of entry i of a chunk in shared memory, without bank conflicts: lanes that read 4 entries
// each read 512 bytes in sequence.
template <int N>
__device__ unsigned shared_index(unsigned i) {
    return i / (32 * N) * (32 * N) + i % N / 4 * 128 + i % (32 * N) / N * 4;
}

template <typename T, int R, int CHUNK>
__device__ void stage(float (*staged)[CHUNK], float* squares, const float* x, const T* gain,
                      i64 x_row, unsigned n, unsigned first, unsigned d_in) {
    for (unsigned part = (threadIdx.x - first / 4) % THREADS; part < CHUNK / 4; part += THREADS) {
        unsigned i = first + 4 * part;
        float scale[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        if (gain && i < d_in)
#pragma unroll
            for (int j = 0; j < 4; ++j) scale[j] = widen(gain[i + j]);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            Pack<float> v = {};
            if (r < n && i < d_in) v = *(const Pack<float>*)(x + r * x_row + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                squares[r] = fmaf(v.entry[j], v.entry[j], squares[r]);
                v.entry[j] *= scale[j];
            }
            *(Pack<float>*)(staged[r] + shared_index<Pack<T>::N>(4 * part)) = v;
        }
    }
}

template <typename T, int R, int OUTS, int STEPS>
__device__ void multiply(float (*sum)[R], const Pack<T> (*w)[OUTS],
                         const float (*staged)[STEPS * 32 * Pack<T>::N], unsigned lane) {
    constexpr int N = Pack<T>::N;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int part = 0; part < N; part += 4)
#pragma unroll
            for (int r = 0; r < R; ++r) {
                Pack<float> v =
                    *(const Pack<float>*)(staged[r] + (step * N + part) * 32 + lane * 4);
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int k = 0; k < OUTS; ++k)
                        sum[k][r] = fmaf(v.entry[j], widen(w[step][k].entry[part + j]), sum[k][r]);
            }
}

template <typename T, int R>
__device__ void
linear_rows(const float* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ gain,
            const T* __restrict__ bias, const float* __restrict__ residual, float* __restrict__ y,
            unsigned n_rows, unsigned d_in, unsigned d_out, unsigned half, i64 x_row, float eps) {
    constexpr int N = Pack<T>::N, OUTS = R >= 4 ? 4 : 2, STEPS = 8 / OUTS, CHUNK = STEPS * 32 * N;
    alignas(16) __shared__ float staged[R][CHUNK];
    __shared__ float partial[R][WARPS];
    unsigned n_groups = (n_rows + R - 1) / R, group = blockIdx.x % n_groups, first_row = group * R,
             n = n_rows - first_row;
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32,
             first_out = (blockIdx.x / n_groups * WARPS + warp) * OUTS;
    x += first_row * x_row;
    const T* row[OUTS];  // a warp without an output of its own reads row 0, and stores nothing
#pragma unroll
    for (unsigned k = 0; k < OUTS; ++k) {
        unsigned o = half ? (first_out + k) / 2 + k % 2 * half : first_out + k;
        row[k] = weight + (i64)(first_out + k < d_out ? o : 0) * d_in;
    }
    float sum[OUTS][R] = {}, squares[R] = {};
    for (unsigned first = 0; first < d_in; first += CHUNK) {
        Pack<T> w[STEPS][OUTS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned i = first + (step * 32 + lane) * N;
#pragma unroll
            for (int k = 0; k < OUTS; ++k) {
                w[step][k] = {};
                if (i < d_in) w[step][k] = *(const Pack<T>*)(row[k] + i);
            }
        }
        __syncthreads();
        stage<T, R, CHUNK>(staged, squares, x, gain, x_row, n, first, d_in);
        __syncthreads();
        multiply<T, R, OUTS, STEPS>(sum, w, staged, lane);
    }
    float result = 0.0f;  // lane r * OUTS + k finishes output k of row r
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float square = warp_reduce_add(squares[r]);
        if (lane == 0) partial[r][warp] = square;
#pragma unroll
        for (int k = 0; k < OUTS; ++k) {
            float total = warp_reduce_add(sum[k][r]);
            if (lane == r * OUTS + k) result = total;
        }
    }
    __syncthreads();
    unsigned r = lane / OUTS, k = lane % OUTS, at = first_out + k,
             o = half ? at / 2 + k % 2 * half : at;
    bool valid = r < R && r < n && at < d_out;
    if (valid && gain) {
        const float* p = partial[r];
        result /= sqrtf((p[0] + p[1] + p[2] + p[3]) / (float)d_in + eps);
    }
    if (valid && bias) result += widen(bias[o]);
    float up = __shfl_xor_sync(ALL_LANES, result, 1);
    i64 out_row = first_row + r;
    if (valid && half && k % 2 == 0) y[out_row * half + o] = swiglu_of(result, up);
    if (valid && !half)
        y[out_row * d_out + o] = residual ? residual[out_row * d_out + o] + result : result;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear(const float* x, const ENTRY* weight, const ENTRY* gain, const ENTRY* bias,
           const float* residual, float* y, unsigned n_rows, unsigned d_in, unsigned d_out,
           unsigned half, i64 x_row, float eps) {
    linear_rows<ENTRY, ROWS>(x, weight, gain, bias, residual, y, n_rows, d_in, d_out, half, x_row,
                             eps);
}
