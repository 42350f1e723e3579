// Vectors of floats in the compiler's own notation, so that one text serves AVX-512, AVX2 and machines without either.
// LANES is the width that the flags allow; PAIRS says whether products of bfloat16 pairs are one instruction.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#else
#define LANES 8
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS 1
#else
#define PAIRS 0
#endif
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t bf16;

INLINE Lanes load(const void* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
INLINE void store(void* to, Lanes x) { std::memcpy(to, &x, sizeof x); }
INLINE Lanes all(float x) { return x - Lanes{}; }
INLINE Ints all_ints(int32_t x) { return x - Ints{}; }
INLINE Ints bits(Lanes x) { return (Ints)x; }
INLINE Lanes pick(Ints mask, Lanes yes, Lanes no) { return (Lanes)((mask & (Ints)yes) | (~mask & (Ints)no)); }

INLINE float sum_of(Lanes x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    float part[LANES];
    store(part, x);
    return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
#endif
}

INLINE float widen(bf16 x) {
    uint32_t wide = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
INLINE float widen(float x) { return x; }

// Round to nearest, ties to even; NaN stays NaN.
INLINE bf16 narrow(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return bf16((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
template <class T> INLINE T narrow_to(float x);
template <> INLINE bf16 narrow_to<bf16>(float x) { return narrow(x); }
template <> INLINE float narrow_to<float>(float x) { return x; }

// The same rounding of lanes that hold no NaN, left in the upper half of each lane.
INLINE Ints rounded(Lanes x) {
    Ints wide = bits(x);
    return wide + 0x7fff + ((wide >> 16) & 1);
}

// 2^x within 2 units in the last place; 0 below the normal range, so that 2^-inf is 0; NaN stays NaN. x <= 127.
INLINE Lanes exp2_lanes(Lanes x) {
    Ints tiny = x < -126.0f;
    x = pick(tiny, all(-126.0f), x);
    Lanes shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer lands in the low bits
    Lanes f = x - (shifted - 12582912.0f);
    Lanes p = all(1.5403530e-4f);  // Taylor series of 2^f around 0, |f| <= 1/2
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    Ints exponent = bits(shifted) << 23;
    return pick(tiny, Lanes{}, (Lanes)(bits(p) + exponent));
}
