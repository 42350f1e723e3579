// y = x Wᵀ + b with a packed weight; see panels.h for the layout.

#include <memory>

#include "panels.h"

namespace nautile {

constexpr i64 WORTH_THREADS = 1 << 16;  // bytes of weights below which waking a thread takes longer than reading them

template <class Format, class T>
static void multiply(const char* weights, const float* scales, i64 group, const T* x, i64 x_stride, const float* bias,
                     T* y, i64 rows, i64 outputs, i64 inputs, int threads) {
    using Pairs = typename Format::Pairs;
    i64 units = units_of(inputs), panels = (outputs + PANEL - 1) / PANEL;
    i64 groups = scales ? (inputs + group - 1) / group : 0, bytes = units * Format::BYTES;
    std::unique_ptr<typename Pairs::Pair[]> pairs(new typename Pairs::Pair[2 * units * std::min(rows, MOST_ROWS)]);
    if (panels * bytes < WORTH_THREADS) threads = 1;
    const Format format;
    for (i64 r = 0; r < rows; r += MOST_ROWS, x += MOST_ROWS * x_stride, y += MOST_ROWS * outputs) {
        i64 some = std::min(MOST_ROWS, rows - r);
        pair_up<Pairs>(x, x_stride, some, inputs, pairs.get());
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (i64 p = 0; p < panels; p++) {
            alignas(64) float totals[MOST_ROWS * PANEL];
            panel(format, weights + p * bytes, scales ? scales + p * groups * PANEL : nullptr, group, pairs.get(), some,
                  inputs, totals);
            i64 first = p * PANEL, n = std::min<i64>(PANEL, outputs - first);
            for (i64 i = 0; i < some; i++)
                for (i64 o = 0; o < n; o++)
                    narrow(totals[i * PANEL + o] + (bias ? bias[first + o] : 0.0f), y + i * outputs + first + o);
        }
    }
}

template <class Pairs, class T, class... Arguments>
static void in_format(int bits, const char* weights, const Arguments&... arguments) {
    if (bits == 16)
        multiply<Bfloat<Pairs>, T>(weights, arguments...);
    else if (bits == 8)
        multiply<Int8<Pairs>, T>(weights, arguments...);
    else
        multiply<Int4<Pairs>, T>(weights, arguments...);
}

}  // namespace nautile

using namespace nautile;

// x [rows, inputs] with `x_stride` numbers from row to row; y [rows, outputs]; both bfloat16.
extern "C" void packed_linear_bf16(int bits, const char* weights, const float* scales, i64 group, const u16* x,
                                   i64 x_stride, const float* bias, u16* y, i64 rows, i64 outputs, i64 inputs,
                                   int threads) {
    in_format<BestPairs, u16>(bits, weights, scales, group, x, x_stride, bias, y, rows, outputs, inputs, threads);
}

// The same in float32.
extern "C" void packed_linear_f32(int bits, const char* weights, const float* scales, i64 group, const float* x,
                                  i64 x_stride, const float* bias, float* y, i64 rows, i64 outputs, i64 inputs,
                                  int threads) {
    in_format<FloatPairs, float>(bits, weights, scales, group, x, x_stride, bias, y, rows, outputs, inputs, threads);
}
