// The operations of functions.h as loops over registers: one loop per operation and type, without
// branches where possible, so that compilers vectorize them.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "functions.h"

namespace native::loops {

// Registers are blocks of so many numbers; the last block is filled with copies of earlier numbers.
constexpr int unit = 16;

struct Step;

// The context of steps: registers as offsets from `base`, and the slice of the tile.
struct Place {
  char* base;
  const Array* operands;
  void* const* sums;
  const Pairs* pairs;
  const void* scores;
  const void* grads;
  int ld;
  int row;   // first key of the slice
  int rows;  // keys of the slice
  bool is_out_of_range = false;  // whether an index of an operand is
  bool zero_divisor = false;

  template <class T>
  T* at(int offset) const {
    return reinterpret_cast<T*>(base + offset);
  }
};

using Run = void (*)(Place& place, const Step& step, int n);

struct Step {
  Run run;
  int out;
  int in[3];
  int64_t number;
  int operand, dim;
  bool contiguous;  // whether an address is one of the contiguous sums
};

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof(To));
  return to;
}

template <class F, class R, class A>
void unary(Place& place, const Step& step, int n) {
  R* __restrict out = place.at<R>(step.out);
  const A* __restrict a = place.at<A>(step.in[0]);
  for (int i = 0; i < n; i += unit)
    for (int j = 0; j < unit; ++j) out[i + j] = F::of(a[i + j]);
}

// The same for functions of the standard library, which compilers do not vectorize.
template <class F, class T>
void called(Place& place, const Step& step, int n) {
  T* out = place.at<T>(step.out);
  const T* a = place.at<T>(step.in[0]);
  for (int i = 0; i < n; ++i) out[i] = F::of(a[i]);
}

template <class F, class R, class A>
void binary(Place& place, const Step& step, int n) {
  R* __restrict out = place.at<R>(step.out);
  const A* __restrict a = place.at<A>(step.in[0]);
  const A* __restrict b = place.at<A>(step.in[1]);
  for (int i = 0; i < n; i += unit)
    for (int j = 0; j < unit; ++j) out[i + j] = F::of(a[i + j], b[i + j]);
}

// By bits, as GCC 12 miscompiles `which[i] ? a[i] : b[i]` with a narrower `which`. T: unsigned, of
// the numbers' size.
template <class T>
inline T chosen(uint8_t which, T a, T b) {
  const T all = T(0) - T(which != 0);
  return (a & all) | (b & ~all);
}

template <class T>
void choose(Place& place, const Step& step, int n) {
  T* __restrict out = place.at<T>(step.out);
  const uint8_t* __restrict which = place.at<uint8_t>(step.in[0]);
  const T* __restrict a = place.at<T>(step.in[1]);
  const T* __restrict b = place.at<T>(step.in[2]);
  for (int i = 0; i < n; i += unit)
    for (int j = 0; j < unit; ++j) out[i + j] = chosen<T>(which[i + j], a[i + j], b[i + j]);
}

// Elementary functions of float: about 1 ulp. -------------------------------------------------------------------------------

inline float power_of_two(int32_t exponent) { return bits<float>((exponent + 127) << 23); }

inline float exp_of(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2**23: the nearest whole number in the last bits
  const float whole = shifted - 12582912.0f;
  float r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(bits<uint32_t>(shifted) - 0x4b400000u);
  const int32_t half = exponent >> 1;  // in two steps, for denormal results
  return p * power_of_two(half) * power_of_two(exponent - half);
}

inline float tanh_of(float x) {
  const float magnitude = std::fabs(x);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = x + x * (z * p);
  const float large = 1.0f - 2.0f / (exp_of(2.0f * (magnitude > 20.0f ? 20.0f : magnitude)) + 1.0f);
  return magnitude < 0.625f ? small : std::copysign(large, x);
}

// The exponent, and the natural logarithm of the fraction in double, precise enough that a float
// result is nearly always the nearest one. x: positive and normal as a double.
struct Fraction {
  double exponent, log;
};

inline Fraction fraction_of(double x) {
  constexpr int64_t start = 0x3fe6a09e667f3bcd;  // sqrt(1/2)
  const int64_t pattern = bits<int64_t>(x);
  const int64_t exponent = (pattern - start) >> 52;
  const double m = bits<double>(pattern - (exponent << 52));
  const double f = (m - 1.0) / (m + 1.0), z = f * f;
  double p = 1.0 / 15;
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  p = p * z + 1.0;
  // The exponent as a double by adding its low bits to 1.5 * 2**52.
  const double whole = bits<double>(exponent + 0x4338000000000000) - 6755399441055744.0;
  return {whole, 2.0 * f * p};
}

