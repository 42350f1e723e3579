// A mixture of SwiGLU experts for a few tokens: y_t = sum_k w_tk W_down[e] (silu(W_gate[e] x_t) * W_up[e] x_t).
//
// Only the matrices of experts that somebody chose are read, each once, in the order in which they lie in memory; what
// is left is one pass over them for gate and up, and one for down. Threads take portions as they become free: every
// number is made by one thread in one order, so that the result does not depend on who took what.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "lanes.h"

#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

using namespace nautile;

constexpr int ROWS = 4;           // rows of a matrix that are multiplied at once with many tokens, or if short
constexpr int64_t FEW = 4;        // tokens up to which rows go one by one: memory is read fastest from end to end
constexpr int64_t SHORT = 1024;   // bytes of a row up to which they do not: ROWS of them are near each other, too
constexpr int64_t PORTION = 64;   // rows that a thread takes at once
constexpr int64_t AHEAD = 4096;  // bytes between what is multiplied and what is fetched

// The fields of `Problem` in ops/cpu/expert_decode.py, in its order.
struct Problem {
    const void *x, *gate_up, *down;
    const int64_t* experts;                // [T, K]
    const float* weights;                  // [T, K]
    void* out;                             // [T, D], without gaps
    int64_t T, K, E, D, F;
    int64_t x_row;                         // numbers from one token to the next
    int64_t up_expert, up_row, down_expert, down_row;  // and from one expert and row to the next
    int64_t threads;
};

// How a vector's worth of two rows is multiplied and added to lanes; STEP numbers of each.
struct FloatRows {
    using Number = float;
    static constexpr int STEP = LANES;
    NAUTILE_INLINE Floats read(const float* from) { return load<Floats>(from); }
    NAUTILE_INLINE Floats mul(Floats sum, Floats a, Floats b) { return sum + a * b; }
};
#if defined(NAUTILE_BFLOAT_PAIRS)
struct BfloatRows {
    using Number = u16;
    static constexpr int STEP = 32;
    NAUTILE_INLINE __m512i read(const u16* from) { return _mm512_loadu_si512(from); }
    NAUTILE_INLINE Floats mul(Floats sum, __m512i a, __m512i b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#else
struct BfloatRows {
    using Number = u16;
    static constexpr int STEP = LANES;
    NAUTILE_INLINE Floats read(const u16* from) {
        return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
    }
    NAUTILE_INLINE Floats mul(Floats sum, Floats a, Floats b) { return sum + a * b; }
};
#endif

// out[r * N + t] = row r . token t over n numbers
template <class M, int R, int N, class T>
NAUTILE_INLINE void dots(const T* w, int64_t row, const T* const* x, int64_t n, float* out) {
    constexpr int CHAINS = R * N >= 8 ? 1 : 8 / (R * N);  // few sums would wait for themselves
    Floats sum[CHAINS][R][N] = {};
    auto step = [&](int64_t i, Floats (&into)[R][N]) INLINE_LAMBDA {
        decltype(M::read(w)) a[N];
        UNROLL for (int t = 0; t < N; t++) a[t] = M::read(x[t] + i);
        UNROLL for (int r = 0; r < R; r++) {
            __builtin_prefetch((const char*)(w + r * row + i) + AHEAD, 0, 3);
            auto b = M::read(w + r * row + i);
            UNROLL for (int t = 0; t < N; t++) into[r][t] = M::mul(into[r][t], a[t], b);
        }
    };
    int64_t i = 0;
    for (; i + CHAINS * M::STEP <= n; i += CHAINS * M::STEP)
        UNROLL for (int c = 0; c < CHAINS; c++) step(i + c * M::STEP, sum[c]);
    for (; i + M::STEP <= n; i += M::STEP) step(i, sum[0]);
    if (i < n)
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < N; t++) {
            T a[M::STEP] = {}, b[M::STEP] = {};
            std::memcpy(a, x[t] + i, (n - i) * sizeof(T));
            std::memcpy(b, w + r * row + i, (n - i) * sizeof(T));
            sum[0][r][t] = M::mul(sum[0][r][t], M::read(a), M::read(b));
        }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < N; t++) {
        Floats total = sum[0][r][t];
        for (int c = 1; c < CHAINS; c++) total += sum[c][r][t];
        out[r * N + t] = nautile::sum(total);
    }
}

