// Sixteen numbers at a time, and two ways to multiply pairs of them.
//
// A weight is met in pairs of neighbouring inputs: 32 bits hold two bfloat16. `BfloatPairs` multiplies a pair and adds
// both products to one float32 in one instruction (AVX512_BF16); `FloatPairs` widens both halves to float32 first and
// runs anywhere: the compiler makes AVX-512, AVX2, NEON or plain code out of the vector types below.

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

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));
typedef std::int8_t Bytes __attribute__((vector_size(16)));

#define NAUTILE_INLINE static inline __attribute__((always_inline))
#define NAUTILE_INLINE_MEMBER inline __attribute__((always_inline))

// Memory is not always aligned: a tensor may be a view into a file. memcpy becomes one load.
template <class Vector>
NAUTILE_INLINE Vector load(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

NAUTILE_INLINE void store(void* p, Floats v) { std::memcpy(p, &v, sizeof v); }

NAUTILE_INLINE Floats zeros() { return Floats{}; }

NAUTILE_INLINE float sum(Floats v) {
    float part[LANES];
    std::memcpy(part, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

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
    if (x != x) return u16(bits >> 16) | 0x40;
    return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

NAUTILE_INLINE void narrow(float x, float* out) { *out = x; }
NAUTILE_INLINE void narrow(float x, u16* out) { *out = to_bfloat(x); }

struct FloatPairs {
    struct Wide {
        Floats even, odd;
    };
    struct Pair {
        float even, odd;
    };
#if defined(__AVX512F__)
    static constexpr int TILE = 8;  // rows whose sums stay in registers
#elif defined(__AVX__)
    static constexpr int TILE = 2;
#else
    static constexpr int TILE = 1;
#endif
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
    static constexpr int TILE = 12;
    NAUTILE_INLINE Wide from_bfloat(Words w) { return (__m512i)w; }
    NAUTILE_INLINE Wide spread(Pair x) { return _mm512_set1_epi32(int(x)); }
    NAUTILE_INLINE Pair pair(u16 even, u16 odd) { return u32(even) | u32(odd) << 16; }
    NAUTILE_INLINE Floats add_products(Floats sums, Wide a, Wide b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
    }
};
using BestPairs = BfloatPairs;
#else
using BestPairs = FloatPairs;
#endif

}  // namespace nautile
