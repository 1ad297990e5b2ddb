// Attention block by block with an online softmax on the tensor cores, for many queries
// (FlashAttention-2, algorithm 1; the formula is that of attention.cu).
//     s = q k^T * scale,   m' = max(m, max_j s_j),   l' = l * exp(m - m') + sum_j exp(s_j - m')
//     a' = a * exp(m - m') + sum_j exp(s_j - m') * v_j;   at the end  y = a / l
//
// PARTS = 3: each number is a sum of three bfloat16 parts, x = x_0 + x_1 + x_2, and a product is
//     x y = sum of x_i y_j with i + j < 3,   which leaves out 2**-23 |x| |y| at most.
// PARTS = 1: q, k, v and exp(s - m) are rounded to bfloat16.  Sums are float32 in both.
//
// Tile: a block has 8 warps, and each warp 16 queries of one head.  KEYS keys at a time lie in
// shared memory, in parts: k as pairs of channels, v transposed, as pairs of keys; rows of both have
// 4 words more than they need, so that the lanes of a load meet 32 banks.  The tiles of keys begin
// at the first key that the block sees.
//
// Query slot i sees key slot j where low <= i - j < high, and j is not before start[b], where the
// padding of row b ends.  Here 0 times a hidden infinity is NaN; and a part of a number near the
// largest one is infinite.  So where a warp finds a result or a score that is not finite, it sets
// failed[warp of all], and attention.cu computes its 16 queries again.
//
// Bytes moved: q and y once; k and v once for every 128 queries, from the second-level cache.
//
// Built with HEAD = 64, 96 or 128, ENTRY = float, bf16 or f16, the type of k and v, and PARTS.

#define WARPS 8
#define ROWS 16  // of a warp
#define FARTHEST (1 << 30)
// Blocks of an SM whose registers are reckoned with: two hide each other's loads.  For heads of 96
// the compiler has enough registers for that on sm_90 alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 9
#define BLOCKS (PARTS == 1 && HEAD <= 96 ? 2 : 1)
#else
#define BLOCKS (PARTS == 1 && HEAD < 96 ? 2 : 1)
#endif
#define LOG2_E 1.4426950408889634f
#define LARGEST 1.7014118e38f  // 2**127

template <typename T, int D, int P>
struct Shape {  // of parts, and of a tile
    static constexpr int OF_ENTRY = P == 1 || sizeof(T) == 4 ? P : 2;  // 11 bits of f16 are two
    static constexpr int KEYS = P == 3 && D > 96 ? 16 : 32;
    static constexpr int K_PITCH = D / 2 + 4, V_PITCH = KEYS / 2 + 4;  // in words
};

// What a thread carries of a tile: packs of keys, and packs of values of two keys in a row.
template <typename T, int D, int P>
struct Carried {
    typedef Shape<T, D, P> S;
    static constexpr int N = Pack<T>::N, PACKS = D / N, THREADS = WARPS * 32;
    static constexpr int KEYS = S::KEYS * PACKS, PAIRS = S::KEYS / 2 * PACKS;  // of all threads
    static constexpr int N_KEYS = (KEYS + THREADS - 1) / THREADS,
                         N_PAIRS = (PAIRS + THREADS - 1) / THREADS;
    Pack<T> k[N_KEYS], v[N_PAIRS][2];

    static __device__ int key_of(int at) { return at / PACKS; }
    // 8 pairs of keys beside 4 packs: each meets few banks, and whole sectors of memory.
    static __device__ int pair_of(int at) { return at % 8 + at / 8 / PACKS * 8; }

    // The first n keys and values from k and v on, zeros behind them: all loads at once.
    __device__ void load(const T* keys, const T* values, int k_row, int v_row, int n) {
#pragma unroll
        for (int i = 0; i < N_KEYS; ++i) {
            int at = threadIdx.x + i * THREADS;
            k[i] = {};
            if (at < KEYS && key_of(at) < n)
                k[i] = *(const Pack<T>*)(keys + (key_of(at) * k_row + at % PACKS * N));
        }
#pragma unroll
        for (int i = 0; i < N_PAIRS; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                int at = threadIdx.x + i * THREADS, key = 2 * pair_of(at) + j;
                v[i][j] = {};
                if (at < PAIRS && key < n)
                    v[i][j] = *(const Pack<T>*)(values + (key * v_row + at / 8 % PACKS * N));
            }
    }

