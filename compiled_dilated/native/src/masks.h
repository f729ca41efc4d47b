// Masks as expressions over a table of nodes: the visible pairs, and verdicts on tiles of pairs.
#pragma once
#include <memory>
#include <stdexcept>
#include <vector>

#include "functions.h"
#include "problem.h"
#include "regions.h"
#include "lanes.h"

namespace native {

// The numbers are those of nodes.py. Comments list the arguments.
enum class Op : int64_t {
  full = 0,
  all_of = 1,            // nodes
  any_of = 2,            // nodes
  none_of = 3,           // node
  causal = 4,
  window = 5,            // left, right, dilation
  segments = 6,          // length
  congruent = 7,         // modulus, offset, period (0: none)
  sinks = 8,             // count: keys below it
  leading = 9,           // count: queries below it
  dilated_blocks = 10,   // block, stride
  document_lengths = 11, // the stop of each document
  tiles = 12,            // block, columns, then row * columns + column of each, ascending
  neighborhood = 13,     // offset, axes, then size, radius, dilation, causal, shifts of each axis
  document_ids = 14,     // number of the data tensor
  padding = 15,          // number of the data tensor
  global_data = 16,      // number of the data tensor
  global_positions = 17, // positions, ascending
  block_window = 18,     // block, left, right
  function = 19,         // head (-1: the call's), number of operands, their numbers, then a tape
};

// The least and the greatest entry of a data tensor's row over ranges of positions, from blocks of
// 16, their pairs, pairs of pairs and so on.
class Summary {
 public:
  Summary() = default;
  Summary(const int32_t* values, int64_t count);
  struct Bounds {
    int32_t least, greatest;
  };
  // Bounds over the smallest two aligned blocks that contain first .. last; exact if that is such a
  // block.
  Bounds over(int64_t first, int64_t last) const;

 private:
  std::vector<std::vector<Bounds>> levels_;
};

// One data tensor of a call: the rows of its batch as 32-bit numbers, equal where the entries are.
struct DataRows {
  int64_t batch = 0, tokens = 0;
  std::vector<int32_t> values;
  std::vector<Summary> summaries;
  const int32_t* row(int64_t b) const { return values.data() + (batch == 1 ? 0 : b) * tokens; }
  const Summary& summary(int64_t b) const { return summaries[batch == 1 ? 0 : b]; }
};

DataRows rows_of(const Array& data);

// One axis of a neighborhood.
struct Axis {
  int64_t size, radius, dilation;
  bool causal, shifts;

  // The least and the greatest coordinate seen from coordinate c; those between are `dilation`
  // apart.
  void reach(int64_t c, int64_t& low, int64_t& high) const;
  // The verdict on coordinates low .. high in steps of `step` of both sides.
  Verdict classify(int64_t q_low, int64_t q_high, int64_t q_step, int64_t k_low, int64_t k_high, int64_t k_step) const;
};

// The grid of a neighborhood.
struct Grid {
  int64_t offset = 0, cells = 1;
  int axes = 0;
  int number = -1;  // equal for equal offsets and sizes
  bool plain = true;  // no dilation, no causal axis, no shifted windows
  Axis axis[3];
  int64_t unit[3];  // distance of neighbors along each axis

  struct Span {
    int64_t low, high, step;
  };

  Grid() = default;
  explicit Grid(const std::vector<int64_t>& arguments);
  bool holds(int64_t position) const { return position >= offset && position < offset + cells; }
  int64_t coordinate(int64_t position, int i) const {
    const int64_t along = (position - offset) / unit[i];
    return i == 0 ? along : along % axis[i].size;
  }
  // A box of the grid that contains a region: the region itself if it is a box, its hull otherwise.
  void spans(const Region& region, Span* out) const;
  Verdict classify(const Region& q, const Region& k) const;
};

struct Node {
  Op op;
  std::vector<int64_t> arguments;
  Grid grid;     // for a neighborhood
  int slot = 0;  // index of its per-lane numbers in a tile
  std::unique_ptr<Function> function;
  int64_t head = -1;
  std::vector<Array> operands;
};

// All nodes of a call's program, and the tensors that they read.
struct Masks {
  std::vector<Node> nodes;
  std::vector<DataRows> data;
  int slots = 0;
  std::vector<std::vector<int64_t>> grids;

  // The number of a grid of this offset and these sizes.
  int grid_number(const std::vector<int64_t>& offset_and_sizes);
  void add(Node node);
  // Verdicts on regions of queries, at most tile_vectors, with one region of keys.
  void classify(int node, int64_t b, int64_t h, const Region* q, int count, const Region& k, Verdict* out) const;
};

// A vector of 32-bit integers for W lanes.
template <int W>
struct IntsOf {
  typedef int32_t type __attribute__((vector_size(W * 4), aligned(4), may_alias));
};

// A thread's workspace for functions, created when it is first needed.
class LazyRoom {
 public:
  LazyRoom() = default;
  LazyRoom(const LazyRoom&) = delete;
  LazyRoom& operator=(const LazyRoom&) = delete;
  ~LazyRoom();
  FunctionRoom& get();

 private:
  FunctionRoom* room_ = nullptr;
};

// The queries of one tile, with the per-lane numbers that nodes need.
template <int W>
class TileQueries {
 public:
  using Ints = typename IntsOf<W>::type;

  // positions: `count` of them, a multiple of W. Per-lane numbers are computed by `seen`.
  void start(const Masks& masks, int64_t b, int64_t h, const int32_t* positions, int count);

  // out[i * (high - low) + j] is -1 for lanes of vector low + j whose queries see key i, 0 for others.
  void seen(int node, int low, int high, const int32_t* keys, int count, Ints* out);

 private:
  void prepare(int node);

  const Masks* masks_ = nullptr;
  int64_t b_ = 0, h_ = 0;
  const int32_t* positions_ = nullptr;
  int count_ = 0;
  std::vector<int32_t> numbers_;
  std::vector<char> is_prepared_;
  std::vector<std::vector<int32_t>> spare_;  // for the parts of joined nodes, by depth
  int depth_ = 0;
  LazyRoom room_;
  std::vector<uint8_t> answers_;
};

}  // namespace native
