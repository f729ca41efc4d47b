#include "functions.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "function_loops.h"

namespace native {

namespace {

using loops::Place;
using loops::Run;
using loops::Step;

constexpr int64_t version = 1;
constexpr int64_t most_nodes = 1 << 14;
constexpr int64_t most_operands = 1 << 10;
constexpr int most_inputs = 1 + max_dims;
constexpr int slice = 512;  // pairs of a slice, at most
constexpr int most_hoisted = 8;
constexpr size_t most_plans = 64;

[[noreturn]] void fail(const char* what) { throw std::runtime_error(std::string("the code of a function is none: ") + what); }

void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// Reading -------------------------------------------------------------------------------------------------------------------

Register register_of(Type type) {
  switch (type) {
    case Type::f64: return Register::f64;
    case Type::f32: case Type::f16: case Type::bf16: return Register::f32;
    case Type::boolean: return Register::boolean;
    case Type::i64: return Register::i64;
    default: return Register::i32;
  }
}

bool is_whole(Register type) { return type == Register::i32 || type == Register::i64; }

bool is_backward(TapeKind kind) { return kind == TapeKind::backward_f32 || kind == TapeKind::backward_f64; }

Register register_of(TapeKind kind) {
  if (kind == TapeKind::mask) return Register::boolean;
  return kind == TapeKind::score_f32 || kind == TapeKind::backward_f32 ? Register::f32 : Register::f64;
}

size_t arity(Operation op) {
  if (op == Operation::where) return 3;
  if (op >= Operation::convert && op <= Operation::erf) return 1;
  return op == Operation::complement ? 1 : 2;
}

// Checks that a node fits its inputs, so that no loop reads registers of other types.
void check(const Function& function, const FunctionTape& tape, const FunctionNode& node) {
  const auto type_of = [&](size_t i) { return tape.nodes[node.inputs[i]].type; };
  const auto check_indices = [&](size_t from) {
    require(node.number >= 0 && node.number < static_cast<int64_t>(function.operands.size()), "an operand that is not there");
    require(static_cast<int64_t>(node.inputs.size() - from) == function.operands[node.number].dims, "indices of an operand");
    for (size_t i = from; i < node.inputs.size(); ++i) require(is_whole(type_of(i)), "an index that is no whole number");
  };
  for (const int input : node.inputs) require(tape.nodes[input].op != Operation::scatter, "a result where there is none");
  const size_t count = node.inputs.size();
  switch (node.op) {
    case Operation::constant: return require(count == 0, "inputs of a constant");
    case Operation::batch: case Operation::head: case Operation::query: case Operation::key:
      return require(count == 0 && node.type == Register::i32, "an index");
    case Operation::score: case Operation::gradient:
      require(node.op == Operation::score || is_backward(tape.kind), "a gradient");
      return require(count == 0 && tape.kind != TapeKind::mask && node.type == register_of(tape.kind), "a score");
    case Operation::load:
      check_indices(0);
      return require(node.type == register_of(function.operands[node.number].type), "the type of an operand");
    case Operation::scatter:
      require(is_backward(tape.kind) && count > 0 && node.type == register_of(tape.kind) && type_of(0) == node.type, "a gradient's sum");
      return check_indices(1);
    case Operation::within:
      return require(count == 1 && is_whole(type_of(0)) && node.type == Register::i64 && node.number > 0, "a position");
    default: break;
  }
  require(count == arity(node.op), "the inputs of an operation");
  const bool compares = node.op >= Operation::equal && node.op <= Operation::less_equal;
  if (node.op == Operation::where) {
    require(type_of(0) == Register::boolean && type_of(1) == node.type && type_of(2) == node.type, "types of a choice");
  } else if (compares) {
    require(node.type == Register::boolean && type_of(0) == type_of(1), "types of a comparison");
  } else if (node.op != Operation::convert) {
    for (size_t i = 0; i < count; ++i) require(type_of(i) == node.type, "types of an operation");
  }
  require(loops::loop_of(node.op, node.type, type_of(0), node.number) != nullptr, "an operation of other types");
}

class Reader {
 public:
  Reader(const int64_t*& at, const int64_t* end) : at_(at), end_(end) {}

  int64_t next() {
    require(at_ != end_, "it stops too early");
    return *at_++;
  }

  int64_t next(int64_t most, const char* what) {
    const int64_t value = next();
    require(value >= 0 && value <= most, what);
    return value;
  }

