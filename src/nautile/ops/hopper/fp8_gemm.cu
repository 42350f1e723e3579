// D = A · Bᵀ (+ C) of e4m3 numbers with a float32 scale per block: dense, in groups of rows, or in groups of K.
//
//   D[m, n] = Σ_b  scale_a[m, b] · scale_b[n or n / 128, b] · Σ_{k in block b of 128} A[m, k] · B[n, k]
//
// The tensor cores' FP8 accumulator keeps about 14 bits, so the sum over each 128 of K starts from zero and is added
// to float32 registers on the CUDA cores (DeepSeek-V3 §3.3.2).
//
// A block is one loading warpgroup and one or two multiplying ones; each loops over tiles of D (persistently), the two
// kinds meeting at a ring of STAGES buffers: `full` says that a stage has arrived, `empty` that it may be overwritten.
// Of the loading warpgroup one thread copies tiles of A and B, another warp the scales, which come in any strides.
// While one multiplying warpgroup adds up, the other one has the tensor cores. Two blocks of a cluster may share the
// tile of A (they compute neighbours along N) or of B (along M): each loads one half, for both.
#include "fp8_store.cuh"
#include "fp8_tiles.cuh"

// One thread.
DEVICE void load_tiles(const TensorMap& map_a, const TensorMap& map_b, const Args& args, const Shared& s) {
    constexpr int ROWS_A = BLOCK_M / (SHARE == SHARE_A ? 2 : 1), ROWS_B = BLOCK_N / (SHARE == SHARE_B ? 2 : 1);
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    prefetch_map(&map_a);
    prefetch_map(&map_b);
    Schedule schedule(args);
    Tile tile;
    Ring ring;
    while (schedule.next(tile)) {
        const int group_a = GROUPING == MASKED ? tile.group : 0;
        const int group_b = GROUPING == MASKED || GROUPING == ROWS ? tile.group : 0;
        const int k_blocks = tile.k_blocks();
        for (int block = 0; block < k_blocks; ++block, ring.step()) {
            uint64_t* full = s.full + ring.stage;
            uint8_t* a = s.a + ring.stage * A_BYTES;
            uint8_t* b = s.b + ring.stage * B_BYTES;
            const int k = tile.k + block * BLOCK_K;
            barrier_wait(s.empty + ring.stage, ring.parity ^ 1);
            barrier_arrive_expecting(full, BLOCK_M * BLOCK_K + B_BYTES);
            if (SHARE == SHARE_A)
                tile_load_multicast(&map_a, full, a + rank * ROWS_A * BLOCK_K, k, tile.m + rank * ROWS_A, group_a, 3);
            else
                tile_load(&map_a, full, a, k, tile.m, group_a);
            if (SHARE == SHARE_B)
                tile_load_multicast(&map_b, full, b + rank * ROWS_B * BLOCK_K, k, tile.n + rank * ROWS_B, group_b, 3);
            else
                tile_load(&map_b, full, b, k, tile.n, group_b);
        }
    }
}

// `COUNT` scales, `stride` apart, of which those from `rows` on do not exist: zeros in their place.
template <int COUNT>
DEVICE void copy_scales(float* to, const float* from, int place, int stride, int rows) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int i = 0; i < COUNT; i += 32)
        if (COUNT % 32 == 0 || i + lane < COUNT)
            word_copy(to + i + lane, from + (i + lane < rows ? place + (i + lane) * stride : 0), i + lane < rows);
}

