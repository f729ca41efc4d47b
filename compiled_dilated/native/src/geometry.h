// How a sequence is cut: queries into tiles of `tile_vectors` vectors, keys into blocks that some of these vectors see.
#pragma once
#include "engine.h"
#include "program.h"

namespace native {

// How an engine cuts a sequence: lanes of a vector, most keys of a block, and how finely edges are followed.
template <class T>
struct WideWalk {
  static constexpr int W = lanes<T>, TQ = tile_queries<T>, most_keys = block_keys, grain = 16, fine_grain = 4;
  using Number = T;
};

struct AmxWalk {
  static constexpr int W = 16, TQ = tile_vectors * W, most_keys = 128, grain = 32, fine_grain = 32;
  using Number = float;
};

// Queries that are computed together. Lanes past the end repeat a valid query: they are read and not written.
template <int W>
struct QueryTile {
  int vectors = 0;  // that have a query
  int32_t positions[tile_vectors * W];
  int32_t sources[tile_vectors * W];  // rows of q
  int32_t rows[tile_vectors * W];     // the same, -1 past the end
  Region whole;
  Region of_vector[tile_vectors];
};

// A run of positions, or whole lines of a grid.
struct Part {
  bool is_box;
  int64_t start, stop;  // positions; of a box its first and past its last
};

inline std::vector<Part> parts_of(const Layout& layout, int64_t start, int64_t stop) {
  int64_t line = 1;
  for (int axis = 1; axis < layout.axes; ++axis) line *= layout.sizes[axis];
  if (layout.axes > 1) {
    const int64_t end = layout.offset + layout.sizes[0] * line;
    const int64_t from = layout.offset + (std::max(start, layout.offset) - layout.offset + line - 1) / line * line;
    const int64_t to = layout.offset + std::max<int64_t>(0, std::min(stop, end) - layout.offset) / line * line;
    if (from < to) {
      std::vector<Part> parts;
      if (start < from) parts.push_back({false, start, from});
      parts.push_back({true, from, to});
      if (to < stop) parts.push_back({false, to, stop});
      return parts;
    }
  }
  return {{false, start, stop}};
}

// A box of the grid as coordinates, and its region.
struct Box {
  int64_t low[3] = {0, 0, 0};
  int32_t extent[3] = {1, 1, 1};

  Region region(const Layout& layout) const {
    int64_t stride[3] = {1, 1, 1}, base = layout.offset, unit = 1;
    for (int axis = layout.axes - 1; axis >= 0; --axis) {
      stride[axis] = unit;
      base += low[axis] * unit;
      unit *= layout.sizes[axis];
    }
    Region out = Region::box(base, extent, stride);
    out.grid = layout.number;
    for (int axis = 0; axis < 3; ++axis) out.low[axis] = static_cast<int32_t>(low[axis]);
    return out;
  }
};

template <int W>
class QueryTiles {
 public:
  QueryTiles(const Layout& layout, int64_t q_len, int64_t q_offset) : layout_(layout), offset_(q_offset), stop_(q_offset + q_len) {
    // Classes that are shorter than a vector leave lanes empty.
    step_ = layout.step;
    while (step_ > 1 && q_len < step_ * W * 2) step_ = step_ % 2 ? 1 : step_ / 2;
    for (const Part& part : parts_of(layout, q_offset, stop_)) {
      starts_.push_back(count_);
      parts_.push_back(part);
      count_ += part.is_box ? patches(part) : (part.stop - part.start + step_ * tile - 1) / (step_ * tile) * step_;
    }
  }

  int64_t count() const { return count_; }

  // Tile `index`; without vectors where a class has no query so far on.
  void tile_at(int64_t index, QueryTile<W>& out) const {
    size_t part = parts_.size() - 1;
    while (starts_[part] > index) --part;
    if (parts_[part].is_box)
      patch(parts_[part], index - starts_[part], out);
    else
      line(parts_[part], index - starts_[part], out);
  }

 private:
  static constexpr int tile = tile_vectors * W;
  static constexpr int64_t band_rows = 8;
  // Vectors are patches of nearly equal sides.
  static constexpr int patch_sides[4][3] = {{1, 1, W}, {1, 1, W}, {1, W >= 16 ? 4 : 2, W / (W >= 16 ? 4 : 2)}, {W >= 8 ? 2 : 1, 2, W / (W >= 8 ? 4 : 2)}};