 private:
  const int64_t*& at_;
  const int64_t* end_;
};

FunctionTape read_tape(Reader& reader, const Function& function) {
  FunctionTape tape{static_cast<TapeKind>(reader.next(static_cast<int64_t>(TapeKind::backward_f64), "a kind")), {}, 0};
  const int64_t count = reader.next(most_nodes, "a count of nodes");
  for (int64_t i = 0; i < count; ++i) {
    FunctionNode node{};
    node.op = static_cast<Operation>(reader.next(static_cast<int64_t>(Operation::where), "an operation"));
    node.type = static_cast<Register>(reader.next(static_cast<int64_t>(Register::f64), "a register"));
    node.number = reader.next();
    node.inputs.resize(reader.next(most_inputs, "a count of inputs"));
    for (int& input : node.inputs) input = static_cast<int>(reader.next(i - 1, "an input"));
    check(function, tape, node);
    tape.nodes.push_back(std::move(node));
  }
  tape.result = static_cast<int>(reader.next(count - 1, "a result"));
  const FunctionNode& result = tape.nodes[tape.result];
  require(result.op != Operation::scatter && result.type == register_of(tape.kind), "a result of another type");
  return tape;
}

const FunctionTape& tape_of(const Function& function, TapeKind kind) {
  for (const FunctionTape& tape : function.tapes)
    if (tape.kind == kind) return tape;
  throw std::runtime_error("a function was not made for scores of this type, or for gradients");
}

// Plans: a tape as steps over registers -------------------------------------------------------------------------------------

// What the numbers of a register vary with: nothing, the lane, the key, or both. Joined by `or`.
enum Level { all = 0, of_lane = 1, of_key = 2, of_pair = 3 };

constexpr int capacity[] = {loops::unit, most_lanes, most_keys, slice};

struct Plan {
  std::vector<Step> once[3];  // by level
  std::vector<Step> hoisted;  // steps of pairs that are the same for all slices
  std::vector<Step> slices;
  std::vector<Step> finish;
  std::vector<std::pair<int, int>> zeros;  // registers that start as zeros: offset, bytes
  int result = 0;
  int bytes = 0;
};

int width(Register type) {
  if (type == Register::boolean) return 1;
  return type == Register::i32 || type == Register::f32 ? 4 : 8;
}

// A step before its registers are allocated; inputs are numbers of items.
struct Item {
  Run run = nullptr;
  Level level = all;
  int width = 4;
  int in[3] = {-1, -1, -1};
  Step step = {};
  Run finish = nullptr;  // for sums over a tile
  bool hoisted = false;
};

void write_constant(Place& place, const Step& step, int n) {
  for (int i = 0; i < n; ++i) switch (step.in[0]) {
      case 1: place.at<uint8_t>(step.out)[i] = step.number != 0; break;
      case 4: place.at<uint32_t>(step.out)[i] = static_cast<uint32_t>(step.number); break;
      default: place.at<int64_t>(step.out)[i] = step.number;
    }
}

void read_batch_or_head(Place& place, const Step& step, int n) {
  for (int i = 0; i < n; ++i) place.at<int32_t>(step.out)[i] = static_cast<int32_t>(step.in[0] ? place.pairs->h : place.pairs->b);
}

void read_queries(Place& place, const Step& step, int n) {
  int32_t* out = place.at<int32_t>(step.out);
  std::copy_n(place.pairs->q, place.pairs->lanes, out);
  loops::fill_up(out, place.pairs->lanes, n);
}

void read_keys(Place& place, const Step& step, int n) {
  int32_t* out = place.at<int32_t>(step.out);
  std::copy_n(place.pairs->k, place.pairs->keys, out);
  loops::fill_up(out, place.pairs->keys, n);
}

Run filler(Level level, int width) {
  if (level == all) return width == 1 ? loops::fill_constant<uint8_t> : width == 4 ? loops::fill_constant<uint32_t> : loops::fill_constant<uint64_t>;
  if (level == of_lane) return width == 1 ? loops::fill_lanes<uint8_t> : width == 4 ? loops::fill_lanes<uint32_t> : loops::fill_lanes<uint64_t>;
  return width == 1 ? loops::fill_keys<uint8_t> : width == 4 ? loops::fill_keys<uint32_t> : loops::fill_keys<uint64_t>;
}

template <class T>
Run scatterer(Level level) {
  if (level == of_pair) return loops::scatter_pairs<T>;
  return level == of_key ? loops::scatter_keys<T> : loops::scatter_lanes<T>;
}

class Planner {
 public:
  // learned: whether each operand needs a gradient.
  Planner(const FunctionTape& tape, const std::vector<uint8_t>& learned) : tape_(tape), learned_(learned) {}