inline double edges_of_log(double x, double log) {
  log = x == std::numeric_limits<double>::infinity() ? x : log;
  log = x == 0.0 ? -std::numeric_limits<double>::infinity() : log;
  return x >= 0.0 ? log : std::numeric_limits<double>::quiet_NaN();
}

inline double log_of(double x) {
  const Fraction part = fraction_of(x);
  return edges_of_log(x, part.exponent * 0.6931471805599453 + part.log);
}

struct Exp {
  static float of(float x) { return exp_of(x); }
  static double of(double x) { return std::exp(x); }
};
struct Tanh {
  static float of(float x) { return tanh_of(x); }
  static double of(double x) { return std::tanh(x); }
};
struct Sigmoid {
  static float of(float x) { return 1.0f / (1.0f + exp_of(-x)); }
  static double of(double x) { return 1.0 / (1.0 + std::exp(-x)); }
};
struct Log {
  static float of(float x) { return static_cast<float>(log_of(x)); }
  static double of(double x) { return std::log(x); }
};
struct Log2 {
  static float of(float x) {
    const Fraction part = fraction_of(x);
    return static_cast<float>(edges_of_log(x, part.exponent + part.log * 1.4426950408889634));
  }
  static double of(double x) { return std::log2(x); }
};
struct Log10 {
  static float of(float x) { return static_cast<float>(log_of(x) * 0.4342944819032518); }
  static double of(double x) { return std::log10(x); }
};
struct Log1p {
  static float of(float x) {
    const double wide = x, u = 1.0 + wide;
    const double quotient = wide / (u - 1.0);  // the rounding error of u
    const double corrected = log_of(u) * quotient;
    const bool is_plain = (u == 1.0) | (u == std::numeric_limits<double>::infinity());
    return static_cast<float>(is_plain ? wide : corrected);
  }
  static double of(double x) { return std::log1p(x); }
};

#define NATIVE_STANDARD(Name, function)        \
  struct Name {                                \
    template <class T>                         \
    static T of(T x) {                         \
      return static_cast<T>(std::function(x)); \
    }                                          \
  };
NATIVE_STANDARD(Exp2, exp2)
NATIVE_STANDARD(Expm1, expm1)
NATIVE_STANDARD(Sin, sin)
NATIVE_STANDARD(Cos, cos)
NATIVE_STANDARD(Tan, tan)
NATIVE_STANDARD(Sinh, sinh)
NATIVE_STANDARD(Cosh, cosh)
NATIVE_STANDARD(Asin, asin)
NATIVE_STANDARD(Acos, acos)
NATIVE_STANDARD(Atan, atan)
NATIVE_STANDARD(Erf, erf)
NATIVE_STANDARD(Floor, floor)
NATIVE_STANDARD(Ceiling, ceil)
NATIVE_STANDARD(Round, nearbyint)
NATIVE_STANDARD(Truncate, trunc)
NATIVE_STANDARD(SquareRoot, sqrt)
#undef NATIVE_STANDARD

// Arithmetic: whole numbers wrap around. ------------------------------------------------------------------------------------

