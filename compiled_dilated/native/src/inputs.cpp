// A package's check of its inputs: the first operator of its graph, so that tensors outside of the
// package's range are refused from Python and from C++. Rules and texts are those of
// packages/entries.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

struct Dtype {
  ScalarType type;
  const char* name;
};

// In the order of DTYPES in packages/entries.py.
constexpr Dtype dtypes[] = {
    {ScalarType::Float, "float32"}, {ScalarType::Double, "float64"}, {ScalarType::Half, "float16"},
    {ScalarType::BFloat16, "bfloat16"}, {ScalarType::Bool, "bool"}, {ScalarType::Char, "int8"},
    {ScalarType::Short, "int16"}, {ScalarType::Int, "int32"}, {ScalarType::Long, "int64"}, {ScalarType::Byte, "uint8"},
};

// In the order of NAMES there. A negative size in the code is -1 minus the number of its name.
enum Name { tokens, batch, queries, names };
constexpr const char* words[names] = {"tokens", "batch", "queries"};

std::string name_of(ScalarType type) {
  for (const Dtype& dtype : dtypes)
    if (dtype.type == type) return dtype.name;
  return torch::headeronly::toString(type);
}

// 1234567 as 1,234,567.
std::string grouped(int64_t number) {
  std::string text = std::to_string(number);
  const int digits_from = number < 0 ? 1 : 0;
  for (int at = static_cast<int>(text.size()) - 3; at > digits_from; at -= 3) text.insert(at, ",");
  return text;
}

// The device of a package, in the order of PLACES in packages/entries.py.
constexpr const char* places[] = {"a CPU", "a GPU"};

const char* place_of(const Tensor& x) { return x.is_cpu() ? places[0] : x.is_cuda() ? places[1] : "another device"; }

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return "(" + text + (parts.size() == 1 ? ",)" : ")");
}

std::string shape_of(const Tensor& x) {
  std::vector<std::string> parts;
  for (int64_t size : x.sizes()) parts.push_back(std::to_string(size));
  return joined(parts);
}

// Reads the code: per name its least and greatest size, 0 and 0 if it has none; whether queries are
// among the tokens; the place of all inputs; then per input the dtype, whether it must be contiguous,
// dims and sizes.
class Expected {
 public:
  explicit Expected(const Ints& code) : code(code) {
    for (int name = 0; name < names; ++name) least[name] = next(), most[name] = next();
    queries_within = next() != 0;
    place = places[next() != 0];
  }

  bool ended() const { return at == code.size(); }

  void check(size_t number, const Tensor& x) {
    const Dtype& dtype = dtypes[next(0, static_cast<int64_t>(std::size(dtypes)) - 1)];
    const bool contiguous = next() != 0;
    const int64_t dims = next(0, static_cast<int64_t>(code.size()));
    const size_t first = at;
    for (int64_t dim = 0; dim < dims; ++dim) next(-names, std::numeric_limits<int64_t>::max());
    const std::string input = "input " + std::to_string(number);
    if (x.scalar_type() != dtype.type || place_of(x) != place)
      throw std::runtime_error(input + " must be " + dtype.name + " on " + place + "; got " + name_of(x.scalar_type()) + " on " +
                               place_of(x));
    bool fits = x.dim() == dims;
    for (int64_t dim = 0; fits && dim < dims; ++dim) fits = is_size(code[first + dim], x.size(dim));
    if (!fits) throw std::runtime_error(input + " must have the shape " + shown(first, dims) + "; got " + shape_of(x));
    if (contiguous && !x.is_contiguous()) throw std::runtime_error(input + " must be contiguous");
  }

  void check_ranges() const {
    for (int name = 0; name < names; ++name)
      if (seen[name] >= 0 && (seen[name] < least[name] || seen[name] > most[name]))
        throw std::runtime_error(std::string(words[name]) + " must be from " + grouped(least[name]) + " to " + grouped(most[name]) +
                                 ", for which the package was made; got " + grouped(seen[name]));
    if (queries_within && seen[queries] > seen[tokens])
      throw std::runtime_error("queries must be the last of the tokens; got " + grouped(seen[queries]) + " queries of " +
                               grouped(seen[tokens]) + " tokens");
  }

 private:
  int64_t next() {
    if (at >= code.size()) throw std::runtime_error("check_inputs: the code ends early");
    return code[at++];
  }

  int64_t next(int64_t least_number, int64_t most_number) {
    const int64_t number = next();
    if (number < least_number || number > most_number) throw std::runtime_error("check_inputs: the code has a number out of its range: " + std::to_string(number));
    return number;
  }

  // A named size is set by the first input that has it, and must be the same in all others.
  bool is_size(int64_t expected, int64_t size) {
    if (expected >= 0) return size == expected;
    int64_t& first = seen[-1 - expected];
    if (first < 0) first = size;
    return size == first;
  }

  std::string shown(size_t first, int64_t dims) const {
    std::vector<std::string> parts;
    for (int64_t dim = 0; dim < dims; ++dim) {
      const int64_t size = code[first + dim];
      parts.push_back(size < 0 ? words[-1 - size] : std::to_string(size));
    }
    return joined(parts);
  }

  const Ints& code;
  size_t at = 0;
  int64_t least[names], most[names], seen[names] = {-1, -1, -1};
  bool queries_within = false;
  const char* place = nullptr;
};

// Reads sizes and dtypes alone, on whatever device; its result is on the CPU.
// Returns 1, which the graph reads, so that no compiler removes the call.
Tensor check_inputs(std::vector<Tensor> inputs, Ints code) {
  Expected expected(code);
  for (size_t number = 0; number < inputs.size(); ++number) expected.check(number, inputs[number]);
  if (!expected.ended()) throw std::runtime_error("check_inputs: the code is of more inputs");
  expected.check_ranges();
  Tensor result = torch::stable::empty(Ints{}, ScalarType::Long);
  return torch::stable::fill_(result, 1.0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compiled_dilated, CPU, m) { m.impl("check_inputs", TORCH_BOX(&check_inputs)); }
STABLE_TORCH_LIBRARY_IMPL(compiled_dilated, CUDA, m) { m.impl("check_inputs", TORCH_BOX(&check_inputs)); }
