// y = x Wᵀ + b, and y = silu(x W_gateᵀ) ⊙ (x W_upᵀ), for few rows of x and weights as they are stored.

#include "rows.h"

namespace nautile {

constexpr i64 WORTH_THREADS = 1 << 16;  // bytes of weights below which waking a thread takes longer than reading them

// finish(first output, how many, totals of one matrix or more, one behind the other) for every block of outputs.
template <int MATRICES, class Finish>
static void blocks(const Rows (&w)[MATRICES], const u16* x, i64 x_stride, i64 rows, i64 inputs, int threads,
                   const Finish& finish) {
    i64 outputs = w[0].outputs;
    if (MATRICES * outputs * inputs * i64(sizeof(u16)) < WORTH_THREADS) threads = 1;
    const Multiplier<BestPairs> multiplier(x, x_stride, rows, inputs);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (i64 first = 0; first < outputs; first += PANEL) {
        alignas(64) float totals[MATRICES][MOST_ROWS * PANEL];
        for (int j = 0; j < MATRICES; j++) multiplier.block(w[j], first, totals[j]);
        finish(first, std::min<i64>(PANEL, outputs - first), totals);
    }
}

}  // namespace nautile

using namespace nautile;

// Everything bfloat16 but the bias; strides in numbers from row to row; rows <= 48; y without gaps.
extern "C" void linear_bf16(const u16* x, i64 x_stride, const u16* weights, i64 stride, const float* bias, u16* y,
                            i64 rows, i64 outputs, i64 inputs, int threads) {
    const Rows w[1] = {{weights, stride, outputs}};
    blocks(w, x, x_stride, rows, inputs, threads, [=](i64 first, i64 n, const auto& totals) {
        for (i64 i = 0; i < rows; i++)
            for (i64 o = 0; o < n; o++)
                y[i * outputs + first + o] = to_bfloat(totals[0][i * PANEL + o] + (bias ? bias[first + o] : 0.0f));
    });
}

extern "C" void gated_linear_bf16(const u16* x, i64 x_stride, const u16* gate, i64 gate_stride, const u16* up,
                                  i64 up_stride, u16* y, i64 rows, i64 outputs, i64 inputs, int threads) {
    const Rows w[2] = {{gate, gate_stride, outputs}, {up, up_stride, outputs}};
    blocks(w, x, x_stride, rows, inputs, threads, [=](i64 first, i64 n, const auto& totals) {
        for (i64 i = 0; i < rows; i++) {
            float product[PANEL];
            for (int o = 0; o < PANEL; o += LANES) {
                Floats g = load<Floats>(totals[0] + i * PANEL + o), u = load<Floats>(totals[1] + i * PANEL + o);
                store(product + o, silu(g) * u);
            }
            for (i64 o = 0; o < n; o++) y[i * outputs + first + o] = to_bfloat(product[o]);
        }
    });
}
