// token[b] = argmax_i logits[b, i], the first of equal ones; then the row moves one slot on.
//     chosen[b, n_chosen[b]] = token[b];  slot, table_row and n_chosen [b] += 1
// A NaN counts as the largest, as in NumPy.  Where the largest is NaN or infinite, chosen is -1: the
// logits are no distribution, and the host computes the step again to say so.
//
// Bytes moved: the logits, once, from the second-level cache.  Tile: a block a row; thread t takes
// entries t, t + THREADS, ..., so that the first of equal entries of a thread is the lowest.

#define THREADS 1024
#define WARPS 32

struct Best {
    float value;
    int at;
};

// Whether `other` comes before `mine`: larger, or NaN, or equal and earlier.
__device__ inline bool precedes(Best other, Best mine) {
    bool other_nan = other.value != other.value, mine_nan = mine.value != mine.value;
    if (other_nan != mine_nan) return other_nan;
    if (other_nan || other.value == mine.value) return other.at < mine.at;
    return other.value > mine.value;
}

__device__ inline Best warp_reduce_best(Best mine) {
    for (int lane = 16; lane > 0; lane /= 2) {
        Best other;
        other.value = __shfl_xor_sync(ALL_LANES, mine.value, lane);
        other.at =
            (int)__float_as_uint(__shfl_xor_sync(ALL_LANES, __uint_as_float(mine.at), lane));
        if (precedes(other, mine)) mine = other;
    }
    return mine;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    choose(const float* logits, i64* token, i64* slot, i64* table_row, i64* n_chosen, i64* chosen,
           unsigned n_vocab, i64 n_room) {
    __shared__ float values[WARPS];
    __shared__ int places[WARPS];
    const float* row = logits + blockIdx.x * (i64)n_vocab;
    Best best = {minus_infinity(), (int)n_vocab};
    for (int i = threadIdx.x; i < (int)n_vocab; i += THREADS) {
        Best other = {row[i], i};
        if (precedes(other, best)) best = other;
    }
    best = warp_reduce_best(best);
    if (threadIdx.x % 32 == 0) {
        values[threadIdx.x / 32] = best.value;
        places[threadIdx.x / 32] = best.at;
    }
    __syncthreads();
    best = {values[threadIdx.x % 32], places[threadIdx.x % 32]};
    best = warp_reduce_best(best);
    if (threadIdx.x == 0) {
        i64 b = blockIdx.x;
        token[b] = best.at;
        bool is_finite = fabsf(best.value) < -minus_infinity();
        if (n_chosen[b] < n_room) chosen[b * n_room + n_chosen[b]] = is_finite ? best.at : -1;
        n_chosen[b] += 1;
        slot[b] += 1;
        table_row[b] += 1;
    }
}
