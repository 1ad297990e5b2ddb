// x[b, i] = weight[token[b], i] of a weight in blocks (blocks.cu), in float32: a thread a unit of
// 32 entries.
//
// Bytes moved: a row of the weight, and d_model entries of x, for each token.
// Built with ENTRY = a format of blocks.cu.

extern "C" __global__ void embed_blocks(const i64* token, const unsigned char* weight,
                                        const float* scales, float* x, i64 n, i64 d_model) {
    i64 at = blockIdx.x * (i64)blockDim.x + threadIdx.x, n_units = d_model / 32;
    if (at >= n / 32) return;
    i64 b = at / n_units;
    unsigned unit = (unsigned)(at % n_units);
    ENTRY loaded = unit_of_row<ENTRY>(weight, token[b] * (d_model / ENTRY::BLOCK), unit);
#pragma unroll
    for (int four = 0; four < 8; ++four) {
        float w[4];
        loaded.four(four / 4, four % 4, w);
        float* to = x + b * d_model + ENTRY::Order::index(unit, 4 * four);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[j] = w[j];
    }
}
