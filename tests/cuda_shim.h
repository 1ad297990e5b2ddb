// Runs the kernels of npllm/kernels/cuda on a CPU, one block after another.  What the subset of the
// kernels needs, and nothing more.
//
// A thread of a block is a fiber: it runs until it has to wait for others, at a barrier or a
// shuffle, and then the next one runs.  A warp runs as far ahead of the others as barriers let it,
// and every other block runs its threads backward, so that a missing barrier shows.
//
// Subnormal operands and results are zero, as on a GPU for code that CuPy compiles (-ftz=true).

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
    unsigned x = 0;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
static inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

namespace shim {

struct Meeting {
    unsigned n_waiting = 0, round = 0;
};
constexpr std::size_t STACK = 1 << 16;
struct Place {
    jmp_buf at;
};
// Where each fiber waits: a switch by longjmp spares the system calls of swapcontext.
static std::vector<Place> places;
static std::vector<char> stacks, started, done;
static std::vector<unsigned> barrier;  // the round of the barrier at which a thread arrived last
constexpr unsigned NO_BARRIER = ~0u;
// At barriers, shuffles and ends: a pass over all threads that adds none is a deadlock.
static unsigned long n_arrivals;
static std::vector<float> slots;
static std::vector<Meeting> warps;
static Meeting block;
static Place scheduler;
static void (*body)(void*);
static void* body_arguments;

static void leave() {
    unsigned me = threadIdx.x;
    if (_setjmp(places[me].at) == 0) _longjmp(scheduler.at, 1);
    threadIdx.x = me;
}

static void wait_for_others(Meeting& meeting, unsigned n) {
    unsigned round = meeting.round;
    ++n_arrivals;
    if (++meeting.n_waiting == n) {
        meeting.n_waiting = 0;
        ++meeting.round;
        return;
    }
    while (meeting.round == round) leave();
}

static float exchange(float x, unsigned lane) {  // every lane of the warp takes part
    unsigned me = threadIdx.x, first = me / 32 * 32;
    slots[me] = x;
    wait_for_others(warps[me / 32], 32);
    float got = slots[first + lane];
    wait_for_others(warps[me / 32], 32);  // nobody overwrites what another has not read
    return got;
}

// While it lives, subnormal numbers are zero; then the caller's mode is back.
class FlushToZero {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();

public:
    FlushToZero() { _mm_setcsr(before | 0x8040); }  // FTZ and DAZ
    ~FlushToZero() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    unsigned long before;

public:
    FlushToZero() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | 1ul << 24));
    }
    ~FlushToZero() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
#error "this processor's flush-to-zero mode is not known here"
#endif
};

static void fiber() {  // one block after another
    for (;;) {
        body(body_arguments);
        done[threadIdx.x] = 1;
        ++n_arrivals;
        leave();
    }
}

static void enter(unsigned t) {
    threadIdx.x = t;
    if (_setjmp(scheduler.at)) return;
    if (started[t]) _longjmp(places[t].at, 1);
    started[t] = 1;
    ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = stacks.data() + t * STACK;
    first.uc_stack.ss_size = STACK;
    first.uc_link = nullptr;
    makecontext(&first, fiber, 0);
    setcontext(&first);
}

static bool waits(unsigned t) { return done[t] || barrier[t] == block.round; }

// Run a warp until all of its threads wait at a barrier or are done; return how many were done.
static unsigned run_warp(unsigned w) {
    unsigned n_done = 0;
    for (unsigned long before = n_arrivals - 1; n_arrivals != before;) {
        before = n_arrivals;
        for (unsigned i = 0; i < 32; ++i) {
            unsigned t = w * 32 + (blockIdx.x % 2 ? 31 - i : i);
            if (waits(t)) continue;
            enter(t);
            n_done += done[t];
        }
    }
    return n_done;
}

static void run_block(unsigned n_threads) {
    done.assign(n_threads, 0);
    warps.assign(n_threads / 32, {});
    block = {};
    barrier.assign(n_threads, NO_BARRIER);
    for (unsigned left = n_threads; left > 0;) {
        unsigned long before = n_arrivals;
        for (unsigned w = 0; w < n_threads / 32; ++w)
            left -= run_warp(blockIdx.x % 2 ? n_threads / 32 - 1 - w : w);
        if (n_arrivals == before) std::abort();
    }
}

template <typename... A>
void launch(void (*kernel)(A...), unsigned n_blocks, unsigned n_threads, void** arguments) {
    if (n_threads % 32) std::abort();
    FlushToZero mode;
    places.resize(n_threads);
    started.assign(n_threads, 0);
    stacks.resize(n_threads * STACK);
    slots.resize(n_threads);
    static void (*called)(A...);
    called = kernel;
    body_arguments = arguments;
    body = [](void* p) {
        [&]<std::size_t... n>(std::index_sequence<n...>) {
            called(*static_cast<A*>(static_cast<void**>(p)[n])...);
        }(std::index_sequence_for<A...>{});
    };
    gridDim.x = n_blocks;
    blockDim.x = n_threads;
    for (unsigned b = 0; b < n_blocks; ++b) {
        blockIdx.x = b;
        run_block(n_threads);
    }
}

}  // namespace shim

static inline void __syncthreads() {
    shim::barrier[threadIdx.x] = shim::block.round;
    shim::wait_for_others(shim::block, blockDim.x);
}
static inline float __shfl_xor_sync(unsigned, float x, int lanes) {
    return shim::exchange(x, (threadIdx.x % 32) ^ lanes);
}
static inline float __shfl_sync(unsigned, float x, int lane) { return shim::exchange(x, lane); }
