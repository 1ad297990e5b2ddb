// y[row, i] = silu(gate[row, i]) * up[row, i]: a thread an entry.
// Rows of gate and up may lie apart, as the halves of gate_up do.
// Built with PARTS = 0; or 1 or 3, and y is in parts [PARTS, n_rows, d_ff] (parts.cu).

extern "C" __global__ void swiglu(const float* gate, const float* up, Stored* y, unsigned n,
                                  unsigned d_ff, i64 gate_row, i64 up_row) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, row = at / d_ff, i = at % d_ff;
    if (at < n)
        store<PARTS>(swiglu_of(gate[row * gate_row + i], up[row * up_row + i]), y, at, n);
}
