// What one compilation of the FP8 products fixes, what a launch is told, and which tiles of D a block computes.
//
// Set on the command line: BLOCK_M, BLOCK_N, STAGES, GROUPING, SHARE, COLUMN_SCALES, OUT_BYTES, TILE_STORE, ADD_C.
#pragma once

#ifndef NAUTILE_PTX
#define NAUTILE_PTX "ptx.cuh"
#endif
#include NAUTILE_PTX

enum { DENSE, ROWS, MASKED, K_GROUPS };
enum { SHARE_NONE, SHARE_A, SHARE_B };

constexpr int BLOCK_K = 128;  // elements, and bytes of a row in shared memory
constexpr int CLUSTER = SHARE == SHARE_NONE ? 1 : 2;
constexpr int MATH_GROUPS = BLOCK_M <= 64 ? 1 : 2;
constexpr int MATH_WARPS = 4 * MATH_GROUPS;
// wgmma multiplies slabs of 64 rows; of a lower tile the rest is whatever is there, and is not stored.
constexpr int SLABS_M = BLOCK_M < 64 ? 64 : BLOCK_M;
constexpr int WAVES = SLABS_M / (64 * MATH_GROUPS);  // slabs per multiplying warpgroup
constexpr int THREADS = 128 * (MATH_GROUPS + 1);

constexpr int A_BYTES = SLABS_M * BLOCK_K;
constexpr int B_BYTES = BLOCK_N * BLOCK_K;
constexpr int B_SCALES = COLUMN_SCALES ? BLOCK_N : 2;  // a tile touches at most two blocks of 128 columns
constexpr int D_BYTES = TILE_STORE ? SLABS_M * BLOCK_N * 2 : 0;

static_assert(BLOCK_M == 16 || BLOCK_M == 32 || BLOCK_M == 64 || BLOCK_M == 128 || BLOCK_M == 256, "slabs of 64");
static_assert(BLOCK_N % 16 == 0 && BLOCK_N <= 192, "an instruction of wgmma, and its registers twice");
// A tile begins at a multiple of this within 128 columns, of 64 at most.
constexpr int EVERY = BLOCK_N % 64 == 0 ? 64 : BLOCK_N % 32 == 0 ? 32 : 16;
static_assert(COLUMN_SCALES || 128 % BLOCK_N == 0 || BLOCK_N + 128 - EVERY <= 256, "columns in more than two blocks");
static_assert(SHARE != SHARE_B || GROUPING != ROWS, "neighbours along M may belong to two groups");
static_assert(!TILE_STORE || OUT_BYTES == 2, "tiles are stored as bfloat16");

struct Args {
    const float* scale_a;
    const float* scale_b;
    const int* layout;  // ROWS: group of each row, or -1. MASKED: rows per group. K_GROUPS: end of each group along K
    const void* c;
    void* out;
    int64_t out_row, out_group, c_row, c_group;  // strides in elements; rows are contiguous
    int scale_a_row, scale_a_k, scale_a_group;
    int scale_b_row, scale_b_k, scale_b_group;
    int m, n, groups, k;  // m: rows of a group if MASKED, of the whole otherwise
    int band;             // tiles along M that are worked on before moving along N
    int alignment;        // K_GROUPS: groups begin at multiples of it
};

struct Shared {
    uint8_t* d;
    uint8_t* a;
    uint8_t* b;
    float* scale_a;
    float* scale_b;
    uint64_t* full;
    uint64_t* empty;
};

DEVICE Shared shared_layout() {
    Shared s;
    s.d = shared_memory();
    s.a = s.d + D_BYTES;
    s.b = s.a + STAGES * A_BYTES;
    s.full = reinterpret_cast<uint64_t*>(s.b + STAGES * B_BYTES);
    s.empty = s.full + STAGES;
    s.scale_a = reinterpret_cast<float*>(s.empty + STAGES);
    s.scale_b = s.scale_a + STAGES * SLABS_M;
    return s;
}

DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// One tile of D: its first row, first column and group, the row after its last, and the stretch of K that it sums.
struct Tile {
    int m, n, group, m_end, k, k_end;
    DEVICE int k_blocks() const { return divide_up(k_end - k, BLOCK_K); }
};

// Which tiles this block computes, in order. All threads of a cluster step through the same sequence; its unit is what
// a cluster computes at once.
struct Schedule {
    const Args& args;
    int unit, group = 0, before = 0;  // `before`: units of the groups before `group`

    DEVICE explicit Schedule(const Args& args) : args(args), unit(block_index() / CLUSTER) {}

    DEVICE bool next(Tile& tile) {
        constexpr int PER_M = SHARE == SHARE_B ? 2 : 1, PER_N = SHARE == SHARE_A ? 2 : 1;
        const int n_units = divide_up(args.n, BLOCK_N * PER_N);
        int m_units = divide_up(args.m, BLOCK_M * PER_M);
        int inside = unit;
        tile.group = 0;
        tile.m_end = args.m;
        if (GROUPING == MASKED) {
            for (;; ++group) {
                if (group == args.groups) return false;
                m_units = divide_up(args.layout[group], BLOCK_M * PER_M);
                if (unit < before + m_units * n_units) break;
                before += m_units * n_units;
            }
            inside = unit - before;
            tile.group = group;
            tile.m_end = args.layout[group];
        } else if (GROUPING == K_GROUPS) {
            tile.group = unit / (m_units * n_units);
            if (tile.group >= args.groups) return false;
            inside = unit - tile.group * (m_units * n_units);
        } else if (unit >= m_units * n_units) {
            return false;
        }
        unit += grid_size() / CLUSTER;

        const int band = inside / (args.band * n_units);
        const int height = min(args.band, m_units - band * args.band);
        const int in_band = inside - band * args.band * n_units;
        const int rank = CLUSTER > 1 ? cluster_rank() : 0;
        tile.m = ((band * args.band + in_band % height) * PER_M + (SHARE == SHARE_B ? rank : 0)) * BLOCK_M;
        tile.n = (in_band / height * PER_N + (SHARE == SHARE_A ? rank : 0)) * BLOCK_N;

        if (BLOCK_M < 64) tile.m_end = min(tile.m_end, tile.m + BLOCK_M);

        tile.k = 0;
        tile.k_end = args.k;
        if (GROUPING == ROWS) {
            tile.group = args.layout[tile.m];
            // Segments begin at multiples of BLOCK_M: padding in front means padding throughout, which becomes zeros.
            if (tile.group < 0) tile.group = 0, tile.k_end = 0;
        }
        if (GROUPING == K_GROUPS) {
            tile.k = tile.group ? divide_up(args.layout[tile.group - 1], args.alignment) * args.alignment : 0;
            tile.k_end = args.layout[tile.group];
        }
        return true;
    }
};

// Place in the ring: goes round once per STAGES steps, the parity flipping each time.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    DEVICE void step() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};
