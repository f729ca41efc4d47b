// Functions of users (mask_mod, score_mod) as tapes: operations on registers with a tile of pairs.
//
//     read_function (numbers -> Function)      once per call
//     mask, score, score_backward              a tile of keys x lanes, in slices for the L1 cache
//     classify                                 a mask's verdict on a block, by intervals
//
// The code of a function, as tape.py writes it:
//
//     version
//     number of operands; per operand: type (Type), dimensions, and per dimension the size that the
//                                      tapes were made for (-1: any)
//     number of tapes; per tape: kind (TapeKind), number of nodes, the nodes, the result's node
//                      per node: operation, register, number, count of inputs, the inputs
//                                (numbers of earlier nodes)
//
// The "number" of a node is its immediate operand: the bits of a constant, an operand, a size, a
// type.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "problem.h"

namespace native {

// The machine type of a node's values.
enum class Register : int { boolean, i32, i64, f32, f64 };

enum class TapeKind : int { mask, score_f32, score_f64, backward_f32, backward_f64 };

// The list of expressions.py; a test compares them.
enum class Operation : int {
  constant = 0,  // number: its bits
  batch = 1,
  head = 2,
  query = 3,
  key = 4,
  score = 5,
  gradient = 6,  // of the new score
  load = 7,      // number: an operand. Inputs: an index for each of its dimensions
  scatter = 8,   // number: an operand. Inputs: the summand of its gradient, then the indices
  within = 9,    // number: a size. An index as a position: negative ones count from the end
  convert = 10,
  narrow = 11,    // number: a Type of whole numbers that the result wraps around in
  round_to = 12,  // number: f16 or bf16
  negate = 13,
  absolute = 14,
  sign = 15,
  floor = 16,
  ceiling = 17,
  round = 18,
  truncate = 19,
  square_root = 20,
  exp = 21,
  exp2 = 22,
  expm1 = 23,
  log = 24,
  log2 = 25,
  log10 = 26,
  log1p = 27,
  sin = 28,
  cos = 29,
  tan = 30,
  sinh = 31,
  cosh = 32,
  asin = 33,
  acos = 34,
  atan = 35,
  tanh = 36,
  sigmoid = 37,
  erf = 38,
  add = 39,
  subtract = 40,
  multiply = 41,
  divide = 42,
  floor_divide = 43,
  remainder = 44,
  fmod = 45,
  minimum = 46,
  maximum = 47,
  power = 48,
  atan2 = 49,
  equal = 50,
  not_equal = 51,
  less = 52,
  less_equal = 53,
  both = 54,
  either = 55,
  exclusive = 56,
  complement = 57,
  shift_left = 58,
  shift_right = 59,
  where = 60,
};

struct FunctionNode {
  Operation op;
  Register type;
  int64_t number;
  std::vector<int> inputs;
};

struct FunctionTape {
  TapeKind kind;
  std::vector<FunctionNode> nodes;
  int result;
};

struct OperandKind {
  Type type;
  int dims;
  int64_t sizes[max_dims];  // -1: any
};

struct Function {
  uint64_t id;  // unique among functions
  std::vector<OperandKind> operands;
  std::vector<FunctionTape> tapes;
};

// Reads one function and moves `code` past it. Throws std::runtime_error for malformed code.
Function read_function(const int64_t*& code, const int64_t* end);

// Throws std::runtime_error unless the operands have the number, types and shapes that the function
// was made for.
void check_operands(const Function& function, const Array* operands, size_t count);

constexpr int most_lanes = 64;
constexpr int most_keys = 128;

// Positions of a tile: lanes queries, keys keys.
struct Pairs {
  int64_t b, h;
  const int32_t* q;
  int lanes;
  const int32_t* k;
  int keys;
};

// The workspace of one thread, for any number of functions and tiles.
class FunctionRoom {
 public:
  FunctionRoom();
  ~FunctionRoom();
  FunctionRoom(FunctionRoom&&) noexcept;
  FunctionRoom& operator=(FunctionRoom&&) noexcept;
  struct Contents;
  Contents& contents() { return *contents_; }

 private:
  std::unique_ptr<Contents> contents_;
};

// The following throw std::runtime_error for an index out of range, and for an integer division by
// zero.

// seen[key * lanes + lane]: 1 where the pair is seen, 0 elsewhere.
void mask(const Function& function, const Array* operands, const Pairs& pairs, uint8_t* seen, FunctionRoom& room);

// Replaces scores[key * ld + lane] by the new scores. T: float or double.
template <class T>
void score(const Function& function, const Array* operands, const Pairs& pairs, T* scores, int ld, FunctionRoom& room);

// scores: the unchanged ones. grads: gradients of the new scores, which become those of the
// unchanged ones. sums: per operand the buffer that its gradient is added to, contiguous in the
// operand's shape, or null. A pair with a gradient of zero adds zero, for any score.
template <class T>
void score_backward(const Function& function, const Array* operands, const Pairs& pairs, const T* scores, T* grads, int ld,
                    T* const* sums, FunctionRoom& room);

// A mask's verdict on positions q_first .. q_last and k_first .. k_last: 0 no pair is seen, 2 all
// are, 1 undecided.
int classify(const Function& function, const Array* operands, int64_t b, int64_t h, int64_t q_first, int64_t q_last,
             int64_t k_first, int64_t k_last);

}  // namespace native
