// y[row, i] = silu(gate[row, i]) * up[row, i]: a block EACH entries a thread of one row.
// Rows of gate and up may lie apart, as the halves of gate_up do.
//
// Bytes moved: gate and up, read once; y or its parts, written once.
// Built with PARTS = 0; or 1 or 3, and y is in parts [PARTS, n_rows, d_ff] (parts.cu).

#define EACH 4

extern "C" __global__ void swiglu(const float* gate, const float* up, Stored* y, unsigned n,
                                  unsigned d_ff, i64 gate_row, i64 up_row) {
    unsigned n_slices = (d_ff + EACH * blockDim.x - 1) / (EACH * blockDim.x),
             row = blockIdx.x / n_slices;
    gate += row * gate_row, up += row * up_row;
#pragma unroll
    for (unsigned each = 0; each < EACH; ++each) {
        unsigned i = (blockIdx.x % n_slices * EACH + each) * blockDim.x + threadIdx.x;
        if (i < d_ff) store<PARTS>(swiglu_of(gate[i], up[i]), y, row * (i64)d_ff + i, n);
    }
}
