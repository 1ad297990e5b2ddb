// Cut projected rows into heads, rotate q and k, and write k and v into the reserved cache slots.
//     y[i] = x[i] * cos[i] - x[i + half] * sin[i],   half = d_rope / 2
//     y[i + half] = x[i + half] * cos[i] + x[i] * sin[i]
// A block has n_each entries a thread of one row.  Rows of qkv are q | k | v.  q is [n_batch, n_head, n_seq, d_head] in one
// piece; k and v have strides, counted in entries.
//
// Where `slots` is given (one token of each row, place read from device memory), row b stands in
// slot slots[b] and is rotated by row table_rows[b] of the tables; k and v begin at slot k_slot.
//
// k and v are rounded to ENTRY = float, bf16 or f16, the type of the cache, after the rotation.
//
// Bytes moved: qkv, read once or twice, and as many of q, k and v; some 10 KB a token and layer.

__device__ float
rotated(const float* head, unsigned i, const float* cos, const float* sin, unsigned d_rope) {
    if (i >= d_rope) return head[i];
    unsigned half = d_rope / 2;
    float partner = i < half ? -head[i + half] : head[i - half];
    return head[i] * cos[i] + partner * sin[i];
}

extern "C" __global__ void
rope_append(const float* qkv, const float* cos, const float* sin, float* q, ENTRY* k, ENTRY* v,
            const i64* slots, const i64* table_rows, i64 k_slot, unsigned n_each, unsigned n_seq,
            unsigned n_head, unsigned n_kv_head, unsigned d_head, unsigned d_rope, i64 table_batch,
            i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row) {
    unsigned width = (n_head + 2 * n_kv_head) * d_head, n_block = n_each * blockDim.x,
             n_slices = (width + n_block - 1) / n_block;
    unsigned row = blockIdx.x / n_slices, b = row / n_seq, s = row % n_seq;
    i64 table = slots ? table_rows[b] * d_rope : b * table_batch + s * d_rope;
    i64 column = slots ? slots[b] - k_slot : s;
    cos += table, sin += table;
    k += b * k_batch + column * k_row, v += b * v_batch + column * v_row;
    for (unsigned each = 0; each < n_each; ++each) {
        unsigned at = blockIdx.x % n_slices * n_block + each * blockDim.x + threadIdx.x;
        if (at >= width) break;
        unsigned h = at / d_head, i = at % d_head;
        const float* head = qkv + (i64)row * width + (at - i);
        if (h < n_head)
            q[((i64)(b * n_head + h) * n_seq + s) * d_head + i] = rotated(head, i, cos, sin, d_rope);
        else if (h < n_head + n_kv_head)
            narrow(rotated(head, i, cos, sin, d_rope), k[(h - n_head) * k_head + i]);
        else
            narrow(head[i], v[(h - n_head - n_kv_head) * v_head + i]);
    }
}
