// The native operators over torch's stable ABI: from tensors to Problem and Gradients.
//
// Schemas are defined by library.py in a process with Python, else by door/door.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "problem.h"

namespace {

using native::Array;
using native::Gradients;
using native::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::optional<std::vector<Tensor>>;
using Ints = std::vector<int64_t>;

// Threads --------------------------------------------------------------------------------------------------------------------

struct Work {
  void (*body)(void*, int);
  void* argument;
};

void some_slots(int64_t begin, int64_t end, void* context) {
  const auto& work = *static_cast<const Work*>(context);
  for (int64_t slot = begin; slot < end; ++slot) work.body(work.argument, static_cast<int>(slot));
}

// Runs on torch's threads: a second pool would compete with it. Bodies throw nothing: on_threads
// catches their errors.
void run_slots(void*, int slots, void (*body)(void*, int), void* argument) {
  Work work{body, argument};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, slots, 1, some_slots, &work));
}

native::Parallel threads() { return {static_cast<int>(torch::stable::get_num_threads()), run_slots, nullptr}; }

// Tensors --------------------------------------------------------------------------------------------------------------------

native::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return native::Type::f32;
    case ScalarType::Double: return native::Type::f64;
    case ScalarType::Half: return native::Type::f16;
    case ScalarType::BFloat16: return native::Type::bf16;
    case ScalarType::Bool: return native::Type::boolean;
    case ScalarType::Char: return native::Type::i8;
    case ScalarType::Short: return native::Type::i16;
    case ScalarType::Int: return native::Type::i32;
    case ScalarType::Long: return native::Type::i64;
    case ScalarType::Byte: return native::Type::u8;
    default: break;
  }
  throw std::runtime_error(std::string("the native kernels take no tensor of dtype ") +
                           torch::headeronly::toString(x.scalar_type()));
}

Array described(const Tensor& x, const void* data) {
  Array result;
  result.data = data;
  result.type = type_of(x);
  const auto sizes = x.sizes(), strides = x.strides();
  if (sizes.size() > native::max_dims) throw std::runtime_error("the native kernels take tensors of 8 dimensions at most");
  result.dims = static_cast<int>(sizes.size());
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    result.sizes[dim] = sizes[dim];
    result.strides[dim] = strides[dim];
  }
  return result;
}

Array read(const Tensor& x) { return described(x, x.const_data_ptr()); }

Array written(const Tensor& x) { return described(x, x.mutable_data_ptr()); }

std::vector<Array> read(const Tensors& tensors) {
  std::vector<Array> result;
  if (!tensors) return result;
  for (const Tensor& x : *tensors) {
    if (!x.is_cpu()) throw std::runtime_error("the native kernels compute on the CPU: data and operands must lie there too");
    result.push_back(read(x));
  }
  return result;
}

// x with its last dimension contiguous, as the kernels read it; other strides may be any.
Tensor rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) == 1 ? x : torch::stable::contiguous(x);
}

