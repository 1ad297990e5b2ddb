// bfloat16 parts of float32 entries (parts.cu): a thread an entry.
//
// Bytes moved: 4 of x and 2 of each part, once.
// Built with PARTS = 1 or 3.

extern "C" __global__ void split(const float* x, bf16* parts, i64 n) {
    i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x;
    if (i < n) store<PARTS>(x[i], parts, i, n);
}
