// Stand-in for nautile/ops/hopper/ptx.cuh that runs a kernel on a CPU, for tests.
//
// Every CUDA thread is a fiber; one OS thread runs them in an order drawn at random. What the machine does on its own
// is done as late as it may be, or at a random time: a tile arrives some time after it was asked for, a product reads
// its operands when it is waited for, a store reads shared memory when it is waited for. A missing wait, a stage
// released too early or a wrong number of arrivals thus shows as wrong numbers, as an error or as a deadlock, which is
// reported with what each fiber waits for. Shared memory starts as NaN.
// Not modelled: the memory order between ordinary writes and the copy engine (fences do nothing), banks, time, and the
// 14-bit accumulator of FP8 products (float32 here).
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define KERNEL static
#define DEVICE inline
#define LAUNCH_BOUNDS(threads)
#define PARAMETER const
using std::max;
using std::min;

// What Python gives to cuTensorMapEncodeTiled. Strides are those of y and z, in bytes; x is contiguous.
struct alignas(64) TensorMap {
    uint64_t address, dims[3], strides[2];
    uint32_t box[3], element_bytes, swizzle;  // swizzle: bytes of a row in shared memory, 0 for none
};

namespace emulated {

constexpr size_t STACK = 128 * 1024;

struct Barrier {  // fits the 8 bytes of an mbarrier
    uint16_t arrivals;
    int16_t pending;
    int32_t bytes : 31;
    uint32_t parity : 1;
};
static_assert(sizeof(Barrier) == 8, "an mbarrier");

struct Meeting {
    int arrived = 0;
    uint64_t round = 0;
};

struct Block {
    uint8_t* shared;
    int index, rank;
    std::map<int, Meeting> meetings;  // named barriers; warps are 1000 + warp
    std::map<int, std::vector<float>> exchanged;  // per warp
};

struct Fiber {
    ucontext_t context;
    Block* block;
    int thread;
    bool done = false;
    const char* waits = "";
    std::vector<std::function<void()>> words, products, stores;
    std::deque<std::vector<std::function<void()>>> product_groups;
};

struct Machine {
    ucontext_t scheduler;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::function<void()>> flying;  // copies on their way
    Meeting cluster;
    Fiber* self = nullptr;
    std::function<void()> body;
    std::string error;
    uint64_t random = 1, progress = 0;
    int threads = 0, grid = 0, cluster_size = 1, shared_bytes = 0;

