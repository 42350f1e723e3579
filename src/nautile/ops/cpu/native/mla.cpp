// Absorbed MLA decode: o = softmax(scale * q.k) c over rows k = [c | rope] of a cache, each row read once.
//
// X query rows (heads times queries) are multiplied with a tile of rows, an online softmax turns scores into weights, and
// the weights are multiplied with the latent part of the same tile, which the first-level cache still holds
// (mla_tiles.h). In the softmax of a few queries lanes are rows: then reading memory is what takes the time. Tiles of all
// sequences lie in one line that is cut into equal pieces, one per thread; a sequence that was cut is merged by its
// log-sum-exp. Rows are read where they lie if they consist of whole chunks of the dtype that is multiplied, and are else
// copied, filled up with zeros, into a panel.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "mla_tiles.h"

namespace {

// The fields of `Problem` in ops/cpu/mla_decode.py, in its order.
struct Problem {
    const void *q, *q_rope, *c, *rope;
    void* out;                              // [B, S, H, C], without gaps
    float* lse;                             // [B, H, S], natural logarithm
    const int32_t* table;                   // blocks of each sequence, or null: block b holds sequence b
    const int64_t* last;                    // [B, S]: last row that a query reads; -1: none
    int64_t B, S, H, C, R;                  // sequences, queries, heads, latent, rope
    int64_t q_strides[3], rope_strides[3];  // numbers from one sequence, query, head to the next
    int64_t blocks, page, table_width;      // blocks of the cache; rows of a block; entries of a row of the table
    int64_t c_block, c_row, r_block, r_row;  // numbers from one block and one row to the next
    double scale;
    int64_t threads;
};

template <class M, class T> struct Worker {
    const Problem& p;
    int64_t X, width, c_chunks, chunks, columns, units, tile;
    bool in_place, few;
    // Of one sequence in work:
    std::unique_ptr<char[]> memory;
    char *q, *panel, *weights;
    float *scores, *keep;
    int64_t* limit;
    Rows tiles[2];

    explicit Worker(const Problem& problem) : p(problem) {
        constexpr int64_t E = 16 * M::PER;
        X = p.S * p.H;
        width = (X + LANES - 1) / LANES * LANES;
        c_chunks = (p.C + E - 1) / E;
        chunks = c_chunks + (p.R + E - 1) / E;
        columns = c_chunks * E;
        units = chunks * 16;
        few = X <= FEW;
        tile = few ? TILE_FEW : TILE;
        in_place = sizeof(T) == sizeof(typename M::Cell) && p.C % E == 0 && p.R % E == 0;
        int64_t sizes[] = {width * units * 4, TILE * chunks * 64, TILE * width * 4, TILE * width * 4, width * 4, width * 8};
        int64_t total = 64;
        for (int64_t size : sizes) total += (size + 63) / 64 * 64;
        memory.reset(new char[total]);
        char* at = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
        void* parts[6];
        for (int i = 0; i < 6; i++) parts[i] = at, at += (sizes[i] + 63) / 64 * 64;
        q = (char*)parts[0], panel = (char*)parts[1], weights = (char*)parts[2];
        std::memset(parts[3], 0, sizes[3]);  // lanes without a query stay so
        scores = (float*)parts[3], keep = (float*)parts[4], limit = (int64_t*)parts[5];
    }

    // Queries of sequence b as [vector][unit][lane], zero where there is none, or few of them one after the other; and
    // how many rows each reads.
    void take_queries(int64_t b) {
        std::memset(q, 0, width * units * 4);
        for (int64_t x = 0; x < width; x++) limit[x] = std::numeric_limits<int64_t>::max();
        for (int64_t x = 0; x < X; x++) {
            int64_t s = x / p.H, h = x % p.H, v = x / LANES;
            limit[x] = p.last[b * p.S + s] + 1;
            // Vectors are multiplied two at a time, the last of an odd number alone.
            const int64_t side = std::min<int64_t>(2, width / LANES - v / 2 * 2);
            char* lane = q + v / 2 * 2 * units * sizeof(Floats) + v % 2 * sizeof(Floats) + x % LANES * 4;
            if (few) lane = q + x * units * 4;
            const int64_t step = few ? 4 : side * sizeof(Floats);
            auto put = [&](const T* from, int64_t n, char* to) {
                for (int64_t u = 0; u < n / M::PER; u++, to += step)
                    if constexpr (sizeof(T) * M::PER == 4)
                        std::memcpy(to, from + u * M::PER, 4);
                    else
                        *reinterpret_cast<float*>(to) = widen(from[u]);
                if (n % M::PER) std::memcpy(to, from + n - 1, sizeof(T));
            };
            put((const T*)p.q + b * p.q_strides[0] + s * p.q_strides[1] + h * p.q_strides[2], p.C, lane);
            put((const T*)p.q_rope + b * p.rope_strides[0] + s * p.rope_strides[1] + h * p.rope_strides[2], p.R,
                lane + c_chunks * 16 * step);
        }
    }

    // Where n rows from `first` on lie; places after the n-th repeat it and will weigh nothing.
    void find(int64_t b, int64_t first, int64_t n, Rows& rows) const {
        for (int64_t i = 0; i < n;) {
            const int64_t t = first + i, row = t % p.page, end = std::min(n, i + p.page - row);
            const int64_t block = p.table ? p.table[b * p.table_width + t / p.page] : b;
            const char* from_c = (const char*)((const T*)p.c + block * p.c_block + row * p.c_row);
            const char* from_r = (const char*)((const T*)p.rope + block * p.r_block + row * p.r_row);
            const int64_t c_row = p.c_row * sizeof(T), r_row = p.r_row * sizeof(T);
            for (; i < end; i++, from_c += c_row, from_r += r_row) rows.c[i] = from_c, rows.rope[i] = from_r;
        }
        for (int64_t i = n; i < tile; i++) rows.c[i] = rows.c[n - 1], rows.rope[i] = rows.rope[n - 1];
    }

    // Rows as they are multiplied.
    void take_rows(Rows& rows) {
        constexpr int64_t E = 16 * M::PER;
        for (int64_t i = 0; i < tile && !in_place; i++) {
            char* to = panel + i * chunks * 64;
            copy_row<typename M::Cell>((const T*)rows.c[i], p.C, columns, to);
            copy_row<typename M::Cell>((const T*)rows.rope[i], p.R, chunks * E - columns, to + c_chunks * 64);
            rows.c[i] = to, rows.rope[i] = to + c_chunks * 64;
        }
    }

    // Scores to weights for one vector of queries: running maximum and sum, and the factor that keeps earlier sums.
    void soften(int64_t v, int64_t first, int64_t n, float* top, float* total) {
        float* s = scores + v * LANES;
        int64_t lowest = *std::min_element(limit + v * LANES, limit + (v + 1) * LANES);
        if (lowest < first + n)
            for (int64_t i = 0; i < n; i++)
                for (int l = 0; l < LANES; l++)
                    if (limit[v * LANES + l] <= first + i) s[i * width + l] = -std::numeric_limits<float>::infinity();
        Floats old = load<Floats>(top + v * LANES), high = old, factor = zeros() + float(p.scale) * LOG2E;
        for (int64_t i = 0; i < n; i++) {
            Floats x = load<Floats>(s + i * width) * factor;
            store(s + i * width, x);
            high = x > high ? x : high;
        }
        Floats kept = exp2(old - high), sum = load<Floats>(total + v * LANES) * kept;
        store(top + v * LANES, high);
        store(keep + v * LANES, kept);
        char* w = weights + v * LANES * 4;
        if constexpr (M::PER == 2)
            for (int64_t i = 0; i < n; i += 2, w += width * 4) {
                Floats a = exp2(load<Floats>(s + i * width) - high), b = {};
                if (i + 1 < n) b = exp2(load<Floats>(s + (i + 1) * width) - high);
                sum += a + b;
                store(w, (Floats)(((rounded(a) >> 16) & 0xffff) | (rounded(b) & (int32_t)0xffff0000)));
            }
        else
            for (int64_t i = 0; i < n; i++, w += width * 4) {
                Floats a = exp2(load<Floats>(s + i * width) - high);
                sum += a;
                store(w, a);
            }
        store(total + v * LANES, sum);
    }

    // The same for one of few queries, whose scores lie one after the other.
    void soften_few(int64_t x, int64_t first, int64_t n, float* top, float* total) {
        constexpr int V = TILE_FEW / LANES;
        const float* s = scores + x * TILE_FEW;
        const int64_t count = std::min(n, limit[x] - first);
        Floats w[V], high = all(top[x]);
        UNROLL for (int v = 0; v < V; v++) {
            w[v] = load<Floats>(s + v * LANES) * (float(p.scale) * LOG2E);
            w[v] = lane_numbers() + v * LANES < all_ints(count) ? w[v] : all(-std::numeric_limits<float>::infinity());
            high = w[v] > high ? w[v] : high;
        }
        const Floats old = all(top[x]);
        high = all(top[x] = highest(high));
        const Floats kept = exp2(old - high);
        Floats sum = {};
        UNROLL for (int v = 0; v < V; v++) {
            w[v] = exp2(w[v] - high);
            M::put_weights(w[v], weights + (x * TILE_FEW + v * LANES) * (4 / M::PER));
            sum += w[v];
        }
        keep[x] = kept[0];
        total[x] = total[x] * kept[0] + nautile::sum(sum);
    }

    // Rows [first, end) of sequence b into sums [X, columns], maxima and totals [width].
    void run(int64_t b, int64_t first, int64_t end, float* sums, float* top, float* total) {
        take_queries(b);
        std::fill(top, top + width, LOWEST);
        std::fill(total, total + width, 0.0f);
        std::fill(sums, sums + X * columns, 0.0f);
        const int64_t vectors = width / LANES, q_vector = units * sizeof(Floats);
        int turn = 0;
        for (int64_t t = first; t < end; t += tile) {
            const int64_t n = std::min(tile, end - t);
            const int64_t ahead = t + n, coming = std::max<int64_t>(0, std::min(tile, end - ahead));
            Rows &now = tiles[turn], &next = tiles[turn ^= 1];
            if (t == first) find(b, t, n, now);
            if (coming > 0)
                find(b, ahead, coming, next);
            else
                next = now;
            take_rows(now);
            const char *const *c = now.c, *const *rope = now.rope;
            const int64_t c_bytes = c_chunks * 64, r_bytes = (chunks - c_chunks) * 64;
            for (int64_t i = 0; few && i < TILE_FEW; i += GROUP)
                in_parts<HEADS_FEW>(X, [&](auto count, int64_t x) {
                    constexpr int N = decltype(count)::value, G = N <= 2 ? GROUP : GROUP / 2;
                    for (int64_t j = i; j < i + GROUP; j += G)
                        scores_of_few<M, N, G>(q + x * units * 4, units * 4, c + j, rope + j, next.c + j / 2,
                                               next.rope + j, c_bytes, r_bytes, scores + x * TILE_FEW + j);
                });
            for (int64_t x = 0; few && x < X; x++) soften_few(x, t, n, top, total);
            int64_t v = few ? vectors : 0;
            for (; v + 2 <= vectors; v += 2)
                for (int64_t i = 0; i < n; i += ROWS_TWO)
                    scores_of<M, 2, ROWS_TWO>(q + v * q_vector, c + i, rope + i, c_chunks, chunks - c_chunks,
                                              scores + i * width + v * LANES, width);
            if (v < vectors)
                for (int64_t i = 0; i < n; i += ROWS_ONE)
                    scores_of<M, 1, ROWS_ONE>(q + v * q_vector, c + i, rope + i, c_chunks, chunks - c_chunks,
                                              scores + i * width + v * LANES, width);
            for (v = few ? vectors : 0; v < vectors; v++) soften(v, t, n, top, total);
            if (few)
                in_parts<CHUNKS_FEW>(c_chunks, [&](auto some, int64_t chunk) {
                    constexpr int W = decltype(some)::value;
                    in_parts<HEADS_FEW>(X, [&](auto count, int64_t x) {
                        add_few<M, decltype(count)::value, W>(c, next.c + TILE_FEW / 2, chunk * 64,
                                                              weights + x * TILE_FEW * 4 / M::PER, keep + x,
                                                              sums + chunk * 16 * M::PER + x * columns, columns);
                    });
                });
            const int64_t steps = (n + M::PER - 1) / M::PER;
            for (int64_t i = 0; !few && i < n; i++)
                for (int64_t j = 0; j < r_bytes; j += 64) __builtin_prefetch(next.rope[i] + j, 0, 3);
            for (int64_t chunk = 0; !few && chunk < c_chunks; chunk++) {
                float* out = sums + chunk * 16 * M::PER;
                in_parts<HEADS>(X, [&](auto count, int64_t x) {
                    constexpr int N = decltype(count)::value;
                    const auto add = x == 0 ? add_rows<M, N, true> : add_rows<M, N, false>;
                    add(c, next.c, chunk * 64, weights + x * 4, width, steps, keep + x, out + x * columns, columns);
                });
            }
        }
    }

    // Weighted sum of `parts` partial results of query row x of sequence b, written out.
    void finish(int64_t b, int64_t x, int64_t parts, float* const* sums, float* const* top, float* const* total) {
        float high = LOWEST, sum = 0;
        for (int64_t i = 0; i < parts; i++) high = std::max(high, top[i][x]);
        for (int64_t i = 0; i < parts; i++) sum += total[i][x] * std::exp2(top[i][x] - high);
        const int64_t s = x / p.H, h = x % p.H;
        const bool none = limit_of(b, s) <= 0;
        T* out = (T*)p.out + (b * X + x) * p.C;
        for (int64_t c = 0; c < columns; c++) {
            constexpr int64_t E = 16 * M::PER;
            const int64_t to = c / E * E + M::column(c % E);
            if (to >= p.C) continue;
            float value = 0;
            for (int64_t i = 0; i < parts; i++) value += sums[i][x * columns + c] * std::exp2(top[i][x] - high);
            narrow(none ? 0.0f : value / sum, out + to);
        }
        p.lse[(b * p.H + h) * p.S + s] = none ? std::numeric_limits<float>::infinity() : (high + std::log2(sum)) * LN2;
    }

    int64_t limit_of(int64_t b, int64_t s) const { return p.last[b * p.S + s] + 1; }
};

template <class M, class T> void decode(const Problem& p) {
    // starts[b]: tiles before sequence b.
    const Worker<M, T> sizes(p);
    const int64_t tile = sizes.tile;
    std::vector<int64_t> rows(p.B), starts(p.B + 1, 0);
    for (int64_t b = 0; b < p.B; b++) {
        for (int64_t s = 0; s < p.S; s++) rows[b] = std::max(rows[b], p.last[b * p.S + s] + 1);
        starts[b + 1] = starts[b] + std::max<int64_t>(1, (rows[b] + tile - 1) / tile);
    }
    const int64_t threads = std::max<int64_t>(1, std::min(p.threads, starts[p.B]));
    const int64_t one = sizes.X * sizes.columns + 2 * sizes.width;
    const std::unique_ptr<float[]> partial(new float[threads * 2 * one]);  // not zeroed
    auto tile_of = [&](int64_t thread) { return starts[p.B] * thread / threads; };
    // What thread i left of sequence b lies in its first slot if it began there, else in its second.
    auto slot = [&](int64_t i, int64_t b) {
        bool begins = tile_of(i) >= starts[b] || tile_of(i) >= starts[b + 1];
        return partial.get() + (2 * i + (begins ? 0 : 1)) * one;
    };
#pragma omp parallel num_threads(threads)
    {
        Worker<M, T> worker(p);
        // A piece is a thread's, but OpenMP may give fewer threads than were asked for.
        const int64_t mine = omp_get_thread_num(), given = omp_get_num_threads();
        for (int64_t i = mine; i < threads; i += given) {
            const int64_t begin = tile_of(i), end = tile_of(i + 1);
            for (int64_t b = 0; b < p.B; b++) {
                const int64_t from = std::max(begin, starts[b]), to = std::min(end, starts[b + 1]);
                if (from >= to) continue;
                float* sums = slot(i, b);
                float *top = sums + sizes.X * sizes.columns, *total = top + sizes.width;
                worker.run(b, (from - starts[b]) * tile, std::min((to - starts[b]) * tile, rows[b]), sums, top, total);
                if (from == starts[b] && to == starts[b + 1])
                    for (int64_t x = 0; x < sizes.X; x++) worker.finish(b, x, 1, &sums, &top, &total);
            }
        }
#pragma omp barrier
        std::vector<float*> sums, top, total;
        for (int64_t b = 0; b < p.B; b++) {
            sums.clear(), top.clear(), total.clear();
            for (int64_t i = 0; i < threads; i++)
                if (tile_of(i) < starts[b + 1] && tile_of(i + 1) > starts[b]) {
                    sums.push_back(slot(i, b));
                    top.push_back(sums.back() + sizes.X * sizes.columns);
                    total.push_back(top.back() + sizes.width);
                }
            if (sums.size() < 2) continue;
            for (int64_t x = sizes.X * mine / given; x < sizes.X * (mine + 1) / given; x++)
                worker.finish(b, x, (int64_t)sums.size(), sums.data(), top.data(), total.data());
        }
    }
}

}  // namespace

// 0, or 1 if a query would read past the rows of its sequence, or 2 if the table names a block that is none.
extern "C" int64_t mla_decode(const Problem* p, int64_t is_bf16) {
    for (int64_t b = 0; b < p->B; b++) {
        int64_t last = -1;
        for (int64_t s = 0; s < p->S; s++) last = std::max(last, p->last[b * p->S + s]);
        if (last >= (p->table ? p->table_width : 1) * p->page) return 1;
        for (int64_t i = 0; p->table && i <= last / p->page && last >= 0; i++) {
            const int32_t block = p->table[b * p->table_width + i];
            if (block < 0 || block >= p->blocks) return 2;
        }
    }
    if (!is_bf16)
        decode<Singles, float>(*p);
    else
#if defined(NAUTILE_BFLOAT_PAIRS)
        decode<Pairs, u16>(*p);
#else
        decode<Singles, u16>(*p);
#endif
    return 0;
}
