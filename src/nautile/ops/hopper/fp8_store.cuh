// How the results of an FP8 product leave a multiplying warpgroup: through shared memory as whole tiles, or one by one.
#pragma once

#include "fp8_tiles.cuh"

constexpr int STORE_COLUMNS = EVERY;  // of one stored box: swizzled rows of 128, 64 or 32 bytes
constexpr int STORE_ROW = STORE_COLUMNS * 2;

// Row of the tile whose results this thread holds in slab `wave`; the other row is 8 below.
DEVICE int slab(int wave) { return (wave * MATH_GROUPS + thread_index() / 128) * 64; }
DEVICE int row_in_slab() { return thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4; }

// Through shared memory in the layout of the map's swizzle, whose 16-byte pieces are spread such that a warp's writes
// hit every bank once.
DEVICE void store_tile(const TensorMap& map_d, const Shared& s, const Tile& tile, float (&total)[WAVES][BLOCK_N / 2]) {
    constexpr int SLAB = 64 * STORE_ROW;
    const int group = thread_index() / 128;
    const bool leader = thread_index() % 128 == 0;
    if (leader) tile_store_wait();
    named_sync(1 + group, 128);
#pragma unroll
    for (int wave = 0; wave < WAVES; ++wave) {
        uint8_t* rows = s.d + slab(wave) * BLOCK_N * 2;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = 8 * j % STORE_COLUMNS + thread_index() % 4 * 2;
                int place = (row_in_slab() + 8 * half) * STORE_ROW + column * 2;
                place ^= (place >> 7) % (STORE_ROW / 16) << 4;
                *reinterpret_cast<uint32_t*>(rows + 8 * j / STORE_COLUMNS * SLAB + place) =
                    pack_bf16(total[wave][4 * j + 2 * half], total[wave][4 * j + 2 * half + 1]);
            }
        }
    }
    copy_fence();
    named_sync(1 + group, 128);
    if (leader) {
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave)
#pragma unroll
            for (int box = 0; box < BLOCK_N / STORE_COLUMNS; ++box)
                tile_store(&map_d, s.d + slab(wave) * BLOCK_N * 2 + box * SLAB, tile.n + box * STORE_COLUMNS,
                           tile.m + slab(wave), GROUPING == MASKED ? tile.group : 0);
        tile_store_commit();
    }
}

DEVICE float element(const void* from, int64_t place) {
    if (OUT_BYTES == 4) return static_cast<const float*>(from)[place];
    return from_bf16(static_cast<const uint16_t*>(from)[place]);
}
DEVICE void store_one(void* to, int64_t place, float value) {
    if (OUT_BYTES == 4)
        static_cast<float*>(to)[place] = value;
    else
        static_cast<uint16_t*>(to)[place] = static_cast<uint16_t>(pack_bf16(value, 0.0f));
}
struct alignas(8) Pair {
    float left, right;
};
DEVICE void store_pair(void* to, int64_t place, float left, float right) {
    if (OUT_BYTES == 4)
        static_cast<Pair*>(to)[place / 2] = Pair{left, right};
    else
        static_cast<uint32_t*>(to)[place / 2] = pack_bf16(left, right);
}

// Straight from registers: for float32, for C, for rows that the copy engine cannot address or may not fill.
DEVICE void store_elements(const Args& args, const Tile& tile, float (&total)[WAVES][BLOCK_N / 2]) {
    const int64_t group = GROUPING == MASKED || GROUPING == K_GROUPS ? tile.group : 0;
    const bool pairs = (args.out_row | args.out_group | args.n) % 2 == 0 && reinterpret_cast<uintptr_t>(args.out) % 8 == 0;
#pragma unroll
    for (int wave = 0; wave < WAVES; ++wave)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile.m + slab(wave) + row_in_slab() + 8 * half;
            if (row >= tile.m_end) continue;
            const int64_t out = group * args.out_group + row * args.out_row;
            const int64_t c = group * args.c_group + row * args.c_row;
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; ++j) {
                const int column = tile.n + 8 * j + thread_index() % 4 * 2;
                float value[2] = {total[wave][4 * j + 2 * half], total[wave][4 * j + 2 * half + 1]};
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (ADD_C && column + i < args.n) value[i] += element(args.c, c + column + i);
                if (pairs && column < args.n) {
                    store_pair(args.out, out + column, value[0], value[1]);
                } else {
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (column + i < args.n) store_one(args.out, out + column + i, value[i]);
                }
            }
        }
}
