// y = x / sqrt(mean(x²) + eps) ⊙ weight, row by row; x is read twice while it is in the first-level cache.

#include <cmath>

#include "lanes.h"

namespace nautile {

constexpr i64 WORTH_THREADS = 1 << 17;  // numbers below which waking a thread takes longer than the work

NAUTILE_INLINE Floats lanes(const float* p) { return load<Floats>(p); }
NAUTILE_INLINE Floats lanes(const u16* p) {
    return (Floats)(__builtin_convertvector(load<Halves>(p), Words) << 16);
}

template <class T>
static float square_sum(const T* x, i64 size) {
    Floats sums[4] = {};
    i64 k = 0;
    for (; k + 4 * LANES <= size; k += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            Floats v = lanes(x + k + j * LANES);
            sums[j] += v * v;
        }
    float rest = 0;
    for (; k < size; k++) {
        float v = widen(x[k]);
        rest += v * v;
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class X, class W>
static void rms_norm(const X* x, i64 stride, const W* weight, float eps, X* y, i64 rows, i64 size, int threads) {
    if (rows * size < WORTH_THREADS) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 i = 0; i < rows; i++) {
        const X* row = x + i * stride;
        X* out = y + i * size;
        float scale = 1.0f / std::sqrt(square_sum(row, size) / float(size) + eps);
        for (i64 k = 0; k < size; k++) narrow(widen(row[k]) * scale * widen(weight[k]), out + k);
    }
}

}  // namespace nautile

using namespace nautile;

// x [rows, size] with `stride` numbers from row to row; y without gaps.
extern "C" {
void rms_norm_f32_f32(const float* x, i64 stride, const float* weight, float eps, float* y, i64 rows, i64 size,
                      int threads) {
    rms_norm(x, stride, weight, eps, y, rows, size, threads);
}
void rms_norm_bf16_f32(const u16* x, i64 stride, const float* weight, float eps, u16* y, i64 rows, i64 size,
                       int threads) {
    rms_norm(x, stride, weight, eps, y, rows, size, threads);
}
void rms_norm_bf16_bf16(const u16* x, i64 stride, const u16* weight, float eps, u16* y, i64 rows, i64 size,
                        int threads) {
    rms_norm(x, stride, weight, eps, y, rows, size, threads);
}
}
