// Rows of tensors of any type as rows of float or double, and back.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "problem.h"
#include "vectors.h"

namespace native {

NATIVE_INLINE float wide(uint16_t bits) {  // of a bfloat16
  const uint32_t high = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &high, sizeof(out));
  return out;
}

NATIVE_INLINE uint16_t narrow(float x) {  // to a bfloat16, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16);
}

inline int64_t size_of(Type type) {
  switch (type) {
    case Type::f64: case Type::i64: return 8;
    case Type::f32: case Type::i32: return 4;
    case Type::f16: case Type::bf16: case Type::i16: return 2;
    default: return 1;
  }
}

template <class T>
constexpr Type type_of = sizeof(T) == 8 ? Type::f64 : Type::f32;

// to[i] = from[i] * factor for `count` numbers of a type.
template <class T>
inline void read_row(const void* from, Type type, T factor, T* to, int count) {
  switch (type) {
    case Type::f32:
      for (int i = 0; i < count; ++i) to[i] = static_cast<T>(static_cast<const float*>(from)[i]) * factor;
      break;
    case Type::f64:
      for (int i = 0; i < count; ++i) to[i] = static_cast<T>(static_cast<const double*>(from)[i]) * factor;
      break;
    case Type::bf16:
      for (int i = 0; i < count; ++i) to[i] = static_cast<T>(wide(static_cast<const uint16_t*>(from)[i])) * factor;
      break;
    case Type::f16:
      for (int i = 0; i < count; ++i) to[i] = static_cast<T>(static_cast<float>(static_cast<const Half*>(from)[i])) * factor;
      break;
    default: throw std::runtime_error("attention takes float16, bfloat16, float32 and float64");
  }
}

template <class T>
inline void write_row(const T* from, Type type, void* to, int count) {
  switch (type) {
    case Type::f32:
      for (int i = 0; i < count; ++i) static_cast<float*>(to)[i] = static_cast<float>(from[i]);
      break;
    case Type::f64:
      for (int i = 0; i < count; ++i) static_cast<double*>(to)[i] = static_cast<double>(from[i]);
      break;
    case Type::bf16:
      for (int i = 0; i < count; ++i) static_cast<uint16_t*>(to)[i] = narrow(static_cast<float>(from[i]));
      break;
    case Type::f16:
      for (int i = 0; i < count; ++i) static_cast<Half*>(to)[i] = static_cast<Half>(static_cast<float>(from[i]));
      break;
    default: throw std::runtime_error("attention takes float16, bfloat16, float32 and float64");
  }
}

// One head of a tensor (B, H, tokens, width), row by row.
struct Head {
  const char* base;
  int64_t stride;  // bytes
  Type type;

  Head(const Array& x, int64_t b, int64_t h) : type(x.type) {
    const int64_t size = size_of(x.type);
    base = static_cast<const char*>(x.data) + (b * x.strides[0] + h * x.strides[1]) * size;
    stride = x.strides[2] * size;
  }

  const void* row(int64_t token) const { return base + token * stride; }
  void* mutable_row(int64_t token) const { return const_cast<char*>(base) + token * stride; }
};

// Memory of one thread, reused from call to call; it grows to the needs of the widest heads.
class Room {
 public:
  // A 64-byte aligned array of T, valid until `reset`.
  template <class T>
  T* take(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (used_ + bytes > size_) throw std::bad_alloc();
    T* out = reinterpret_cast<T*>(base_.get() + used_);
    used_ += bytes;
    return out;
  }

  // Frees all arrays; makes room for `bytes` bytes in `arrays` arrays.
  void reset(size_t bytes, size_t arrays) {
    bytes += 64 * arrays;
    if (bytes > size_) {
      // No size without memory, should there be none.
      size_ = 0;
      base_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!base_) throw std::bad_alloc();
      size_ = bytes;
    }
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* x) const { std::free(x); }
  };
  std::unique_ptr<char, Free> base_;
  size_t size_ = 0, used_ = 0;
};

}  // namespace native
