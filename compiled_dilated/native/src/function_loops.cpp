// The table of all loops.
#include "function_loops.h"

namespace native::loops {

namespace {

template <class F>
Run of_floats(Register type) {
  if (type == Register::f32) return unary<F, float, float>;
  return type == Register::f64 ? unary<F, double, double> : nullptr;
}

template <class F>
Run of_calls(Register type) {
  if (type == Register::f32) return called<F, float>;
  return type == Register::f64 ? called<F, double> : nullptr;
}

// Loops with vectors of float, and with calls for double.
template <class F>
Run with_float(Register type) {
  if (type == Register::f32) return unary<F, float, float>;
  return type == Register::f64 ? called<F, double> : nullptr;
}

template <class F>
Run of_numbers(Register type) {
  if (type == Register::i32) return unary<F, int32_t, int32_t>;
  return type == Register::i64 ? unary<F, int64_t, int64_t> : of_floats<F>(type);
}

template <class F>
Run of_two_floats(Register type) {
  if (type == Register::f32) return binary<F, float, float>;
  return type == Register::f64 ? binary<F, double, double> : nullptr;
}

template <class F>
Run of_two_numbers(Register type) {
  if (type == Register::i32) return binary<F, int32_t, int32_t>;
  return type == Register::i64 ? binary<F, int64_t, int64_t> : of_two_floats<F>(type);
}

template <class F>
Run divided(Register type) {
  if (type == Register::i32) return division<F, int32_t>;
  return type == Register::i64 ? division<F, int64_t> : of_two_floats<F>(type);
}

template <class F>
Run compared(Register type) {
  switch (type) {
    case Register::i32: return binary<F, uint8_t, int32_t>;
    case Register::i64: return binary<F, uint8_t, int64_t>;
    case Register::f32: return binary<F, uint8_t, float>;
    case Register::f64: return binary<F, uint8_t, double>;
    default: return nullptr;
  }
}

template <class F>
Run of_bits(Register type) {
  switch (type) {
    case Register::boolean: return binary<F, uint8_t, uint8_t>;
    case Register::i32: return binary<F, int32_t, int32_t>;
    case Register::i64: return binary<F, int64_t, int64_t>;
    default: return nullptr;
  }
}

template <class A>
Run converted_from(Register type) {
  switch (type) {
    case Register::boolean: return unary<To<uint8_t>, uint8_t, A>;
    case Register::i32: return unary<To<int32_t>, int32_t, A>;
    case Register::i64: return unary<To<int64_t>, int64_t, A>;
    case Register::f32: return unary<To<float>, float, A>;
    case Register::f64: return unary<To<double>, double, A>;
  }
  return nullptr;
}

Run converted(Register from, Register to) {
  switch (from) {
    case Register::boolean: return converted_from<uint8_t>(to);
    case Register::i32: return converted_from<int32_t>(to);
    case Register::i64: return converted_from<int64_t>(to);
    case Register::f32: return converted_from<float>(to);
    case Register::f64: return converted_from<double>(to);
  }
  return nullptr;
}

Run narrowed(Type to) {
  switch (to) {
    case Type::i8: return unary<Wrapped<int8_t>, int64_t, int64_t>;
    case Type::i16: return unary<Wrapped<int16_t>, int64_t, int64_t>;
    case Type::i32: return unary<Wrapped<int32_t>, int64_t, int64_t>;
    case Type::u8: return unary<Wrapped<uint8_t>, int64_t, int64_t>;
    default: return nullptr;
  }
}

}  // namespace

Run loop_of(Operation op, Register type, Register first, int64_t number) {
  switch (op) {
    case Operation::convert: return converted(first, type);
    case Operation::narrow: return type == Register::i64 ? narrowed(static_cast<Type>(number)) : nullptr;
    case Operation::round_to:
      if (type != Register::f32) return nullptr;
      if (number == static_cast<int64_t>(Type::f16)) return unary<ToF16, float, float>;
      return number == static_cast<int64_t>(Type::bf16) ? unary<ToBf16, float, float> : nullptr;
    case Operation::negate: return of_numbers<Negate>(type);
    case Operation::absolute: return of_numbers<Absolute>(type);
    case Operation::sign: return of_numbers<Sign>(type);
    case Operation::floor: return of_floats<Floor>(type);
    case Operation::ceiling: return of_floats<Ceiling>(type);
    case Operation::round: return of_floats<Round>(type);
    case Operation::truncate: return of_floats<Truncate>(type);
    case Operation::square_root: return of_floats<SquareRoot>(type);
    case Operation::exp: return with_float<Exp>(type);
    case Operation::exp2: return of_calls<Exp2>(type);
    case Operation::expm1: return of_calls<Expm1>(type);
    case Operation::log: return with_float<Log>(type);
    case Operation::log2: return with_float<Log2>(type);
    case Operation::log10: return with_float<Log10>(type);
    case Operation::log1p: return with_float<Log1p>(type);
    case Operation::sin: return of_calls<Sin>(type);
    case Operation::cos: return of_calls<Cos>(type);
    case Operation::tan: return of_calls<Tan>(type);
    case Operation::sinh: return of_calls<Sinh>(type);
    case Operation::cosh: return of_calls<Cosh>(type);
    case Operation::asin: return of_calls<Asin>(type);
    case Operation::acos: return of_calls<Acos>(type);
    case Operation::atan: return of_calls<Atan>(type);
    case Operation::tanh: return with_float<Tanh>(type);
    case Operation::sigmoid: return with_float<Sigmoid>(type);
    case Operation::erf: return of_calls<Erf>(type);
    case Operation::add: return of_two_numbers<Add>(type);
    case Operation::subtract: return of_two_numbers<Subtract>(type);
    case Operation::multiply: return of_two_numbers<Multiply>(type);
    case Operation::divide: return of_two_floats<Divide>(type);
    case Operation::floor_divide: return divided<FloorDivide>(type);
    case Operation::remainder: return divided<Remainder>(type);
    case Operation::fmod: return divided<Fmod>(type);
    case Operation::minimum: return of_two_numbers<Minimum>(type);
    case Operation::maximum: return of_two_numbers<Maximum>(type);
    case Operation::power: return of_two_floats<Power>(type);
    case Operation::atan2: return of_two_floats<Atan2>(type);
    case Operation::equal: return compared<Equal>(first);
    case Operation::not_equal: return compared<NotEqual>(first);
    case Operation::less: return compared<Less>(first);
    case Operation::less_equal: return compared<LessEqual>(first);
    case Operation::both: return of_bits<Both>(type);
    case Operation::either: return of_bits<Either>(type);
    case Operation::exclusive: return of_bits<Exclusive>(type);
    case Operation::complement:
      if (type == Register::boolean) return unary<Complement, uint8_t, uint8_t>;
      if (type == Register::i32) return unary<Complement, int32_t, int32_t>;
      return type == Register::i64 ? unary<Complement, int64_t, int64_t> : nullptr;
    case Operation::shift_left: return type == Register::i64 ? binary<ShiftLeft, int64_t, int64_t> : nullptr;
    case Operation::shift_right: return type == Register::i64 ? binary<ShiftRight, int64_t, int64_t> : nullptr;
    case Operation::where:
      if (type == Register::boolean) return choose<uint8_t>;
      return type == Register::i32 || type == Register::f32 ? choose<uint32_t> : choose<uint64_t>;
    default: return nullptr;
  }
}

}  // namespace native::loops
