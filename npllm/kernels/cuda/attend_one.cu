// Attention of one query of each sequence.  A block takes SPLIT keys of one key/value head.
//     m = max_j s_j,   l = sum_j exp(s_j - m),   a = sum_j exp(s_j - m) * v_j   over its keys j
// One split: y = a / l.  Several: m, l and a go to `parts`, and attend_merge.cu merges them
// ("Flash-Decoding for long-context inference", Dao et al. 2023).
//
// What a query sees is a run of keys: low <= distance < high, and not before start[b], where the
// padding of row b ends.  Splits are counted from the first key that the row sees, so that its sums
// have the same bits alone and beside longer rows.
//
// Where `slots` is given, the query of row b stands in slot slots[b], and the keys end there: the
// place is read from device memory, and a split behind the last key finds nothing.
//
// Bytes moved: keys and values that are seen, once for each chunk of GROUP query heads.
//
// Three steps with a barrier between them: scores, four lanes a key; weights, a warp a head;
// values, a pack of channels a thread.
//
// Built with HEAD, a multiple of 32 up to 256; ENTRY = float, bf16 or f16, the type of k and v;
// GROUP, the query heads of a block.  Rows of k and v begin at multiples of 16 bytes.

#define THREADS 128
#define SPLIT 128

template <typename T, int D, int G>
__device__ void score_keys(float (*scores)[SPLIT], const float (*queries)[D], const T* k, i64 k_row,
                           int n, float scale) {
    constexpr int N = Pack<T>::N, PACKS = D / (4 * N);
    constexpr int AT_ONCE = PACKS >= 8 ? 1 : PACKS >= 4 ? 2 : 4;  // keys: 8 loads or so in flight
    int quad = threadIdx.x / 4, part = threadIdx.x % 4;
    for (int first = 0; first < SPLIT; first += AT_ONCE * (THREADS / 4)) {
        Pack<T> keys[AT_ONCE][PACKS];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            int key = first + u * (THREADS / 4) + quad;
#pragma unroll
            for (int c = 0; c < PACKS; ++c) {
                keys[u][c] = {};
                if (key < n) keys[u][c] = *(const Pack<T>*)(k + key * k_row + (c * 4 + part) * N);
            }
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float s = 0.0f;
#pragma unroll
                for (int c = 0; c < PACKS; ++c)
#pragma unroll
                    for (int j = 0; j < N; ++j)
                        s = fmaf(queries[g][(c * 4 + part) * N + j], widen(keys[u][c].entry[j]), s);
                s += __shfl_xor_sync(ALL_LANES, s, 1);
                s += __shfl_xor_sync(ALL_LANES, s, 2);
                if (part == 0) scores[g][first + u * (THREADS / 4) + quad] = s * scale;
            }
    }
}

template <int G>
__device__ void softmax_keys(float (*scores)[SPLIT], float* m, float* l, int n) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int g = warp; g < G; g += THREADS / 32) {
        float largest = minus_infinity(), sum = 0.0f;
        for (int key = lane; key < n; key += 32) largest = fmaxf(largest, scores[g][key]);
        largest = warp_reduce_max(largest);
        for (int key = lane; key < n; key += 32) {
            float p = expf(scores[g][key] - softmax_shift(largest));
            scores[g][key] = p;
            sum += p;
        }
        sum = warp_reduce_add(sum);
        if (lane == 0) {
            m[g] = largest;
            l[g] = sum;
        }
    }
}

