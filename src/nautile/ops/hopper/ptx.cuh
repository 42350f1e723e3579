// Every machine instruction that the Hopper kernels use by name, one function each.
//
// The kernels are plain C++ above this header. Tests swap it for an emulation of the same functions and run the very
// same kernels on a CPU; whoever adds a function here adds its emulation in tests/ops/hopper_emulator.hpp.
// Source: PTX ISA 8.7, sections on mbarrier, cp.async.bulk.tensor, wgmma and setmaxnreg.
#pragma once

#include <stdint.h>

#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
#define LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)
#define PARAMETER const __grid_constant__

struct alignas(128) TensorMap {
    uint64_t opaque[16];  // what cuTensorMapEncodeTiled writes
};

// ---- where this thread is ----

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int grid_size() { return gridDim.x; }
DEVICE int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// The same value in all lanes, which the compiler may then keep in a uniform register.
DEVICE int uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

// The block's dynamic shared memory; the 128-byte swizzle repeats every 1024 bytes.
DEVICE uint8_t* shared_memory() {
    extern __shared__ __align__(1024) uint8_t memory[];
    return memory;
}
DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ---- waiting for each other ----

DEVICE void warp_sync() { __syncwarp(); }
DEVICE void block_sync() { __syncthreads(); }
// All blocks of the cluster; every thread calls it, whole warps together.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// `threads` threads of the block meet at barrier `id`; 0 is block_sync's.
DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Counts for the barrier without waiting there.
DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// The value of the lane whose number differs by `mask`.
DEVICE float exchange(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }

// Registers of this warpgroup's threads, from here on; all four warps call it.
template <int N>
DEVICE void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- mbarriers: a phase ends when `arrivals` threads have arrived and all announced bytes have come ----

DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the cluster and to the copy engine; a cluster_sync or block_sync follows.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The barrier at the same place in block `rank` of the cluster. It orders what this thread has read before what the
// copy engine writes after; `.release.cluster`, which would also publish writes, costs a fence of the whole GPU.
DEVICE void barrier_arrive_remote(uint64_t* barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}
DEVICE void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Returns when the phase of this parity is over; the phase before the first counts as one of parity 1.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- copies ----

DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// One box at (x, y, z) into shared memory; places outside the tensor become zeros. Its bytes count on `barrier`.
DEVICE void tile_load(const TensorMap* map, uint64_t* barrier, void* to, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}
// The same box to the same place, and the same barrier, of every block in `mask`.
DEVICE void tile_load_multicast(const TensorMap* map, uint64_t* barrier, void* to, int x, int y, int z, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(mask)
        : "memory");
}
// One box to (x, y, z); what lies outside the tensor is not written. Ordinary writes to shared memory need
// `copy_fence` in each writing thread, then a barrier, before it.
DEVICE void tile_store(const TensorMap* map, const void* from, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
DEVICE void tile_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's stores have read their shared memory.
DEVICE void tile_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void copy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 4 bytes into shared memory, or zeros if not `valid`.
DEVICE void word_copy(void* to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
}
// One arrival on `barrier` when this thread's word copies so far are done.
DEVICE void word_copies_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// ---- numbers ----

// Two bfloat16, rounded to nearest even, `low` at the lower address.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float from_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

// To about 22 bits; −∞ gives 0.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- warpgroup products ----

// Shared-memory operand of 128-byte rows under the 128-byte swizzle, eight rows every 1024 bytes.
DEVICE uint64_t operand(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// The same with K along the rows: 64 elements of 16 bits of the other dimension in a row, the next 64 `leading` bytes on.
DEVICE uint64_t operand_across(uint32_t address, int leading) {
    return operand(address) | uint64_t(leading >> 4) << 16;
}
// The compiler may move no use of the accumulators across these.
template <int N>
DEVICE void hold(float (&accumulators)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}
template <int N>
DEVICE void product_begin(float (&accumulators)[N]) {
    hold(accumulators);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last `PENDING` committed groups are done.
template <int PENDING, int N>
DEVICE void product_wait(float (&accumulators)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    hold(accumulators);
}

#define OUT_4(d, i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define OUT_8(d, i) OUT_4(d, i), OUT_4(d, (i) + 4)
#define OUTS_8(d) OUT_8(d, 0)
#define OUTS_16(d) OUTS_8(d), OUT_8(d, 8)
#define OUTS_24(d) OUTS_16(d), OUT_8(d, 16)
#define OUTS_32(d) OUTS_24(d), OUT_8(d, 24)
#define OUTS_40(d) OUTS_32(d), OUT_8(d, 32)
#define OUTS_48(d) OUTS_40(d), OUT_8(d, 40)
#define OUTS_56(d) OUTS_48(d), OUT_8(d, 48)
#define OUTS_64(d) OUTS_56(d), OUT_8(d, 56)
#define OUTS_72(d) OUTS_64(d), OUT_8(d, 64)
#define OUTS_80(d) OUTS_72(d), OUT_8(d, 72)
#define OUTS_88(d) OUTS_80(d), OUT_8(d, 80)
#define OUTS_96(d) OUTS_88(d), OUT_8(d, 88)
#define OUTS_104(d) OUTS_96(d), OUT_8(d, 96)
#define OUTS_112(d) OUTS_104(d), OUT_8(d, 104)
#define OUTS_120(d) OUTS_112(d), OUT_8(d, 112)
#define OUTS_128(d) OUTS_120(d), OUT_8(d, 120)
#define NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_24 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES_32 NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_40 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES_48 NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_56 NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES_64 NAMES_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_72 NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define NAMES_80 NAMES_72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define NAMES_88 NAMES_80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define NAMES_96 NAMES_88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_104 NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define NAMES_112 NAMES_104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define NAMES_120 NAMES_112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define NAMES_128 NAMES_120 ",%120,%121,%122,%123,%124,%125,%126,%127"

// accumulators [64, N] (+)= a [64, 32] · b [N, 32]ᵀ in e4m3, both K-major in shared memory; `add` 0 starts from zero.
// A thread holds, of row 16·warp + lane / 4 and of the row 8 below it, columns 8j + 2·(lane % 4) and the next one:
// elements 4j, 4j + 1 and 4j + 2, 4j + 3.
template <int N>
DEVICE void product_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int add);

#define PRODUCT_E4M3(N, COUNT, A, B, ADD)                                                                    \
    template <>                                                                                              \
    DEVICE void product_e4m3<N>(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {                        \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" NAMES_##COUNT "}, " A      \
                     ", " B ", add, 1, 1;\n}"                                                                \
                     : OUTS_##COUNT(d)                                                                       \
                     : "l"(a), "l"(b), "r"(add));                                                            \
    }
PRODUCT_E4M3(16, 8, "%8", "%9", "%10")
PRODUCT_E4M3(32, 16, "%16", "%17", "%18")
PRODUCT_E4M3(48, 24, "%24", "%25", "%26")
PRODUCT_E4M3(64, 32, "%32", "%33", "%34")
PRODUCT_E4M3(80, 40, "%40", "%41", "%42")
PRODUCT_E4M3(96, 48, "%48", "%49", "%50")
PRODUCT_E4M3(112, 56, "%56", "%57", "%58")
PRODUCT_E4M3(128, 64, "%64", "%65", "%66")
PRODUCT_E4M3(144, 72, "%72", "%73", "%74")
PRODUCT_E4M3(160, 80, "%80", "%81", "%82")
PRODUCT_E4M3(176, 88, "%88", "%89", "%90")
PRODUCT_E4M3(192, 96, "%96", "%97", "%98")

// accumulators [64, N] (+)= a [64, 16] · b [N, 16]ᵀ in bfloat16, held as above; b is K-major, or across if ACROSS.
template <int N, int ACROSS>
DEVICE void product_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, int add);

#define PRODUCT_BF16(N, COUNT, ACROSS, A, B, ADD)                                                            \
    template <>                                                                                              \
    DEVICE void product_bf16<N, ACROSS>(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {                \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES_##COUNT "}, " A      \
                     ", " B ", add, 1, 1, 0, " #ACROSS ";\n}"                                                \
                     : OUTS_##COUNT(d)                                                                       \
                     : "l"(a), "l"(b), "r"(add));                                                            \
    }
PRODUCT_BF16(64, 32, 0, "%32", "%33", "%34")
PRODUCT_BF16(256, 128, 1, "%128", "%129", "%130")