    // keys[part][key][pair of channels]; values[part][channel][pair of keys].
    __device__ void store(unsigned (*keys)[S::KEYS][S::K_PITCH],
                          unsigned (*values)[D][S::V_PITCH]) const {
        unsigned part[S::OF_ENTRY];
#pragma unroll
        for (int i = 0; i < N_KEYS; ++i) {
            int at = threadIdx.x + i * THREADS;
            if (at < KEYS)
#pragma unroll
                for (int j = 0; j < N; j += 2) {
                    split_pair(widen(k[i].entry[j]), widen(k[i].entry[j + 1]), part);
#pragma unroll
                    for (int p = 0; p < S::OF_ENTRY; ++p)
                        keys[p][key_of(at)][(at % PACKS * N + j) / 2] = part[p];
                }
        }
#pragma unroll
        for (int i = 0; i < N_PAIRS; ++i) {
            int at = threadIdx.x + i * THREADS;
            if (at < PAIRS)
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    split_pair(widen(v[i][0].entry[j]), widen(v[i][1].entry[j]), part);
#pragma unroll
                    for (int p = 0; p < S::OF_ENTRY; ++p)
                        values[p][at / 8 % PACKS * N + j][pair_of(at)] = part[p];
                }
        }
    }
};

// 16 queries of a warp, and what they have gathered.  A lane has entries of rows g = lane / 4 and
// g + 8 (mma.cu): m, l of both, and a[c][e] of row g + e / 2 * 8 and channel 8 c + 2 t + e % 2.
template <typename T, int D, int P>
struct Warp {
    typedef Shape<T, D, P> S;
    static constexpr int TILES = S::KEYS / 8, STEPS = D / 16;
    unsigned q[P][STEPS][4];
    float a[D / 8][4], m[2], l[2];

    // Queries first ... first + 15 of a head, zeros behind n_seq.
    __device__ void begin(const float* x, int first, int n_seq) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                int row = first + lane / 4 + w % 2 * 8;
                int channel = step * 16 + lane % 4 * 2 + w / 2 * 8;
                bool there = row < n_seq;
                unsigned part[P];
                split_pair(there ? x[(i64)row * D + channel] : 0.0f,
                           there ? x[(i64)row * D + channel + 1] : 0.0f, part);
#pragma unroll
                for (int p = 0; p < P; ++p) q[p][step][w] = part[p];
            }
#pragma unroll
        for (int c = 0; c < D / 8; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) a[c][e] = 0.0f;
        m[0] = m[1] = minus_infinity();
        l[0] = l[1] = 0.0f;
    }

    // s[n][e]: the score of key 8 n + 2 t + e % 2 and of the query in row g + e / 2 * 8.
    __device__ void score(float (*s)[4], const unsigned (*keys)[S::KEYS][S::K_PITCH]) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int j = S::OF_ENTRY - 1; j >= 0; --j) {
                    const unsigned* row = keys[j][n * 8 + lane / 4] + step * 8 + lane % 4;
                    unsigned pair[2] = {row[0], row[4]};
#pragma unroll
                    for (int i = P - 1 - j; i >= 0; --i) mma_bf16(s[n], q[i][step], pair);
                }
    }

    // Scores become weights exp(s - m); those of keys that are not seen become 0.
    template <typename Seen>
    __device__ void weigh(float (*s)[4], float scale, Seen seen) {
        float most[2] = {m[0], m[1]};
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float score = s[n][e] * scale;
                score += score - score;  // NaN in the place of an infinity
                s[n][e] = seen(n, e) ? score : minus_infinity();
                most[e / 2] = fmaxf(most[e / 2], s[n][e]);
            }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            most[h] = fmaxf(most[h], __shfl_xor_sync(ALL_LANES, most[h], 1));
            most[h] = fmaxf(most[h], __shfl_xor_sync(ALL_LANES, most[h], 2));
            float shift = softmax_shift(most[h]), decay = exp2f(m[h] - shift), sum = 0.0f;
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; ++e)
                    sum += s[n][e] = exp2f(s[n][e] - shift);
            m[h] = most[h];
            l[h] = l[h] * decay + sum;
#pragma unroll
            for (int c = 0; c < D / 8; ++c) {
                a[c][2 * h] *= decay;
                a[c][2 * h + 1] *= decay;
            }
        }
    }

    // Weights times values: what score() left in a lane are the words of the left factor.
    __device__ void add_values(const float (*s)[4], const unsigned (*values)[D][S::V_PITCH]) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < S::KEYS / 16; ++step) {
            unsigned weights[P][4];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float* two = s[step * 2 + w / 2] + w % 2 * 2;
                unsigned part[P];
                split_pair(two[0], two[1], part);
#pragma unroll
                for (int p = 0; p < P; ++p) weights[p][w] = part[p];
            }
#pragma unroll
            for (int c = 0; c < D / 8; ++c)