  // Sides of a vector's patch, and of a tile's, along the grid's axes.
  int32_t side(int axis) const { return patch_sides[layout_.axes][3 - layout_.axes + axis]; }
  int32_t tile_side(int axis) const { return side(axis) * (axis == layout_.axes - 1 ? tile_vectors : 1); }

  // The lines of a part as sizes of a grid of their own.
  int64_t size(const Part& part, int axis) const {
    if (axis > 0) return layout_.sizes[axis];
    return (part.stop - part.start) / line_length();
  }

  int64_t line_length() const {
    int64_t length = 1;
    for (int axis = 1; axis < layout_.axes; ++axis) length *= layout_.sizes[axis];
    return length;
  }

  int64_t along(const Part& part, int axis) const { return (size(part, axis) + tile_side(axis) - 1) / tile_side(axis); }

  int64_t patches(const Part& part) const {
    int64_t count = 1;
    for (int axis = 0; axis < layout_.axes; ++axis) count *= along(part, axis);
    return count;
  }

  void line(const Part& part, int64_t index, QueryTile<W>& out) const {
    // Tiles of all classes of one stretch follow each other: they share keys.
    const int64_t start = part.start + index % step_ + index / step_ * tile * step_;
    out.vectors = 0;
    if (start >= part.stop) return;
    const int64_t count = std::min<int64_t>(tile, (part.stop - start + step_ - 1) / step_);
    for (int i = 0; i < tile; ++i) {
      const int64_t position = start + std::min<int64_t>(i, count - 1) * step_;
      out.positions[i] = static_cast<int32_t>(position);
      out.sources[i] = static_cast<int32_t>(position - offset_);
      out.rows[i] = i < count ? out.sources[i] : -1;
    }
    out.vectors = static_cast<int>((count + W - 1) / W);
    out.whole = Region::line(start, count, step_);
    for (int j = 0; j < out.vectors; ++j)
      out.of_vector[j] = Region::line(start + j * W * step_, std::min<int64_t>(W, count - j * W), step_);
  }

  void patch(const Part& part, int64_t index, QueryTile<W>& out) const {
    const int axes = layout_.axes, last_axis = axes - 1;
    // Along bands of a few lines of patches, column by column: patches that follow each other see nearly the same keys.
    int64_t at[3] = {0, 0, 0};
    const int64_t columns = along(part, last_axis), rows = along(part, last_axis - 1);
    const int64_t plane = index / (rows * columns), in_plane = index % (rows * columns);
    const int64_t band = in_plane / (band_rows * columns), in_band = in_plane % (band_rows * columns);
    const int64_t rows_of_band = std::min(band_rows, rows - band * band_rows);
    at[last_axis] = in_band / rows_of_band;
    at[last_axis - 1] = band * band_rows + in_band % rows_of_band;
    if (axes == 3) at[0] = plane;
    Box box;
    for (int axis = 0; axis < axes; ++axis) {
      const int64_t low = at[axis] * tile_side(axis);
      box.extent[axis] = static_cast<int32_t>(std::min<int64_t>(tile_side(axis), size(part, axis) - low));
      box.low[axis] = low + (axis == 0 ? (part.start - layout_.offset) / line_length() : 0);
    }
    out.whole = box.region(layout_);
    const int last = axes - 1;
    out.vectors = (box.extent[last] + side(last) - 1) / side(last);
    const Region& whole = out.whole;
    for (int j = 0; j < tile_vectors; ++j) {
      if (j < out.vectors) {
        Box own = box;
        own.low[last] += j * side(last);
        own.extent[last] = std::min(side(last), box.extent[last] - j * side(last));
        out.of_vector[j] = own.region(layout_);
      }
      for (int lane = 0; lane < W; ++lane) {
        int rest = lane;
        int64_t position = whole.first;
        bool inside = true;
        for (int axis = last; axis >= 0; --axis) {
          const int32_t at = rest % side(axis) + (axis == last ? j * side(axis) : 0);
          rest /= side(axis);
          inside = inside && at < box.extent[axis];
          position += std::min(at, box.extent[axis] - 1) * whole.stride[axis];
        }
        out.positions[j * W + lane] = static_cast<int32_t>(position);
        out.sources[j * W + lane] = static_cast<int32_t>(position - offset_);
        out.rows[j * W + lane] = inside ? out.sources[j * W + lane] : -1;
      }
    }
  }