struct Negate {
  template <class T>
  static T of(T x) {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(Unsigned<T>(0) - Unsigned<T>(x));
    else return -x;
  }
};
struct Absolute {
  template <class T>
  static T of(T x) {
    if constexpr (std::is_integral_v<T>) return x < 0 ? Negate::of(x) : x;
    else return std::fabs(x);
  }
};
struct Sign {
  template <class T>
  static T of(T x) {
    return static_cast<T>((x > T(0)) - (x < T(0)));
  }
};
struct Add {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b));
    else return a + b;
  }
};
struct Subtract {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b));
    else return a - b;
  }
};
struct Multiply {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(Unsigned<T>(a) * Unsigned<T>(b));
    else return a * b;
  }
};
struct Divide {
  template <class T>
  static T of(T a, T b) {
    return a / b;
  }
};
struct Minimum {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) return a < b ? a : b;
    else return ((a < b) | (a != a)) ? a : b;
  }
};
struct Maximum {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) return a > b ? a : b;
    else return ((a > b) | (a != a)) ? a : b;
  }
};
struct FloorDivide {
  // Exact: different quotients of 32-bit numbers differ by more than a double's rounding.
  static int32_t of(int32_t a, int32_t b) {
    const double quotient = std::floor(static_cast<double>(a) / static_cast<double>(b == 0 ? 1 : b));
    return static_cast<int32_t>(static_cast<uint32_t>(static_cast<int64_t>(quotient)));
  }
  static int64_t of(int64_t a, int64_t b) {
    if (b == 0 || b == -1) return b == 0 ? 0 : Negate::of(a);
    const int64_t quotient = a / b;
    return quotient - (a % b != 0 && (a < 0) != (b < 0));
  }
  template <class T>
  static T floating(T a, T b) {
    if (b == 0) return a / b;
    const T rest = std::fmod(a, b);
    T quotient = (a - rest) / b;
    if (rest != 0 && (b < 0) != (rest < 0)) quotient -= 1;
    if (quotient == 0) return std::copysign(T(0), a / b);
    const T whole = std::floor(quotient);
    return quotient - whole > T(0.5) ? whole + 1 : whole;
  }
  static float of(float a, float b) { return floating(a, b); }
  static double of(double a, double b) { return floating(a, b); }
};
struct Remainder {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return b == 0 ? T(0) : Subtract::of(a, Multiply::of(FloorDivide::of(a, b), b));
    } else {
      const T rest = std::fmod(a, b);
      return rest != 0 && (b < 0) != (rest < 0) ? rest + b : rest;
    }
  }
};
struct Fmod {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) return b == 0 || b == -1 ? T(0) : static_cast<T>(a % b);
    else return std::fmod(a, b);
  }
};
struct Power {
  template <class T>
  static T of(T a, T b) {
    return std::pow(a, b);
  }
};
struct Atan2 {
  template <class T>
  static T of(T a, T b) {
    return std::atan2(a, b);
  }
};
struct Equal {
  template <class T>
  static uint8_t of(T a, T b) {
    return a == b;
  }
};
struct NotEqual {
  template <class T>
  static uint8_t of(T a, T b) {
    return a != b;
  }
};
struct Less {
  template <class T>
  static uint8_t of(T a, T b) {
    return a < b;
  }
};
struct LessEqual {
  template <class T>
  static uint8_t of(T a, T b) {
    return a <= b;
  }
};
struct Both {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Either {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Exclusive {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
struct Complement {
  static uint8_t of(uint8_t x) { return x ^ 1; }
  template <class T>
  static T of(T x) {
    return ~x;
  }
};
struct ShiftLeft {
  static int64_t of(int64_t a, int64_t b) { return b < 0 || b > 63 ? 0 : static_cast<int64_t>(static_cast<uint64_t>(a) << b); }
};
struct ShiftRight {
  static int64_t of(int64_t a, int64_t b) { return a >> (b < 0 || b > 63 ? 63 : b); }
};

// Conversions ---------------------------------------------------------------------------------------------------------------

template <class R>
struct To {
  template <class A>
  static R of(A x) {
    if constexpr (std::is_same_v<R, uint8_t>) {
      return x != A(0);
    } else if constexpr (std::is_floating_point_v<A> && std::is_integral_v<R>) {
      // Out of range: the least number, as by the machine's conversion.
      constexpr A most = sizeof(R) == 8 ? A(9223372036854775808.0) : A(2147483648.0);
      const bool inside = (x > -most) & (x < most);
      const R whole = static_cast<R>(inside ? x : A(0));
      return inside ? whole : std::numeric_limits<R>::min();
    } else {
      return static_cast<R>(x);
    }
  }
};

template <class Narrow>
struct Wrapped {
  static int64_t of(int64_t x) { return static_cast<Narrow>(x); }
};

struct ToBf16 {
  static float of(float x) {
    const uint32_t pattern = bits<uint32_t>(x);
    const float rounded = bits<float>((pattern + 0x7fffu + ((pattern >> 16) & 1u)) & 0xffff0000u);
    return x == x ? rounded : x;
  }
};

struct ToF16 {
  static float of(float x) {
    const uint32_t pattern = bits<uint32_t>(x), sign = pattern & 0x80000000u, magnitude = pattern & 0x7fffffffu;
    const uint32_t near = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & 0xffffe000u;
    const uint32_t most = 0x477fe000u;  // 65504
    const float large = bits<float>(near > most ? 0x7f800000u : near);
    const float small = (bits<float>(magnitude) + 0.5f) - 0.5f;  // the last bit of 0.5 is 2**-24
    const float rounded = magnitude < 0x38800000u ? small : large;
    return x == x ? bits<float>(bits<uint32_t>(rounded) | sign) : x;
  }
};

inline float of_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  const float scaled = bits<float>(rest << 13) * 5.192296858534828e33f;  // 2**112
  const uint32_t pattern = rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : bits<uint32_t>(scaled);
  return bits<float>(pattern | sign);
}

inline float of_bf16(uint16_t half) { return bits<float>(static_cast<uint32_t>(half) << 16); }

// Integer divisions, which may fail.
template <class F, class T>
void division(Place& place, const Step& step, int n) {
  const T* b = place.at<T>(step.in[1]);
  int zeros = 0;
  for (int i = 0; i < n; ++i) zeros |= b[i] == 0;
  if (zeros) place.zero_divisor = true;
  binary<F, T, T>(place, step, n);
}

// Looking up ----------------------------------------------------------------------------------------------------------------

inline int64_t stride_of(const Array& array, int dim, bool contiguous) {
  if (!contiguous) return array.strides[dim];
  int64_t stride = 1;
  for (int d = dim + 1; d < array.dims; ++d) stride *= array.sizes[d];
  return stride;
}

// An index as a position in 0 .. size - 1, times the stride; out of range: any position, and the
// error is recorded.
template <class T>
void positions(Place& place, const Step& step, int n, int64_t size, int64_t stride) {
  int64_t* __restrict out = place.at<int64_t>(step.out);
  const T* __restrict in = place.at<T>(step.in[0]);
  int bad = size <= 0;
  if (size > std::numeric_limits<int32_t>::max() || sizeof(T) == 8) {
    for (int i = 0; i < n; i += unit)
      for (int j = 0; j < unit; ++j) {
        const int64_t x = in[i + j], at = x < 0 ? Add::of<int64_t>(x, size) : x;
        const bool inside = (at >= 0) & (at < size);
        bad |= !inside;
        out[i + j] = (inside ? at : 0) * stride;
      }
  } else {
    const int32_t most = static_cast<int32_t>(size);
    for (int i = 0; i < n; i += unit)
      for (int j = 0; j < unit; ++j) {
        const int32_t x = static_cast<int32_t>(in[i + j]), at = x < 0 ? x + most : x;
        const bool inside = (at >= 0) & (at < most);
        bad |= !inside;
        out[i + j] = (inside ? at : 0) * stride;
      }
  }
  if (bad) place.is_out_of_range = true;
}

template <class T>
void address(Place& place, const Step& step, int n) {
  const Array& array = place.operands[step.operand];
  positions<T>(place, step, n, array.sizes[step.dim], stride_of(array, step.dim, step.contiguous));
}

template <class T>
void within(Place& place, const Step& step, int n) {
  positions<T>(place, step, n, step.number, 1);
}

template <class R, class S, class F>
void gathered(Place& place, const Step& step, int n, F read) {
  R* __restrict out = place.at<R>(step.out);
  const int64_t* __restrict at = place.at<int64_t>(step.in[0]);
  const S* __restrict data = place.operands[step.operand].as<S>();
  for (int i = 0; i < n; i += unit)
    for (int j = 0; j < unit; ++j) out[i + j] = read(data[at[i + j]]);
}

// in[0]: addresses of elements.
inline void gather(Place& place, const Step& step, int n) {
  switch (place.operands[step.operand].type) {
    case Type::f32: return gathered<float, float>(place, step, n, [](float x) { return x; });
    case Type::f64: return gathered<double, double>(place, step, n, [](double x) { return x; });
    case Type::f16: return gathered<float, uint16_t>(place, step, n, of_f16);
    case Type::bf16: return gathered<float, uint16_t>(place, step, n, of_bf16);
    case Type::boolean: return gathered<uint8_t, uint8_t>(place, step, n, [](uint8_t x) -> uint8_t { return x != 0; });
    case Type::i8: return gathered<int32_t, int8_t>(place, step, n, [](int8_t x) { return x; });
    case Type::i16: return gathered<int32_t, int16_t>(place, step, n, [](int16_t x) { return x; });
    case Type::i32: return gathered<int32_t, int32_t>(place, step, n, [](int32_t x) { return x; });
    case Type::i64: return gathered<int64_t, int64_t>(place, step, n, [](int64_t x) { return x; });
    case Type::u8: return gathered<int32_t, uint8_t>(place, step, n, [](uint8_t x) { return x; });
  }
}

// From numbers of keys, lanes or the tile to those of pairs -----------------------------------------------------------------

// Fills the last block with copies of earlier numbers.
template <class T>
void fill_up(T* out, int count, int n) {
  for (int i = count; i < n; ++i) out[i] = out[count - 1];
}

template <class T>
void fill_constant(Place& place, const Step& step, int n) {
  T* __restrict out = place.at<T>(step.out);
  const T value = *place.at<T>(step.in[0]);
  for (int i = 0; i < n; i += unit)
    for (int j = 0; j < unit; ++j) out[i + j] = value;
}

template <class T>
void fill_lanes(Place& place, const Step& step, int n) {
  T* __restrict out = place.at<T>(step.out);
  const T* in = place.at<T>(step.in[0]);
  const int lanes = place.pairs->lanes;
  for (int row = 0; row < place.rows; ++row) std::memcpy(out + row * lanes, in, lanes * sizeof(T));
  fill_up(out, place.rows * lanes, n);
}

template <class T>
void fill_keys(Place& place, const Step& step, int n) {
  T* out = place.at<T>(step.out);
  const T* in = place.at<T>(step.in[0]) + place.row;
  const int lanes = place.pairs->lanes;
  for (int row = 0; row < place.rows; ++row) {
    const T value = in[row];
    for (int i = 0; i < lanes; ++i) out[row * lanes + i] = value;
  }
  fill_up(out, place.rows * lanes, n);
}

// The slice's part of the tile's scores (in[0] = 0) or gradients (1).
template <class T>
void read_tile(Place& place, const Step& step, int n) {
  T* __restrict out = place.at<T>(step.out);
  const T* in = static_cast<const T*>(step.in[0] ? place.grads : place.scores);
  const int lanes = place.pairs->lanes;
  for (int row = 0; row < place.rows; ++row)
    std::memcpy(out + row * lanes, in + static_cast<int64_t>(place.row + row) * place.ld, lanes * sizeof(T));
  fill_up(out, place.rows * lanes, n);
}

// Gradients of operands -----------------------------------------------------------------------------------------------------

// value, or zero where the gradient is zero.
template <class T>
inline T reached(T value, T grad) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  return bits<T>(static_cast<Bits>(bits<Bits>(value) & (Bits(0) - Bits(grad != T(0)))));
}

// in: summands, addresses, gradients of the new scores; where these are zero nothing is added.
template <class T>
void scatter_pairs(Place& place, const Step& step, int) {
  const T* value = place.at<T>(step.in[0]);
  const T* grad = place.at<T>(step.in[2]);
  const int64_t* at = place.at<int64_t>(step.in[1]);
  T* to = static_cast<T*>(place.sums[step.operand]);
  const int total = place.rows * place.pairs->lanes;
  for (int i = 0; i < total; ++i)
    if (grad[i] != T(0)) to[at[i]] += value[i];
}

template <class T>
void scatter_keys(Place& place, const Step& step, int) {
  const T* value = place.at<T>(step.in[0]);
  const T* grad = place.at<T>(step.in[2]);
  const int64_t* at = place.at<int64_t>(step.in[1]) + place.row;
  T* to = static_cast<T*>(place.sums[step.operand]);
  const int lanes = place.pairs->lanes;
  for (int row = 0; row < place.rows; ++row, value += lanes, grad += lanes) {
    T parts[unit] = {};
    int i = 0;
    for (; i + unit <= lanes; i += unit)
      for (int j = 0; j < unit; ++j) parts[j] += reached(value[i + j], grad[i + j]);
    T sum = 0;
    for (; i < lanes; ++i) sum += reached(value[i], grad[i]);
    for (const T part : parts) sum += part;
    to[at[row]] += sum;
  }
}

// Sums over keys per lane, in `out`; finish_lanes and finish_all add them to the gradients.
template <class T>
void scatter_lanes(Place& place, const Step& step, int) {
  const T* value = place.at<T>(step.in[0]);
  const T* grad = place.at<T>(step.in[2]);
  T* __restrict sums = place.at<T>(step.out);
  const int lanes = place.pairs->lanes;
  for (int row = 0; row < place.rows; ++row, value += lanes, grad += lanes)
    for (int i = 0; i < lanes; ++i) sums[i] += reached(value[i], grad[i]);
}

template <class T>
void finish_lanes(Place& place, const Step& step, int) {
  const int64_t* at = place.at<int64_t>(step.in[1]);
  T* to = static_cast<T*>(place.sums[step.operand]);
  for (int i = 0; i < place.pairs->lanes; ++i) to[at[i]] += place.at<T>(step.out)[i];
}

template <class T>
void finish_all(Place& place, const Step& step, int) {
  double sum = 0;
  for (int i = 0; i < place.pairs->lanes; ++i) sum += static_cast<double>(place.at<T>(step.out)[i]);
  static_cast<T*>(place.sums[step.operand])[*place.at<int64_t>(step.in[1])] += static_cast<T>(sum);
}

// The loop of an operation on registers of these types; null if there is none.
Run loop_of(Operation op, Register type, Register first, int64_t number);

}  // namespace native::loops