    uint64_t draw() {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        return random;
    }
    void fail(const std::string& what) {
        if (error.empty()) error = what;
    }
};
static Machine* machine;

// Back to the scheduler; for good once something has failed.
inline void pause(const char* what) {
    Fiber* self = machine->self;
    self->waits = what;
    do swapcontext(&self->context, &machine->scheduler);
    while (!machine->error.empty());
    self->waits = "";
}
inline void check(bool good, const char* what) {
    if (good) return;
    machine->fail(what);
    pause(what);
}

inline void meet(Meeting& meeting, int of, const char* what) {
    const uint64_t round = meeting.round;
    ++machine->progress;
    if (++meeting.arrived == of) {
        meeting.arrived = 0, ++meeting.round;
        return;
    }
    while (meeting.round == round) pause(what);
}

inline uint8_t* in_block(const void* pointer, int rank) {
    const Block* from = machine->self->block;
    return machine->blocks[rank]->shared + (static_cast<const uint8_t*>(pointer) - from->shared);
}

inline void settle(Barrier* barrier) {
    ++machine->progress;
    if (barrier->pending < 0) machine->fail("more arrivals on an mbarrier than it counts");
    if (barrier->pending == 0 && barrier->bytes == 0) barrier->pending = barrier->arrivals, barrier->parity ^= 1;
}
inline void arrive(Barrier* barrier) { --barrier->pending, settle(barrier); }

// Calls `each(offset in shared memory, address or null, bytes)` for every row of the box.
template <typename Each>
inline void rows_of_box(const TensorMap& map, int x, int y, int z, Each each) {
    int place = 0;
    for (uint32_t k = 0; k < map.box[2]; ++k)
        for (uint32_t j = 0; j < map.box[1]; ++j)
            for (uint32_t i = 0; i < map.box[0]; ++i, place += map.element_bytes) {
                const int64_t at[3] = {int64_t(x) + i, int64_t(y) + j, int64_t(z) + k};
                bool inside = true;
                for (int d = 0; d < 3; ++d) inside &= at[d] >= 0 && at[d] < int64_t(map.dims[d]);
                const uint64_t address =
                    map.address + at[0] * map.element_bytes + at[1] * map.strides[0] + at[2] * map.strides[1];
                each(place, inside ? reinterpret_cast<uint8_t*>(address) : nullptr);
            }
}
// The swizzle acts on address bits: 16-byte pieces move by an exclusive or with the number of the 128-byte line.
inline uint64_t swizzled(uint64_t address, uint32_t swizzle) {
    return swizzle ? address ^ ((address >> 7 & (swizzle / 16 - 1)) << 4) : address;
}
inline void check_box(const TensorMap& map, const void* shared) {
    check(uintptr_t(shared) % (map.swizzle == 128 ? 1024 : 128) == 0, "tile is not aligned in shared memory");
    check(!map.swizzle || map.box[0] * map.element_bytes <= map.swizzle, "box is wider than its swizzle");
    check(map.box[0] <= 256 && map.box[1] <= 256 && map.box[2] <= 256, "box of more than 256");
    check(map.box[0] * map.element_bytes % 16 == 0 && map.address % 16 == 0, "box or tensor not in pieces of 16 bytes");
    check(map.strides[0] % 16 == 0 && map.strides[1] % 16 == 0, "strides not in pieces of 16 bytes");
}

inline void fly(std::function<void()> copy) { machine->flying.push_back(std::move(copy)); }

inline void load_box(const TensorMap& map, Barrier* barrier, uint8_t* to, int x, int y, int z) {
    int bytes = 0;
    rows_of_box(map, x, y, z, [&](int place, const uint8_t* from) {
        uint8_t* there = reinterpret_cast<uint8_t*>(swizzled(uintptr_t(to) + place, map.swizzle));
        if (from)
            memcpy(there, from, map.element_bytes);
        else
            memset(there, 0, map.element_bytes);
        bytes += map.element_bytes;
    });
    barrier->bytes = barrier->bytes - bytes;
    settle(barrier);
}

inline float from_e4m3(uint8_t bits) {
    static float table[256];
    static bool made = false;
    if (!made) {
        for (int i = 0; i < 256; ++i) {
            const int exponent = i >> 3 & 15, mantissa = i & 7;
            float value = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(float(mantissa), -9);
            if ((i & 127) == 127) value = NAN;
            table[i] = i & 128 ? -value : value;
        }
        made = true;
    }
    return table[bits];
}
inline float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

struct Operand {  // a matrix descriptor, taken apart
    const uint8_t* block;
    uint32_t start, leading, stride;
    explicit Operand(uint64_t bits) {
        block = machine->self->block->shared;
        start = (bits & 0x3fff) << 4, leading = (bits >> 16 & 0x3fff) << 4, stride = (bits >> 32 & 0x3fff) << 4;
        check(bits >> 62 == 1 && (bits >> 49 & 7) == 0, "operand is not under the 128-byte swizzle");
    }
    // K-major: row r is 128 bytes of the 8-row group r / 8.
    const uint8_t* row_byte(int row, int byte) const {
        const uint64_t place = start + row / 8 * stride + row % 8 * 128 + byte;
        return reinterpret_cast<const uint8_t*>(swizzled(uintptr_t(block) + place, 128));
    }
    // Across: row k holds 64 elements of 16 bits of the other dimension.
    const uint8_t* across(int n, int k) const {
        const uint64_t place = start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
        return reinterpret_cast<const uint8_t*>(swizzled(uintptr_t(block) + place, 128));
    }
};

inline void run_all(std::vector<std::function<void()>>& what) {
    auto now = std::move(what);
    what.clear();
    for (auto& one : now) one();
}

inline void entry() {
    machine->body();
    Fiber* self = machine->self;
    if (!self->words.empty() || !self->products.empty() || !self->product_groups.empty() || !self->stores.empty())
        machine->fail("thread ends with copies or products that nobody waits for");
    self->done = true;
    ++machine->progress;
    swapcontext(&self->context, &machine->scheduler);
}

// One cluster at a time.
inline void run_cluster(int first_block) {
    Machine& m = *machine;
    for (int rank = 0; rank < m.cluster_size; ++rank) {
        auto block = std::make_unique<Block>();
        block->index = first_block + rank, block->rank = rank;
        block->shared = static_cast<uint8_t*>(aligned_alloc(1024, (m.shared_bytes + 1023) / 1024 * 1024));
        memset(block->shared, 0xff, m.shared_bytes);
        m.blocks.push_back(std::move(block));
    }
    const size_t count = size_t(m.cluster_size) * m.threads;
    uint8_t* stacks = static_cast<uint8_t*>(
        mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < count; ++i) {
        auto fiber = std::make_unique<Fiber>();
        fiber->block = m.blocks[i / m.threads].get(), fiber->thread = i % m.threads;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = stacks + i * STACK;
        fiber->context.uc_stack.ss_size = STACK;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, entry, 0);
        m.fibers.push_back(std::move(fiber));
    }
    size_t alive = count;
    while (alive && m.error.empty()) {
        const uint64_t before = m.progress;
        const size_t offset = m.draw() % count;
        for (size_t i = 0; i < count && m.error.empty(); ++i) {
            Fiber* fiber = m.fibers[(i * 7919 + offset) % count].get();
            if (fiber->done) continue;
            m.self = fiber;
            swapcontext(&m.scheduler, &fiber->context);
            alive -= fiber->done;
        }
        std::vector<std::function<void()>> now, later;
        for (auto& copy : m.flying) (m.draw() % 3 ? now : later).push_back(std::move(copy));
        if (now.empty() && m.progress == before) now.swap(later);
        m.flying = std::move(later);
        for (auto& copy : now) copy();
        m.progress += !now.empty();
        if (m.progress == before && alive && m.error.empty()) {
            std::map<std::string, int> waits;
            for (auto& fiber : m.fibers)
                if (!fiber->done) ++waits[fiber->waits];
            std::string text = "deadlock:";
            for (auto& [what, threads] : waits) text += " " + std::to_string(threads) + " threads in " + what + ",";
            m.fail(text);
        }
    }
    if (m.error.empty() && !m.flying.empty()) m.fail("the cluster ends with copies on their way");
    munmap(stacks, count * STACK);
    for (auto& block : m.blocks) free(block->shared);
    m.fibers.clear(), m.blocks.clear(), m.flying.clear();
}

