// Verdicts of masks on blocks: a tape evaluated on intervals instead of numbers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "functions.h"

namespace native {

namespace {

constexpr int64_t least_whole = std::numeric_limits<int64_t>::min(), most_whole = std::numeric_limits<int64_t>::max();
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t most_looked_up = 64;

// All values that a node may have: low .. high, integers or floating-point by its type, and NaN if
// flagged.
struct Bounds {
  int64_t low = 0, high = 0;
  double least = 0, greatest = 0;
  bool nan = false;

  static Bounds whole(int64_t low, int64_t high) { return {low, high, 0, 0, false}; }
  static Bounds floating(double least, double greatest, bool nan) { return {0, 0, least, greatest, nan}; }
  bool is_point() const { return low == high; }
};

bool is_float(Register type) { return type == Register::f32 || type == Register::f64; }

Bounds unknown(Register type) {
  switch (type) {
    case Register::boolean: return Bounds::whole(0, 1);
    case Register::i32: return Bounds::whole(std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max());
    case Register::i64: return Bounds::whole(least_whole, most_whole);
    default: return Bounds::floating(-infinity, infinity, true);
  }
}

// Integers in 128 bits, for results of registers; unknown if they may wrap around.
using Wide = __int128;

Bounds fitted(Register type, Wide low, Wide high) {
  const Bounds range = unknown(type);
  if (low < range.low || high > range.high) return range;
  return Bounds::whole(static_cast<int64_t>(low), static_cast<int64_t>(high));
}

double rounded(Register type, double x) { return type == Register::f32 ? static_cast<double>(static_cast<float>(x)) : x; }

// An interval of floating-point numbers from its ends; unknown if an end is NaN.
Bounds spanned(Register type, double a, double b, bool nan) {
  if (std::isnan(a) || std::isnan(b)) return unknown(type);
  return Bounds::floating(rounded(type, std::min(a, b)), rounded(type, std::max(a, b)), nan);
}

// The same for functions with errors of a few roundings.
Bounds loosened(Register type, double a, double b, bool nan) {
  if (std::isnan(a) || std::isnan(b)) return unknown(type);
  const double part = type == Register::f32 ? 1e-6 : 1e-14, little = type == Register::f32 ? 1e-44 : 1e-320;
  const double least = std::min(a, b), greatest = std::max(a, b);
  return spanned(type, least - std::fabs(least) * part - little, greatest + std::fabs(greatest) * part + little, nan);
}

template <class F>
Bounds rising(Register type, const Bounds& x, const F& f) {
  return loosened(type, f(x.least), f(x.greatest), x.nan);
}

int64_t floor_divided(int64_t a, int64_t b) {
  if (b == -1) return a == least_whole ? a : -a;
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

template <class T>
Bounds of_corners(const T& f, double a, double b, double c, double d, Register type, bool nan) {
  const double x[] = {f(a, c), f(a, d), f(b, c), f(b, d)};
  double least = x[0], greatest = x[0];
  for (const double corner : x) {
    if (std::isnan(corner)) return unknown(type);
    least = std::min(least, corner), greatest = std::max(greatest, corner);
  }
  return spanned(type, least, greatest, nan);
}

// Whether the extended results of two intervals may be infinity minus infinity.
bool has_infinity(const Bounds& x) { return std::isinf(x.least) || std::isinf(x.greatest); }

Bounds of_floats(Operation op, Register type, const Bounds& a, const Bounds& b) {
  const bool nan = a.nan || b.nan;
  switch (op) {
    case Operation::add: return spanned(type, a.least + b.least, a.greatest + b.greatest, nan || (has_infinity(a) && has_infinity(b)));
    case Operation::subtract:
      return spanned(type, a.least - b.greatest, a.greatest - b.least, nan || (has_infinity(a) && has_infinity(b)));
    case Operation::multiply:
      return of_corners([](double x, double y) { return x * y; }, a.least, a.greatest, b.least, b.greatest, type,
                        nan || has_infinity(a) || has_infinity(b));
    case Operation::divide:
      if (b.least <= 0 && b.greatest >= 0) return unknown(type);
      return of_corners([](double x, double y) { return x / y; }, a.least, a.greatest, b.least, b.greatest, type, nan || has_infinity(a));
    case Operation::minimum:
      return Bounds::floating(std::min(a.least, b.least), std::min(a.greatest, b.greatest), nan);
    case Operation::maximum:
      return Bounds::floating(std::max(a.least, b.least), std::max(a.greatest, b.greatest), nan);
    default: return unknown(type);
  }
}

Bounds of_float(Operation op, Register type, const Bounds& x) {
  switch (op) {
    case Operation::negate: return Bounds::floating(-x.greatest, -x.least, x.nan);
    case Operation::absolute: {
      const double least = x.least <= 0 && x.greatest >= 0 ? 0 : std::min(std::fabs(x.least), std::fabs(x.greatest));
      return Bounds::floating(least, std::max(std::fabs(x.least), std::fabs(x.greatest)), x.nan);
    }
    case Operation::floor: return spanned(type, std::floor(x.least), std::floor(x.greatest), x.nan);
    case Operation::ceiling: return spanned(type, std::ceil(x.least), std::ceil(x.greatest), x.nan);
    case Operation::round: return spanned(type, std::nearbyint(x.least), std::nearbyint(x.greatest), x.nan);
    case Operation::truncate: return spanned(type, std::trunc(x.least), std::trunc(x.greatest), x.nan);
    case Operation::exp: return rising(type, x, [](double y) { return std::exp(y); });
    case Operation::tanh: return rising(type, x, [](double y) { return std::tanh(y); });
    case Operation::sigmoid: return rising(type, x, [](double y) { return 1 / (1 + std::exp(-y)); });
    case Operation::square_root: return rising(type, x, [](double y) { return std::sqrt(y); });
    case Operation::log: return rising(type, x, [](double y) { return std::log(y); });
    case Operation::log2: return rising(type, x, [](double y) { return std::log2(y); });
    case Operation::log10: return rising(type, x, [](double y) { return std::log10(y); });
    case Operation::log1p: return rising(type, x, [](double y) { return std::log1p(y); });
    default: return unknown(type);
  }
}

Bounds of_wholes(Operation op, Register type, const Bounds& a, const Bounds& b) {
  switch (op) {
    case Operation::add: return fitted(type, Wide(a.low) + b.low, Wide(a.high) + b.high);
    case Operation::subtract: return fitted(type, Wide(a.low) - b.high, Wide(a.high) - b.low);
    case Operation::multiply: {
      const Wide x[] = {Wide(a.low) * b.low, Wide(a.low) * b.high, Wide(a.high) * b.low, Wide(a.high) * b.high};
      return fitted(type, *std::min_element(x, x + 4), *std::max_element(x, x + 4));
    }
    case Operation::floor_divide: {
      if (b.low <= 0 && b.high >= 0) return unknown(type);
      if (b.low < 0 && a.low == least_whole) return unknown(type);
      const int64_t x[] = {floor_divided(a.low, b.low), floor_divided(a.low, b.high), floor_divided(a.high, b.low), floor_divided(a.high, b.high)};
      return fitted(type, *std::min_element(x, x + 4), *std::max_element(x, x + 4));
    }
    case Operation::remainder: {
      if (b.low <= 0) return b.high < 0 && b.low > least_whole ? Bounds::whole(b.low + 1, 0) : unknown(type);
      if (b.is_point()) {
        const int64_t turn = floor_divided(a.low, b.low);
        if (turn == floor_divided(a.high, b.low)) {
          const Wide start = Wide(turn) * b.low;
          return fitted(type, a.low - start, a.high - start);
        }
      }
      return Bounds::whole(0, b.high - 1);
    }
    case Operation::fmod:
      if (b.low > 0 && a.low >= 0) return Bounds::whole(0, std::min(a.high, b.high - 1));
      return b.low > 0 ? Bounds::whole(-(b.high - 1), b.high - 1) : unknown(type);
    case Operation::minimum: return Bounds::whole(std::min(a.low, b.low), std::min(a.high, b.high));
    case Operation::maximum: return Bounds::whole(std::max(a.low, b.low), std::max(a.high, b.high));
    case Operation::both:
      if (type == Register::boolean) return Bounds::whole(a.low & b.low, a.high & b.high);
      if (a.is_point() && b.is_point()) return Bounds::whole(a.low & b.low, a.low & b.low);
      return a.low >= 0 && b.low >= 0 ? Bounds::whole(0, std::min(a.high, b.high)) : unknown(type);
    case Operation::either:
      if (type == Register::boolean) return Bounds::whole(a.low | b.low, a.high | b.high);
      return a.is_point() && b.is_point() ? Bounds::whole(a.low | b.low, a.low | b.low) : unknown(type);
    case Operation::exclusive: return a.is_point() && b.is_point() ? Bounds::whole(a.low ^ b.low, a.low ^ b.low) : unknown(type);
    case Operation::shift_right:
      return b.is_point() && b.low >= 0 && b.low < 64 ? Bounds::whole(a.low >> b.low, a.high >> b.low) : unknown(type);
    case Operation::shift_left:
      if (!b.is_point() || b.low < 0 || b.low > 62) return unknown(type);
      return fitted(type, Wide(a.low) * (Wide(1) << b.low), Wide(a.high) * (Wide(1) << b.low));
    default: return unknown(type);
  }
}

Bounds of_whole(Operation op, Register type, const Bounds& x) {
  switch (op) {
    case Operation::negate: return fitted(type, -Wide(x.high), -Wide(x.low));
    case Operation::absolute: {
      if (x.low == unknown(type).low) return unknown(type);
      const int64_t low = std::abs(x.low), high = std::abs(x.high);
      return Bounds::whole(x.low <= 0 && x.high >= 0 ? 0 : std::min(low, high), std::max(low, high));
    }
    case Operation::sign: return Bounds::whole((x.low > 0) - (x.low < 0), (x.high > 0) - (x.high < 0));
    case Operation::complement:
      if (type == Register::boolean) return Bounds::whole(1 - x.high, 1 - x.low);
      return Bounds::whole(~x.high, ~x.low);
    default: return unknown(type);
  }
}

template <class T>
Bounds compared(Operation op, T a_low, T a_high, T b_low, T b_high, bool nan) {
  const bool apart = a_high < b_low || b_high < a_low, same = a_low == a_high && b_low == b_high && a_low == b_low;
  bool always = false, never = false;
  switch (op) {
    case Operation::equal: always = same, never = apart; break;
    case Operation::not_equal: always = apart, never = same; break;
    case Operation::less: always = a_high < b_low, never = a_low >= b_high; break;
    default: always = a_high <= b_low, never = a_low > b_high; break;
  }
  // Every comparison with NaN is false, except !=.
  if (nan && op == Operation::not_equal) never = false;
  if (nan && op != Operation::not_equal) always = false;
  return Bounds::whole(always, !never);
}

Bounds converted(Register from, Register to, const Bounds& x) {
  if (to == Register::boolean) {
    if (is_float(from)) return Bounds::whole(x.least > 0 || x.greatest < 0, x.nan || x.least != 0 || x.greatest != 0);
    return Bounds::whole(x.low > 0 || x.high < 0, x.low != 0 || x.high != 0);
  }
  if (is_float(from) && is_float(to)) return spanned(to, x.least, x.greatest, x.nan);
  if (to == Register::f32) return Bounds::floating(static_cast<float>(x.low), static_cast<float>(x.high), false);
  if (is_float(to)) return spanned(to, static_cast<double>(x.low), static_cast<double>(x.high), false);
  if (!is_float(from)) return fitted(to, x.low, x.high);
  const double most = to == Register::i32 ? 2147483647.0 : 9e18;
  if (x.nan || x.least <= -most || x.greatest >= most) return unknown(to);
  return Bounds::whole(static_cast<int64_t>(x.least), static_cast<int64_t>(x.greatest));
}

float of_16_bits(uint16_t pattern, Type type) {
  uint32_t wide = static_cast<uint32_t>(pattern) << 16;
  float out;
  if (type == Type::f16) {
    const int exponent = pattern >> 10 & 31, fraction = pattern & 1023;
    out = exponent == 31 ? (fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                         : std::ldexp(static_cast<float>(fraction + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
    return pattern & 0x8000 ? -out : out;
  }
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

// One entry of an operand, as bounds.
Bounds entry(const Array& array, int64_t at) {
  const auto whole = [](int64_t x) { return Bounds::whole(x, x); };
  const auto floating = [](double x) { return std::isnan(x) ? Bounds::floating(infinity, -infinity, true) : Bounds::floating(x, x, false); };
  switch (array.type) {
    case Type::f32: return floating(array.as<float>()[at]);
    case Type::f64: return floating(array.as<double>()[at]);
    case Type::f16: case Type::bf16: return floating(of_16_bits(array.as<uint16_t>()[at], array.type));
    case Type::boolean: return whole(array.as<uint8_t>()[at] != 0);
    case Type::i8: return whole(array.as<int8_t>()[at]);
    case Type::i16: return whole(array.as<int16_t>()[at]);
    case Type::i32: return whole(array.as<int32_t>()[at]);
    case Type::i64: return whole(array.as<int64_t>()[at]);
    case Type::u8: return whole(array.as<uint8_t>()[at]);
  }
  return whole(0);
}

Bounds joined(const Bounds& a, const Bounds& b) {
  return {std::min(a.low, b.low), std::max(a.high, b.high), std::min(a.least, b.least), std::max(a.greatest, b.greatest), a.nan || b.nan};
}

// Bounds of all entries that a look-up may read, if they are few; indices of either sign, all in
// range.
Bounds looked_up(const FunctionNode& node, const Array& array, const Bounds* values) {
  int64_t counts[max_dims], total = 1;
  for (int dim = 0; dim < array.dims; ++dim) {
    const Bounds& index = values[node.inputs[dim]];
    if (index.low < -array.sizes[dim] || index.high >= array.sizes[dim]) return unknown(node.type);
    counts[dim] = index.high - index.low + 1;
    total *= counts[dim];
    if (total > most_looked_up) return unknown(node.type);
  }
  Bounds out;
  for (int64_t i = 0; i < total; ++i) {
    int64_t rest = i, at = 0;
    for (int dim = array.dims - 1; dim >= 0; --dim) {
      const int64_t index = values[node.inputs[dim]].low + rest % counts[dim];
      rest /= counts[dim];
      at += (index < 0 ? index + array.sizes[dim] : index) * array.strides[dim];
    }
    out = i ? joined(out, entry(array, at)) : entry(array, at);
  }
  if (is_float(node.type) && out.least > out.greatest) return unknown(node.type);  // only NaN
  return out;
}

Bounds constant(Register type, int64_t number) {
  float narrow;
  double wide;
  const uint32_t low = static_cast<uint32_t>(number);
  std::memcpy(&narrow, &low, sizeof(narrow));
  std::memcpy(&wide, &number, sizeof(wide));
  switch (type) {
    case Register::boolean: return Bounds::whole(number != 0, number != 0);
    case Register::i32: return Bounds::whole(static_cast<int32_t>(number), static_cast<int32_t>(number));
    case Register::i64: return Bounds::whole(number, number);
    case Register::f32: return std::isnan(narrow) ? unknown(type) : Bounds::floating(narrow, narrow, false);
    case Register::f64: return std::isnan(wide) ? unknown(type) : Bounds::floating(wide, wide, false);
  }
  return unknown(type);
}

struct Block {
  const Array* operands;
  Bounds b, h, q, k;
};

Bounds bounds_of(const FunctionNode& node, const FunctionTape& tape, const Block& block, const Bounds* values) {
  const auto input = [&](size_t i) -> const Bounds& { return values[node.inputs[i]]; };
  switch (node.op) {
    case Operation::constant: return constant(node.type, node.number);
    case Operation::batch: return block.b;
    case Operation::head: return block.h;
    case Operation::query: return block.q;
    case Operation::key: return block.k;
    case Operation::load: return looked_up(node, block.operands[node.number], values);
    case Operation::within:
      if (input(0).low >= 0 && input(0).high < node.number) return input(0);
      return unknown(node.type);
    case Operation::narrow: {
      const int width = node.number == static_cast<int64_t>(Type::i32) ? 32 : node.number == static_cast<int64_t>(Type::i16) ? 16 : 8;
      const int64_t low = node.number == static_cast<int64_t>(Type::u8) ? 0 : -(int64_t{1} << (width - 1));
      const int64_t high = low + (int64_t{1} << width) - 1;
      return input(0).low >= low && input(0).high <= high ? input(0) : Bounds::whole(low, high);
    }
    case Operation::convert: return converted(tape.nodes[node.inputs[0]].type, node.type, input(0));
    case Operation::equal: case Operation::not_equal: case Operation::less: case Operation::less_equal:
      if (is_float(tape.nodes[node.inputs[0]].type))
        return compared(node.op, input(0).least, input(0).greatest, input(1).least, input(1).greatest, input(0).nan || input(1).nan);
      return compared(node.op, input(0).low, input(0).high, input(1).low, input(1).high, false);
    case Operation::where:
      if (input(0).is_point()) return input(0).low ? input(1) : input(2);
      return joined(input(1), input(2));
    default: break;
  }
  if (node.inputs.size() == 1) return is_float(node.type) ? of_float(node.op, node.type, input(0)) : of_whole(node.op, node.type, input(0));
  if (node.inputs.size() != 2) return unknown(node.type);
  return is_float(node.type) ? of_floats(node.op, node.type, input(0), input(1)) : of_wholes(node.op, node.type, input(0), input(1));
}

}  // namespace

int classify(const Function& function, const Array* operands, int64_t b, int64_t h, int64_t q_first, int64_t q_last,
             int64_t k_first, int64_t k_last) {
  for (const FunctionTape& tape : function.tapes) {
    if (tape.kind != TapeKind::mask) continue;
    check_operands(function, operands, function.operands.size());
    const Block block{operands, Bounds::whole(b, b), Bounds::whole(h, h), Bounds::whole(q_first, q_last), Bounds::whole(k_first, k_last)};
    Bounds few[64];
    std::vector<Bounds> many(tape.nodes.size() > 64 ? tape.nodes.size() : 0);
    Bounds* values = many.empty() ? few : many.data();
    for (size_t i = 0; i < tape.nodes.size(); ++i) values[i] = bounds_of(tape.nodes[i], tape, block, values);
    const Bounds& result = values[tape.result];
    return result.low ? 2 : result.high ? 1 : 0;
  }
  throw std::runtime_error("a function was not made for masks");
}

}  // namespace native
