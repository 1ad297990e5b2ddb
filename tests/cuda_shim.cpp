// Runs the kernels of npllm/kernels/cuda on a CPU, one block after another.  What the subset of the
// kernels needs, and nothing more.
//
// A thread of a block is a fiber: it runs until it has to wait for others, at a barrier or a
// shuffle, and then the next one runs.  Without a seed a warp runs as far ahead of the others as
// barriers let it, and every other block runs its threads backward, so that a missing barrier
// shows.  With a seed the order of threads is drawn, and lanes of a warp diverge; with
// tests/cuda_checks.cpp a thread may also be interrupted at any access to memory.
//
// A deadlock, and threads that wait at different barriers, end the launch with a message.  In it
// {line 97} is a line of the source, and {+0x1f0} a place in the library.
//
// Subnormal operands and results are zero, as on a GPU for code that CuPy compiles (-ftz=true).

#include "cuda_shim.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

struct Meeting {
    unsigned n_waiting = 0, round = 0;
    unsigned line = 0;  // of whoever came first
};
static std::string failure;
static jmp_buf failed;
// Barriers that each thread has passed, of the block and of its warp.
static std::vector<unsigned> n_passed, n_warp_passed;
static std::vector<unsigned> waits_at;
static unsigned long long drawn;  // state of the generator; 0: threads run in a fixed order
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
struct Factors {  // of a lane, in the product of a warp
    unsigned a[4], b[2];
};
static std::vector<Factors> factors;
static std::vector<Meeting> warps;
static Meeting block;
static Place scheduler;
static void (*body)(void**);
static void** body_arguments;

[[noreturn]] static void fail(const std::string& what) {
    failure = what;
    _longjmp(failed, 1);
}

static std::string name_of(unsigned t) {
    return "block " + std::to_string(blockIdx.x) + " thread " + std::to_string(t);
}

static std::string text_of(unsigned line) { return "{line " + std::to_string(line) + "}"; }

static unsigned draw(unsigned n) {  // xorshift64*
    drawn ^= drawn >> 12, drawn ^= drawn << 25, drawn ^= drawn >> 27;
    return (unsigned)((drawn * 2685821657736338717ull) >> 33) % n;
}

static void leave() {
    unsigned me = threadIdx.x;
    if (_setjmp(places[me].at) == 0) _longjmp(scheduler.at, 1);
    threadIdx.x = me;
}

static void wait_for_others(Meeting& meeting, unsigned n, unsigned line) {
    unsigned round = meeting.round;
    ++n_arrivals;
    waits_at[threadIdx.x] = line;
    if (meeting.n_waiting == 0) meeting.line = line;
    if (line != meeting.line)
        fail("barrier divergence: " + name_of(threadIdx.x) + " waits at " + text_of(line) +
             ", others at " + text_of(meeting.line));
    if (++meeting.n_waiting == n) {
        meeting.n_waiting = 0;
        ++meeting.round;
        return;
    }
    while (meeting.round == round) leave();
}

// Every lane of the warp takes part.  Two exchanges in a row use different slots: nobody overwrites
// what another has not read, since the next but one begins where all have come to the next.
static float exchange(unsigned mask, float x, unsigned lane, unsigned line) {
    unsigned me = threadIdx.x, first = me / 32 * 64 + warps[me / 32].round % 2 * 32;
    if (mask != 0xffffffffu) fail("a shuffle of some lanes only, at " + text_of(line));
    slots[first + me % 32] = x;
    wait_for_others(warps[me / 32], 32, line);
    return slots[first + lane];
}

static float half_of(unsigned pair, unsigned which) {
    return __uint_as_float(which ? pair & 0xffff0000u : pair << 16);
}