// Runs `body` as a grid; returns 0, or 1 with the reason in `error`.
inline int launch(int grid, int cluster, int threads, int shared_bytes, uint64_t seed, char* error, int error_bytes,
                  std::function<void()> body) {
    Machine fresh;
    machine = &fresh;
    fresh.body = std::move(body);
    fresh.grid = grid, fresh.cluster_size = cluster, fresh.threads = threads, fresh.shared_bytes = shared_bytes;
    fresh.random = seed * 2654435761u + 88172645463325252ull;
    for (int block = 0; block < grid && fresh.error.empty(); block += cluster) run_cluster(block);
    snprintf(error, error_bytes, "%s", fresh.error.c_str());
    return fresh.error.empty() ? 0 : 1;
}

}  // namespace emulated

DEVICE int thread_index() { return emulated::machine->self->thread; }
DEVICE int block_index() { return emulated::machine->self->block->index; }
DEVICE int grid_size() { return emulated::machine->grid; }
DEVICE int cluster_rank() { return emulated::machine->self->block->rank; }
DEVICE int uniform(int value) { return value; }
DEVICE uint8_t* shared_memory() { return emulated::machine->self->block->shared; }
DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<const uint8_t*>(pointer) - emulated::machine->self->block->shared;
}

DEVICE void warp_sync() {
    emulated::meet(emulated::machine->self->block->meetings[1000 + thread_index() / 32], 32, "warp_sync");
}
DEVICE void block_sync() {
    emulated::meet(emulated::machine->self->block->meetings[0], emulated::machine->threads, "block_sync");
}
DEVICE void cluster_sync() {
    emulated::meet(emulated::machine->cluster, emulated::machine->threads * emulated::machine->cluster_size,
                   "cluster_sync");
}
DEVICE void named_sync(int id, int threads) {
    emulated::check(id > 0 && id < 16 && threads % 32 == 0, "named barrier out of range");
    emulated::meet(emulated::machine->self->block->meetings[id], threads, "named_sync");
}
DEVICE void named_arrive(int id, int threads) {
    auto& meeting = emulated::machine->self->block->meetings[id];
    ++emulated::machine->progress;
    if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.round;
}
DEVICE float exchange(float value, int mask) {
    auto& lanes = emulated::machine->self->block->exchanged[thread_index() / 32];
    lanes.resize(32);
    lanes[thread_index() % 32] = value;
    warp_sync();
    const float other = lanes[(thread_index() % 32) ^ mask];
    warp_sync();
    return other;
}
template <int N>
DEVICE void registers_give() {}
template <int N>
DEVICE void registers_take() {}