  const Layout layout_;
  int64_t offset_, stop_, step_, count_ = 0;
  std::vector<Part> parts_;
  std::vector<int64_t> starts_;
};

// Keys that the same vectors of a tile see, low .. high - 1.
struct KeyBlock {
  int count = 0, low = 0, high = 0;
  bool any_partial = false;
  int32_t least = 0;        // of its keys
  int64_t least_after = 0;  // no later block of the branch has a key below this, where its keys are walked without a step
  const int32_t* keys = nullptr;
  const uint8_t* partial = nullptr;  // of each key: bit j says that vector j sees some of its pairs only
  const uint64_t* seen = nullptr;    // of each key with such vectors: bit lane_bits * (j - low) + i says that lane i of vector j sees it
};

constexpr int lane_bits = 16;

// Finds the keys of a tile: regions are halved until the mask decides them. Gives blocks of at most `most` keys to a function.
// Keys of so many as the grain or fewer are asked about vector by vector; edges are followed down to the finer grain.
template <int W, int grain, int fine_grain>
class KeyWalk {
 public:
  KeyWalk(const Masks& masks, int64_t b, int64_t h, const Layout& layout, const QueryTile<W>& tile, int most)
      : masks_(masks), b_(b), h_(h), layout_(layout), tile_(tile), most_(most) {
    for (int low = 0; low < tile_vectors; ++low)
      for (int high = low + 1; high <= tile_vectors; ++high) {
        OpenBlock& open = open_[low][high - 1];
        open.block.low = low;
        open.block.high = high;
        open.block.keys = open.keys;
        open.block.partial = open.partial;
      }
  }

  // Walks the keys of one branch, each once, and gives them to visit(block).
  template <class Visit>
  void branch(const Branch& branch, int64_t kv_len, const Visit& visit) {
    root_ = branch.root;
    cursor_ = 0;
    for (const Part& part : parts_of(layout_, 0, kv_len)) {
      if (part.is_box) {
        Box box;
        int64_t line = 1;
        for (int axis = 1; axis < layout_.axes; ++axis) line *= layout_.sizes[axis], box.extent[axis] = static_cast<int32_t>(layout_.sizes[axis]);
        box.low[0] = (part.start - layout_.offset) / line;
        box.extent[0] = static_cast<int32_t>((part.stop - part.start) / line);
        walk(box, visit);
        continue;
      }
      for (int64_t residue = 0; residue < branch.key_step; ++residue) {
        const int64_t first = part.start + modulo(residue - part.start, branch.key_step);
        if (first < part.stop) line(first, branch.key_step, 0, (part.stop - first + branch.key_step - 1) / branch.key_step, visit);
      }
    }
    for (int low = 0; low < tile_vectors; ++low)
      for (int high = low + 1; high <= tile_vectors; ++high) flush(open_[low][high - 1], visit);
  }

 private:
  // A block that keys are added to.
  struct OpenBlock {
    KeyBlock block;
    int32_t keys[128];
    uint8_t partial[128];
  };

  template <class Visit>
  void flush(OpenBlock& open, const Visit& visit) {
    KeyBlock& block = open.block;
    if (!block.count) return;
    block.least_after = cursor_;
    for (const auto& row : open_)
      for (const OpenBlock& other : row)
        if (other.block.count && &other != &open) block.least_after = std::min<int64_t>(block.least_after, other.block.least);
    visit(block);
    block.count = 0;
    block.any_partial = false;
  }

  // Adds keys first, first + step, ...
  template <class Visit>
  void add(int64_t first, int64_t step, int32_t count, int low, int high, uint8_t partial, bool is_line, const Visit& visit) {
    OpenBlock& open = open_[low][high - 1];
    KeyBlock& block = open.block;
    while (count > 0) {
      if (!block.count || first < block.least) block.least = static_cast<int32_t>(first);
      const int32_t some = std::min(count, most_ - block.count);
      int32_t* to = open.keys + block.count;
      for (int32_t i = 0; i < some; ++i) to[i] = static_cast<int32_t>(first + i * step);
      std::fill(open.partial + block.count, open.partial + block.count + some, partial);
      block.any_partial |= partial != 0;
      block.count += some;
      first += some * step;
      count -= some;
      if (is_line) cursor_ = first;
      if (block.count == most_) flush(open, visit);
    }
  }

