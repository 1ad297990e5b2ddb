// y[r, o] = sum_i x[r, i] * weight[o, i] + bias[o] for a few rows x, as in a decode step.
//     gain given:      x[r] is divided by sqrt(mean_i x[r, i]**2 + eps) and scaled by gain first
//     residual given:  y[r, o] is added to it
//     half > 0:        rows o and o + half of the weight are gate and up: y = silu(gate) * up
//
// An int8 weight has a scale for every 64 entries of a row: weight[o, i] * scales[o, i / 64].
//
// Bytes moved: each weight once from DRAM; x once for each block, from the second-level cache.
// Tile: a block has 4 warps, a warp OUTS = 2 outputs, 4 where ROWS >= 4.  A lane takes one pack (16
// bytes) in every 32 of a row of the weight.  A batch is 8 packs a lane: STEPS packs of each of
// OUTS rows.  All loads of a batch are issued before its first product, and those of the first
// batch before x is staged in shared memory, 32 KB at a time.  Blocks with the same rows of the
// weight and other rows of x are neighbours, so that the weight comes from DRAM once.
//
// A sum has the same terms in the same order, and so the same bits, for every ROWS: a lane adds its
// entries in ascending order by fused multiply-adds, then lanes are added pairwise.  So it is for
// the squares, of which thread t adds entries 4t ... 4t + 3 of every 512.
//
// Built with ENTRY = float, bf16, f16 or i8, the type of the weight, and ROWS = 1, 2, 4 or 8 rows
// of x a block.  Gain and bias have the type of the weight, float for i8.  d_in is a multiple of a
// pack's entries; rows begin at multiples of 16 bytes.

#define THREADS 128
#define WARPS 4
#define GROUP 64  // entries of an int8 row that share a scale

template <typename T>
struct Vectors {
    typedef T type;  // of gain and bias
};
template <>
struct Vectors<i8> {
    typedef float type;
};

template <typename T, int R>
struct Tile {
    static constexpr int N = Pack<T>::N, OUTS = R >= 4 ? 4 : 2, STEPS = 8 / OUTS,
                         BATCH = STEPS * 32 * N, CHUNK = 8192 / R;
    Words<T> w[STEPS][OUTS];
    float scale[STEPS][OUTS];
};

// Index of entry i of a chunk in shared memory, without bank conflicts: lanes that read 4 entries
// each read 512 bytes in sequence.
template <int N>
__device__ unsigned shared_index(unsigned i) {
    return i / (32 * N) * (32 * N) + i % N / 4 * 128 + i % (32 * N) / N * 4;
}

// Entries first ... first + BATCH - 1 of OUTS rows.  `whole`: all of them are below d_in, so that
// no load waits for a comparison.
template <bool whole, typename T, int R>
__device__ void load(Tile<T, R>& tile, const T* const* row, const float* const* scales,
                     unsigned first, unsigned d_in) {
    constexpr int N = Pack<T>::N;
#pragma unroll
    for (int step = 0; step < Tile<T, R>::STEPS; ++step) {
        unsigned i = first + (step * 32 + threadIdx.x % 32) * N;
#pragma unroll
        for (int k = 0; k < Tile<T, R>::OUTS; ++k) {
            if (!whole) tile.w[step][k] = {};
            if (whole || i < d_in) tile.w[step][k] = *(const Words<T>*)(row[k] + i);
            if (N == 16) tile.scale[step][k] = whole || i < d_in ? scales[k][i / GROUP] : 0.0f;
        }
    }
}

template <typename T, int R>
__device__ void load_batch(Tile<T, R>& tile, const T* const* row, const float* const* scales,
                           unsigned first, unsigned d_in) {
    if (first + Tile<T, R>::BATCH <= d_in)
        load<true, T, R>(tile, row, scales, first, d_in);
    else
        load<false, T, R>(tile, row, scales, first, d_in);
}

