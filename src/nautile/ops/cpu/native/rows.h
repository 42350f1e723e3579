// Products with weights as they are stored, row by row: y[i][o] = Σ_k x[i][k] W[o][k], both bfloat16, for a block of 32
// outputs and a few rows i.
//
// For few rows, sums run along the inputs and rows of W are read as they lie. From some rows on, that loads x too often
// and W is turned, a few KiB at a time, into the panels of panels.h.

#pragma once

#include <memory>

#include "panels.h"

namespace nautile {

struct Rows {
    const u16* weights;
    i64 stride;   // numbers from row to row
    i64 outputs;  // rows
    const u16* row(i64 o) const { return weights + std::min(o, outputs - 1) * stride; }  // after the last: the last
};

// The numbers from `row` on, zeros after the first `count`.
template <class Pairs>
NAUTILE_INLINE typename Pairs::Wide chunk(const u16* row, i64 count) {
    return Pairs::from_bfloat(words_of(row, count));
}

// totals[row][PANEL] = ROWS rows of x times OUTPUTS rows of W. x [row][chunk].
template <class Pairs, int OUTPUTS, int ROWS>
__attribute__((noinline)) static void dot(const Rows& w, i64 first, i64 inputs, const typename Pairs::Wide* x,
                                          float* totals) {
    i64 whole = inputs / CHUNK, chunks = (inputs + CHUNK - 1) / CHUNK;
    const u16* row[OUTPUTS];
    Floats sums[OUTPUTS][ROWS];
    for (int o = 0; o < OUTPUTS; o++) {
        row[o] = w.row(first + o);
        for (int i = 0; i < ROWS; i++) sums[o][i] = zeros();
    }
    auto add = [&](i64 c, i64 count) __attribute__((always_inline)) {
        typename Pairs::Wide numbers[OUTPUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) numbers[o] = chunk<Pairs>(row[o] + c * CHUNK, count);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int o = 0; o < OUTPUTS; o++)
                sums[o][i] = Pairs::add_products(sums[o][i], numbers[o], x[i * chunks + c]);
    };
    for (i64 c = 0; c < whole; c++) add(c, CHUNK);
    if (whole < chunks) add(whole, inputs - whole * CHUNK);
    for (int o = 0; o < OUTPUTS; o++)
        for (int i = 0; i < ROWS; i++) totals[i * PANEL + o] = sum(sums[o][i]);
}

template <class Pairs, int ROWS, class... Arguments>
NAUTILE_INLINE void dot_of(i64 rows, const Arguments&... arguments) {
    if constexpr (ROWS == 1)
        dot<Pairs, Pairs::DOT_OUTPUTS, 1>(arguments...);
    else if (rows == ROWS)
        dot<Pairs, Pairs::DOT_OUTPUTS, ROWS>(arguments...);
    else
        dot_of<Pairs, ROWS - 1>(rows, arguments...);
}

#if defined(NAUTILE_BFLOAT_PAIRS)
constexpr i64 TURNED_FROM = 5;  // rows of x
constexpr i64 TURNED = 32;       // units that are turned at once: as many as a panel has outputs, see `Ahead`

// totals[rows][PANEL] = x times rows [first, first + PANEL) of W, by way of panels. x [step][row].
static void turned(const Rows& w, i64 first, i64 inputs, const u32* x, i64 rows, float* totals) {
    const Bfloat<BfloatPairs> format;
    i64 units = units_of(inputs), size = tile_rows<BfloatPairs>(rows);
    alignas(64) u32 panel[TURNED * 2 * PANEL];
    for (i64 u = 0; u < units; u += TURNED) {
        i64 n = std::min(TURNED, units - u), k = u * UNIT;
        for (i64 half = 0; half < 2; half++)
            for (i64 c = 0; c < n * UNIT; c += CHUNK) {
                __m512i r[16];
                for (int o = 0; o < HALF; o++)
                    r[o] = chunk<BfloatPairs>(w.row(first + half * HALF + o) + k + c, inputs - k - c);
                turn(r, panel + c / STEP * PANEL + half * HALF, PANEL, HALF);
            }
        // Meanwhile comes what is turned next: with every unit one row of W.
        bool last = u + TURNED >= units;
        const u16* next = w.weights + (first + (last ? PANEL : 0)) * w.stride + (last ? 0 : k + TURNED * UNIT);
        Ahead ahead{(const char*)next, w.stride * i64(sizeof(u16))};
        for (i64 r = 0; r < rows; r += size)
            tile_of<Bfloat<BfloatPairs>>(std::min(size, rows - r), format, (const char*)panel, n,
                                         x + u * 2 * rows + r, rows, (const float*)nullptr, u == 0,
                                         totals + r * PANEL, ahead);
    }
}
#endif

// A few rows of x, made ready for one of the two ways.
template <class Pairs>
class Multiplier {
  public:
    Multiplier(const u16* x, i64 stride, i64 rows, i64 inputs) : rows_(rows), inputs_(inputs) {
        if (turns()) {
            pairs_.reset(new typename Pairs::Pair[2 * units_of(inputs) * rows]);
            pair_up<Pairs>(x, stride, rows, inputs, pairs_.get());
        } else {
            i64 chunks = (inputs + CHUNK - 1) / CHUNK;
            chunks_.reset(new typename Pairs::Wide[chunks * rows]);
            for (i64 i = 0; i < rows; i++)
                for (i64 c = 0; c < chunks; c++)
                    chunks_[i * chunks + c] = chunk<Pairs>(x + i * stride + c * CHUNK, inputs - c * CHUNK);
        }
    }

    // totals[rows][PANEL] for the outputs from `first` on.
    void block(const Rows& w, i64 first, float* totals) const {
#if defined(NAUTILE_BFLOAT_PAIRS)
        if constexpr (std::is_same_v<Pairs, BfloatPairs>)
            if (turns()) return turned(w, first, inputs_, pairs_.get(), rows_, totals);
#endif
        i64 chunks = (inputs_ + CHUNK - 1) / CHUNK, tiles = (rows_ + Pairs::DOT_ROWS - 1) / Pairs::DOT_ROWS;
        i64 size = (rows_ + tiles - 1) / tiles;
        for (i64 o = 0; o < std::min<i64>(PANEL, w.outputs - first); o += Pairs::DOT_OUTPUTS)
            for (i64 r = 0; r < rows_; r += size)
                dot_of<Pairs, Pairs::DOT_ROWS>(std::min(size, rows_ - r), w, first + o, inputs_,
                                               (const typename Pairs::Wide*)chunks_.get() + r * chunks,
                                               totals + r * PANEL + o);
    }

  private:
    bool turns() const {
#if defined(NAUTILE_BFLOAT_PAIRS)
        return std::is_same_v<Pairs, BfloatPairs> && rows_ >= TURNED_FROM;
#else
        return false;
#endif
    }

    i64 rows_, inputs_;
    std::unique_ptr<typename Pairs::Pair[]> pairs_;
    std::unique_ptr<typename Pairs::Wide[]> chunks_;
};

}  // namespace nautile
