// What the kernels of npllm/kernels/cuda need to be compiled for a CPU, and nothing more: it is read
// once for each variant, so it includes nothing.  tests/cuda_shim.cpp runs them.

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
// Of functions whose accesses to memory are not checked (tests/cuda_checks.cpp).
#define UNCHECKED __attribute__((no_sanitize("thread")))

struct Index {
    unsigned x = 0;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

extern "C" {
float exp2f(float) noexcept;
float expf(float) noexcept;
float fabsf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float sqrtf(float) noexcept;
}

static inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
static inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }

// Byte n of the result is byte (selector >> 4 n) & 7 of x, then y.
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long both = x | (unsigned long long)y << 32;
    unsigned result = 0;
    for (int n = 0; n < 4; ++n)
        result |= (unsigned)(both >> (selector >> 4 * n & 7) * 8 & 255) << 8 * n;
    return result;
}

// Each waits for the others.  `line`: of the call in the source.
void __syncthreads(unsigned line = __builtin_LINE());
void __syncwarp(unsigned line = __builtin_LINE());
float __shfl_xor_sync(unsigned mask, float x, int lanes, unsigned line = __builtin_LINE());
float __shfl_sync(unsigned mask, float x, int lane, unsigned line = __builtin_LINE());
// mma.cu: the product of a warp.
void mma_bf16(float* d, const unsigned* a, const unsigned* b, unsigned line = __builtin_LINE());

namespace shim {

// Run all blocks; return what went wrong, "" for nothing.
const char* launch(void (*body)(void**), unsigned n_blocks, unsigned n_threads, void** arguments,
                   unsigned long long seed);

template <unsigned... n>
struct Numbers {};

template <typename... A, unsigned... n>
UNCHECKED void call(void (*kernel)(A...), void** arguments, Numbers<n...>) {
    kernel(*(A*)arguments[n]...);
}

// Call a kernel with what the pointers point to.
template <typename... A>
UNCHECKED void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, Numbers<__integer_pack(sizeof...(A))...>());
}

}  // namespace shim

namespace checks {

struct Given;

void begin(const Given* given, unsigned n);

// Register an array of shared memory, in the middle of a box, unless it is known.
void know_shared(const char* name, const void* box, unsigned long n_box, const void* array,
                 unsigned long n_array);

// A shared array between two red zones.
template <typename T>
struct alignas(64) Shared {
    char before[64];
    T value;
    char after[64];
    UNCHECKED T& named(const char* name) {
        know_shared(name, this, sizeof *this, &value, sizeof value);
        return value;
    }
};

}  // namespace checks

template <typename T>
T atomicAdd(T* p, T x);  // in tests of the checker: int alone
