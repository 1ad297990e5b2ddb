// Attention block by block with an online softmax, for many queries at a time (FlashAttention-2, algorithm 1).
//     m' = max(m, max_j s_j),   l' = l * exp(m - m') + sum_j exp(s_j - m'),   a' = a * exp(m - m') + sum_j exp(s_j - m') * v_j
// A block has 4 warps, and each warp ROWS queries of one head.  Lane j of a warp holds the score of key j of the tile, and
// channels j, j + 32, ... of the sums.  Query slot i sees key slot j where low <= i - j < high; tiles outside are skipped.
// Built with HEAD = 64, 96 or 128, and ENTRY = float, bf16 or f16, the type of k and v.  Sums are float32.

#define WARPS 4
#define ROWS 4
#define KEYS 32
#define NOTHING (-1e38f)

template <typename T, int D>
__device__ void load_tile(float* tile, const T* x, i64 row_stride, i64 first, i64 n, int pitch) {
    for (int at = threadIdx.x; at < KEYS * D; at += WARPS * 32) {
        i64 key = first + at / D;
        tile[at / D * pitch + at % D] = key < n ? widen(x[key * row_stride + at % D]) : 0.0f;
    }
}

template <typename T, int D>
__device__ void attend(const float* q, const T* k, const T* v, float* y, i64 n_seq, i64 n_ctx, i64 k_row, i64 v_row, i64 first_row,
                       i64 shift, i64 low, i64 high, float scale) {
    __shared__ float queries[WARPS * ROWS][D], keys[KEYS * (D + 1)], values[KEYS * D];  // keys: pitch D + 1 spares bank conflicts
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int at = threadIdx.x; at < WARPS * ROWS * D; at += WARPS * 32) {
        i64 row = first_row + at / D;
        queries[at / D][at % D] = row < n_seq ? q[row * D + at % D] * scale : 0.0f;
    }
    float m[ROWS], l[ROWS], a[ROWS][D / 32];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        m[r] = NOTHING;
        l[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < D / 32; ++c) a[r][c] = 0.0f;
    }
    i64 last_row = first_row + WARPS * ROWS - 1 < n_seq - 1 ? first_row + WARPS * ROWS - 1 : n_seq - 1;
    i64 start = first_row + shift - high + 1, stop = last_row + shift - low + 1;  // keys that any query of the block sees
    start = start > 0 ? start / KEYS * KEYS : 0;
    stop = stop < n_ctx ? stop : n_ctx;
    for (i64 first = start; first < stop; first += KEYS) {
        __syncthreads();
        load_tile<T, D>(keys, k, k_row, first, n_ctx, D + 1);
        load_tile<T, D>(values, v, v_row, first, n_ctx, D);
        __syncthreads();
        float s[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) s[r] = 0.0f;
#pragma unroll 4
        for (int c = 0; c < D; ++c) {
            float key = keys[lane * (D + 1) + c];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) s[r] += queries[warp * ROWS + r][c] * key;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            i64 distance = first_row + warp * ROWS + r + shift - (first + lane);
            bool visible = first + lane < n_ctx && low <= distance && distance < high;
            float m_new = fmaxf(m[r], warp_max(visible ? s[r] : NOTHING)), decay = expf(m[r] - m_new);
            s[r] = visible ? expf(s[r] - m_new) : 0.0f;
            l[r] = l[r] * decay + warp_sum(s[r]);
            m[r] = m_new;
#pragma unroll
            for (int c = 0; c < D / 32; ++c) a[r][c] *= decay;
        }
#pragma unroll 4
        for (int j = 0; j < KEYS; ++j) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float p = __shfl_sync(ALL_LANES, s[r], j);
#pragma unroll
                for (int c = 0; c < D / 32; ++c) a[r][c] += p * values[j * D + lane + 32 * c];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        i64 row = first_row + warp * ROWS + r;
#pragma unroll
        for (int c = 0; c < D / 32; ++c)
            if (row < n_seq) y[row * D + lane + 32 * c] = l[r] > 0.0f ? a[r][c] / l[r] : 0.0f;  // a row that sees no key is zero
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
attention(const float* q, const ENTRY* k, const ENTRY* v, float* y, i64 n_tiles, i64 n_head, i64 n_kv_head, i64 n_seq, i64 n_ctx,
          i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row, i64 shift, i64 low, i64 high, float scale) {
    i64 head = blockIdx.x / n_tiles, b = head / n_head, kv = head % n_head / (n_head / n_kv_head);
    attend<ENTRY, HEAD>(q + head * n_seq * HEAD, k + b * k_batch + kv * k_head, v + b * v_batch + kv * v_head, y + head * n_seq * HEAD,
                        n_seq, n_ctx, k_row, v_row, blockIdx.x % n_tiles * (WARPS * ROWS), shift, low, high, scale);
}
