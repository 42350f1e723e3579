// As many numbers at a time as the machine has lanes, and two ways to multiply pairs of them.
//
// A weight is met in pairs of neighbouring inputs: 32 bits hold two bfloat16. `BfloatPairs` multiplies a pair and adds
// both products to one float32 in one instruction (AVX512_BF16); `FloatPairs` widens both halves to float32 first and
// runs anywhere: the compiler makes AVX-512, AVX2, SSE or NEON code out of the vector types below.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses from one file to another

namespace nautile {

using i64 = std::int64_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;

// Wider vectors than the machine's would be taken apart through memory, twenty times slower.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef std::int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef std::uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * LANES)));

#define NAUTILE_INLINE static inline __attribute__((always_inline))
#define NAUTILE_INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

// Memory is not always aligned: a tensor may be a view into a file. memcpy becomes one load.
template <class Vector>
NAUTILE_INLINE Vector load(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

NAUTILE_INLINE void store(void* p, Floats v) { std::memcpy(p, &v, sizeof v); }

constexpr i64 CHUNK = 2 * LANES;  // bfloat16 numbers in a vector

// The numbers from `row` on, zeros after the first `count`.
NAUTILE_INLINE Words words_of(const u16* row, i64 count) {
    if (count >= CHUNK) return load<Words>(row);
    u16 some[CHUNK] = {};
    if (count > 0) std::memcpy(some, row, count * sizeof(u16));
    return load<Words>(some);
}

NAUTILE_INLINE Floats zeros() { return Floats{}; }

NAUTILE_INLINE float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES];
    std::memcpy(part, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
#endif
}

// e to the x, to two units in the last place; between e^-87 and e^88, which float32 can tell from 0 and infinity.
NAUTILE_INLINE Floats exp(Floats x) {
    x = x < -87.0f ? zeros() - 87.0f : x;
    x = x > 88.0f ? zeros() + 88.0f : x;
    Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the sum is rounded to a whole number
    Floats whole = shifted - 12582912.0f;
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
    Floats p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return (Floats)((Ints)p + (__builtin_convertvector(whole, Ints) << 23));
}

// 2 to the x, to two units in the last place; 0 below the normal range, so that 2^-inf is 0; NaN stays NaN. x <= 127.
NAUTILE_INLINE Floats exp2(Floats x) {
    Ints tiny = x < -126.0f;
    x = tiny ? zeros() - 126.0f : x;
    Floats shifted = x + 12582912.0f;  // 1.5 · 2^23: the nearest integer lands in the low bits
    Floats f = x - (shifted - 12582912.0f);
    Floats p = f * 1.5403530e-4f + 1.3333558e-3f;  // Taylor series of 2^f around 0, |f| <= 1/2
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return tiny ? zeros() : (Floats)((Ints)p + ((Ints)shifted << 23));
}

NAUTILE_INLINE Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

NAUTILE_INLINE float widen(float x) { return x; }
NAUTILE_INLINE float widen(u16 bits) {
    u32 wide = u32(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
NAUTILE_INLINE u16 to_bfloat(float x) {
    u32 bits;
    std::memcpy(&bits, &x, sizeof bits);
    u32 nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return u16(x != x ? (bits >> 16) | 0x40 : nearest);  // no branch: loops over this become vectors
}

NAUTILE_INLINE void narrow(float x, float* out) { *out = x; }
NAUTILE_INLINE void narrow(float x, u16* out) { *out = to_bfloat(x); }

// TILE: rows of x whose sums for 32 outputs stay in registers; DOT_OUTPUTS and DOT_ROWS: whose do where sums run along
// the inputs.
struct FloatPairs {
    struct Wide {
        Floats even, odd;
    };
    struct Pair {
        float even, odd;
    };
    static constexpr int TILE = LANES == 16 ? 8 : LANES == 8 ? 2 : 1;
    static constexpr int DOT_OUTPUTS = 4, DOT_ROWS = LANES == 16 ? 3 : 2;
    NAUTILE_INLINE Wide from_bfloat(Words w) { return {(Floats)(w << 16), (Floats)(w & 0xffff0000u)}; }
    NAUTILE_INLINE Wide spread(Pair x) { return {zeros() + x.even, zeros() + x.odd}; }
    NAUTILE_INLINE Pair pair(u16 even, u16 odd) { return {widen(even), widen(odd)}; }
    NAUTILE_INLINE Pair pair(float even, float odd) { return {even, odd}; }
    NAUTILE_INLINE Floats add_products(Floats sums, Wide a, Wide b) {
        return sums + a.even * b.even + a.odd * b.odd;
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define NAUTILE_BFLOAT_PAIRS
struct BfloatPairs {
    using Wide = __m512i;
    using Pair = u32;
    static constexpr int TILE = 12, DOT_OUTPUTS = 8, DOT_ROWS = 3;
    NAUTILE_INLINE Wide from_bfloat(Words w) { return (__m512i)w; }
    NAUTILE_INLINE Wide spread(Pair x) { return _mm512_set1_epi32(int(x)); }
    NAUTILE_INLINE Pair pair(u16 even, u16 odd) { return u32(even) | u32(odd) << 16; }
    NAUTILE_INLINE Floats add_products(Floats sums, Wide a, Wide b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
    }
};
using BestPairs = BfloatPairs;

// words[16][columns], `apart` words apart, from 16 rows of 16 words each, of which the first `columns` are kept.
NAUTILE_INLINE void turn(__m512i r[16], u32* words, i64 apart, i64 columns) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    // Now a quarter of r[i + j] has word 4 · quarter + j of rows i to i + 3; quarters change places twice.
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    __mmask16 kept = __mmask16((1u << columns) - 1);
    for (int j = 0; j < 8; j++) {
        _mm512_mask_storeu_epi32(words + j * apart, kept, _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88));
        _mm512_mask_storeu_epi32(words + (j + 8) * apart, kept, _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd));
    }
}
#else
using BestPairs = FloatPairs;
#endif

}  // namespace nautile
