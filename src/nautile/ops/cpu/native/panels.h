// Products with weights in panels: y[i][o] = Σ_k x[i][k] W[o][k] for the 32 outputs o of one panel and a few rows i.
//
// A panel holds 32 outputs; a unit of it, 4 inputs of all of them, as 2 steps of 2 inputs × 2 halves of 16 outputs.
// In memory [unit][step][half][16 outputs][2 inputs], so that a panel is read from one end to the other and 64 bytes
// of bfloat16 are what one multiplication takes. Inputs and outputs that only fill up are zeros.
// int8 is ordered likewise. int4: one 16-bit word for (output of a half, input of a step), whose nibble step·2 + half is
// the number.
//
// Rows of x are stored as pairs [step][row]: the rows of a step lie side by side, whatever their number.

#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace nautile {

constexpr int HALF = 16, PANEL = 2 * HALF, UNIT = 4, STEP = 2;
constexpr int PARTS = PANEL / LANES;  // vectors of a step
constexpr i64 MOST_ROWS = 48;  // whose sums for one panel fit into the first-level cache beside weights and x
constexpr i64 AHEAD = 8192;    // bytes between what is multiplied and what is fetched

NAUTILE_INLINE i64 units_of(i64 inputs) { return (inputs + UNIT - 1) / UNIT; }

// How numbers are stored: read(unit, step, part) gives LANES outputs × 2 inputs as Pairs multiplies them.
template <class Pairs_>
struct Bfloat {
    using Pairs = Pairs_;
    static constexpr int BYTES = 256;  // of a unit
    NAUTILE_INLINE_MEMBER typename Pairs::Wide read(const char* unit, int step, int part) const {
        return Pairs::from_bfloat(load<Words>(unit + 128 * step + 4 * LANES * part));
    }
};

template <class Pairs>
struct Int8;
template <class Pairs>
struct Int4;

template <>
struct Int8<FloatPairs> {
    using Pairs = FloatPairs;
    static constexpr int BYTES = 128;
    NAUTILE_INLINE_MEMBER FloatPairs::Wide read(const char* unit, int step, int part) const {
        Words w = __builtin_convertvector(load<Halves>(unit + 64 * step + 2 * LANES * part), Words);
        return {__builtin_convertvector((Ints)(w << 24) >> 24, Floats),
                __builtin_convertvector((Ints)(w << 16) >> 24, Floats)};
    }
};

template <>
struct Int4<FloatPairs> {
    using Pairs = FloatPairs;
    static constexpr int BYTES = 64;
    NAUTILE_INLINE_MEMBER FloatPairs::Wide read(const char* unit, int step, int part) const {
        int half = part * LANES / HALF, up = 12 - 4 * (2 * step + half);
        Words w = load<Words>(unit + 4 * (LANES * part - HALF * half));
        return {__builtin_convertvector((Ints)(w << (16 + up)) >> 28, Floats),
                __builtin_convertvector((Ints)(w << up) >> 28, Floats)};
    }
};

#if defined(NAUTILE_BFLOAT_PAIRS)
template <>
struct Int8<BfloatPairs> {
    using Pairs = BfloatPairs;
    static constexpr int BYTES = 128;
    NAUTILE_INLINE_MEMBER __m512i read(const char* unit, int step, int part) const {
        const char* p = unit + 64 * step + 32 * part;
        return (__m512i)_mm512_cvtne2ps_pbh(sixteen(p + 16), sixteen(p));  // exact: bfloat16 has 8 bits
    }
    NAUTILE_INLINE __m512 sixteen(const char* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p))); }
};

template <>
struct Int4<BfloatPairs> {
    using Pairs = BfloatPairs;
    static constexpr int BYTES = 64;
    __m512i table;  // bfloat16 of every int4, twice: a lookup takes five bits, and the fifth is a neighbour's
    Int4() {
        u16 found[32];
        for (int i = 0; i < 32; i++) found[i] = to_bfloat(float((i & 7) - (i & 8)));
        table = load<__m512i>(found);
    }
    NAUTILE_INLINE_MEMBER __m512i read(const char* unit, int step, int part) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(load<__m512i>(unit), 4 * (2 * step + part)), table);
    }
};
#endif

// What to fetch while multiplying: with each unit as many lines as a unit has, `stride` bytes after those before.
struct Ahead {
    const char* from;
    i64 stride;
};

