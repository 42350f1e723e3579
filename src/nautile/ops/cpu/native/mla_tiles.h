// Inner loops of absorbed MLA decode: scores of a tile of cached rows, and sums of their latents weighted by the softmax.
//
// A unit is a pair of bfloat16, or one float; a chunk is 16 units. Lanes are queries while scores are made (one unit of a
// row is broadcast to all of them) and columns while latents are summed, so neither product needs a sum across lanes.
// Scores of a few queries, which would leave lanes idle, are summed across lanes instead. The next tile is fetched
// between the products, a line at a time: lines asked for in one go would be waited for.
#pragma once

#include <algorithm>

#include "lanes.h"

// Inner loops are functions of their own: within the loops around them, registers would not suffice for their addresses.
#define ALONE static __attribute__((noinline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

using namespace nautile;

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float LOWEST = -1e30f;  // below any score; finite, so that differences stay numbers

#if defined(NAUTILE_BFLOAT_PAIRS)
// bfloat16 in pairs: one instruction multiplies 16 pairs and adds each to a lane.
struct Pairs {
    static constexpr int PER = 2, VECTORS = 2;  // numbers of a unit; vectors of sums per chunk
    using Cell = u16;
    NAUTILE_INLINE Floats mul(Floats sum, __m512i q, const void* unit) {
        int32_t pair;
        std::memcpy(&pair, unit, 4);
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)q, (__m512bh)_mm512_set1_epi32(pair));
    }
    NAUTILE_INLINE Floats mul_units(Floats sum, __m512i a, __m512i b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    NAUTILE_INLINE __m512i units(const void* from) { return _mm512_loadu_si512(from); }
    // Two rows interleaved: within each quarter, columns 0-3 go to the first vector and 4-7 to the second.
    NAUTILE_INLINE void columns(const char* const* rows, int64_t at, __m512i (&v)[2]) {
        __m512i a = _mm512_loadu_si512(rows[0] + at), b = _mm512_loadu_si512(rows[1] + at);
        v[0] = _mm512_unpacklo_epi16(a, b);
        v[1] = _mm512_unpackhi_epi16(a, b);
    }
    NAUTILE_INLINE void put_weights(Floats w, char* to) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)w));
    }
    static int column(int i) { return i < 16 ? i / 4 * 8 + i % 4 : (i - 16) / 4 * 8 + 4 + i % 4; }
};
#endif

struct Singles {
    static constexpr int PER = 1, VECTORS = 16 / LANES;
    using Cell = float;
    NAUTILE_INLINE Floats mul(Floats sum, Floats q, const void* unit) {
        float x;
        std::memcpy(&x, unit, 4);
        return sum + q * x;
    }
    NAUTILE_INLINE Floats mul_units(Floats sum, Floats a, Floats b) { return sum + a * b; }
    NAUTILE_INLINE Floats units(const void* from) { return load<Floats>(from); }
    NAUTILE_INLINE void columns(const char* const* rows, int64_t at, Floats (&v)[VECTORS]) {
        for (int i = 0; i < VECTORS; i++) v[i] = load<Floats>(rows[0] + at + i * sizeof(Floats));
    }
    NAUTILE_INLINE void put_weights(Floats w, char* to) { store(to, w); }
    static int column(int i) { return i; }
};

// Rows of scores that are made at once, by how many vectors of queries; sums of HEADS queries that are held at once.
constexpr int ROWS_ONE = 12, ROWS_TWO = LANES == 16 ? 12 : 6, HEADS = LANES == 16 ? 8 : 4;
constexpr int TILE = 48;  // rows; a multiple of ROWS_ONE and ROWS_TWO
// Queries up to which products are summed across lanes, and the sums that are made at once.
constexpr int FEW = 8, ROWS_FEW = LANES == 16 ? 4 : 2;
// Rows of a tile of few queries: those of the next tile fit into the first-level cache beside them. Rows of one step,
// queries of one step, and chunks whose latents are summed at once.
constexpr int TILE_FEW = 16, GROUP = 2 * ROWS_FEW, HEADS_FEW = 4, CHUNKS_FEW = LANES == 16 ? 2 : 1;