  template <class Visit>
  void add(const Region& keys, int low, int high, uint8_t partial, const Visit& visit) {
    if (keys.grid < 0) return add(keys.base, keys.stride[0], keys.extent[0], low, high, partial, true, visit);
    for (int32_t i = 0; i < keys.extent[0]; ++i)
      for (int32_t j = 0; j < keys.extent[1]; ++j) {
        const int64_t first = keys.base + i * keys.stride[0] + j * keys.stride[1];
        add(first, keys.stride[2], keys.extent[2], low, high, partial, false, visit);
      }
  }

  // What holds of the whole tile.
  Verdict classify(const Region& keys) const {
    Verdict out;
    masks_.classify(root_, b_, h_, &tile_.whole, 1, keys, &out);
    return out;
  }

  // Which vectors see a few keys; true where that is settled: not where an edge may run through them.
  template <class Visit>
  bool by_vector(const Region& keys, bool finest, const Visit& visit) {
    Verdict seen[tile_vectors];
    masks_.classify(root_, b_, h_, tile_.of_vector, tile_.vectors, keys, seen);
    int low = 0, high = tile_.vectors, undecided = 0, hidden = 0;
    while (low < high && seen[low] == EMPTY) ++low;
    while (high > low && seen[high - 1] == EMPTY) --high;
    if (low == high) return true;
    for (int j = low; j < high; ++j) {
      undecided += seen[j] == PARTIAL;
      // Vectors between others that see nothing are computed with them and hidden.
      hidden |= (seen[j] != FULL) << j;
    }
    if (!finest && undecided && undecided != tile_.vectors) return false;
    add(keys, low, high, static_cast<uint8_t>(hidden), visit);
    return true;
  }

  template <class Visit>
  void line(int64_t base, int64_t step, int64_t from, int64_t to, const Visit& visit) {
    const Region keys = Region::line(base + from * step, to - from, step);
    cursor_ = keys.first;
    const Verdict seen = classify(keys);
    if (seen == EMPTY) return;
    if (seen == FULL) return add(keys, 0, tile_.vectors, 0, visit);
    const int64_t count = to - from;
    if (count <= grain) {
      if (by_vector(keys, count <= fine_grain, visit)) return;
      for (int64_t at = from; at < to; at += fine_grain)
        by_vector(Region::line(base + at * step, std::min<int64_t>(fine_grain, to - at), step), true, visit);
      return;
    }
    // At a multiple of the largest power of two: tiles of equal places then have equal regions.
    int64_t power = 1;
    while (power * 2 < count) power *= 2;
    int64_t middle = (from / power + 1) * power;
    while (middle >= to) power /= 2, middle = (from / power + 1) * power;
    line(base, step, from, middle, visit);
    line(base, step, middle, to, visit);
  }

  template <class Visit>
  void walk(const Box& box, const Visit& visit) {
    const Region keys = box.region(layout_);
    cursor_ = layout_.offset + box.low[0] * keys.stride[0];
    const Verdict seen = classify(keys);
    if (seen == EMPTY) return;
    if (seen == FULL) return add(keys, 0, tile_.vectors, 0, visit);
    // The slowest axis that is longer than a small box is cut, so that lines are walked in order.
    int axis = -1;
    const int32_t side = layout_.axes == 2 ? 4 : 2;
    for (int i = layout_.axes - 1; i >= 0; --i)
      if (box.extent[i] > side) axis = i;
    if (axis < 0) {
      if (by_vector(keys, false, visit)) return;
      const int last = layout_.axes - 1;
      for (int32_t at = 0; at < box.extent[last]; ++at) {
        Box column = box;
        column.low[last] += at;
        column.extent[last] = 1;
        by_vector(column.region(layout_), true, visit);
      }
      return;
    }
    int64_t power = side;
    while (power * 2 < box.extent[axis]) power *= 2;
    const int64_t from = box.low[axis], to = from + box.extent[axis];
    int64_t middle = (from / power + 1) * power;
    while (middle >= to) power /= 2, middle = (from / power + 1) * power;
    Box first = box, second = box;
    first.extent[axis] = static_cast<int32_t>(middle - from);
    second.low[axis] = middle;
    second.extent[axis] = static_cast<int32_t>(to - middle);
    walk(first, visit);
    walk(second, visit);
  }

