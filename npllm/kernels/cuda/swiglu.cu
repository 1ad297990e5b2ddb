// y[row, i] = silu(gate[row, i]) * up[row, i]: a thread an entry.
// Rows of gate and up may lie apart, as the halves of gate_up do.

extern "C" __global__ void swiglu(const float* gate, const float* up, float* y, unsigned n,
                                  unsigned d_ff, i64 gate_row, i64 up_row) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, row = at / d_ff, i = at % d_ff;
    if (at < n) y[at] = swiglu_of(gate[row * gate_row + i], up[row * up_row + i]);
}