// sum[row, query] += row . query for N rows and V vectors of queries, over chunks of the rows
template <class M, int V, int N>
NAUTILE_INLINE const char* dot(Floats (&sum)[N][V], const char* q, const char* const* rows, int64_t chunks) {
    const char* r[N];
    UNROLL for (int i = 0; i < N; i++) r[i] = rows[i];
    for (int64_t c = 0; c < chunks * 64; c += 64)
        UNROLL for (int u = 0; u < 16; u++, q += V * sizeof(Floats)) {
            decltype(M::units(q)) x[V];
            UNROLL for (int v = 0; v < V; v++) x[v] = M::units(q + v * sizeof(Floats));
            UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < V; v++)
                sum[i][v] = M::mul(sum[i][v], x[v], r[i] + c + u * 4);
        }
    return q;
}

// to[i] = sum of the lanes of x[i], for ROWS_FEW of them
NAUTILE_INLINE void put_sums(const Floats* x, float* to) {
#if defined(__AVX512F__)
    __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a, b, a, b in each quarter
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), upper);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    for (int i = 0; i < ROWS_FEW; i++) to[i] = nautile::sum(x[i]);
#endif
}

template <class M, int V, int N>
ALONE void scores_of(const char* q, const char* const* c, const char* const* rope, int64_t c_chunks, int64_t r_chunks,
                     float* s, int64_t width) {
    Floats sum[N][V] = {};
    dot<M, V, N>(sum, dot<M, V, N>(sum, q, c, c_chunks), rope, r_chunks);
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < V; v++) store(s + i * width + v * LANES, sum[i][v]);
}

// s[query, row] = row . query for N queries that lie one after the other, `stride` bytes apart, and G rows at c[0], ...
// and rope[0], ...; half as many rows of the next tile, and all of their rope, are on their way into the cache.
template <class M, int N, int G>
ALONE void scores_of_few(const char* q, int64_t stride, const char* const* c, const char* const* rope,
                         const char* const* next_c, const char* const* next_rope, int64_t c_bytes, int64_t r_bytes,
                         float* s) {
    Floats sum[N][G] = {};
    auto add = [&](const char* const* rows, int64_t bytes, auto fetched, const char* const* next) INLINE_LAMBDA {
        const char *r[G], *f[G];
        UNROLL for (int i = 0; i < G; i++) r[i] = rows[i];
        UNROLL for (int i = 0; i < fetched; i++) f[i] = next[i];
        for (int64_t at = 0; at < bytes; at += sizeof(Floats)) {
            decltype(M::units(q)) x[N];
            UNROLL for (int j = 0; j < N; j++) x[j] = M::units(q + j * stride + at);
            UNROLL for (int i = 0; i < fetched; i++) __builtin_prefetch(f[i] + at, 0, 3);
            UNROLL for (int i = 0; i < G; i++) {
                auto row = M::units(r[i] + at);
                UNROLL for (int j = 0; j < N; j++) sum[j][i] = M::mul_units(sum[j][i], x[j], row);
            }
        }
        q += bytes;
    };
    add(c, c_bytes, std::integral_constant<int, G / 2>(), next_c);
    add(rope, r_bytes, std::integral_constant<int, G>(), next_rope);
    UNROLL for (int j = 0; j < N; j++) UNROLL for (int i = 0; i < G; i += ROWS_FEW)
        put_sums(&sum[j][i], s + j * TILE_FEW + i);
}