  const Masks& masks_;
  int64_t b_, h_;
  const Layout& layout_;
  const QueryTile<W>& tile_;
  int most_, root_ = 0;
  int64_t cursor_ = 0;
  OpenBlock open_[tile_vectors][tile_vectors];
};

// All blocks of a tile, branch by branch: visit(branch, block).
template <class Engine, class Visit>
void walk_keys(const Masks& masks, int64_t b, int64_t h, const Group& group, const QueryTile<Engine::W>& tile, int64_t kv_len,
               const Visit& visit) {
  KeyWalk<Engine::W, Engine::grain, Engine::fine_grain> walk(masks, b, h, group.layout, tile, Engine::most_keys);
  for (const Branch& branch : group.branches) walk.branch(branch, kv_len, [&](const KeyBlock& block) { visit(branch, block); });
}

// The blocks of a stretch's tiles and who sees their keys, kept by a thread from one head to the next that sees the same.
class BlockCache {
 public:
  // Keeps what is there if it is of the same stretch.
  void start(int64_t entry, int64_t group, int64_t first, int64_t tiles) {
    const int64_t key[3] = {entry, group, first};
    if (std::equal(key, key + 3, key_) && tiles == static_cast<int64_t>(tiles_.size())) return;
    std::copy(key, key + 3, key_);
    blocks_.clear();
    keys_.clear();
    partial_.clear();
    seen_.clear();
    tiles_.assign(static_cast<size_t>(tiles), {});
  }

  // visit(branch, block) for all blocks of tile `index` of the stretch: those that were kept, or those that walk(visit) finds and
  // answer(branch, block, seen) completes.
  template <class Walk, class Answer, class Visit>
  void blocks(int64_t index, const Walk& walk, const Answer& answer, const Visit& visit) {
    Range& range = tiles_[static_cast<size_t>(index)];
    if (range.known) {
      for (size_t at = range.start; at < range.stop; ++at) visit(blocks_[at].branch, with_arrays(blocks_[at]));
      return;
    }
    range.start = blocks_.size();
    walk([&](const Branch& branch, const KeyBlock& block) {
      uint64_t seen[128];
      KeyBlock complete = block;
      complete.seen = seen;
      if (block.any_partial) answer(branch, block, seen);
      if (blocks_.size() < most_blocks) keep(branch, complete);
      visit(branch, complete);
    });
    range.stop = blocks_.size();
    // A tile that found no room is walked anew each time.
    range.known = range.stop < most_blocks;
  }

 private:
  static constexpr size_t most_blocks = 512;
  struct Range {
    size_t start = 0, stop = 0;
    bool known = false;
  };
  struct Kept {
    Branch branch;
    KeyBlock block;  // without its arrays
    size_t keys, seen;
  };

  void keep(const Branch& branch, const KeyBlock& block) {
    blocks_.push_back({branch, block, keys_.size(), seen_.size()});
    keys_.insert(keys_.end(), block.keys, block.keys + block.count);
    partial_.insert(partial_.end(), block.partial, block.partial + block.count);
    if (block.any_partial) seen_.insert(seen_.end(), block.seen, block.seen + block.count);
  }

  KeyBlock with_arrays(const Kept& kept) const {
    KeyBlock block = kept.block;
    block.keys = keys_.data() + kept.keys;
    block.partial = partial_.data() + kept.keys;
    block.seen = seen_.data() + kept.seen;
    return block;
  }

  int64_t key_[3] = {-1, -1, -1};
  std::vector<Kept> blocks_;
  std::vector<int32_t> keys_;
  std::vector<uint8_t> partial_;
  std::vector<uint64_t> seen_;
  std::vector<Range> tiles_;
};

}  // namespace native