// What a lane has of d += a b, from the words of all lanes: PTX ISA, "Matrix Fragments for
// mma.m16n8k16".  Rounded once, to the nearest: the order of a tensor core is not documented.
static void multiply(float* d, const Factors* warp, unsigned lane) {
    for (unsigned e = 0; e < 4; ++e) {
        unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        double sum = d[e];
        for (unsigned k = 0; k < 16; ++k) {
            const Factors &left = warp[row % 8 * 4 + k % 8 / 2], &right = warp[column * 4 + k % 8 / 2];
            sum += (double)half_of(left.a[row / 8 + k / 8 * 2], k % 2) *
                   half_of(right.b[k / 8], k % 2);
        }
        d[e] = (float)sum;
    }
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

// Run some of the threads, all if `whole`, each until it waits; return how many were done.
static unsigned run_some(unsigned n_threads, bool whole) {
    static std::vector<unsigned> order;
    unsigned n_done = 0, n = whole ? n_threads : 1 + draw(n_threads);
    order.resize(n_threads);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned i = 0; i < n; ++i) {
        std::swap(order[i], order[i + draw(n_threads - i)]);
        if (waits(order[i])) continue;
        enter(order[i]);
        n_done += done[order[i]];
    }
    return n_done;
}

[[noreturn]] static void fail_of_deadlock(unsigned n_threads) {
    std::string text = "barrier divergence: ";
    unsigned n_ended = 0, ended = 0, waiting = 0;
    for (unsigned t = 0; t < n_threads; ++t) {
        if (!done[t]) waiting = t;
        if (done[t]) ++n_ended, ended = t;
    }
    text += name_of(waiting) + " waits at " + text_of(waits_at[waiting]);
    for (unsigned t = 0; t < n_threads && !n_ended; ++t)
        if (waits_at[t] != waits_at[waiting])
            fail(text + ", thread " + std::to_string(t) + " at " + text_of(waits_at[t]));
    fail(text + "; " + std::to_string(n_ended) + " threads have ended, thread " +
         std::to_string(ended) + " among them");
}

static void run_block(unsigned n_threads) {
    done.assign(n_threads, 0);
    warps.assign(n_threads / 32, {});
    block = {};
    barrier.assign(n_threads, NO_BARRIER);
    n_passed.assign(n_threads, 0);
    n_warp_passed.assign(n_threads, 0);
    waits_at.assign(n_threads, 0);
    bool whole = false;
    for (unsigned left = n_threads; left > 0;) {
        unsigned long before = n_arrivals;
        if (drawn) left -= run_some(n_threads, whole);
        for (unsigned w = 0; w < n_threads / 32 && !drawn; ++w)
            left -= run_warp(blockIdx.x % 2 ? n_threads / 32 - 1 - w : w);
        if (n_arrivals == before && (whole || !drawn)) fail_of_deadlock(n_threads);
        whole = n_arrivals == before;
    }
}

static void (*start_block)() = [] {};  // called before each block

const char* launch(void (*called)(void**), unsigned n_blocks, unsigned n_threads, void** arguments,
                   unsigned long long seed) {
    if (n_threads % 32) std::abort();
    FlushToZero mode;
    drawn = seed;
    failure = "";
    places.resize(n_threads);
    started.assign(n_threads, 0);
    stacks.resize(n_threads * STACK);
    slots.resize(2 * n_threads);
    factors.resize(2 * n_threads);
    body = called;
    body_arguments = arguments;
    if (_setjmp(failed)) return failure.c_str();
    gridDim.x = n_blocks;
    blockDim.x = n_threads;
    for (unsigned b = 0; b < n_blocks; ++b) {
        blockIdx.x = b;
        start_block();
        run_block(n_threads);
    }
    return "";
}

}  // namespace shim

void __syncthreads(unsigned line) {
    shim::barrier[threadIdx.x] = shim::block.round;
    shim::wait_for_others(shim::block, blockDim.x, line);
    ++shim::n_passed[threadIdx.x];
}
void __syncwarp(unsigned line) {
    shim::wait_for_others(shim::warps[threadIdx.x / 32], 32, line);
    ++shim::n_warp_passed[threadIdx.x];
}
float __shfl_xor_sync(unsigned mask, float x, int lanes, unsigned line) {
    return shim::exchange(mask, x, (threadIdx.x % 32) ^ lanes, line);
}
float __shfl_sync(unsigned mask, float x, int lane, unsigned line) {
    return shim::exchange(mask, x, lane, line);
}
void mma_bf16(float* d, const unsigned* a, const unsigned* b, unsigned line) {
    using namespace shim;
    unsigned me = threadIdx.x, first = me / 32 * 64 + warps[me / 32].round % 2 * 32;
    factors[first + me % 32] = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    wait_for_others(warps[me / 32], 32, line);
    multiply(d, &factors[first], me % 32);
}