  Plan plan() {
    find_needed();
    of_node_.assign(tape_.nodes.size(), -1);
    for (size_t i = 0; i < tape_.nodes.size(); ++i)
      if (needed_[i]) of_node_[i] = add_node(tape_.nodes[i]);
    result_ = for_pairs(of_node_[tape_.result]);
    place();
    return std::move(plan_);
  }

 private:
  void find_needed() {
    needed_.assign(tape_.nodes.size(), 0);
    needed_[tape_.result] = 1;
    for (size_t i = tape_.nodes.size(); i-- > 0;) {
      const FunctionNode& node = tape_.nodes[i];
      if (node.op == Operation::scatter && learned_[node.number]) needed_[i] = 1;
      if (needed_[i])
        for (const int input : node.inputs) needed_[input] = 1;
    }
  }

  int add(const Item& item) {
    items_.push_back(item);
    return static_cast<int>(items_.size()) - 1;
  }

  // The numbers of an item repeated for every pair of a slice.
  int for_pairs(int number) {
    const Item& of = items_[number];
    if (of.level == of_pair) return number;
    const auto [place, is_new] = filled_.try_emplace(number, 0);
    if (is_new) {
      Item item;
      item.run = filler(of.level, of.width);
      item.level = of_pair;
      item.width = of.width;
      item.in[0] = number;
      item.hoisted = of.level != of_key && hoisted_++ < most_hoisted;
      place->second = add(item);
    }
    return place->second;
  }

  Level joined(const std::vector<int>& inputs) const {
    int level = all;
    for (const int input : inputs) level |= items_[of_node_[input]].level;
    return static_cast<Level>(level);
  }

  int add_node(const FunctionNode& node) {
    Item item;
    item.width = width(node.type);
    item.step.number = node.number;
    item.step.in[0] = item.width;
    switch (node.op) {
      case Operation::constant: item.run = write_constant; return add(item);
      case Operation::batch: case Operation::head:
        item.run = read_batch_or_head;
        item.step.in[0] = node.op == Operation::head;
        return add(item);
      case Operation::query: item.run = read_queries; item.level = of_lane; return add(item);
      case Operation::key: item.run = read_keys; item.level = of_key; return add(item);
      case Operation::score: return add_tile(node.type, 0);
      case Operation::gradient: return add_tile(node.type, 1);
      case Operation::load: {
        item.in[0] = add_address(node, 0, false);
        item.level = items_[item.in[0]].level;
        item.run = loops::gather;
        item.step.operand = static_cast<int>(node.number);
        return add(item);
      }
      case Operation::scatter: return add_scatter(node);
      default: break;
    }
    const Register first = tape_.nodes[node.inputs[0]].type;
    item.run = node.op != Operation::within ? loops::loop_of(node.op, node.type, first, node.number)
               : first == Register::i32    ? loops::within<int32_t>
                                           : loops::within<int64_t>;
    item.step.operand = -1;
    item.level = joined(node.inputs);
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      const int input = of_node_[node.inputs[i]];
      item.in[i] = item.level == of_pair ? for_pairs(input) : aligned(input, item.level);
    }
    return add(item);
  }

  int add_tile(Register type, int which) {
    const auto [place, is_new] = tiles_.try_emplace(which, 0);
    if (is_new) {
      Item item;
      item.run = type == Register::f32 ? loops::read_tile<float> : loops::read_tile<double>;
      item.width = width(type);
      item.level = of_pair;
      item.step.in[0] = which;
      place->second = add(item);
    }
    return place->second;
  }

  // A register of level `all`, extended to the size of one of lanes or keys.
  int aligned(int number, Level level) {
    if (items_[number].level == level) return number;
    const auto [place, is_new] = spread_.try_emplace({number, level}, 0);
    if (is_new) {
      Item item;
      item.run = filler(all, items_[number].width);
      item.width = items_[number].width;
      item.level = level;
      item.in[0] = number;
      place->second = add(item);
    }
    return place->second;
  }

