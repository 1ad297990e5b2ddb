// y[row, i] = silu(gate[row, i]) * up[row, i]: a thread an entry.  Rows of gate and up may lie apart, as the halves of gate_up do.
// Built with ENTRY, the type of all three.

template <typename T>
__device__ T swiglu_entry(T gate, T up) {
    T decay = expf(-fabsf(gate));  // of -|gate| only, so that it cannot overflow
    return gate * (gate >= 0 ? 1 : decay) / (1 + decay) * up;
}

extern "C" __global__ void swiglu(const ENTRY* gate, const ENTRY* up, ENTRY* y, unsigned n, unsigned d_ff, i64 gate_row, i64 up_row) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, row = at / d_ff, i = at % d_ff;
    if (at < n) y[at] = swiglu_entry<ENTRY>(gate[row * gate_row + i], up[row * up_row + i]);
}