#pragma unroll
                for (int j = S::OF_ENTRY - 1; j >= 0; --j) {
                    const unsigned* row = values[j][c * 8 + lane / 4] + step * 8 + lane % 4;
                    unsigned pair[2] = {row[0], row[4]};
#pragma unroll
                    for (int i = P - 1 - j; i >= 0; --i) mma_bf16(a[c], weights[i], pair);
                }
        }
    }

    // Write the means; return whether a number was not finite.
    __device__ bool finish(float* y, int first, int n_seq, int y_row) {
        int lane = threadIdx.x % 32;
        float bad = 0.0f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            l[h] += __shfl_xor_sync(ALL_LANES, l[h], 1);
            l[h] += __shfl_xor_sync(ALL_LANES, l[h], 2);
            int row = first + lane / 4 + h * 8;
            float* to = y + (i64)row * y_row + lane % 4 * 2;
#pragma unroll
            for (int c = 0; c < D / 8; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float mean = weighted_mean(a[c][2 * h + e], l[h]);
                    if (!(fabsf(mean) < LARGEST)) bad = 1.0f;
                    if (row < n_seq) to[c * 8 + e] = mean;
                }
        }
        return warp_reduce_max(bad) > 0.0f;
    }
};

template <typename T, int D, int P>
__device__ void attend(const float* q, const T* k, const T* v, float* y, int* failed, int n_seq,
                       int n_ctx, int k_row, int v_row, int y_row, int first_row, int shift, int low,
                       int high, int first_valid, float scale) {
    typedef Shape<T, D, P> S;
    alignas(16) __shared__ unsigned keys[S::OF_ENTRY][S::KEYS][S::K_PITCH];
    alignas(16) __shared__ unsigned values[S::OF_ENTRY][D][S::V_PITCH];
    int row = first_row + threadIdx.x / 32 * ROWS;  // the first of the warp
    Warp<T, D, P> warp;
    warp.begin(q, row, n_seq);
    // Keys that any query of the block sees.
    int last = first_row + WARPS * ROWS < n_seq ? first_row + WARPS * ROWS - 1 : n_seq - 1;
    int start = first_row + shift - high + 1, stop = last + shift - low + 1;
    start = start > first_valid ? start : first_valid;
    start = start > 0 ? start : 0;
    stop = stop < n_ctx ? stop : n_ctx;
    for (int first = start; first < stop; first += S::KEYS) {
        int n = n_ctx - first < S::KEYS ? n_ctx - first : S::KEYS;
        Carried<T, D, P> tile;
        tile.load(k + (i64)first * k_row, v + (i64)first * v_row, k_row, v_row, n);
        __syncthreads();
        tile.store(keys, values);
        __syncthreads();
        // Distances of the first query to the first key and to the last.
        int near = row + shift - first - (S::KEYS - 1), far = row + shift - first;
        if (row >= n_seq || far + ROWS - 1 < low || near >= high) continue;  // the warp sees none
        float s[S::KEYS / 8][4];
        warp.score(s, keys);
        if (n == S::KEYS && near >= low && far + ROWS - 1 < high) {
            warp.weigh(s, scale * LOG2_E, [](int, int) { return true; });
        } else {
            int lane = threadIdx.x % 32;
            warp.weigh(s, scale * LOG2_E, [&](int tile, int e) {
                int key = tile * 8 + lane % 4 * 2 + e % 2;
                int distance = far + lane / 4 + e / 2 * 8 - key;
                return key < n && low <= distance && distance < high;
            });
        }
        warp.add_values(s, values);
    }
    if (row < n_seq) {
        bool bad = warp.finish(y, row, n_seq, y_row);
        if (threadIdx.x % 32 == 0) failed[row / ROWS] = bad;
    }
}

// A limit of the band, where "no limit" is beyond every slot.
__device__ inline int slots_of(i64 limit) {
    return (int)(limit > FARTHEST ? FARTHEST : limit < -FARTHEST ? -FARTHEST : limit);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    attention_mma(const float* q, const ENTRY* k, const ENTRY* v, const i64* start, int* failed,
                  float* y, i64 n_tiles, i64 n_head, i64 n_kv_head, i64 n_seq, i64 n_ctx,
                  i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row,
                  i64 y_batch, i64 y_head, i64 y_row, i64 q_slot, i64 k_slot, i64 low, i64 high,
                  float scale) {
    // The last queries of every head see the most keys: they come first.
    i64 n_heads = gridDim.x / n_tiles, head = blockIdx.x % n_heads,
        tile = n_tiles - 1 - blockIdx.x / n_heads;
    i64 b = head / n_head, h = head % n_head, kv = h / (n_head / n_kv_head);
    attend<ENTRY, HEAD, PARTS>(q + head * n_seq * HEAD, k + b * k_batch + kv * k_head,
                               v + b * v_batch + kv * v_head, y + b * y_batch + h * y_head,
                               failed + head * ((n_seq + ROWS - 1) / ROWS), (int)n_seq, (int)n_ctx,
                               (int)k_row, (int)v_row, (int)y_row, (int)tile * WARPS * ROWS,
                               (int)(q_slot - k_slot), slots_of(low), slots_of(high),
                               start ? (int)(start[b] - k_slot) : 0, scale);
}
