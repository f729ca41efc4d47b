// Vectors of queries: GCC's and clang's vector extensions, so that one source serves AVX-512, AVX2, NEON and plain C.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "lanes.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace native {

// A vector may have any address of its element type, and alias arrays of it.
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
  // Integers as wide as T: the result of a comparison of vectors, -1 where it holds.
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Bits mask __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using VectorMask = typename VectorOf<T>::mask;

template <class T>
NATIVE_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <class T>
NATIVE_INLINE void store(T* to, Vector<T> x) {
  *reinterpret_cast<Vector<T>*>(to) = x;
}

template <class T>
NATIVE_INLINE Vector<T> all(T x) {
  return Vector<T>{} + x;
}

template <class T>
NATIVE_INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  // The compiler makes a comparison and a blend of `a > b ? a : b`.
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

// The smaller number; NaN of a stays NaN.
template <class T>
NATIVE_INLINE Vector<T> smaller(Vector<T> a, Vector<T> b) {
  return a > b ? b : a;
}

// The sum of the lanes, of halves.
template <class T>
NATIVE_INLINE T sum_of(Vector<T> x) {
  for (int step = lanes<T> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
}

// a . b, summed per lane and then in double, which loses no more than the last rounding.
template <class T>
T dot(const T* a, const T* b, int count) {
  constexpr int W = lanes<T>;
  Vector<T> sums{};
  int i = 0;
  for (; i + W <= count; i += W) sums += load(a + i) * load(b + i);
  double total = 0;
  for (int lane = 0; lane < W; ++lane) total += static_cast<double>(sums[lane]);
  for (; i < count; ++i) total += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return static_cast<T>(total);
}

#if defined(__AVX512F__)
// Transposes 16 x 16 numbers of 32 bits.
NATIVE_INLINE void transpose16(__m512i* rows) {
  __m512i half[16];
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      half[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
      half[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    rows[j] = _mm512_shuffle_i32x4(half[j], half[j + 8], 0x88);
    rows[j + 8] = _mm512_shuffle_i32x4(half[j], half[j + 8], 0xdd);
  }
}
#endif

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();
constexpr double log2_of_e = 1.44269504088896340736;
constexpr double ln_of_2 = 0.69314718055994530942;

// Adding `magic` rounds a float to a whole number, which is then in the low bits. Below `least`
// powers of two are denormal.
constexpr float magic = 12582912.0f, least = magic - 125.0f;  // 1.5 * 2^23

#if defined(__AVX512F__)
// A product as a whole number and a remainder of at most 1/2, without an intermediate rounding.
struct Exponent {
  __m512 shifted, whole, rest;

  NATIVE_INLINE Exponent(__m512 x, __m512 factor)
      : shifted(_mm512_fmadd_ps(x, factor, _mm512_set1_ps(magic))), whole(_mm512_sub_ps(shifted, _mm512_set1_ps(magic))),
        rest(_mm512_fmsub_ps(x, factor, whole)) {}

  // power * 2^whole; 0 for denormal results.
  NATIVE_INLINE __m512 applied_to(__m512 power) const {
    // Not "less than", so that NaN stays NaN.
    const __mmask16 normal = _mm512_cmp_ps_mask(shifted, _mm512_set1_ps(least), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, power, whole);
  }
};
#endif

// 2^(x * factor) for x <= 0 to the precision of T; 0 for denormal results, which would cost a
// hundred cycles; NaN stays NaN. The product is not rounded before 1.5 * 2^23 is added, which
// rounds it to a whole number in the low bits.
NATIVE_INLINE Vector<float> exp2_of(Vector<float> x, float factor) {
  constexpr float coefficients[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                                    2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f};
#if defined(__AVX512F__)
  const Exponent by((__m512)x, _mm512_set1_ps(factor));
  __m512 power = _mm512_set1_ps(coefficients[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; ++i) power = _mm512_fmadd_ps(power, by.rest, _mm512_set1_ps(coefficients[i]));
  return (Vector<float>)by.applied_to(power);
#else
  const Vector<float> shifted = x * factor + magic;
  const Vector<float> rest = x * factor - (shifted - magic);
  Vector<float> power = all(coefficients[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; ++i) power = power * rest + coefficients[i];
  const VectorMask<float> exponent = (VectorMask<float>)shifted << 23;
  const Vector<float> result = (Vector<float>)((VectorMask<float>)power + exponent);
  return shifted < least ? Vector<float>{} : x == x ? result : x;
#endif
}

NATIVE_INLINE Vector<double> exp2_of(Vector<double> x, double factor) {
  constexpr double magic = 6755399441055744.0, least = magic - 1000.0;
  const Vector<double> shifted = x * factor + magic;
  const Vector<double> rest = (x * factor - (shifted - magic)) * ln_of_2;
  Vector<double> power = all(1.0);
  // Taylor's series: |rest| <= 0.35, so that fourteen terms are exact to the last bit.
#pragma GCC unroll 14
  for (int i = 14; i > 0; --i) power = power * rest / static_cast<double>(i) + 1.0;
  const VectorMask<double> exponent = (VectorMask<double>)shifted << 52;
  const Vector<double> result = (Vector<double>)((VectorMask<double>)power + exponent);
  return shifted < least ? Vector<double>{} : x == x ? result : x;
}

// An online softmax in base 2 continues from a natural log-sum-exp as from this score and a sum of
// 1. factor > 0: a pair's weight is 2^(factor * (score - the maximum)).
template <class T>
NATIVE_INLINE T score_from(T lse, double factor) {
  return static_cast<T>(lse * (log2_of_e / factor));
}

// The natural log-sum-exp of a maximum and a sum of weights; -inf if nothing is seen.
template <class T>
NATIVE_INLINE T lse_from(T most, T sum, double factor) {
  if (sum == T(0)) return -infinity<T>;
  return static_cast<T>((most * factor + std::log2(sum)) * ln_of_2);
}

}  // namespace native