// take(r, t, value) for the products of `rows` rows with all tokens of one expert
template <class M, class T, class Take>
NAUTILE_INLINE void products(const T* w, int64_t row, int64_t rows, const T* const* x, int64_t tokens, int64_t n,
                             Take take) {
    auto block = [&](auto r_count, int64_t r) {
        constexpr int R = decltype(r_count)::value;
        float out[R * 4];
        auto some = [&](auto t_count, int64_t t) {
            constexpr int N = decltype(t_count)::value;
            dots<M, R, N>(w + r * row, row, x + t, n, out);
            for (int i = 0; i < R; i++)
                for (int j = 0; j < N; j++) take(r + i, t + j, out[i * N + j]);
        };
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) some(std::integral_constant<int, 4>(), t);
        if (tokens - t == 3) some(std::integral_constant<int, 3>(), t);
        if (tokens - t == 2) some(std::integral_constant<int, 2>(), t);
        if (tokens - t == 1) some(std::integral_constant<int, 1>(), t);
    };
    int64_t r = 0;
    const bool several = tokens > FEW || n * (int64_t)sizeof(T) <= SHORT;
    for (; several && r + ROWS <= rows; r += ROWS) block(std::integral_constant<int, ROWS>(), r);
    for (; r < rows; r++) block(std::integral_constant<int, 1>(), r);
}

template <class M> void mix(const Problem& p) {
    using T = typename M::Number;
    // Choices by expert: those of the i-th chosen expert are choices[starts[i]] to choices[starts[i + 1] - 1].
    const int64_t n = p.T * p.K;
    std::vector<int64_t> choices(n), starts, names;
    for (int64_t i = 0; i < n; i++) choices[i] = i;
    std::stable_sort(choices.begin(), choices.end(), [&](int64_t a, int64_t b) { return p.experts[a] < p.experts[b]; });
    for (int64_t i = 0; i < n; i++)
        if (i == 0 || p.experts[choices[i]] != names.back()) {
            starts.push_back(i);
            names.push_back(p.experts[choices[i]]);
        }
    const int64_t chosen = (int64_t)names.size();
    starts.push_back(n);
    std::vector<const T*> x(n), hidden(n);
    const std::unique_ptr<T[]> memory(new T[n * p.F]);
    for (int64_t i = 0; i < n; i++) {
        x[i] = (const T*)p.x + choices[i] / p.K * p.x_row;
        hidden[i] = memory.get() + i * p.F;
    }
    const int64_t up_portions = (p.F + PORTION - 1) / PORTION, down_portions = (p.D + PORTION - 1) / PORTION;
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<float> gates(PORTION * n), sums(PORTION * p.T);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < chosen * up_portions; i++) {
            const int64_t e = i / up_portions, first = i % up_portions * PORTION, begin = starts[e];
            const int64_t rows = std::min(PORTION, p.F - first), tokens = starts[e + 1] - begin;
            const T* gate = (const T*)p.gate_up + names[e] * p.up_expert + first * p.up_row;
            products<M>(gate, p.up_row, rows, &x[begin], tokens, p.D,
                        [&](int64_t r, int64_t t, float value) { gates[t * PORTION + r] = value; });
            products<M>(gate + p.F * p.up_row, p.up_row, rows, &x[begin], tokens, p.D,
                        [&](int64_t r, int64_t t, float value) {
                            const float g = gates[t * PORTION + r];
                            narrow(g / (1 + std::exp(-g)) * value, &memory[(begin + t) * p.F + first + r]);
                        });
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < down_portions; i++) {
            const int64_t first = i * PORTION, rows = std::min(PORTION, p.D - first);
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t e = 0; e < chosen; e++) {
                const int64_t begin = starts[e], tokens = starts[e + 1] - begin;
                const T* down = (const T*)p.down + names[e] * p.down_expert + first * p.down_row;
                products<M>(down, p.down_row, rows, &hidden[begin], tokens, p.F, [&](int64_t r, int64_t t, float value) {
                    const int64_t choice = choices[begin + t];
                    sums[choice / p.K * PORTION + r] += p.weights[choice] * value;
                });
            }
            for (int64_t t = 0; t < p.T; t++)
                for (int64_t r = 0; r < rows; r++)
                    narrow(sums[t * PORTION + r], (T*)p.out + t * p.D + first + r);
        }
    }
}

}  // namespace

// 0, or 1 if a choice is no expert.
extern "C" int64_t experts_decode(const Problem* p, int64_t is_bf16) {
    for (int64_t i = 0; i < p->T * p->K; i++)
        if (p->experts[i] < 0 || p->experts[i] >= p->E) return 1;
    is_bf16 ? mix<BfloatRows>(*p) : mix<FloatRows>(*p);
    return 0;
}