template <typename T, int D, int G>
__device__ void accumulate_values(float (*sums)[THREADS * Pack<T>::N], const float (*scores)[SPLIT],
                           const T* v, i64 v_row, int n) {
    constexpr int N = Pack<T>::N, CHUNKS = D / N, AT_ONCE = 4;
    constexpr int STREAMS = THREADS / CHUNKS;  // of keys, each on CHUNKS threads
    int chunk = threadIdx.x % CHUNKS, stream = threadIdx.x / CHUNKS;
    float a[G][N] = {};
    for (int first = stream; first < n && stream < STREAMS; first += AT_ONCE * STREAMS) {
        Pack<T> values[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
            if (first + u * STREAMS < n)
                values[u] = *(const Pack<T>*)(v + (first + u * STREAMS) * v_row + chunk * N);
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
            if (first + u * STREAMS < n)
#pragma unroll
                for (int g = 0; g < G; ++g)
#pragma unroll
                    for (int j = 0; j < N; ++j)
                        a[g][j] = fmaf(scores[g][first + u * STREAMS], widen(values[u].entry[j]),
                                       a[g][j]);
    }
    if (stream < STREAMS)
#pragma unroll
        for (int g = 0; g < G; ++g)
#pragma unroll
            for (int j = 0; j < N; ++j) sums[g][stream * D + chunk * N + j] = a[g][j];
}

template <typename T, int D, int G>
__device__ void
attend_split(const float* q, const T* k, const T* v, float* y, float* parts, i64 n_rows, i64 row,
             int n_heads, i64 n_split, i64 split, i64 k_row, i64 v_row, int n, float scale) {
    constexpr int STREAMS = THREADS / (D / Pack<T>::N);
    alignas(16) __shared__ float queries[G][D];
    __shared__ float scores[G][SPLIT], sums[G][THREADS * Pack<T>::N], m[G], l[G];
    for (int at = threadIdx.x; at < G * D; at += THREADS)
        queries[at / D][at % D] = at / D < n_heads ? q[row * D + at] : 0.0f;
    __syncthreads();
    score_keys<T, D, G>(scores, queries, k, k_row, n, scale);
    __syncthreads();
    softmax_keys<G>(scores, m, l, n);
    __syncthreads();
    accumulate_values<T, D, G>(sums, scores, v, v_row, n);
    __syncthreads();
    float* state = parts + n_rows * n_split * D;  // behind all sums a: m and l
    for (int at = threadIdx.x; at < n_heads * D; at += THREADS) {
        int g = at / D, i = at % D;
        i64 part = (row + g) * n_split + split;
        float a = 0.0f;
        for (int stream = 0; stream < STREAMS; ++stream) a += sums[g][stream * D + i];
        if (n_split == 1) {
            y[row * D + at] = weighted_mean(a, l[g]);
        } else {
            parts[part * D + i] = a;
            if (i < 2) state[part * 2 + i] = i == 0 ? m[g] : l[g];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_one(const float* q, const ENTRY* k, const ENTRY* v, const i64* start,
               const i64* slots, float* y, float* parts, i64 n_batch, i64 n_head, i64 n_kv_head, i64 n_ctx, i64 n_split,
               i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row, i64 q_slot,
               i64 k_slot, i64 low, i64 high, float scale) {
    i64 group = n_head / n_kv_head, n_chunks = (group + GROUP - 1) / GROUP,
        at = blockIdx.x / n_split, split = blockIdx.x % n_split;
    i64 chunk = at % n_chunks, kv = at / n_chunks % n_kv_head, b = at / n_chunks / n_kv_head;
    if (slots) {
        q_slot = slots[b];
        n_ctx = q_slot + 1 - k_slot;
    }
    i64 first = q_slot - high + 1 - k_slot, stop = q_slot - low + 1 - k_slot,
        first_valid = start ? start[b] - k_slot : 0;
    first = first > 0 ? first : 0;
    first = (first > first_valid ? first : first_valid) + split * SPLIT;
    stop = stop < n_ctx ? stop : n_ctx;
    i64 n = stop - first < SPLIT ? stop - first : SPLIT, n_heads = group - chunk * GROUP;
    attend_split<ENTRY, HEAD, GROUP>(q, k + b * k_batch + kv * k_head + first * k_row,
                                     v + b * v_batch + kv * v_head + first * v_row, y, parts,
                                     n_batch * n_head, b * n_head + kv * group + chunk * GROUP,
                                     n_heads < GROUP ? n_heads : GROUP, n_split, split, k_row,
                                     v_row, n > 0 ? (int)n : 0, scale);
}