// Put n_staged entries of R rows into shared memory, scaled by gain; zeros behind d_in.
template <typename T, int R, typename V>
__device__ void stage(float (*staged)[Tile<T, R>::CHUNK], float* squares, const float* x,
                      const V* gain, i64 x_row, unsigned n, unsigned first, unsigned n_staged,
                      unsigned d_in) {
#pragma unroll(R >= 4 ? 1 : 4 / R)
    for (unsigned part = threadIdx.x; part < n_staged / 4; part += THREADS) {
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

// sum[k][r] += the products of a batch, of which `first` is the place in the chunk.
template <typename T, int R>
__device__ void multiply(float (*sum)[R], const Tile<T, R>& tile,
                         const float (*staged)[Tile<T, R>::CHUNK], unsigned first) {
    constexpr int N = Pack<T>::N, OUTS = Tile<T, R>::OUTS;
    unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < Tile<T, R>::STEPS; ++step) {
        float scaled[OUTS][R] = {};  // of an int8 weight, before the scale
        float(*to)[R] = N == 16 ? scaled : sum;
#pragma unroll
        for (int part = 0; part < N; part += 4)
#pragma unroll
            for (int r = 0; r < R; ++r) {
                Pack<float> v =
                    *(const Pack<float>*)(staged[r] + first + (step * N + part) * 32 + lane * 4);
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int k = 0; k < OUTS; ++k)
                        to[k][r] = fmaf(v.entry[j], widen_entry(tile.w[step][k], part + j),
                                        to[k][r]);
            }
#pragma unroll
        for (int k = 0; k < OUTS; ++k)
#pragma unroll
            for (int r = 0; r < R; ++r)
                if (N == 16) sum[k][r] = fmaf(tile.scale[step][k], scaled[k][r], sum[k][r]);
    }
}

template <typename T, int R, typename V>
__device__ void
linear_rows(const float* __restrict__ x, const T* __restrict__ weight,
            const float* __restrict__ scales, const V* __restrict__ gain,
            const V* __restrict__ bias, const float* __restrict__ residual, float* __restrict__ y,
            unsigned n_rows, unsigned d_in, unsigned d_out, unsigned half, i64 x_row, float eps) {
    constexpr int OUTS = Tile<T, R>::OUTS, BATCH = Tile<T, R>::BATCH, CHUNK = Tile<T, R>::CHUNK;
    alignas(16) __shared__ float staged[R][CHUNK];
    __shared__ float partial[R][WARPS];
    unsigned n_groups = (n_rows + R - 1) / R, group = blockIdx.x % n_groups, first_row = group * R,
             n = n_rows - first_row;
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32,
             first_out = (blockIdx.x / n_groups * WARPS + warp) * OUTS;
    x += first_row * x_row;
    const T* row[OUTS];  // a warp without an output of its own reads row 0, and stores nothing
    const float* row_scales[OUTS];
#pragma unroll
    for (unsigned k = 0; k < OUTS; ++k) {
        unsigned o = half ? (first_out + k) / 2 + k % 2 * half : first_out + k;
        o = first_out + k < d_out ? o : 0;
        row[k] = weight + (i64)o * d_in;
        row_scales[k] = scales + (i64)o * ((d_in + GROUP - 1) / GROUP);
    }
    float sum[OUTS][R] = {}, squares[R] = {};
    Tile<T, R> tile;
    load_batch<T, R>(tile, row, row_scales, 0, d_in);
    for (unsigned first = 0; first < d_in; first += CHUNK) {
        unsigned n_left = d_in - first, n_staged = (n_left + BATCH - 1) / BATCH * BATCH;
        n_staged = n_staged < CHUNK ? n_staged : CHUNK;
        __syncthreads();
        stage<T, R, V>(staged, squares, x, gain, x_row, n, first, n_staged, d_in);
        __syncthreads();
        for (unsigned at = 0; at < n_staged; at += BATCH) {
            multiply<T, R>(sum, tile, staged, at);
            if (first + at + BATCH < d_in)
                load_batch<T, R>(tile, row, row_scales, first + at + BATCH, d_in);
        }
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
    linear(const float* x, const ENTRY* weight, const float* scales,
           const Vectors<ENTRY>::type* gain, const Vectors<ENTRY>::type* bias,
           const float* residual, float* y, unsigned n_rows, unsigned d_in, unsigned d_out,
           unsigned half, i64 x_row, float eps) {
    linear_rows<ENTRY, ROWS>(x, weight, scales, gain, bias, residual, y, n_rows, d_in, d_out, half,
                             x_row, eps);
}