// One warp. Places are 32-bit offsets, for this warpgroup has few registers left.
DEVICE void load_scales(const Args& args, const Shared& s) {
    Schedule schedule(args);
    Tile tile;
    Ring ring;
    while (schedule.next(tile)) {
        const int b_row = COLUMN_SCALES ? tile.n : tile.n / 128;
        const int rows_a = args.m - tile.m, rows_b = (COLUMN_SCALES ? args.n : divide_up(args.n, 128)) - b_row;
        int place_a = tile.k / BLOCK_K * args.scale_a_k + tile.m * args.scale_a_row;
        int place_b = tile.k / BLOCK_K * args.scale_b_k + b_row * args.scale_b_row;
        const int k_blocks = tile.k_blocks();
        if (GROUPING == MASKED) place_a += tile.group * args.scale_a_group;
        if (GROUPING == MASKED || GROUPING == ROWS) place_b += tile.group * args.scale_b_group;
        for (int block = 0; block < k_blocks; ++block, ring.step()) {
            barrier_wait(s.empty + ring.stage, ring.parity ^ 1);
            copy_scales<BLOCK_M>(s.scale_a + ring.stage * SLABS_M, args.scale_a, place_a, args.scale_a_row, rows_a);
            copy_scales<B_SCALES>(s.scale_b + ring.stage * B_SCALES, args.scale_b, place_b, args.scale_b_row, rows_b);
            word_copies_arrive(s.full + ring.stage);
            place_a += args.scale_a_k;
            place_b += args.scale_b_k;
        }
    }
}

// The scaled sum of one block of 128 along K.
DEVICE void add_scaled(float (&total)[BLOCK_N / 2], const float (&sum)[BLOCK_N / 2], float upper, float lower,
                       const float* scale_b, int columns_left) {
    if (COLUMN_SCALES) {
        const int column = thread_index() % 4 * 2;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j) {
            const float left = scale_b[8 * j + column], right = scale_b[8 * j + column + 1];
            total[4 * j] += upper * left * sum[4 * j];
            total[4 * j + 1] += upper * right * sum[4 * j + 1];
            total[4 * j + 2] += lower * left * sum[4 * j + 2];
            total[4 * j + 3] += lower * right * sum[4 * j + 3];
        }
        return;
    }
    constexpr bool ONE = 128 % BLOCK_N == 0;
    const float first = scale_b[0], second = ONE ? first : scale_b[1];
    const float upper_first = upper * first, lower_first = lower * first;
    const float upper_second = upper * second, lower_second = lower * second;
#pragma unroll
    for (int j = 0; j < BLOCK_N / 8; ++j) {
        // `columns_left` is a multiple of EVERY, from EVERY to 128.
        const bool in_first = ONE || 8 * j < EVERY || (8 * j < 128 && 8 * j / EVERY * EVERY < columns_left);
        const float up = in_first ? upper_first : upper_second, low = in_first ? lower_first : lower_second;
        total[4 * j] += up * sum[4 * j];
        total[4 * j + 1] += up * sum[4 * j + 1];
        total[4 * j + 2] += low * sum[4 * j + 2];
        total[4 * j + 3] += low * sum[4 * j + 3];
    }
}

// Beyond the end of a group, A and B hold anything: zeros instead, before the tensor cores read them.
DEVICE void clear_columns(uint8_t* rows, int count, int from) {
    for (int row = thread_index() % 128; row < count; row += 128)
        for (int byte = from; byte < BLOCK_K; ++byte)
            rows[row * BLOCK_K + ((byte / 16 ^ row % 8) * 16 | byte % 16)] = 0;
}

