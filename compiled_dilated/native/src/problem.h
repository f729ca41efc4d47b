// The arguments of the kernels: plain values, without torch.
//
//     operators.cpp (tensors) -> Problem, Gradients -> forward, backward, count (kernels)
#pragma once

#include <cstdint>
#include <vector>

namespace native {

// 16-bit floats of the CPU's own arithmetic.
#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

enum class Type : int { f32, f64, f16, bf16, boolean, i8, i16, i32, i64, u8 };

constexpr int max_dims = 8;
// Positions of queries and keys are below.
constexpr int64_t most_positions = int64_t{1} << 30;
constexpr int count_numbers = 8;

// A tensor's data, owned by the caller. Sizes and strides in elements.
struct Array {
  const void* data = nullptr;
  Type type = Type::f32;
  int dims = 0;
  int64_t sizes[max_dims] = {};
  int64_t strides[max_dims] = {};

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }

  // For results only.
  template <class T>
  T* writable() const {
    return static_cast<T*>(const_cast<void*>(data));
  }

  explicit operator bool() const { return data != nullptr; }
};

// The caller's threads. run calls body(argument, slot) once for every slot in 0 .. slots - 1, on up
// to `threads` threads, and returns when all are done. A body throws nothing.
struct Parallel {
  int threads = 1;
  void (*run)(void* context, int slots, void (*body)(void* argument, int slot), void* argument) = nullptr;
  void* context = nullptr;
};

// q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv): any strides, the last dimension contiguous.
// out (B, H, N, Dv): any strides, the last dimension contiguous. lse (B, H, N), contiguous: f32, or f64 where q is f64.
// No size is 0, H is a multiple of Hkv. q_offsets has 1 or B numbers. counts: null, or count_numbers numbers, zeros at first.
struct Problem {
  Array q, k, v;
  Array out, lse;
  std::vector<Array> data, operands;
  std::vector<int64_t> code;
  double scale = 1.0;
  std::vector<int64_t> q_offsets;
  Parallel parallel;
  int64_t* counts = nullptr;
};

// All contiguous and zero at first, except grad_out, which has any strides. grad_lse: no data if
// there is none. sums: the gradients of operands[learned[0]], operands[learned[1]], ...
// concatenated; no data if there are none.
struct Gradients {
  Array grad_out, grad_lse;
  Array grad_q, grad_k, grad_v;
  std::vector<int64_t> learned;
  Array sums;
};

// Each throws std::runtime_error with a text for the user on bad input.

// merge: out and lse contain the result over other keys, and become that over all keys.
void forward(const Problem& problem, bool merge);
void backward(const Problem& problem, const Gradients& gradients);
// Fills counts from sizes: q, k and v need no data, data tensors and operands do.
void count(const Problem& problem);

}  // namespace native
