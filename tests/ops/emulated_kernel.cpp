// A Hopper kernel as a function of the CPU; hopper_emulation.py compiles and calls it.
#include NAUTILE_PTX
#include NAUTILE_KERNEL

extern "C" int emulate(const TensorMap* maps, const Args* args, int grid, int cluster, int threads, int shared_bytes,
                       uint64_t seed, char* error, int error_bytes) {
    return emulated::launch(grid, cluster, threads, shared_bytes, seed, error, error_bytes, [&] { NAUTILE_CALL; });
}