DEVICE emulated::Barrier* state(uint64_t* barrier) { return reinterpret_cast<emulated::Barrier*>(barrier); }
DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
    *state(barrier) = emulated::Barrier{uint16_t(arrivals), int16_t(arrivals), 0, 0};
}
DEVICE void barrier_init_fence() {}
DEVICE void barrier_arrive(uint64_t* barrier) { emulated::arrive(state(barrier)); }
DEVICE void barrier_arrive_remote(uint64_t* barrier, int rank) {
    emulated::arrive(state(reinterpret_cast<uint64_t*>(emulated::in_block(barrier, rank))));
}
DEVICE void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
    state(barrier)->bytes = state(barrier)->bytes + bytes;
    emulated::arrive(state(barrier));
}
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    while (state(barrier)->parity == parity) emulated::pause("barrier_wait");
}

DEVICE void prefetch_map(const TensorMap*) {}
DEVICE void tile_load_multicast(const TensorMap* map, uint64_t* barrier, void* to, int x, int y, int z, uint16_t mask) {
    emulated::check_box(*map, to);
    for (int rank = 0; rank < emulated::machine->cluster_size; ++rank)
        if (mask >> rank & 1) {
            auto* there = reinterpret_cast<emulated::Barrier*>(emulated::in_block(barrier, rank));
            uint8_t* box = emulated::in_block(to, rank);
            emulated::fly([=, map = *map] { emulated::load_box(map, there, box, x, y, z); });
        }
}
DEVICE void tile_load(const TensorMap* map, uint64_t* barrier, void* to, int x, int y, int z) {
    tile_load_multicast(map, barrier, to, x, y, z, uint16_t(1 << cluster_rank()));
}
DEVICE void tile_store(const TensorMap* map, const void* from, int x, int y, int z) {
    emulated::check_box(*map, from);
    emulated::machine->self->stores.push_back([=, map = *map] {
        emulated::rows_of_box(map, x, y, z, [&](int place, uint8_t* to) {
            if (to) memcpy(to, (void*)emulated::swizzled(uintptr_t(from) + place, map.swizzle), map.element_bytes);
        });
    });
}
DEVICE void tile_store_commit() {}
DEVICE void tile_store_wait() { emulated::run_all(emulated::machine->self->stores); }
DEVICE void copy_fence() {}
DEVICE void word_copy(void* to, const void* from, bool valid) {
    emulated::machine->self->words.push_back([=] {
        if (valid)
            memcpy(to, from, 4);
        else
            memset(to, 0, 4);
    });
}
DEVICE void word_copies_arrive(uint64_t* barrier) {
    emulated::fly([words = std::move(emulated::machine->self->words), barrier] {
        for (auto& word : words) word();
        emulated::arrive(state(barrier));
    });
    emulated::machine->self->words.clear();
}

DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t packed = 0;
    const float both[2] = {low, high};
    for (int i = 0; i < 2; ++i) {
        uint32_t bits;
        memcpy(&bits, &both[i], 4);
        bits = std::isnan(both[i]) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        packed |= bits << 16 * i;
    }
    return packed;
}

DEVICE float exp2_fast(float x) { return std::exp2(x); }
DEVICE float log2_fast(float x) { return std::log2(x); }
DEVICE float from_bf16(uint16_t bits) { return emulated::from_bf16(bits); }

DEVICE uint64_t operand(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
DEVICE uint64_t operand_across(uint32_t address, int leading) {
    return operand(address) | uint64_t(leading >> 4) << 16;
}
template <int N>
DEVICE void product_begin(float (&)[N]) {}
DEVICE void product_commit() {
    auto* self = emulated::machine->self;
    self->product_groups.push_back(std::move(self->products));
    self->products.clear();
}
template <int PENDING, int N>
DEVICE void product_wait(float (&)[N]) {
    auto& groups = emulated::machine->self->product_groups;
    // All four warps are there before a product is done, and none goes on before it is.
    named_sync(15 - thread_index() / 128, 128);
    while (groups.size() > PENDING) {
        emulated::run_all(groups.front());
        groups.pop_front();
    }
}

template <int N>
DEVICE void product_e4m3(float (&d)[N / 2], uint64_t a_bits, uint64_t b_bits, int add) {
    float* out = d;
    const int thread = thread_index();
    emulated::machine->self->products.push_back([=] {
        const emulated::Operand a(a_bits), b(b_bits);
        float rows[2][32];
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 32; ++k)
                rows[half][k] =
                    emulated::from_e4m3(*a.row_byte(thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * half, k));
        for (int i = 0; i < N / 4; ++i) {
            const int column = i / 2 * 8 + thread % 4 * 2 + i % 2;
            float sums[2] = {0.0f, 0.0f};
            for (int piece = 0; piece < 2; ++piece) {
                const uint8_t* from = b.row_byte(column, 16 * piece);  // a swizzle keeps 16 bytes together
                for (int k = 0; k < 16; ++k) {
                    const float value = emulated::from_e4m3(from[k]);
                    sums[0] += rows[0][16 * piece + k] * value;
                    sums[1] += rows[1][16 * piece + k] * value;
                }
            }
            for (int half = 0; half < 2; ++half) {
                float& place = out[i / 2 * 4 + half * 2 + i % 2];
                place = (add ? place : 0.0f) + sums[half];
            }
        }
    });
}

template <int N, int ACROSS>
DEVICE void product_bf16(float (&d)[N / 2], uint64_t a_bits, uint64_t b_bits, int add) {
    float* out = d;
    const int thread = thread_index();
    emulated::machine->self->products.push_back([=] {
        const emulated::Operand a(a_bits), b(b_bits);
        const auto value = [](const uint8_t* from) { return emulated::from_bf16(*reinterpret_cast<const uint16_t*>(from)); };
        float rows[2][16];
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 16; ++k)
                rows[half][k] = value(a.row_byte(thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * half, 2 * k));
        for (int i = 0; i < N / 4; ++i) {
            const int column = i / 2 * 8 + thread % 4 * 2 + i % 2;
            float sums[2] = {0.0f, 0.0f};
            for (int k = 0; k < 16; ++k) {
                const float other = value(ACROSS ? b.across(column, k) : b.row_byte(column, 2 * k));
                sums[0] += rows[0][k] * other;
                sums[1] += rows[1][k] * other;
            }
            for (int half = 0; half < 2; ++half) {
                float& place = out[i / 2 * 4 + half * 2 + i % 2];
                place = (add ? place : 0.0f) + sums[half];
            }
        }
    });
}
