// y[r, o] = sum_i x[r, i] * weight[o, i] + bias[o] for a few rows x, as in a decode step: what the
// kernels have in common, whatever the type of the weight.
//     gain given:      x[r] is divided by sqrt(mean_i x[r, i]**2 + eps) and scaled by gain first
//     residual given:  y[r, o] is added to it
//     half > 0:        rows o and o + half of the weight are gate and up: y = silu(gate) * up
// y and residual have y_row entries from row to row.
//
// A Tile is what a warp loads of the weight at a time: BATCH entries of OUTS rows.  It has
//     R, OUTS, BATCH, CHUNK        rows of x; rows of the weight; entries loaded, and entries staged
//     AHEAD                        whether the next batch is on its way during the products of one
//     Entry, Vector                types of the weight in memory, and of gain and bias
//     Rows                         where OUTS rows of the weight lie: begin(k, weight, scales, o, d_in)
//     shared_index(i)              place of entry i of a chunk in shared memory
//     load(rows, first, d_in)      fetch entries first ... first + BATCH - 1; zeros behind d_in
//     multiply(sum, staged, at)    sum[k][r] += products with the batch at entry `at` of the chunk
//
// Tile of a block: 4 warps, a warp OUTS outputs.  All loads of a batch are issued before its first
// product, where AHEAD before the first product of the batch before it; those of the first batch
// before x is staged in shared memory, 32 KB at a time.
// Blocks with the same rows of the weight and other rows of x are neighbours, so that the weight
// comes from DRAM once.
//
// A sum has the same terms in the same order, and so the same bits, for every number of rows: a
// lane adds its entries in ascending order by fused multiply-adds, then lanes are added pairwise.
// So it is for the squares, of which thread t adds entries 4t ... 4t + 3 of every 512.

#define THREADS 128
#define WARPS 4

// Put n_staged entries of R rows into shared memory, scaled by gain; zeros behind d_in.
template <typename Tile>
__device__ void stage(float (*staged)[Tile::CHUNK], float* squares, const float* x,
                      const typename Tile::Vector* gain, i64 x_row, unsigned n, unsigned first,
                      unsigned n_staged, unsigned d_in) {
    constexpr int R = Tile::R;
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
            *(Pack<float>*)(staged[r] + Tile::shared_index(4 * part)) = v;
        }
    }
}

template <typename Tile>
__device__ void
product(const float* __restrict__ x, const typename Tile::Entry* __restrict__ weight,
        const float* __restrict__ scales, const typename Tile::Vector* __restrict__ gain,
        const typename Tile::Vector* __restrict__ bias, const float* __restrict__ residual,
        float* __restrict__ y, unsigned n_rows, unsigned d_in, unsigned d_out, unsigned half,
        i64 x_row, i64 y_row, float eps) {
    constexpr int R = Tile::R, OUTS = Tile::OUTS, BATCH = Tile::BATCH, CHUNK = Tile::CHUNK;
    alignas(16) __shared__ float staged[R][CHUNK];
    __shared__ float partial[R][WARPS];
    unsigned n_groups = (n_rows + R - 1) / R, group = blockIdx.x % n_groups, first_row = group * R,
             n = n_rows - first_row;
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32,
             first_out = (blockIdx.x / n_groups * WARPS + warp) * OUTS;
    x += first_row * x_row;
    typename Tile::Rows rows;  // a warp without an output of its own reads row 0, and stores nothing
#pragma unroll
    for (unsigned k = 0; k < OUTS; ++k) {
        unsigned o = half ? (first_out + k) / 2 + k % 2 * half : first_out + k;
        rows.begin(k, weight, scales, first_out + k < d_out ? o : 0, d_in);
    }
    float sum[OUTS][R] = {}, squares[R] = {};
    Tile tile;
    tile.load(rows, 0, d_in);
    for (unsigned first = 0; first < d_in; first += CHUNK) {
        unsigned n_left = d_in - first, n_staged = (n_left + BATCH - 1) / BATCH * BATCH;
        n_staged = n_staged < CHUNK ? n_staged : CHUNK;
        __syncthreads();
        stage<Tile>(staged, squares, x, gain, x_row, n, first, n_staged, d_in);
        __syncthreads();
        for (unsigned at = 0; at < n_staged; at += BATCH) {
            Tile next;
            bool more = first + at + BATCH < d_in;
            if (Tile::AHEAD && more) next.load(rows, first + at + BATCH, d_in);
            tile.multiply(sum, staged, at);
            if (!Tile::AHEAD && more) next.load(rows, first + at + BATCH, d_in);
            tile = next;
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
    i64 place = (first_row + r) * y_row + o;
    if (valid && half && k % 2 == 0) y[place] = swiglu_of(result, up);
    if (valid && !half) y[place] = residual ? residual[place] + result : result;
}
