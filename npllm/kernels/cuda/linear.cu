// The product of a few rows with a weight of float32, bfloat16, float16 or int8 entries: the
// formula is in product.cu.
//
// An int8 weight has a scale for every 64 entries of a row: weight[o, i] * scales[o, i / 64].
//
// Bytes moved: each weight once from DRAM; x once for each block, from the second-level cache.
// Tile: a lane takes one pack (16 bytes) in every 32 of a row of the weight.  A batch is 8 packs a
// lane: STEPS packs of each of OUTS = 2 rows, of 4 where ROWS >= 4.
//
// Built with ENTRY = float, bf16, f16 or i8, the type of the weight, and ROWS = 1, 2, 4 or 8 rows
// of x a block.  Gain and bias have the type of the weight, float for i8.  d_in is a multiple of a
// pack's entries; rows begin at multiples of 16 bytes.

#define GROUP 64  // entries of an int8 row that share a scale

template <typename T>
struct Vectors {
    typedef T type;  // of gain and bias
};
template <>
struct Vectors<i8> {
    typedef float type;
};

template <typename T, int OUTS>
struct PackedRows {
    const T* row[OUTS];
    const float* scales[OUTS];

    __device__ void begin(int k, const T* weight, const float* all_scales, unsigned o,
                          unsigned d_in) {
        row[k] = weight + (i64)o * d_in;
        scales[k] = all_scales + (i64)o * ((d_in + GROUP - 1) / GROUP);
    }
};

template <typename T, int R_>
struct Tile {
    static constexpr int R = R_, N = Pack<T>::N, OUTS = R >= 4 ? 4 : 2, STEPS = 8 / OUTS,
                         BATCH = STEPS * 32 * N, CHUNK = 8192 / R;
    static constexpr bool AHEAD = true;
    typedef T Entry;
    typedef typename Vectors<T>::type Vector;
    typedef PackedRows<T, OUTS> Rows;
    Words<T> w[STEPS][OUTS];
    float scale[STEPS][OUTS];

    // Without bank conflicts: lanes that read 4 entries each read 512 bytes in sequence.
    static __device__ unsigned shared_index(unsigned i) {
        return i / (32 * N) * (32 * N) + i % N / 4 * 128 + i % (32 * N) / N * 4;
    }

    __device__ void load(const Rows& rows, unsigned first, unsigned d_in) {
        if (first + BATCH <= d_in)
            load_batch<true>(rows, first, d_in);
        else
            load_batch<false>(rows, first, d_in);
    }

    // `whole`: all entries are below d_in, so that no load waits for a comparison.
    template <bool whole>
    __device__ void load_batch(const Rows& rows, unsigned first, unsigned d_in) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned i = first + (step * 32 + threadIdx.x % 32) * N;
#pragma unroll
            for (int k = 0; k < OUTS; ++k) {
                if (!whole) w[step][k] = {};
                if (whole || i < d_in) w[step][k] = *(const Words<T>*)(rows.row[k] + i);
                if (N == 16)
                    scale[step][k] = whole || i < d_in ? rows.scales[k][i / GROUP] : 0.0f;
            }
        }
    }

    __device__ void multiply(float (*sum)[R], const float (*staged)[CHUNK], unsigned at) const {
        unsigned lane = threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            float scaled[OUTS][R] = {};  // of an int8 weight, before the scale
            float(*to)[R] = N == 16 ? scaled : sum;
#pragma unroll
            for (int part = 0; part < N; part += 4)
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    Pack<float> v =
                        *(const Pack<float>*)(staged[r] + at + (step * N + part) * 32 + lane * 4);
#pragma unroll
                    for (int j = 0; j < 4; ++j)
#pragma unroll
                        for (int k = 0; k < OUTS; ++k)
                            to[k][r] = fmaf(v.entry[j], widen_entry(w[step][k], part + j),
                                            to[k][r]);
                }
#pragma unroll
            for (int k = 0; k < OUTS; ++k)
#pragma unroll
                for (int r = 0; r < R; ++r)
                    if (N == 16) sum[k][r] = fmaf(scale[step][k], scaled[k][r], sum[k][r]);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear(const float* x, const ENTRY* weight, const float* scales,
           const Vectors<ENTRY>::type* gain, const Vectors<ENTRY>::type* bias,
           const float* residual, float* y, unsigned n_rows, unsigned d_in, unsigned d_out,
           unsigned half, i64 x_row, i64 y_row, float eps) {
    product<Tile<ENTRY, ROWS>>(x, weight, scales, gain, bias, residual, y, n_rows, d_in, d_out,
                               half, x_row, y_row, eps);
}