// sums[h, column] = sums * keep[h] + sum over rows of p[row, h] * c[row, column], for N queries and one chunk. With
// FETCH, the same columns of the next tile are on their way into the cache.
template <class M, int N, bool FETCH>
ALONE void add_rows(const char* const* rows, const char* const* next, int64_t at, const char* p, int64_t width,
                    int64_t steps, const float* keep, float* sums, int64_t columns) {
    constexpr int V = M::VECTORS;
    Floats sum[N][V];
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < V; v++)
        sum[i][v] = load<Floats>(sums + i * columns + v * LANES) * keep[i];
    for (int64_t t = 0; t < steps; t++, rows += M::PER, next += M::PER, p += width * 4) {
        decltype(M::units(p)) x[V];
        M::columns(rows, at, x);
        if (FETCH) UNROLL for (int i = 0; i < M::PER; i++) __builtin_prefetch(next[i] + at, 0, 3);
        UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < V; v++)
            sum[i][v] = M::mul(sum[i][v], x[v], p + i * 4);
    }
    UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < V; v++)
        store(sums + i * columns + v * LANES, sum[i][v]);
}

// The same for W chunks and a whole tile of few queries, whose weights lie one after the other; half of the next tile,
// the rows that `scores_of_few` leaves out, is on its way into the cache.
template <class M, int N, int W>
ALONE void add_few(const char* const* rows, const char* const* next, int64_t at, const char* p, const float* keep,
                   float* sums, int64_t columns) {
    constexpr int V = M::VECTORS, STEPS = TILE_FEW / M::PER, STRIDE = TILE_FEW * 4 / M::PER;
    Floats sum[W][N][V];
    UNROLL for (int w = 0; w < W; w++) UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < V; v++)
        sum[w][i][v] = load<Floats>(sums + i * columns + (w * V + v) * LANES) * keep[i];
    UNROLL for (int t = 0; t < STEPS; t++) {
        UNROLL for (int w = 0; w < W; w++) {
            decltype(M::units(p)) x[V];
            M::columns(rows + t * M::PER, at + w * 64, x);
            UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < V; v++)
                sum[w][i][v] = M::mul(sum[w][i][v], x[v], p + i * STRIDE + t * 4);
            if (t < TILE_FEW / 2) __builtin_prefetch(next[t] + at + w * 64, 0, 3);
        }
    }
    UNROLL for (int w = 0; w < W; w++) UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < V; v++)
        store(sums + i * columns + (w * V + v) * LANES, sum[w][i][v]);
}

// take(N, x) for as many of N = MOST at x = 0, MOST, ..., and then of halves of it, as fill [x, n)
template <int MOST, class Take>
NAUTILE_INLINE void in_parts(int64_t n, Take take, int64_t x = 0) {
    for (; x + MOST <= n; x += MOST) take(std::integral_constant<int, MOST>(), x);
    if constexpr (MOST > 1)
        if (x < n) in_parts<MOST / 2>(n, take, x);
}

NAUTILE_INLINE Floats all(float x) { return zeros() + x; }
NAUTILE_INLINE Ints all_ints(int64_t x) { return Ints{} + int32_t(x); }
NAUTILE_INLINE Ints lane_numbers() {
    Ints i;
    for (int l = 0; l < LANES; l++) i[l] = l;
    return i;
}
NAUTILE_INLINE float highest(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float high = x[0];
    for (int l = 1; l < LANES; l++) high = std::max(high, x[l]);
    return high;
#endif
}

template <class Cell, class T>
NAUTILE_INLINE void copy_row(const T* from, int64_t n, int64_t filled, char* to) {
    Cell* cell = reinterpret_cast<Cell*>(to);
    for (int64_t i = 0; i < n; i++)
        if constexpr (sizeof(Cell) == sizeof(T))
            cell[i] = from[i];
        else
            cell[i] = widen(from[i]);
    std::fill(cell + n, cell + filled, Cell(0));
}

// Rounded to bfloat16 as `to_bfloat` does, but for NaN; in the upper half of each lane.
NAUTILE_INLINE Ints rounded(Floats x) {
    const Ints wide = (Ints)x;
    return wide + 0x7fff + ((wide >> 16) & 1);
}

struct Rows {
    const char *c[TILE], *rope[TILE];
};

}  // namespace