// One warpgroup.
DEVICE void multiply(const TensorMap& map_d, const Args& args, const Shared& s) {
    const int lane = thread_index() % 32, group = uniform(thread_index() / 128);
    const uint64_t operand_a = operand(shared_address(s.a) + group * 64 * BLOCK_K);
    const uint64_t operand_b = operand(shared_address(s.b));
    Schedule schedule(args);
    Tile tile;
    Ring ring;
    while (schedule.next(tile)) {
        float total[WAVES][BLOCK_N / 2], sum[BLOCK_N / 2];
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave)
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; ++i) total[wave][i] = 0.0f;

        const int k_blocks = tile.k_blocks();
        for (int block = 0; block < k_blocks; ++block, ring.step()) {
            const uint64_t a = operand_a + ring.stage * (A_BYTES / 16), b = operand_b + ring.stage * (B_BYTES / 16);
            float scale_b[2] = {0.0f, 0.0f};
            barrier_wait(s.full + ring.stage, ring.parity);
            if (!COLUMN_SCALES) scale_b[0] = s.scale_b[ring.stage * 2], scale_b[1] = s.scale_b[ring.stage * 2 + 1];
            if (GROUPING == K_GROUPS && tile.k + (block + 1) * BLOCK_K > tile.k_end) {
                const int from = (tile.k_end - tile.k) % BLOCK_K;
                for (int wave = 0; wave < WAVES; ++wave)
                    clear_columns(s.a + ring.stage * A_BYTES + slab(wave) * BLOCK_K, 64, from);
                clear_columns(s.b + ring.stage * B_BYTES, BLOCK_N, from);
                copy_fence();
                named_sync(1 + group, 128);
            }
            // A stage is free once its numbers are multiplied, or, if scales are read while adding up, after that.
            const auto release = [&] {
                warp_sync();
                if (CLUSTER == 1 && lane == 0) barrier_arrive(s.empty + ring.stage);
                if (CLUSTER > 1 && lane < CLUSTER) barrier_arrive_remote(s.empty + ring.stage, lane);
            };
#pragma unroll
            for (int wave = 0; wave < WAVES; ++wave) {
                const float* scale_a = s.scale_a + ring.stage * SLABS_M + slab(wave) + row_in_slab();
                const float upper = scale_a[0], lower = scale_a[8];
                product_begin(sum);
#pragma unroll
                for (int k = 0; k < BLOCK_K / 32; ++k)
                    product_e4m3<BLOCK_N>(sum, a + (wave * MATH_GROUPS * 64 * BLOCK_K + k * 32) / 16, b + k * 32 / 16,
                                          k > 0);
                product_commit();
                product_wait<0>(sum);
                if (!COLUMN_SCALES && wave == WAVES - 1) release();
                add_scaled(total[wave], sum, upper, lower,
                           COLUMN_SCALES ? s.scale_b + ring.stage * BLOCK_N : scale_b, 128 - tile.n % 128);
                if (COLUMN_SCALES && wave == WAVES - 1) release();
            }
        }

        if (GROUPING == ROWS) {
            // Padding may hold anything, and is zero in D.
#pragma unroll
            for (int wave = 0; wave < WAVES; ++wave)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = tile.m + slab(wave) + row_in_slab() + 8 * half;
                    if (row < tile.m_end && args.layout[row] >= 0) continue;
#pragma unroll
                    for (int j = 0; j < BLOCK_N / 8; ++j)
                        total[wave][4 * j + 2 * half] = total[wave][4 * j + 2 * half + 1] = 0.0f;
                }
        }
        // A whole tile would also write the rows after the last one of a group, which are not ours.
        if (TILE_STORE && (GROUPING != MASKED || tile.m + BLOCK_M <= tile.m_end))
            store_tile(map_d, s, tile, total);
        else
            store_elements(args, tile, total);
    }
    if (TILE_STORE && thread_index() % 128 == 0) tile_store_wait();
}

KERNEL void LAUNCH_BOUNDS(THREADS)
    fp8_gemm(PARAMETER TensorMap map_a, PARAMETER TensorMap map_b, PARAMETER TensorMap map_d, PARAMETER Args args) {
    const Shared s = shared_layout();
    const int warp = uniform(thread_index() / 32);
    if (thread_index() == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(s.full + stage, 1 + 32);  // the thread of the tiles, the warp of the scales
            barrier_init(s.empty + stage, CLUSTER * MATH_WARPS);
        }
        barrier_init_fence();
    }
    if (CLUSTER > 1)
        cluster_sync();
    else
        block_sync();

    if (warp >= MATH_WARPS) {
        if (MATH_GROUPS == 2) registers_give<40>();
        if (warp == MATH_WARPS && thread_index() % 32 == 0) load_tiles(map_a, map_b, args, s);
        if (warp == MATH_WARPS + 1) load_scales(args, s);
        warp_sync();
    } else {
        if (MATH_GROUPS == 2) registers_take<232>();
        multiply(map_d, args, s);
        warp_sync();
    }
    // The other block may still send tiles and arrivals here.
    if (CLUSTER > 1) cluster_sync();
}
