// What a launch of MLA decoding is told, how a block's shared memory is laid out, and what a block does.
#pragma once

#ifndef NAUTILE_PTX
#define NAUTILE_PTX "ptx.cuh"
#endif
#include NAUTILE_PTX

constexpr int ROWS = 64, TOKENS = 64;
constexpr int BOX_BYTES = 64 * 128;  // 64 rows of 64 bfloat16
constexpr int BOXES = 9, VALUE = 512;
constexpr int TILE_BYTES = BOXES * BOX_BYTES;
constexpr int WEIGHTS = 8 * BOX_BYTES;  // place of the weights in a tile
constexpr int THREADS = 384;
constexpr int HALF = VALUE / 2;
constexpr int MERGE_ROWS = 8;
constexpr float LN2 = 0.6931471805599453f;

struct alignas(8) Pair {
    float left, right;
};
struct alignas(16) Piece {
    uint64_t low, high;
};
struct alignas(16) Quad {
    float element[4];
};

struct Args {
    const int* block_table;
    const int* lengths;
    const int* splits;  // [R, 3]: request or -1, first tile, end tile
    const int* ends;    // [B + 1]: where each request's splits begin
    uint16_t* out;      // [B, rows, 512] bfloat16
    float* lse;         // [B, heads, queries]
    float* part;        // [R, rows, 512], for requests of several splits
    float* part_lse;    // [R, rows], to base 2
    int queries, heads, page, table_row, row_tiles, causal;
    float scale;        // log₂ e included
};

struct Shared {
    uint8_t* q;
    uint8_t* tiles;  // two
    float* decay;    // two, one per row
    float* inverse;
    uint64_t* q_full;
    uint64_t* full;
    uint64_t* empty;
};

DEVICE Shared shared_layout() {
    Shared s;
    s.q = shared_memory();
    s.tiles = s.q + TILE_BYTES;
    s.q_full = reinterpret_cast<uint64_t*>(s.tiles + 2 * TILE_BYTES);
    s.full = s.q_full + 1;
    s.empty = s.full + 2;
    s.decay = reinterpret_cast<float*>(s.empty + 3);
    s.inverse = s.decay + 2 * ROWS;
    return s;
}

// What this block does; the same for all its threads.
struct Work {
    int request, first_row, begin, stop, length, split;
    bool whole;  // the request has no other split
    DEVICE int tiles() const { return (stop - begin + TOKENS - 1) / TOKENS; }
};

DEVICE Work find_work(const Args& args) {
    Work w;
    w.split = block_index() / args.row_tiles;
    w.first_row = block_index() % args.row_tiles * ROWS;
    w.request = args.splits[3 * w.split];
    if (w.request < 0) return w;
    w.length = args.lengths[w.request];
    w.begin = args.splits[3 * w.split + 1] * TOKENS;
    w.stop = min(args.splits[3 * w.split + 2] * TOKENS, w.length);
    w.whole = args.ends[w.request + 1] - args.ends[w.request] == 1;
    return w;
}
