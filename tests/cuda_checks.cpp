// Checks every access of a kernel to global and shared memory while tests/cuda_shim.cpp runs it.
//
//     out of bounds   an address in no array of the launch, or between two shared arrays
//     uninitialised   a read of what nobody has written
//     race            two threads access one address with no barrier between, one of them writes,
//                     and not both accesses are atomic
//
// The kernel is compiled with -fsanitize=thread, which calls a function before each access; the
// functions are here, compiled without it, and the library of the compiler is not linked.  An
// access by thread t is ordered before one by u where they are of one block and a __syncthreads
// lies between, or of one warp and a __syncwarp lies between.  A shuffle orders nothing, as on a
// GPU.
//
// Of a unit of memory (2 or 4 bytes) the last write is kept, and the last reads of two threads: a
// third thread that writes is another one than at least one of them.

#include <dlfcn.h>

#include <cstdint>

namespace checks {

struct Access {
    int block = -1;
    unsigned thread = 0, n_passed = 0, n_warp_passed = 0;
    const void* place = nullptr;
    bool is_atomic = false;
};

struct Unit {
    Access write, reads[2];
    bool in_array = false, written = false;
};

struct Region {
    std::string name;
    std::uintptr_t first;
    std::size_t n_bytes;
    unsigned unit;
    std::vector<Unit> units;
};

// What Python says of a range of global memory: for each unit 0 if it is in no array, 1 if nobody
// has written it yet, 2 if it holds a value.
struct Given {
    const char* name;
    std::uintptr_t first;
    std::size_t n_bytes;
    unsigned unit;
    const unsigned char* states;
};

static std::vector<Region> global_regions, shared_regions;
constexpr unsigned INTERRUPT = 24;  // one access in so many lets another thread run

static std::string text_of(const Access& access, const char* verb) {
    Dl_info library;
    dladdr(access.place, &library);
    char place[40];
    std::snprintf(place, sizeof place, "{+0x%lx}",
                  (unsigned long)((const char*)access.place - (const char*)library.dli_fbase - 1));
    return "block " + std::to_string(access.block) + " thread " + std::to_string(access.thread) +
           " " + verb + " at " + place;
}

static bool is_ordered(const Access& before, const Access& now) {
    if (before.block < 0) return true;
    if (before.block != now.block) return false;
    bool same_warp = before.thread / 32 == now.thread / 32;
    return before.thread == now.thread || before.n_passed < now.n_passed ||
           (same_warp && before.n_warp_passed < now.n_warp_passed);
}

static void fail(const std::string& what, const Region& region, std::size_t at, const Access& now,
                 const char* verb) {
    shim::fail(what + ": " + text_of(now, verb) + " " + region.name + ", byte " +
               std::to_string(at * region.unit));
}

static void require_order(const Access& before, const char* verb, const Region& region,
                          std::size_t at, const Access& now, const char* verb_now) {
    if (is_ordered(before, now) || (before.is_atomic && now.is_atomic)) return;
    fail("race: " + text_of(before, verb) + ", and", region, at, now, verb_now);
}

static void check_unit(Region& region, std::size_t at, const Access& now, bool writes, bool reads) {
    Unit& unit = region.units[at];
    const char* verb = writes ? "writes" : "reads";
    if (!unit.in_array) fail("out of bounds", region, at, now, verb);
    if (reads && !unit.written) fail("uninitialised", region, at, now, verb);
    require_order(unit.write, "writes", region, at, now, verb);
    if (writes) {
        for (const Access& read : unit.reads) require_order(read, "reads", region, at, now, verb);
        unit.write = now;
        unit.written = true;
    } else {
        unit.reads[is_ordered(unit.reads[0], now) ? 0 : 1] = now;
    }
}

static Region* region_of(std::uintptr_t address) {
    for (auto* regions : {&shared_regions, &global_regions})
        for (Region& region : *regions)
            if (address - region.first < region.n_bytes) return &region;
    return nullptr;
}

static bool is_private(std::uintptr_t address) {  // a stack, the index of a thread
    auto stacks = (std::uintptr_t)shim::stacks.data();
    if (address - stacks < shim::stacks.size()) return true;
    for (const Index* index : {&threadIdx, &blockIdx, &blockDim, &gridDim})
        if (address == (std::uintptr_t)index) return true;
    return false;
}

static void access(const void* pointer, std::size_t n_bytes, const void* place, bool writes,
                   bool is_atomic = false) {
    auto address = (std::uintptr_t)pointer;
    if (is_private(address)) return;
    unsigned me = threadIdx.x;
    Access now{(int)blockIdx.x, me, shim::n_passed[me], shim::n_warp_passed[me], place, is_atomic};
    Region* region = region_of(address);
    if (!region || address + n_bytes > region->first + region->n_bytes)
        shim::fail("out of bounds: " + text_of(now, writes ? "writes" : "reads") +
                   " outside all arrays");
    std::size_t first = (address - region->first) / region->unit,
                last = (address + n_bytes - 1 - region->first) / region->unit;
    for (std::size_t at = first; at <= last; ++at)
        check_unit(*region, at, now, writes, !writes || is_atomic);
    if (shim::drawn && shim::draw(INTERRUPT) == 0) {
        ++shim::n_arrivals;
        shim::leave();
    }
}

void know_shared(const char* name, const void* box, unsigned long n_box, const void* array,
                 unsigned long n_array) {
    auto first = (std::uintptr_t)box;
    for (const Region& region : shared_regions)
        if (region.first == first) return;
    Region region{std::string("shared memory ") + name, first, n_box, 2, {}};
    region.units.resize(n_box / 2);
    for (std::size_t i = 0; i < n_array / 2; ++i)
        region.units[((const char*)array - (const char*)box) / 2 + i].in_array = true;
    shared_regions.push_back(std::move(region));
}

static void start_block() {  // shared memory holds nothing
    for (Region& region : shared_regions)
        for (Unit& unit : region.units) unit = {{}, {}, unit.in_array, false};
}

void begin(const Given* given, unsigned n) {
    shim::start_block = start_block;
    global_regions.clear();
    for (unsigned i = 0; i < n; ++i) {
        const Given& g = given[i];
        Region region{g.name, g.first, g.n_bytes, g.unit, {}};
        region.units.resize(g.n_bytes / g.unit);
        for (std::size_t at = 0; at < region.units.size(); ++at) {
            region.units[at].in_array = g.states[at] > 0;
            region.units[at].written = g.states[at] > 1;
        }
        global_regions.push_back(std::move(region));
    }
}

}  // namespace checks

#define CHECK(p, n_bytes, ...) checks::access(p, n_bytes, __builtin_return_address(0), __VA_ARGS__)
#define ACCESS(name, size, writes) \
    extern "C" void name(void* p) { CHECK(p, size, writes); }
#define ACCESSES(size)                               \
    ACCESS(__tsan_read##size, size, false)           \
    ACCESS(__tsan_write##size, size, true)           \
    ACCESS(__tsan_unaligned_read##size, size, false) \
    ACCESS(__tsan_unaligned_write##size, size, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(void* p, std::size_t n) { CHECK(p, n, false); }
extern "C" void __tsan_write_range(void* p, std::size_t n) { CHECK(p, n, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

template <typename T>
T atomicAdd(T* p, T x) {
    CHECK(p, sizeof(T), true, true);
    T before = *p;
    *p = before + x;
    return before;
}
template float atomicAdd(float*, float);
template int atomicAdd(int*, int);
template unsigned atomicAdd(unsigned*, unsigned);
