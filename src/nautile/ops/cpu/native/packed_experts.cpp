// A mixture of SwiGLU experts with packed weights, for a few tokens; see panels.h for the layout and experts.cpp for the
// same with weights as they are stored. Threads take panels as they become free; every number is made by one of them.

#include <cmath>
#include <memory>
#include <vector>

#include "panels.h"

namespace nautile {

// One stack of packed matrices.
struct Stack {
    i64 bits;
    const char* data;
    const float* scales;
    i64 group, outputs, inputs;
};

// The fields of `Problem` in ops/cpu/packed_mixture.py, in its order.
struct Problem {
    Stack gate_up, down;
    const void* x;           // [T, D], `x_row` numbers from one token to the next
    i64 x_row;
    const i64* experts;      // [T, K]
    const float* weights;    // [T, K]
    void* out;               // [T, D], without gaps
    i64 T, K, threads;
};

// Choices in the order of their experts: those of the i-th chosen one are starts[i] to starts[i + 1] - 1.
struct Order {
    std::vector<i64> choices, starts, names;
    explicit Order(const Problem& p) : choices(p.T * p.K) {
        for (i64 i = 0; i < p.T * p.K; i++) choices[i] = i;
        std::stable_sort(choices.begin(), choices.end(), [&](i64 a, i64 b) { return p.experts[a] < p.experts[b]; });
        for (i64 i = 0; i < p.T * p.K; i++)
            if (names.empty() || p.experts[choices[i]] != names.back()) {
                starts.push_back(i);
                names.push_back(p.experts[choices[i]]);
            }
        starts.push_back(p.T * p.K);
    }
};

// Panel `p` of matrix `name`, times rows [first, first + rows) of all pairs; take(row, output, value) gets the products.
template <class Format, class Take>
static void times_panel(const Format& format, const Stack& s, i64 name, i64 p, const typename Format::Pairs::Pair* pairs,
                        i64 first, i64 rows, const Take& take) {
    const i64 units = units_of(s.inputs), panels = (s.outputs + PANEL - 1) / PANEL;
    const i64 groups = s.scales ? (s.inputs + s.group - 1) / s.group : 0;
    const char* data = s.data + (name * panels + p) * units * Format::BYTES;
    const float* scales = s.scales ? s.scales + (name * panels + p) * groups * PANEL : nullptr;
    alignas(64) float totals[MOST_ROWS * PANEL];
    for (i64 r = 0; r < rows; r += MOST_ROWS) {
        const i64 some = std::min(MOST_ROWS, rows - r);
        panel(format, data, scales, s.group, pairs + 2 * units * (first + r), some, s.inputs, totals);
        for (i64 i = 0; i < some; i++)
            for (i64 o = 0; o < std::min<i64>(PANEL, s.outputs - p * PANEL); o++)
                take(first + r + i, p * PANEL + o, totals[i * PANEL + o]);
    }
}

// Rows of tokens of each expert, at most MOST_ROWS at a time, as pairs.
template <class Pairs, class T>
static void pair_up_choices(const T* rows, i64 inputs, const Order& order, typename Pairs::Pair* pairs) {
    for (size_t e = 0; e < order.names.size(); e++)
        for (i64 r = order.starts[e]; r < order.starts[e + 1]; r += MOST_ROWS)
            pair_up<Pairs>(rows + r * inputs, inputs, std::min(MOST_ROWS, order.starts[e + 1] - r), inputs,
                           pairs + 2 * units_of(inputs) * r);
}

template <class Up, class Down, class T>
static void mix(const Problem& p) {
    using Pairs = typename Up::Pairs;
    const Order order(p);
    const i64 n = p.T * p.K, D = p.gate_up.inputs, F = p.down.inputs, chosen = i64(order.names.size());
    const i64 up_panels = (2 * F + PANEL - 1) / PANEL, down_panels = (D + PANEL - 1) / PANEL;
    const i64 room = 2 * std::max(units_of(D), units_of(F)) * n;
    const std::unique_ptr<typename Pairs::Pair[]> pairs(new typename Pairs::Pair[room]);
    const std::unique_ptr<T[]> rows(new T[n * std::max(D, F)]);
    const std::unique_ptr<float[]> hidden(new float[n * 2 * F]);
    for (i64 i = 0; i < n; i++)
        std::memcpy(&rows[i * D], static_cast<const T*>(p.x) + order.choices[i] / p.K * p.x_row, D * sizeof(T));
    pair_up_choices<Pairs>(rows.get(), D, order, pairs.get());
    const Up up;
    const Down down;
#pragma omp parallel num_threads(p.threads)
    {
        std::vector<float> sums(p.T * PANEL);
#pragma omp for schedule(dynamic)
        for (i64 i = 0; i < chosen * up_panels; i++) {
            const i64 e = i / up_panels, first = order.starts[e];
            times_panel(up, p.gate_up, order.names[e], i % up_panels, pairs.get(), first, order.starts[e + 1] - first,
                        [&](i64 row, i64 o, float value) { hidden[row * 2 * F + o] = value; });
        }
#pragma omp for
        for (i64 i = 0; i < n; i++)
            for (i64 f = 0; f < F; f++) {
                const float gate = hidden[i * 2 * F + f];
                narrow(gate / (1 + std::exp(-gate)) * hidden[i * 2 * F + F + f], &rows[i * F + f]);
            }
#pragma omp single
        pair_up_choices<Pairs>(rows.get(), F, order, pairs.get());
#pragma omp for schedule(dynamic)
        for (i64 i = 0; i < down_panels; i++) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (i64 e = 0; e < chosen; e++) {
                const i64 first = order.starts[e];
                times_panel(down, p.down, order.names[e], i, pairs.get(), first, order.starts[e + 1] - first,
                            [&](i64 row, i64 o, float value) {
                                const i64 choice = order.choices[row];
                                sums[choice / p.K * PANEL + o - i * PANEL] += p.weights[choice] * value;
                            });
            }
            for (i64 t = 0; t < p.T; t++)
                for (i64 o = 0; o < std::min<i64>(PANEL, D - i * PANEL); o++)
                    narrow(sums[t * PANEL + o], static_cast<T*>(p.out) + t * D + i * PANEL + o);
        }
    }
}

template <class Pairs, class Up, class T>
static void with_down(const Problem& p) {
    if (p.down.bits == 16)
        mix<Up, Bfloat<Pairs>, T>(p);
    else if (p.down.bits == 8)
        mix<Up, Int8<Pairs>, T>(p);
    else
        mix<Up, Int4<Pairs>, T>(p);
}

template <class Pairs, class T>
static void with_up(const Problem& p) {
    if (p.gate_up.bits == 16)
        with_down<Pairs, Bfloat<Pairs>, T>(p);
    else if (p.gate_up.bits == 8)
        with_down<Pairs, Int8<Pairs>, T>(p);
    else
        with_down<Pairs, Int4<Pairs>, T>(p);
}

}  // namespace nautile

extern "C" void packed_experts(const nautile::Problem* p, nautile::i64 is_bf16) {
    if (is_bf16)
        nautile::with_up<nautile::BestPairs, nautile::u16>(*p);
    else
        nautile::with_up<nautile::FloatPairs, float>(*p);
}
