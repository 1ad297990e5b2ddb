// Attention block by block with an online softmax, for many queries (FlashAttention-2,
// algorithm 1).
//     m' = max(m, max_j s_j),   l' = l * exp(m - m') + sum_j exp(s_j - m')
//     a' = a * exp(m - m') + sum_j exp(s_j - m') * v_j;   at the end  y = a / l
// A block has 4 warps, and each warp ROWS queries of one head.  Lane j of a warp holds the score of
// key j of the tile, and channels j, j + 32, ... of the sums.
//
// Query slot i sees key slot j where low <= i - j < high, and j is not before start[b], where the
// padding of row b ends; tiles outside are skipped.  A key that is not seen counts for nothing,
// whatever it holds.
//
// Where `failed` is given (attention_mma.cu), only blocks whose entry is not 0 compute.
//
// Built with HEAD = 64, 96 or 128, and ENTRY = float, bf16 or f16, the type of k and v.

#define WARPS 4
#define ROWS 4
#define KEYS 32
#define MASKED (-1.0f)  // in the place of exp(s - m), which is never negative

template <typename T, int D>
__device__ void load_tile(float* tile, const T* x, i64 row_stride, i64 first, i64 n, int pitch) {
    for (int at = threadIdx.x; at < KEYS * D; at += WARPS * 32) {
        i64 key = first + at / D;
        tile[at / D * pitch + at % D] = key < n ? widen(x[key * row_stride + at % D]) : 0.0f;
    }
}

template <typename T, int D>
__device__ void
attend(const float* q, const T* k, const T* v, float* y, i64 n_seq, i64 n_ctx, i64 k_row, i64 v_row,
       i64 y_row, i64 first_row, i64 shift, i64 low, i64 high, i64 first_valid, float scale) {
    __shared__ float queries[WARPS * ROWS][D], values[KEYS * D];
    __shared__ float keys[KEYS * (D + 1)];  // the pitch D + 1 spares bank conflicts
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int at = threadIdx.x; at < WARPS * ROWS * D; at += WARPS * 32) {
        i64 row = first_row + at / D;
        queries[at / D][at % D] = row < n_seq ? q[row * D + at % D] : 0.0f;
    }
    float m[ROWS], l[ROWS], a[ROWS][D / 32];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        m[r] = minus_infinity();
        l[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < D / 32; ++c) a[r][c] = 0.0f;
    }
    i64 last_row =
        first_row + WARPS * ROWS - 1 < n_seq - 1 ? first_row + WARPS * ROWS - 1 : n_seq - 1;
    // Keys that any query of the block sees.
    i64 start = first_row + shift - high + 1, stop = last_row + shift - low + 1;
    start = start > first_valid ? start : first_valid;
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
            for (int r = 0; r < ROWS; ++r) s[r] = fmaf(queries[warp * ROWS + r][c], key, s[r]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            i64 key = first + lane, distance = first_row + warp * ROWS + r + shift - key;
            bool visible = key < n_ctx && key >= first_valid && low <= distance && distance < high;
            float score = visible ? s[r] * scale : minus_infinity();
            float m_new = fmaxf(m[r], warp_reduce_max(score));
            float p = expf(score - softmax_shift(m_new));
            float decay = expf(m[r] - softmax_shift(m_new));
            l[r] = l[r] * decay + warp_reduce_add(visible ? p : 0.0f);
            m[r] = m_new;
            s[r] = visible ? p : MASKED;
#pragma unroll
            for (int c = 0; c < D / 32; ++c) a[r][c] *= decay;
        }
#pragma unroll 4
        for (int j = 0; j < KEYS; ++j) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float p = __shfl_sync(ALL_LANES, s[r], j);
                if (p == MASKED) continue;  // the same for the whole warp
#pragma unroll
                for (int c = 0; c < D / 32; ++c)
                    a[r][c] = fmaf(p, values[j * D + lane + 32 * c], a[r][c]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        i64 row = first_row + warp * ROWS + r;
#pragma unroll
        for (int c = 0; c < D / 32; ++c)
            if (row < n_seq) y[row * y_row + lane + 32 * c] = weighted_mean(a[r][c], l[r]);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attention(const float* q, const ENTRY* k, const ENTRY* v, const i64* start, const int* failed,
              float* y, i64 n_tiles, i64 n_head, i64 n_kv_head, i64 n_seq, i64 n_ctx, i64 k_batch,
              i64 k_head,
              i64 k_row, i64 v_batch, i64 v_head, i64 v_row, i64 y_batch, i64 y_head, i64 y_row,
              i64 q_slot, i64 k_slot, i64 low, i64 high, float scale) {
    if (failed && !failed[blockIdx.x]) return;
    i64 head = blockIdx.x / n_tiles, b = head / n_head, h = head % n_head,
        kv = h / (n_head / n_kv_head);
    attend<ENTRY, HEAD>(q + head * n_seq * HEAD, k + b * k_batch + kv * k_head,
                        v + b * v_batch + kv * v_head, y + b * y_batch + h * y_head, n_seq, n_ctx,
                        k_row, v_row, y_row, blockIdx.x % n_tiles * (WARPS * ROWS), q_slot - k_slot,
                        low, high, start ? start[b] - k_slot : 0, scale);
}