  int sum(int a, int b) {
    const auto [place, is_new] = sums_.try_emplace({a, b}, 0);
    if (is_new) {
      Item item;
      item.level = static_cast<Level>(items_[a].level | items_[b].level);
      item.width = 8;
      item.run = loops::binary<loops::Add, int64_t, int64_t>;
      item.in[0] = item.level == of_pair ? for_pairs(a) : aligned(a, item.level);
      item.in[1] = item.level == of_pair ? for_pairs(b) : aligned(b, item.level);
      place->second = add(item);
    }
    return place->second;
  }

  // The addresses of a node's elements; offsets that vary least are summed first.
  int add_address(const FunctionNode& node, size_t from, bool contiguous) {
    int of_level[4] = {-1, -1, -1, -1};
    for (size_t i = from; i < node.inputs.size(); ++i) {
      const int dim = static_cast<int>(i - from), input = of_node_[node.inputs[i]];
      const auto [place, is_new] = addresses_.try_emplace({node.number, dim, input, contiguous}, 0);
      if (is_new) {
        Item item;
        item.run = tape_.nodes[node.inputs[i]].type == Register::i32 ? loops::address<int32_t> : loops::address<int64_t>;
        item.level = items_[input].level;
        item.width = 8;
        item.in[0] = input;
        item.step.operand = static_cast<int>(node.number);
        item.step.dim = dim;
        item.step.contiguous = contiguous;
        place->second = add(item);
      }
      int& total = of_level[items_[place->second].level];
      total = total < 0 ? place->second : sum(total, place->second);
    }
    int total = -1;
    for (const int part : of_level)
      if (part >= 0) total = total < 0 ? part : sum(total, part);
    if (total >= 0) return total;
    Item zero;
    zero.run = write_constant;
    zero.width = 8;
    zero.step.in[0] = 8;
    return add(zero);
  }

  int add_scatter(const FunctionNode& node) {
    Item item;
    item.in[1] = add_address(node, 1, true);
    item.in[0] = for_pairs(of_node_[node.inputs[0]]);
    item.in[2] = add_tile(node.type, 1);
    const Level level = items_[item.in[1]].level;
    const bool is_float = node.type == Register::f32;
    item.run = is_float ? scatterer<float>(level) : scatterer<double>(level);
    if (level == all) item.finish = is_float ? loops::finish_all<float> : loops::finish_all<double>;
    if (level == of_lane) item.finish = is_float ? loops::finish_lanes<float> : loops::finish_lanes<double>;
    item.level = of_pair;
    item.width = item.finish ? width(node.type) : 0;
    item.step.operand = static_cast<int>(node.number);
    return add(item);
  }

  int room(int bytes) {
    const int at = plan_.bytes;
    plan_.bytes += (bytes + 63) / 64 * 64;
    return at;
  }

  // Allocates registers. Items of pairs, which every slice computes again, reuse registers that are
  // no longer read.
  void place() {
    std::vector<int> last(items_.size(), -1);
    for (size_t i = 0; i < items_.size(); ++i)
      for (const int input : items_[i].in)
        if (input >= 0) last[input] = static_cast<int>(i);
    last[result_] = static_cast<int>(items_.size());
    std::map<int, std::vector<int>> free;  // by width
    for (size_t i = 0; i < items_.size(); ++i) {
      Item& item = items_[i];
      Step& step = item.step;
      step.run = item.run;
      const bool is_shared = item.level == of_pair && !item.hoisted && !item.finish;
      std::vector<int>& of_width = free[item.width];
      if (is_shared && !of_width.empty()) {
        step.out = of_width.back();
        of_width.pop_back();
      } else {
        step.out = room(item.width * capacity[item.finish ? of_lane : item.level]);
      }
      for (int j = 0; j < 3; ++j)
        if (item.in[j] >= 0) step.in[j] = items_[item.in[j]].step.out;
      for (int j = 0; j < 3; ++j) {
        const int input = item.in[j];
        if (input < 0 || last[input] != static_cast<int>(i) || std::count(item.in, item.in + j, input)) continue;
        const Item& of = items_[input];
        if (of.level == of_pair && !of.hoisted) free[of.width].push_back(of.step.out);
      }
      if (item.finish) {
        plan_.zeros.emplace_back(step.out, item.width * most_lanes);
        Step finish = step;
        finish.run = item.finish;
        plan_.finish.push_back(finish);
      }
      (item.level != of_pair ? plan_.once[item.level] : item.hoisted ? plan_.hoisted : plan_.slices).push_back(step);
    }
    plan_.result = items_[result_].step.out;
  }

