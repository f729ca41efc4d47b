#include "masks.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "parts.h"

namespace native {

namespace {

constexpr int block_bits = 4;  // a summary's smallest blocks are of 16 positions
constexpr int32_t least_int = std::numeric_limits<int32_t>::min();
constexpr int32_t greatest_int = std::numeric_limits<int32_t>::max();

int32_t clipped(int64_t x) { return static_cast<int32_t>(std::clamp<int64_t>(x, least_int + 1, greatest_int - 1)); }

// The verdict of -left <= k - q <= right and (k - q) % dilation == 0, for k - q from low to high in
// steps of `step` (0: one value).
Verdict classify_difference(int64_t low, int64_t high, int64_t step, int64_t dilation, int64_t left, int64_t right) {
  const bool inside = high <= right && low >= -left;
  if (high < -left || low > right) return EMPTY;
  if (dilation == 1) return inside ? FULL : PARTIAL;
  const int64_t shared = std::gcd(step, dilation);
  const bool constant = step % dilation == 0;  // one residue only
  if (modulo(low, shared) != 0) return EMPTY;
  if (constant) return modulo(low, dilation) != 0 ? EMPTY : inside ? FULL : PARTIAL;
  if (shared == std::max<int64_t>(step, 1)) {
    // Every multiple of the dilation occurs: EMPTY if none is within reach.
    const int64_t least = std::max(low, -left), most = std::min(high, right);
    if (least + modulo(-least, dilation) > most) return EMPTY;
  }
  return PARTIAL;
}

// The verdict of equal group numbers, from the bounds of both sides.
Verdict same_group(int64_t q_first, int64_t q_last, int64_t k_first, int64_t k_last) {
  if (q_last < k_first || k_last < q_first) return EMPTY;
  return q_first == q_last && k_first == k_last ? FULL : PARTIAL;
}

Verdict classify_congruent(const Region& side, int64_t modulus, int64_t offset, int64_t period) {
  int64_t first = side.first;
  bool one_period = true;
  if (period && period % modulus) {
    one_period = floor_div(first, period) == floor_div(side.last, period) || side.step % period == 0;
    first = modulo(first, period);
  }
  if (!one_period) return PARTIAL;
  const int64_t shared = std::max<int64_t>(1, std::gcd(side.step, modulus));
  if (modulo(first - offset, shared)) return EMPTY;
  if (side.step % modulus == 0) return modulo(first, modulus) == offset ? FULL : EMPTY;
  const bool contiguous = side.step == 1 && side.dense();
  return contiguous && modulo(offset - first, modulus) > side.last - side.first ? EMPTY : PARTIAL;
}

// The document of a position: the number of documents that stop at or before it.
int64_t document_of(const std::vector<int64_t>& stops, int64_t position) {
  return std::upper_bound(stops.begin(), stops.end(), position) - stops.begin();
}

Verdict classify_tiles(const std::vector<int64_t>& arguments, const Region& q, const Region& k) {
  const int64_t block = arguments[0], columns = arguments[1];
  const auto begin = arguments.begin() + 2, end = arguments.end();
  const int64_t first_row = q.first / block, last_row = q.last / block;
  const int64_t first_column = k.first / block, last_column = std::min(k.last / block, columns - 1);
  const bool beyond = k.last / block >= columns;
  if (first_column > last_column) return EMPTY;
  Verdict together = PARTIAL;
  for (int64_t row = first_row; row <= last_row; ++row) {
    const auto from = std::lower_bound(begin, end, row * columns + first_column);
    const int64_t listed = std::upper_bound(from, end, row * columns + last_column) - from;
    const Verdict of_row = verdict(listed == last_column - first_column + 1 && !beyond, listed == 0);
    if (of_row == PARTIAL || (row > first_row && of_row != together)) return PARTIAL;
    together = of_row;
  }
  return together;
}

// The verdict of listed positions on a region's hull.
Verdict classify_positions(const std::vector<int64_t>& listed, const Region& side) {
  const auto from = std::lower_bound(listed.begin(), listed.end(), side.first);
  const int64_t count = std::upper_bound(from, listed.end(), side.last) - from;
  return verdict(count == side.last - side.first + 1, count == 0);
}

Verdict classify_flags(const Summary& summary, const Region& side) {
  const Summary::Bounds bounds = summary.over(side.first, side.last);
  return verdict(bounds.least != 0, bounds.greatest == 0);
}

// The verdict of global tokens, from those on a region of keys and, if needed, on one of queries.
template <class OfQueries>
Verdict classify_global(const Region& q, Verdict of_keys, const OfQueries& of_queries) {
  if (q.globals == Globals::all) return FULL;
  if (q.globals == Globals::none) return of_keys;
  return std::max(of_keys, of_queries(q));
}

int slots_of(const Node& node) {
  switch (node.op) {
    case Op::causal: case Op::segments: case Op::document_lengths: case Op::block_window: return 2;
    case Op::window: return node.arguments[2] == 1 ? 2 : 3;
    case Op::congruent: case Op::dilated_blocks: case Op::tiles: case Op::document_ids: return 1;
    case Op::global_data: case Op::global_positions: case Op::leading: return 1;
    case Op::neighborhood: return 3 * static_cast<int>(node.arguments[1]);
    default: return 0;
  }
}

}  // namespace

void Axis::reach(int64_t c, int64_t& low, int64_t& high) const {
  const int64_t far = radius * dilation;
  if (!shifts || causal) {
    low = c - far;
    high = causal ? c : c + far;
    return;
  }
  const int64_t lane = c % dilation, rank = c / dilation;
  const int64_t members = (size - lane + dilation - 1) / dilation;
  const int64_t start = std::min(std::max<int64_t>(rank - radius, 0), std::max<int64_t>(members - (2 * radius + 1), 0));
  low = start * dilation + lane;
  high = (start + 2 * radius) * dilation + lane;
}

Verdict Axis::classify(int64_t q_low, int64_t q_high, int64_t q_step, int64_t k_low, int64_t k_high, int64_t k_step) const {
  const int64_t far = radius * dilation, step = dilation == 1 ? 1 : std::gcd(q_step, k_step);
  if (!shifts || causal) return classify_difference(k_low - q_high, k_high - q_low, step, dilation, far, causal ? 0 : far);
  const Verdict residues = classify_difference(k_low - q_high, k_high - q_low, step, dilation, size, size);
  // Reach grows with the coordinate inside a residue class: its first and last members bound it.
  int64_t low_least = greatest_int, low_most = 0, high_least = greatest_int, high_most = 0;
  for (int64_t lane = 0; lane < std::min(dilation, size); ++lane) {
    const int64_t first = q_low + modulo(lane - q_low, dilation), last = q_high - modulo(q_high - lane, dilation);
    if (first > q_high) continue;
    for (const int64_t c : {first, last}) {
      int64_t low, high;
      reach(c, low, high);
      low_least = std::min(low_least, low), low_most = std::max(low_most, low);
      high_least = std::min(high_least, high), high_most = std::max(high_most, high);
    }
  }
  return std::min(residues, verdict(low_most <= k_low && k_high <= high_least, k_high < low_least || k_low > high_most));
}

Grid::Grid(const std::vector<int64_t>& arguments) : offset(arguments[0]), axes(static_cast<int>(arguments[1])) {
  for (int i = axes - 1; i >= 0; --i) {
    const int64_t* of = arguments.data() + 2 + 5 * i;
    axis[i] = {of[0], of[1], of[2], of[3] != 0, of[4] != 0};
    plain = plain && axis[i].dilation == 1 && !axis[i].causal && !axis[i].shifts;
    unit[i] = cells;
    cells *= of[0];
  }
}

void Grid::spans(const Region& region, Span* out) const {
  if (region.grid == number) {
    for (int i = 0; i < axes; ++i) out[i] = {region.low[i], region.low[i] + region.extent[i] - 1, region.extent[i] > 1};
    return;
  }
  int64_t reach[3] = {}, steps[3] = {};
  bool box = true;
  for (int side = 0; side < 3; ++side) {
    if (region.extent[side] == 1) continue;
    bool taken = false;
    for (int i = 0; i < axes && !taken; ++i) {
      if (region.stride[side] < unit[i] || region.stride[side] % unit[i]) continue;
      reach[i] += (region.extent[side] - 1) * (region.stride[side] / unit[i]);
      steps[i] = std::gcd(steps[i], region.stride[side] / unit[i]);
      taken = true;
    }
    box = box && taken;
  }
  int64_t first[3], last[3];
  for (int i = 0; i < axes; ++i) {
    first[i] = coordinate(region.first, i);
    last[i] = coordinate(region.last, i);
    box = box && (i == 0 || first[i] + reach[i] < axis[i].size);
  }
  // No box: the row-major range from first to last, in which an axis is complete once a slower one
  // moves.
  bool same = true;
  for (int i = 0; i < axes; ++i) {
    const int64_t low = box || same ? first[i] : 0;
    const int64_t high = box ? first[i] + reach[i] : same ? last[i] : axis[i].size - 1;
    out[i] = {low, high, box ? steps[i] : low == high ? 0 : 1};
    same = same && first[i] == last[i];
  }
}

Verdict Grid::classify(const Region& q, const Region& k) const {
  if (plain && q.grid == number && k.grid == number) {
    bool full = true;
    for (int i = 0; i < axes; ++i) {
      const int64_t least = k.low[i] - (q.low[i] + q.extent[i] - 1), most = k.low[i] + k.extent[i] - 1 - q.low[i];
      if (most < -axis[i].radius || least > axis[i].radius) return EMPTY;
      full = full && least >= -axis[i].radius && most <= axis[i].radius;
    }
    return full ? FULL : PARTIAL;
  }
  const int64_t stop = offset + cells;
  if (q.last < offset || q.first >= stop || k.last < offset || k.first >= stop) return EMPTY;
  if (!holds(q.first) || !holds(q.last) || !holds(k.first) || !holds(k.last)) return PARTIAL;
  Span q_spans[3], k_spans[3];
  spans(q, q_spans);
  spans(k, k_spans);
  Verdict out = FULL;
  for (int i = 0; i < axes && out != EMPTY; ++i) {
    const Span &a = q_spans[i], &b = k_spans[i];
    out = std::min(out, axis[i].classify(a.low, a.high, a.step, b.low, b.high, b.step));
  }
  return out;
}

Summary::Summary(const int32_t* values, int64_t count) {
  std::vector<Bounds> level((count + (1 << block_bits) - 1) >> block_bits, {greatest_int, least_int});
  for (int64_t i = 0; i < count; ++i) {
    Bounds& bounds = level[i >> block_bits];
    bounds.least = std::min(bounds.least, values[i]);
    bounds.greatest = std::max(bounds.greatest, values[i]);
  }
  while (true) {
    levels_.push_back(level);
    if (level.size() <= 1) break;
    std::vector<Bounds> coarser((level.size() + 1) / 2);
    for (size_t i = 0; i < coarser.size(); ++i) {
      const Bounds &a = level[2 * i], &b = level[std::min(2 * i + 1, level.size() - 1)];
      coarser[i] = {std::min(a.least, b.least), std::max(a.greatest, b.greatest)};
    }
    level = std::move(coarser);
  }
}

Summary::Bounds Summary::over(int64_t first, int64_t last) const {
  size_t level = 0;
  int bits = block_bits;
  while (level + 1 < levels_.size() && (last >> bits) - (first >> bits) > 1) ++level, ++bits;
  const std::vector<Bounds>& blocks = levels_[level];
  Bounds out = blocks[first >> bits];
  for (int64_t i = (first >> bits) + 1; i <= (last >> bits); ++i) {
    out.least = std::min(out.least, blocks[i].least);
    out.greatest = std::max(out.greatest, blocks[i].greatest);
  }
  return out;
}

namespace {

template <class T>
void copy_rows(const Array& data, std::vector<int64_t>& out) {
  const T* base = static_cast<const T*>(data.data);
  for (int64_t b = 0; b < data.sizes[0]; ++b)
    for (int64_t i = 0; i < data.sizes[1]; ++i) {
      const T value = base[b * data.strides[0] + i * data.strides[1]];
      int64_t bits = 0;
      if constexpr (std::is_floating_point_v<T>) {
        const double wide = value == T(0) ? 0.0 : static_cast<double>(value);  // -0.0 equals 0.0
        std::memcpy(&bits, &wide, sizeof(bits));
      } else {
        bits = static_cast<int64_t>(value);
      }
      out.push_back(bits);
    }
}

}  // namespace

DataRows rows_of(const Array& data) {
  if (data.dims != 2) throw std::runtime_error("data must be tensors of shape (batch or 1, tokens)");
  std::vector<int64_t> wide;
  wide.reserve(data.sizes[0] * data.sizes[1]);
  switch (data.type) {
    case Type::boolean: case Type::u8: copy_rows<uint8_t>(data, wide); break;
    case Type::i8: copy_rows<int8_t>(data, wide); break;
    case Type::i16: copy_rows<int16_t>(data, wide); break;
    case Type::i32: copy_rows<int32_t>(data, wide); break;
    case Type::i64: copy_rows<int64_t>(data, wide); break;
    case Type::f32: copy_rows<float>(data, wide); break;
    case Type::f64: copy_rows<double>(data, wide); break;
    default: throw std::runtime_error("data must be bool, integers, float32 or float64");
  }
  DataRows out;
  out.batch = data.sizes[0];
  out.tokens = data.sizes[1];
  out.values.resize(wide.size());
  const bool narrow = std::all_of(wide.begin(), wide.end(), [](int64_t x) { return x > least_int && x < greatest_int; });
  std::vector<int64_t> distinct;
  if (!narrow) {
    // Only order and equality matter, so ranks suffice.
    distinct = wide;
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  }
  for (size_t i = 0; i < wide.size(); ++i)
    out.values[i] = static_cast<int32_t>(narrow ? wide[i] : std::lower_bound(distinct.begin(), distinct.end(), wide[i]) - distinct.begin());
  for (int64_t b = 0; b < out.batch; ++b) out.summaries.emplace_back(out.values.data() + b * out.tokens, out.tokens);
  return out;
}

int Masks::grid_number(const std::vector<int64_t>& offset_and_sizes) {
  const auto number = std::find(grids.begin(), grids.end(), offset_and_sizes) - grids.begin();
  if (number == static_cast<int64_t>(grids.size())) grids.push_back(offset_and_sizes);
  return static_cast<int>(number);
}

void Masks::add(Node node) {
  node.slot = slots;
  if (node.op == Op::neighborhood) {
    node.grid = Grid(node.arguments);
    std::vector<int64_t> kind{node.grid.offset};
    for (int i = 0; i < node.grid.axes; ++i) kind.push_back(node.grid.axis[i].size);
    node.grid.number = grid_number(kind);
  }
  slots += slots_of(node);
  nodes.push_back(std::move(node));
}

void Masks::classify(int index, int64_t b, int64_t h, const Region* q, int count, const Region& k, Verdict* out) const {
  const Node& node = nodes[index];
  const std::vector<int64_t>& x = node.arguments;
  const auto by_region = [&](auto&& of) {
    for (int i = 0; i < count; ++i) out[i] = of(q[i]);
  };
  const auto all_alike = [&](Verdict of) { std::fill(out, out + count, of); };
  switch (node.op) {
    case Op::full: return all_alike(FULL);
    case Op::all_of: case Op::any_of: {
      const bool all_parts = node.op == Op::all_of;
      const Verdict decided = all_parts ? EMPTY : FULL;
      classify(static_cast<int>(x[0]), b, h, q, count, k, out);
      Verdict part[tile_vectors];
      for (size_t at = 1; at < x.size(); ++at) {
        if (std::all_of(out, out + count, [&](Verdict of) { return of == decided; })) return;
        classify(static_cast<int>(x[at]), b, h, q, count, k, part);
        for (int i = 0; i < count; ++i) out[i] = all_parts ? std::min(out[i], part[i]) : std::max(out[i], part[i]);
      }
      return;
    }
    case Op::none_of:
      classify(static_cast<int>(x[0]), b, h, q, count, k, out);
      for (int i = 0; i < count; ++i) out[i] = static_cast<Verdict>(FULL - out[i]);
      return;
    case Op::causal: return by_region([&](const Region& q) { return verdict(k.last <= q.first, k.first > q.last); });
    case Op::window:
      return by_region([&](const Region& q) {
        const int64_t step = x[2] == 1 ? 1 : std::gcd(q.step, k.step);
        return classify_difference(k.first - q.last, k.last - q.first, step, x[2], x[0], x[1]);
      });
    case Op::segments: {
      const int64_t k_first = k.first / x[0], k_last = k.last / x[0];
      return by_region([&](const Region& q) { return same_group(floor_div(q.first, x[0]), floor_div(q.last, x[0]), k_first, k_last); });
    }
    case Op::congruent: {
      const Verdict of_keys = classify_congruent(k, x[0], x[1], x[2]);
      if (of_keys == EMPTY) return all_alike(EMPTY);
      return by_region([&](const Region& q) { return std::min(of_keys, classify_congruent(q, x[0], x[1], x[2])); });
    }
    case Op::sinks: return all_alike(verdict(k.last < x[0], k.first >= x[0]));
    case Op::leading: return by_region([&](const Region& q) { return verdict(q.last < x[0], q.first >= x[0]); });
    case Op::dilated_blocks: {
      const int64_t k_first = k.first / x[0], k_last = k.last / x[0];
      return by_region([&](const Region& q) {
        const int64_t low = k_first - floor_div(q.last, x[0]), high = k_last - floor_div(q.first, x[0]);
        return classify_difference(low, high, low == high ? 0 : 1, x[1], int64_t{1} << 60, int64_t{1} << 60);
      });
    }
    case Op::block_window: {
      const int64_t k_first = k.first / x[0], k_last = k.last / x[0];
      return by_region([&](const Region& q) {
        const int64_t low = k_first - floor_div(q.last, x[0]), high = k_last - floor_div(q.first, x[0]);
        return classify_difference(low, high, 1, 1, x[1], x[2]);
      });
    }
    case Op::document_lengths: {
      const int64_t documents = static_cast<int64_t>(x.size());
      const int64_t k_first = document_of(x, k.first), k_last = document_of(x, k.last);
      return by_region([&](const Region& q) {
        const int64_t q_first = document_of(x, q.first);
        return std::max(q_first, k_first) >= documents ? EMPTY : same_group(q_first, document_of(x, q.last), k_first, k_last);
      });
    }
    case Op::tiles: return by_region([&](const Region& q) { return classify_tiles(x, q, k); });
    case Op::neighborhood: return by_region([&](const Region& q) { return node.grid.classify(q, k); });
    case Op::document_ids: {
      const Summary& ids = data[x[0]].summary(b);
      const Summary::Bounds of_k = ids.over(k.first, k.last);
      return by_region([&](const Region& q) {
        const Summary::Bounds of_q = ids.over(q.first, q.last);
        return same_group(of_q.least, of_q.greatest, of_k.least, of_k.greatest);
      });
    }
    case Op::padding: return all_alike(static_cast<Verdict>(FULL - classify_flags(data[x[0]].summary(b), k)));
    case Op::global_data: {
      const Summary& flags = data[x[0]].summary(b);
      const Verdict of_keys = classify_flags(flags, k);
      if (of_keys == FULL) return all_alike(FULL);
      const auto of_queries = [&](const Region& q) { return classify_flags(flags, q); };
      return by_region([&](const Region& q) { return classify_global(q, of_keys, of_queries); });
    }
    case Op::global_positions: {
      const Verdict of_keys = classify_positions(x, k);
      if (of_keys == FULL) return all_alike(FULL);
      const auto of_queries = [&](const Region& q) { return classify_positions(x, q); };
      return by_region([&](const Region& q) { return classify_global(q, of_keys, of_queries); });
    }
    case Op::function:
      return by_region([&](const Region& q) {
        return static_cast<Verdict>(functions().verdict(*node.function, node.operands.data(), b, node.head < 0 ? h : node.head, q.first,
                                                     q.last, k.first, k.last));
      });
  }
}

FunctionRoom& LazyRoom::get() {
  if (!room_) room_ = functions().make_room();
  return *room_;
}

LazyRoom::~LazyRoom() {
  if (room_) functions().free_room(room_);
}

Parts& parts() {
  static Parts all;
  return all;
}

template <int W>
void TileQueries<W>::start(const Masks& masks, int64_t b, int64_t h, const int32_t* positions, int count) {
  masks_ = &masks;
  b_ = b;
  h_ = h;
  positions_ = positions;
  count_ = count;
  numbers_.resize(static_cast<size_t>(masks.slots) * count);
  is_prepared_.assign(masks.nodes.size(), 0);
}

template <int W>
void TileQueries<W>::prepare(int index) {
  if (is_prepared_[index]) return;
  is_prepared_[index] = 1;
  const Node& node = masks_->nodes[index];
  const std::vector<int64_t>& x = node.arguments;
  int32_t* low = numbers_.data() + static_cast<size_t>(node.slot) * count_;
  int32_t* high = low + count_;
  int32_t* residue = high + count_;
  for (int i = 0; i < count_; ++i) {
    const int64_t q = positions_[i];
    switch (node.op) {
      case Op::causal: low[i] = least_int, high[i] = positions_[i]; break;
      case Op::window:
        low[i] = clipped(q - x[0]), high[i] = clipped(q + x[1]);
        if (x[2] > 1) residue[i] = clipped(modulo(q, x[2]));
        break;
      case Op::segments: low[i] = clipped(floor_div(q, x[0]) * x[0]), high[i] = clipped(floor_div(q, x[0]) * x[0] + x[0] - 1); break;
      case Op::block_window:
        low[i] = clipped((floor_div(q, x[0]) - x[1]) * x[0]), high[i] = clipped((floor_div(q, x[0]) + x[2] + 1) * x[0] - 1);
        break;
      case Op::congruent: low[i] = modulo(x[2] ? modulo(q, x[2]) : q, x[0]) == x[1] ? -1 : 0; break;
      case Op::leading: low[i] = q < x[0] ? -1 : 0; break;
      case Op::dilated_blocks: low[i] = clipped(modulo(floor_div(q, x[0]), x[1])); break;
      case Op::document_lengths: {
        const int64_t document = document_of(x, q);
        const bool none = document == static_cast<int64_t>(x.size());
        low[i] = none ? 1 : clipped(document ? x[document - 1] : 0);
        high[i] = none ? 0 : clipped(x[document] - 1);
        break;
      }
      case Op::tiles: low[i] = clipped(q / x[0]); break;
      case Op::document_ids: case Op::global_data: low[i] = masks_->data[x[0]].row(b_)[q]; break;
      case Op::global_positions: low[i] = std::binary_search(x.begin(), x.end(), q) ? -1 : 0; break;
      default: break;
    }
  }
  if (node.op == Op::global_data)
    for (int i = 0; i < count_; ++i) low[i] = low[i] ? -1 : 0;
  if (node.op == Op::neighborhood) {
    const Grid& grid = node.grid;
    for (int axis = 0; axis < grid.axes; ++axis)
      for (int i = 0; i < count_; ++i) {
        int32_t* numbers = low + static_cast<size_t>(3 * axis) * count_ + i;
        int64_t first = 1, last = 0;  // a query outside of the grid sees nothing
        if (grid.holds(positions_[i])) {
          const int64_t c = grid.coordinate(positions_[i], axis);
          grid.axis[axis].reach(c, first, last);
          numbers[2 * count_] = clipped(c % grid.axis[axis].dilation);
        }
        numbers[0] = clipped(first);
        numbers[count_] = clipped(last);
      }
  }
}

template <int W>
void TileQueries<W>::seen(int index, int low, int high, const int32_t* keys, int count, Ints* out) {
  const Node& node = masks_->nodes[index];
  const std::vector<int64_t>& x = node.arguments;
  const int vectors = high - low, total = count * vectors;
  prepare(index);
  const auto numbers = [&](int which, int vector) {
    return *reinterpret_cast<const Ints*>(numbers_.data() + static_cast<size_t>(node.slot + which) * count_ + (low + vector) * W);
  };
  // of_key(key) is evaluated once per key; of_pair(its result, vector) gives the mask of the pairs.
  const auto fill = [&](auto&& of_key, auto&& of_pair) {
    for (int i = 0; i < count; ++i) {
      const auto of = of_key(keys[i]);
      for (int vector = 0; vector < vectors; ++vector) out[i * vectors + vector] = of_pair(of, vector);
    }
  };
  const auto all_lanes = [](bool answer, int) { return Ints{} - static_cast<int32_t>(answer); };
  switch (node.op) {
    case Op::full: fill([](int32_t) { return true; }, all_lanes); return;
    case Op::sinks: fill([&](int32_t k) { return k < x[0]; }, all_lanes); return;
    case Op::padding: {
      const int32_t* flags = masks_->data[x[0]].row(b_);
      fill([&](int32_t k) { return flags[k] == 0; }, all_lanes);
      return;
    }
    case Op::all_of: case Op::any_of: {
      seen(static_cast<int>(x[0]), low, high, keys, count, out);
      if (static_cast<int>(spare_.size()) <= depth_) spare_.emplace_back();
      if (static_cast<int>(spare_[depth_].size()) < total * W) spare_[depth_].resize(total * W);
      Ints* of_part = reinterpret_cast<Ints*>(spare_[depth_].data());
      ++depth_;
      for (size_t part = 1; part < x.size(); ++part) {
        seen(static_cast<int>(x[part]), low, high, keys, count, of_part);
        if (node.op == Op::all_of)
          for (int i = 0; i < total; ++i) out[i] &= of_part[i];
        else
          for (int i = 0; i < total; ++i) out[i] |= of_part[i];
      }
      --depth_;
      return;
    }
    case Op::none_of:
      seen(static_cast<int>(x[0]), low, high, keys, count, out);
      for (int i = 0; i < total; ++i) out[i] = ~out[i];
      return;
    case Op::causal: case Op::segments: case Op::document_lengths: case Op::window: case Op::block_window: {
      fill([](int32_t k) { return k; }, [&](int32_t k, int vector) { return (numbers(0, vector) <= k) & (numbers(1, vector) >= k); });
      if (node.op != Op::window || x[2] == 1) return;
      for (int i = 0; i < count; ++i) {
        const int32_t residue = static_cast<int32_t>(keys[i] % x[2]);
        for (int vector = 0; vector < vectors; ++vector) out[i * vectors + vector] &= numbers(2, vector) == residue;
      }
      return;
    }
    case Op::congruent: {
      const auto matches = [&](int32_t k) { return (x[2] ? k % x[2] : k) % x[0] == x[1]; };
      fill(matches, [&](bool match, int vector) { return match ? numbers(0, vector) : Ints{}; });
      return;
    }
    case Op::leading: fill([](int32_t) { return 0; }, [&](int, int vector) { return numbers(0, vector); }); return;
    case Op::dilated_blocks: {
      const auto class_of = [&](int32_t k) { return static_cast<int32_t>(k / x[0] % x[1]); };
      fill(class_of, [&](int32_t of, int vector) { return numbers(0, vector) == of; });
      return;
    }
    case Op::document_ids: {
      const int32_t* ids = masks_->data[x[0]].row(b_);
      fill([&](int32_t k) { return ids[k]; }, [&](int32_t id, int vector) { return numbers(0, vector) == id; });
      return;
    }
    case Op::global_data: case Op::global_positions: {
      const auto is_global = [&](int32_t k) {
        if (node.op == Op::global_data) return masks_->data[x[0]].row(b_)[k] != 0;
        return std::binary_search(x.begin(), x.end(), static_cast<int64_t>(k));
      };
      fill(is_global, [&](bool global, int vector) { return global ? ~Ints{} : numbers(0, vector); });
      return;
    }
    case Op::tiles: {
      // Lanes of one row of tiles are adjacent, and so are keys of one column.
      const int32_t* rows = numbers_.data() + static_cast<size_t>(node.slot) * count_ + low * W;
      int64_t column = -1;
      for (int i = 0; i < count; ++i) {
        Ints* answers = out + i * vectors;
        if (keys[i] / x[0] == column) {
          std::copy(answers - vectors, answers, answers);
          continue;
        }
        column = keys[i] / x[0];
        int32_t answer = 0;
        for (int lane = 0; lane < vectors * W; ++lane) {
          if (lane == 0 || rows[lane] != rows[lane - 1])
            answer = column < x[1] && std::binary_search(x.begin() + 2, x.end(), rows[lane] * x[1] + column) ? -1 : 0;
          reinterpret_cast<int32_t*>(answers)[lane] = answer;
        }
      }
      return;
    }
    case Op::neighborhood: {
      const Grid& grid = node.grid;
      struct Cell {
        int32_t at[3];
        bool inside;
      };
      const auto cell_of = [&](int32_t k) {
        Cell cell{{0, 0, 0}, grid.holds(k)};
        uint32_t rest = cell.inside ? static_cast<uint32_t>(k - grid.offset) : 0;
        for (int axis = 0; axis < grid.axes; ++axis) {
          const uint32_t unit = static_cast<uint32_t>(grid.unit[axis]);
          cell.at[axis] = static_cast<int32_t>(rest / unit);
          rest %= unit;
        }
        return cell;
      };
      const auto sees = [&](const Cell& cell, int vector) {
        if (!cell.inside) return Ints{};
        Ints answer = ~Ints{};
        for (int axis = 0; axis < grid.axes; ++axis) {
          answer &= (numbers(3 * axis, vector) <= cell.at[axis]) & (numbers(3 * axis + 1, vector) >= cell.at[axis]);
          const int32_t dilation = static_cast<int32_t>(grid.axis[axis].dilation);
          if (dilation > 1) answer &= numbers(3 * axis + 2, vector) == cell.at[axis] % dilation;
        }
        return answer;
      };
      fill(cell_of, sees);
      return;
    }
    case Op::function: {
      const int queries = vectors * W;
      answers_.resize(static_cast<size_t>(count) * queries);
      const Pairs pairs{b_, node.head < 0 ? h_ : node.head, positions_ + low * W, queries, keys, count};
      functions().seen(*node.function, node.operands.data(), pairs, answers_.data(), room_.get());
      for (int i = 0; i < total * W; ++i) reinterpret_cast<int32_t*>(out)[i] = -static_cast<int32_t>(answers_[i] != 0);
      return;
    }
  }
}

template class TileQueries<lanes<float>>;
template class TileQueries<lanes<double>>;

}  // namespace native