// totals[row][PANEL] (+)= scale · (ROWS rows of x times `units` units of one panel).
template <class Format, int ROWS>
__attribute__((noinline)) static void tile(const Format& format, const char* weights, i64 units,
                                           const typename Format::Pairs::Pair* x, i64 rows, const float* scale,
                                           bool first, float* totals, Ahead ahead) {
    using Pairs = typename Format::Pairs;
    // Few sums would wait for themselves: then each step has its own, if there are registers.
    constexpr int CHAINS = PARTS * ROWS <= 12 && PARTS == 2 ? 2 : 1;
    Floats sums[CHAINS][ROWS][PARTS];
    for (auto& chain : sums)
        for (auto& row : chain)
            for (auto& part : row) part = zeros();
    for (i64 u = 0; u < units; u++, weights += Format::BYTES, ahead.from += ahead.stride) {
        for (int line = 0; line < Format::BYTES; line += 64) __builtin_prefetch(ahead.from + line);
#pragma GCC unroll 2
        for (int step = 0; step < 2; step++, x += rows) {
            typename Pairs::Wide numbers[PARTS];
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; part++) numbers[part] = format.read(weights, step, part);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++) {
                auto pair = Pairs::spread(x[i]);
#pragma GCC unroll 8
                for (int part = 0; part < PARTS; part++) {
                    auto& total = sums[step % CHAINS][i][part];
                    total = Pairs::add_products(total, numbers[part], pair);
                }
            }
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int part = 0; part < PARTS; part++) {
            Floats total = sums[0][i][part];
            for (int c = 1; c < CHAINS; c++) total += sums[c][i][part];
            float* place = totals + i * PANEL + part * LANES;
            if (scale) total *= load<Floats>(scale + part * LANES);
            store(place, first ? total : total + load<Floats>(place));
        }
}

// `tile` for a number of rows that is known only now, up to Pairs::TILE.
template <class Format, int ROWS = Format::Pairs::TILE, class... Arguments>
NAUTILE_INLINE void tile_of(i64 rows, const Arguments&... arguments) {
    if constexpr (ROWS == 1)
        tile<Format, 1>(arguments...);
    else if (rows == ROWS)
        tile<Format, ROWS>(arguments...);
    else
        tile_of<Format, ROWS - 1>(rows, arguments...);
}

// How `rows` rows are cut into tiles of nearly the same size.
template <class Pairs>
NAUTILE_INLINE i64 tile_rows(i64 rows) {
    i64 tiles = (rows + Pairs::TILE - 1) / Pairs::TILE;
    return (rows + tiles - 1) / tiles;
}

// totals[rows][PANEL] = x · one panel. `group`: inputs that share a scale; scales are [group][PANEL], or null.
template <class Format>
static void panel(const Format& format, const char* weights, const float* scales, i64 group,
                  const typename Format::Pairs::Pair* x, i64 rows, i64 inputs, float* totals) {
    using Pairs = typename Format::Pairs;
    i64 units = units_of(inputs), size = tile_rows<Pairs>(rows);
    // A block of weights that several tiles multiply stays in the first-level cache: 64 units of bfloat16 are 16 KiB.
    i64 block = scales ? group / UNIT : size == rows ? units : 64;
    for (i64 u = 0; u < units; u += block) {
        i64 n = std::min(block, units - u);
        const char* here = weights + u * Format::BYTES;
        const float* scale = scales ? scales + u / block * PANEL : nullptr;
        for (i64 r = 0; r < rows; r += size) {
            // Of the next block, every tile but the last fetches its part.
            Ahead ahead = size == rows ? Ahead{here + AHEAD, Format::BYTES}
                                       : Ahead{here + (block + (r / size % 2) * block / 2) * Format::BYTES,
                                               Format::BYTES / 2};
            tile_of<Format>(std::min(size, rows - r), format, here, n, x + u * 2 * rows + r, rows, scale, u == 0,
                            totals + r * PANEL, ahead);
        }
    }
}

// x[rows][inputs] as pairs [step][row], for all steps of the units.
template <class Pairs, class T>
static void pair_up(const T* x, i64 stride, i64 rows, i64 inputs, typename Pairs::Pair* pairs) {
    i64 steps = 2 * units_of(inputs), whole = 0;
#if defined(NAUTILE_BFLOAT_PAIRS)
    if constexpr (std::is_same_v<Pairs, BfloatPairs>) {
        // Number by number, with writes `rows` apart, this takes a tenth of the time of the product.
        whole = inputs / CHUNK * LANES;
        for (i64 s = 0; s < whole && rows > 1; s += LANES)
            for (i64 i = 0; i < rows; i += LANES) {
                __m512i r[LANES];
                for (i64 j = 0; j < LANES; j++) r[j] = load<__m512i>(x + std::min(i + j, rows - 1) * stride + 2 * s);
                turn(r, pairs + s * rows + i, rows, std::min<i64>(LANES, rows - i));
            }
        if (rows == 1) std::memcpy(pairs, x, whole * sizeof(u32));
    }
#endif
    for (i64 i = 0; i < rows; i++) {
        const T* row = x + i * stride;
        for (i64 s = whole; s < steps; s++)
            pairs[s * rows + i] =
                Pairs::pair(2 * s < inputs ? row[2 * s] : T(0), 2 * s + 1 < inputs ? row[2 * s + 1] : T(0));
    }
}

}  // namespace nautile