  const FunctionTape& tape_;
  const std::vector<uint8_t>& learned_;
  Plan plan_;
  std::vector<uint8_t> needed_;
  std::vector<Item> items_;
  std::vector<int> of_node_;
  int result_ = 0;
  int hoisted_ = 0;
  std::map<int, int> filled_, tiles_;
  std::map<std::pair<int, int>, int> spread_, sums_;
  std::map<std::tuple<int64_t, int, int, bool>, int> addresses_;
};

struct CachedPlan {
  uint64_t id;
  TapeKind kind;
  std::vector<uint8_t> learned;
  Plan plan;
};

struct alignas(64) Line {
  char bytes[64];
};

int whole_units(int count) { return (count + loops::unit - 1) / loops::unit * loops::unit; }

}  // namespace

struct FunctionRoom::Contents {
  std::vector<CachedPlan> plans;
  std::vector<Line> memory;

  const Plan& plan(const Function& function, TapeKind kind, void* const* sums) {
    const auto is_learned = [&](size_t i) -> uint8_t { return sums && sums[i]; };
    for (const CachedPlan& cached : plans) {
      if (cached.id != function.id || cached.kind != kind) continue;
      bool same = true;
      for (size_t i = 0; i < cached.learned.size(); ++i) same &= cached.learned[i] == is_learned(i);
      if (same) return cached.plan;
    }
    const FunctionTape& tape = tape_of(function, kind);
    std::vector<uint8_t> learned(function.operands.size());
    for (size_t i = 0; i < learned.size(); ++i) learned[i] = is_learned(i);
    if (plans.size() >= most_plans) plans.clear();
    Plan plan = Planner(tape, learned).plan();
    plans.push_back({function.id, kind, std::move(learned), std::move(plan)});
    return plans.back().plan;
  }
};

FunctionRoom::FunctionRoom() : contents_(std::make_unique<Contents>()) {}
FunctionRoom::~FunctionRoom() = default;
FunctionRoom::FunctionRoom(FunctionRoom&&) noexcept = default;
FunctionRoom& FunctionRoom::operator=(FunctionRoom&&) noexcept = default;

namespace {

void run_all(const std::vector<Step>& steps, Place& place, int n) {
  for (const Step& step : steps) step.run(place, step, n);
}

// Runs a tape over a tile; calls take(row, rows, result) with the results of a slice, rows x lanes.
template <class Take>
void run(const Function& function, TapeKind kind, const Pairs& pairs, Place place, FunctionRoom& room, const Take& take) {
  if (pairs.lanes <= 0 || pairs.keys <= 0) return;
  if (pairs.lanes > most_lanes || pairs.keys > most_keys) throw std::runtime_error("a tile is too large for functions");
  check_operands(function, place.operands, function.operands.size());
  FunctionRoom::Contents& contents = room.contents();
  const Plan& plan = contents.plan(function, kind, place.sums);
  if (contents.memory.size() * sizeof(Line) < static_cast<size_t>(plan.bytes)) contents.memory.resize((plan.bytes + sizeof(Line) - 1) / sizeof(Line));
  place.base = reinterpret_cast<char*>(contents.memory.data());
  place.pairs = &pairs;
  for (const auto& [offset, bytes] : plan.zeros) std::memset(place.base + offset, 0, bytes);
  const int most_rows = std::min(slice / pairs.lanes, pairs.keys);
  const auto faults = [&] {
    if (place.is_out_of_range) throw std::runtime_error("index out of range: a function looks up a captured tensor where it has no entry");
    if (place.zero_divisor) throw std::runtime_error("a function divides a whole number by zero");
  };
  run_all(plan.once[all], place, loops::unit);
  run_all(plan.once[of_lane], place, whole_units(pairs.lanes));
  run_all(plan.once[of_key], place, whole_units(pairs.keys));
  place.row = 0, place.rows = most_rows;
  run_all(plan.hoisted, place, whole_units(most_rows * pairs.lanes));
  for (int row = 0; row < pairs.keys; row += most_rows) {
    place.row = row, place.rows = std::min(most_rows, pairs.keys - row);
    run_all(plan.slices, place, whole_units(place.rows * pairs.lanes));
    take(row, place.rows, place.base + plan.result);
  }
  run_all(plan.finish, place, 0);
  faults();
}

}  // namespace