std::string shape(const Tensor& x) {
  std::string text;
  for (int64_t size : x.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

void expect(bool holds, const char* what, const Tensor& x) {
  if (!holds) throw std::runtime_error(std::string("the native kernels expected ") + what + "; got shape " + shape(x));
}

// The sizes of a call, B H N D and S Dv; checks that its tensors agree in them.
struct Sizes {
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;

  explicit Sizes(const Ints& sizes) {
    if (sizes.size() != 7 && sizes.size() != 8)
      throw std::runtime_error(
          "sizes are 7 numbers: batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim, and maybe the dtype's of problem.h; got " +
          std::to_string(sizes.size()));
    batch = sizes[0], heads = sizes[1], kv_heads = sizes[2], q_len = sizes[3], kv_len = sizes[4];
    head_dim = sizes[5], value_dim = sizes[6];
    for (int64_t size : sizes)
      if (size < 0) throw std::runtime_error("sizes are 0 or more; got " + std::to_string(size));
    check_heads();
  }

  Sizes(const Tensor& q, const Tensor& k, const Tensor& v) {
    expect(q.dim() == 4, "q of shape (B, H, N, D)", q);
    expect(k.dim() == 4, "k of shape (B, Hkv, S, D)", k);
    expect(v.dim() == 4, "v of shape (B, Hkv, S, Dv)", v);
    const auto of_q = q.sizes(), of_k = k.sizes(), of_v = v.sizes();
    batch = of_q[0], heads = of_q[1], kv_heads = of_k[1], q_len = of_q[2], kv_len = of_k[2];
    head_dim = of_q[3], value_dim = of_v[3];
    expect(of_k[0] == batch && of_k[3] == head_dim, "k with q's batch and head dim", k);
    expect(of_v[0] == batch && of_v[1] == kv_heads && of_v[2] == kv_len, "v with k's batch, heads and length", v);
    if (k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type())
      throw std::runtime_error("q, k and v must have one dtype");
    if (!q.is_cpu() || !k.is_cpu() || !v.is_cpu()) throw std::runtime_error("the native kernels compute on the CPU");
    check_heads();
  }

  bool empty() const { return !(batch && heads && kv_heads && q_len && kv_len && head_dim && value_dim); }

  void check_out(const Tensor& out, const Tensor& lse, ScalarType dtype) const {
    expect(out.dim() == 4 && out.size(0) == batch && out.size(1) == heads && out.size(2) == q_len && out.size(3) == value_dim,
           "out and its gradient of shape (B, H, N, Dv)", out);
    expect(lse.dim() == 3 && lse.size(0) == batch && lse.size(1) == heads && lse.size(2) == q_len,
           "lse and its gradient of shape (B, H, N)", lse);
    if (out.scalar_type() != dtype) throw std::runtime_error("out must have the dtype of q");
    check_lse(lse, dtype);
  }

  static ScalarType lse_type(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  static void check_lse(const Tensor& lse, ScalarType dtype) {
    if (lse.scalar_type() != lse_type(dtype)) throw std::runtime_error("lse must be float32, or float64 where q is");
  }

 private:
  void check_heads() const {
    if (kv_heads && heads % kv_heads)
      throw std::runtime_error("query heads must be a multiple of key heads; got " + std::to_string(heads) + " and " +
                               std::to_string(kv_heads));
  }
};

// The position of each batch entry's first query, or one for all.
Ints positions(int64_t q_offset, const std::optional<Tensor>& offsets, int64_t batch) {
  if (!offsets) return {q_offset};
  expect(offsets->dim() == 1 && (offsets->size(0) == 1 || offsets->size(0) == batch), "offsets of shape (1,) or (B,)", *offsets);
  if (offsets->scalar_type() != ScalarType::Long) throw std::runtime_error("offsets must be of dtype int64");
  const int64_t* numbers = offsets->const_data_ptr<int64_t>();
  Ints result;
  for (int64_t b = 0; b < offsets->size(0); ++b) {
    const int64_t number = numbers[b * offsets->stride(0)];
    if (number < 0) throw std::runtime_error("q_offset must be 0 or more for each sequence; got " + std::to_string(number));
    // Before the sum, which may overflow.
    if (number > native::most_positions || q_offset > native::most_positions)
      throw std::runtime_error("the native kernel takes positions up to 2**30; got a q_offset of " + std::to_string(std::max(number, q_offset)));
    result.push_back(q_offset + number);
  }
  return result;
}

// The fields of a problem apart from q, k and v.
Problem problem_of(const Tensors& data, const Tensors& operands, Ints code, double scale, Ints q_offsets) {
  Problem problem;
  problem.data = read(data);
  problem.operands = read(operands);
  problem.code = std::move(code);
  problem.scale = scale;
  problem.q_offsets = std::move(q_offsets);
  problem.parallel = threads();
  return problem;
}

// A new, uninitialized tensor. A large one requests large pages: the system creates pages at their
// first write, which took up to a tenth of a call with pages of 4 KiB.
Tensor unwritten(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  Tensor x = torch::stable::new_empty(like, sizes, dtype);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (start + page - 1) / page * page, stop = (start + x.numel() * x.element_size()) / page * page;
  // Only a request: pages stay small if the system has no large ones.
  if (stop > first) madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);
#endif
  return x;
}

Tensor zeros(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  Tensor x = unwritten(like, sizes, dtype);
  return torch::stable::zero_(x);
}

Tensor new_counts() {
  Tensor counts = torch::stable::empty(Ints{native::count_numbers}, ScalarType::Long);
  return torch::stable::zero_(counts);
}

// Operators ------------------------------------------------------------------------------------------------------------------

// An uninitialized out: (B, H, N, Dv), or by token a view of (B, N, H, Dv).
Tensor new_out(const Tensor& q, const Sizes& sizes, bool by_token) {
  if (!by_token) return unwritten(q, {sizes.batch, sizes.heads, sizes.q_len, sizes.value_dim}, q.scalar_type());
  const Tensor tokens = unwritten(q, {sizes.batch, sizes.q_len, sizes.heads, sizes.value_dim}, q.scalar_type());
  return torch::stable::transpose(tokens, 1, 2);
}

std::tuple<Tensor, Tensor> computed(const Tensor& q, const Tensor& k, const Tensor& v, const Tensors& data,
                                    const Tensors& operands, Ints code, double scale, int64_t q_offset,
                                    const std::optional<Tensor>& offsets, bool by_token, int64_t* counts) {
  const Sizes sizes(q, k, v);
  const ScalarType dtype = q.scalar_type();
  Tensor out = new_out(q, sizes, by_token);
  Tensor lse = torch::stable::new_empty(q, Ints{sizes.batch, sizes.heads, sizes.q_len}, Sizes::lse_type(dtype));
  if (sizes.empty()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  const Tensor q_rows = rows(q), k_rows = rows(k), v_rows = rows(v);
  Problem problem = problem_of(data, operands, std::move(code), scale, positions(q_offset, offsets, sizes.batch));
  problem.q = read(q_rows), problem.k = read(k_rows), problem.v = read(v_rows);
  problem.out = written(out), problem.lse = written(lse);
  problem.counts = counts;
  native::forward(problem, false);
  return {out, lse};
}

std::tuple<Tensor, Tensor> native_(Tensor q, Tensor k, Tensor v, Tensors data, Tensors operands, Ints code, double scale,
                                   int64_t q_offset, std::optional<Tensor> offsets, bool by_token) {
  return computed(q, k, v, data, operands, std::move(code), scale, q_offset, offsets, by_token, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> native_counted(Tensor q, Tensor k, Tensor v, Tensors data, Tensors operands, Ints code,
                                                  double scale, int64_t q_offset, std::optional<Tensor> offsets, bool by_token) {
  Tensor counts = new_counts();
  auto [out, lse] =
      computed(q, k, v, data, operands, std::move(code), scale, q_offset, offsets, by_token, counts.mutable_data_ptr<int64_t>());
  return {out, lse, counts};
}

void native_merge(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensors data, Tensors operands, Ints code, double scale,
                  int64_t q_offset) {
  const Sizes sizes(q, k, v);
  sizes.check_out(out, lse, q.scalar_type());
  if (sizes.empty()) return;
  if (out.stride(3) != 1 && out.size(3) != 1) throw std::runtime_error("native_merge writes into out with contiguous rows");
  const Tensor q_rows = rows(q), k_rows = rows(k), v_rows = rows(v);
  Problem problem = problem_of(data, operands, std::move(code), scale, {q_offset});
  problem.q = read(q_rows), problem.k = read(k_rows), problem.v = read(v_rows);
  problem.out = written(out), problem.lse = written(lse);
  native::forward(problem, true);
}

// A zero vector for the gradients of all learned operands.
Tensor new_sums(const Tensor& like, const Tensors& operands, const Ints& learned) {
  int64_t numbers = 0;
  ScalarType dtype = ScalarType::Float;
  for (int64_t number : learned) {
    if (!operands || number < 0 || number >= static_cast<int64_t>(operands->size()))
      throw std::runtime_error("learned names operand " + std::to_string(number) + ", which is not there");
    const Tensor& operand = (*operands)[number];
    numbers += operand.numel();
    if (operand.scalar_type() == ScalarType::Double) dtype = ScalarType::Double;
  }
  return zeros(like, {numbers}, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> native_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                                           Tensor v, Tensor out, Tensor lse, Tensors data, Tensors operands,
                                                           Ints code, double scale, int64_t q_offset,
                                                           std::optional<Tensor> offsets, Ints learned) {
  const Sizes sizes(q, k, v);
  const ScalarType dtype = q.scalar_type();
  sizes.check_out(out, lse, dtype);
  sizes.check_out(grad_out, grad_lse.value_or(lse), dtype);
  Tensor grad_q = zeros(q, {sizes.batch, sizes.heads, sizes.q_len, sizes.head_dim}, dtype);
  Tensor grad_k = zeros(k, {sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.head_dim}, dtype);
  Tensor grad_v = zeros(v, {sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.value_dim}, dtype);
  Tensor sums = new_sums(q, operands, learned);
  if (sizes.empty()) return {grad_q, grad_k, grad_v, sums};

  const Tensor q_rows = rows(q), k_rows = rows(k), v_rows = rows(v), out_rows = rows(out), grad_out_rows = rows(grad_out);
  const Tensor lse_read = torch::stable::contiguous(lse), grad_lse_read = torch::stable::contiguous(grad_lse.value_or(lse));
  Problem problem = problem_of(data, operands, std::move(code), scale, positions(q_offset, offsets, sizes.batch));
  problem.q = read(q_rows), problem.k = read(k_rows), problem.v = read(v_rows);
  problem.out = read(out_rows), problem.lse = read(lse_read);
  Gradients gradients;
  gradients.grad_out = read(grad_out_rows);
  if (grad_lse) gradients.grad_lse = read(grad_lse_read);
  gradients.grad_q = written(grad_q), gradients.grad_k = written(grad_k), gradients.grad_v = written(grad_v);
  if (!learned.empty()) gradients.sums = written(sums);
  gradients.learned = std::move(learned);
  native::backward(problem, gradients);
  return {grad_q, grad_k, grad_v, sums};
}

native::Type counted_type(int64_t number) {
  if (number < 0 || number > static_cast<int64_t>(native::Type::bf16))
    throw std::runtime_error("the dtype counted for must be float32, float64, float16 or bfloat16, 0 to 3; got " + std::to_string(number));
  return static_cast<native::Type>(number);
}

Array sized(int64_t batch, int64_t heads, int64_t tokens, int64_t width) {
  Array result;
  result.dims = 4;
  result.sizes[0] = batch, result.sizes[1] = heads, result.sizes[2] = tokens, result.sizes[3] = width;
  result.strides[0] = heads * tokens * width, result.strides[1] = tokens * width, result.strides[2] = width;
  result.strides[3] = 1;
  return result;
}

Tensor native_counts(Tensors data, Tensors operands, Ints code, Ints numbers, int64_t q_offset, std::optional<Tensor> offsets) {
  const Sizes sizes(numbers);
  Tensor counts = new_counts();
  if (sizes.empty()) return counts;
  Problem problem = problem_of(data, operands, std::move(code), 1.0, positions(q_offset, offsets, sizes.batch));
  problem.q = sized(sizes.batch, sizes.heads, sizes.q_len, sizes.head_dim);
  problem.k = sized(sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.head_dim);
  problem.v = sized(sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.value_dim);
  problem.out = sized(sizes.batch, sizes.heads, sizes.q_len, sizes.value_dim);
  if (numbers.size() == 8) problem.q.type = counted_type(numbers[7]);
  problem.counts = counts.mutable_data_ptr<int64_t>();
  native::count(problem);
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compiled_dilated, CPU, m) {
  m.impl("native", TORCH_BOX(&native_));
  m.impl("native_counted", TORCH_BOX(&native_counted));
  m.impl("native_backward", TORCH_BOX(&native_backward));
  m.impl("native_merge", TORCH_BOX(&native_merge));
}

// A call may have no tensor and so no device: this key is dispatched first.
STABLE_TORCH_LIBRARY_IMPL(compiled_dilated, BackendSelect, m) { m.impl("native_counts", TORCH_BOX(&native_counts)); }
