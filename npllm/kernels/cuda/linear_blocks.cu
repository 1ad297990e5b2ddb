// The product of a few rows with a weight in blocks (blocks.cu): the formula is in product.cu.
//
// Bytes moved: each block once from DRAM, in its file's format, 4.5 to 8.5 bits an entry; x once
// for each block of threads, from the second-level cache.
// Tile: a lane takes one unit (32 entries) in every 32 of a row of the weight.  A batch is 4 units
// a lane: STEPS units of each of OUTS = 2 rows, of 4 where ROWS >= 4.  Each entry is widened once
// for all rows of x; where x has 8 rows, arithmetic and not memory is the limit for 4 bits.
//
// Built with ENTRY = a format of blocks.cu, and ROWS = 1, 2, 4 or 8 rows of x a block.  Gain and
// bias are float32.

template <int OUTS>
struct BlockRows {
    const unsigned char* blocks;
    i64 first[OUTS];  // block of each row

    __device__ void begin(int k, const unsigned char* weight, const float*, unsigned o,
                          unsigned d_in) {
        blocks = weight;
        first[k] = (i64)o * (d_in / ENTRY::BLOCK);
    }
};

template <typename Format, int R_>
struct Tile {
    static constexpr int R = R_, OUTS = R >= 4 ? 4 : 2, STEPS = 4 / OUTS, BATCH = STEPS * 1024,
                         CHUNK = 8192 / R;
    static constexpr bool AHEAD = false;  // registers are short, and instructions are the limit
    typedef unsigned char Entry;
    typedef float Vector;
    typedef BlockRows<OUTS> Rows;
    typedef typename Format::Order Order;
    Format w[STEPS][OUTS];
    unsigned n_steps;  // that have entries below d_in

    // Lanes that read 4 entries each read 512 bytes; the order of the lanes is another for each
    // four of a unit, so that threads that stage neighbours use different banks.
    static __device__ unsigned shared_index(unsigned i) {
        unsigned part = Order::entry_of(i) / 4, unit = Order::unit_of(i);
        return unit / 32 * 1024 + part * 128 + ((unit % 32) ^ part) * 4;
    }

    __device__ void load(const Rows& rows, unsigned first, unsigned d_in) {
        n_steps = (d_in - first + 1023) / 1024;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned unit = first / 32 + step * 32 + threadIdx.x % 32;
#pragma unroll
            for (int k = 0; k < OUTS; ++k) {
                w[step][k] = {};
                if (unit < d_in / 32)
                    w[step][k] = unit_of_row<Format>(rows.blocks, rows.first[k], unit);
            }
        }
    }

    __device__ void multiply(float (*sum)[R], const float (*staged)[CHUNK], unsigned at) const {
        unsigned lane = threadIdx.x % 32;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (step >= n_steps) break;
#pragma unroll 1  // so that a few packs of x are in registers at a time, and not all
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    unsigned four = half * 4 + part,
                             place = at + step * 1024 + four * 128 + (lane ^ four) * 4;
                    float entry[OUTS][4];
#pragma unroll
                    for (int k = 0; k < OUTS; ++k) w[step][k].four(half, part, entry[k]);
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        Pack<float> v = *(const Pack<float>*)(staged[r] + place);
#pragma unroll
                        for (int j = 0; j < 4; ++j)
#pragma unroll
                            for (int k = 0; k < OUTS; ++k)
                                sum[k][r] = fmaf(v.entry[j], entry[k][j], sum[k][r]);
                    }
                }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, ROWS == 1 ? 4 : ROWS == 2 ? 3 : 2)
    linear_blocks(const float* x, const unsigned char* weight, const float* scales,
                  const float* gain, const float* bias, const float* residual, float* y,
                  unsigned n_rows, unsigned d_in, unsigned d_out, unsigned half, i64 x_row,
                  i64 y_row, float eps) {
    product<Tile<ENTRY, ROWS>>(x, weight, scales, gain, bias, residual, y, n_rows, d_in, d_out,
                               half, x_row, y_row, eps);
}