Function read_function(const int64_t*& code, const int64_t* end) {
  static std::atomic<uint64_t> count{0};
  Function function{++count, {}, {}};
  Reader reader(code, end);
  require(reader.next() == version, "it was written by another version of compiled_dilated");
  const int64_t operands = reader.next(most_operands, "a count of operands");
  for (int64_t i = 0; i < operands; ++i) {
    OperandKind kind{};
    kind.type = static_cast<Type>(reader.next(static_cast<int64_t>(Type::u8), "a type"));
    kind.dims = static_cast<int>(reader.next(max_dims, "a count of dimensions"));
    for (int dim = 0; dim < kind.dims; ++dim) kind.sizes[dim] = reader.next();
    function.operands.push_back(kind);
  }
  const int64_t tapes = reader.next(8, "a count of tapes");
  for (int64_t i = 0; i < tapes; ++i) function.tapes.push_back(read_tape(reader, function));
  return function;
}

void check_operands(const Function& function, const Array* operands, size_t count) {
  if (count != function.operands.size()) throw std::runtime_error("a function reads another number of captured tensors than the call has");
  for (size_t i = 0; i < count; ++i) {
    const Array& operand = operands[i];
    if (operand.type != function.operands[i].type || operand.dims != function.operands[i].dims)
      throw std::runtime_error("captured tensor " + std::to_string(i) + " has another dtype or number of dimensions than the function was made for");
    for (int dim = 0; dim < operand.dims; ++dim)
      if (function.operands[i].sizes[dim] >= 0 && function.operands[i].sizes[dim] != operand.sizes[dim])
        throw std::runtime_error("captured tensor " + std::to_string(i) + " has another shape than the function was made for");
    for (int dim = 0; dim < operand.dims; ++dim)
      if (operand.sizes[dim] <= 0) throw std::runtime_error("index out of range: captured tensor " + std::to_string(i) + " is empty");
    if (!operand.data) throw std::runtime_error("captured tensor " + std::to_string(i) + " has no data");
  }
}

void mask(const Function& function, const Array* operands, const Pairs& pairs, uint8_t* seen, FunctionRoom& room) {
  Place place{};
  place.operands = operands;
  place.is_out_of_range = false;
  run(function, TapeKind::mask, pairs, place, room, [&](int row, int rows, const char* result) {
    std::memcpy(seen + row * pairs.lanes, result, static_cast<size_t>(rows) * pairs.lanes);
  });
}

template <class T>
void score(const Function& function, const Array* operands, const Pairs& pairs, T* scores, int ld, FunctionRoom& room) {
  Place place{};
  place.operands = operands;
  place.scores = scores;
  place.ld = ld;
  place.is_out_of_range = false;
  const TapeKind kind = sizeof(T) == 4 ? TapeKind::score_f32 : TapeKind::score_f64;
  run(function, kind, pairs, place, room, [&](int row, int rows, const char* result) {
    for (int i = 0; i < rows; ++i)
      std::memcpy(scores + static_cast<int64_t>(row + i) * ld, result + i * pairs.lanes * sizeof(T), pairs.lanes * sizeof(T));
  });
}

template <class T>
void score_backward(const Function& function, const Array* operands, const Pairs& pairs, const T* scores, T* grads, int ld,
                    T* const* sums, FunctionRoom& room) {
  Place place{};
  place.operands = operands;
  place.scores = scores;
  place.grads = grads;
  place.ld = ld;
  place.sums = reinterpret_cast<void* const*>(sums);
  place.is_out_of_range = false;
  const TapeKind kind = sizeof(T) == 4 ? TapeKind::backward_f32 : TapeKind::backward_f64;
  run(function, kind, pairs, place, room, [&](int row, int rows, const char* result) {
    const T* from = reinterpret_cast<const T*>(result);
    for (int i = 0; i < rows; ++i, from += pairs.lanes) {
      T* __restrict to = grads + static_cast<int64_t>(row + i) * ld;
      for (int lane = 0; lane < pairs.lanes; ++lane) to[lane] = loops::reached(from[lane], to[lane]);
    }
  });
}

template void score<float>(const Function&, const Array*, const Pairs&, float*, int, FunctionRoom&);
template void score<double>(const Function&, const Array*, const Pairs&, double*, int, FunctionRoom&);
template void score_backward<float>(const Function&, const Array*, const Pairs&, const float*, float*, int, float* const*, FunctionRoom&);
template void score_backward<double>(const Function&, const Array*, const Pairs&, const double*, double*, int, double* const*, FunctionRoom&);

}  // namespace native
