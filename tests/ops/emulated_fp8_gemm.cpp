// The FP8 kernel as a function of the CPU; tests/ops/hopper_emulation.py compiles and calls it.
#include NAUTILE_PTX
#include NAUTILE_KERNEL

extern "C" int emulate(const TensorMap* maps, const Args* args, int grid, int cluster, int threads, int shared_bytes,
                       uint64_t seed, char* error, int error_bytes) {
    return emulated::launch(grid, cluster, threads, shared_bytes, seed, error, error_bytes,
                            [&] { fp8_gemm(maps[0], maps[1], maps[2], *args); });
}
