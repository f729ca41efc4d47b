#include "walk.h"

#include "reach.h"

namespace native {

namespace {

// Where a range of at least two numbers is cut: inside it, at a multiple of the largest power of two,
// so that tiles at equal places have equal regions.
int64_t cut_of(int64_t from, int64_t to) {
  int64_t power = 1;
  while (power * 2 < to - from) power *= 2;
  int64_t cut = (from / power + 1) * power;
  while (cut >= to) power /= 2, cut = (from / power + 1) * power;
  return cut;
}

// The walk over the keys of a tile: regions are halved until the mask decides them.
class KeyWalk {
 public:
  KeyWalk(const Masks& masks, int64_t b, int64_t h, const Layout& layout, const TileRegions& tile, const WalkSizes& sizes,
          const Callback<const KeyBlock&>& visit)
      : masks_(masks), b_(b), h_(h), layout_(layout), tile_(tile), sizes_(sizes), visit_(visit) {
    for (int low = 0; low < tile_vectors; ++low)
      for (int high = low + 1; high <= tile_vectors; ++high) {
        OpenBlock& open = open_[low][high - 1];
        open.block.low = low;
        open.block.high = high;
        open.block.keys = open.keys;
        open.block.partial = open.partial;
      }
  }

  // Walks some keys of one branch, each once, and passes them to the visitor.
  void branch(const Branch& branch, const KeyRange& keys) {
    root_ = branch.root;
    cursor_ = 0;
    for (const Part& part : parts_of(layout_, keys.first, keys.after)) {
      Reach reach{part.start, part.stop, {0, 0, 0}, {0, 0, 0}};
      if (part.is_box) {
        box(part, reach);
        continue;
      }
      narrow(masks_, root_, tile_.whole, layout_.number, reach);
      const int64_t step = branch.key_step, classes = branch.strict ? classes_of_tile(step) : step;
      for (int64_t i = 0; i < classes; ++i) {
        const int64_t residue = branch.strict ? tile_.whole.first + i * tile_.whole.step : i;
        const int64_t first = part.start + modulo(residue - part.start, step);
        if (first >= part.stop) continue;
        // Counts of keys of the class before the first that may be seen and before the first that
        // may not, rounded to the grain.
        const int64_t count = (part.stop - first + step - 1) / step, grain = sizes_.grain;
        const int64_t from = floor_div(std::max<int64_t>(reach.first - first, 0), step * grain) * grain;
        const int64_t to = std::min(count, floor_div(reach.after - first + step * grain - 1, step * grain) * grain);
        if (from < to) line(first, step, from, to);
      }
    }
    for (int low = 0; low < tile_vectors; ++low)
      for (int high = low + 1; high <= tile_vectors; ++high) flush(open_[low][high - 1]);
  }

 private:
  // A block that keys are added to.
  struct OpenBlock {
    KeyBlock block;
    int32_t keys[most_block_keys];
    uint8_t partial[most_block_keys];
  };

  // The number of residue classes of the tile's queries, a line.
  int64_t classes_of_tile(int64_t modulus) const {
    return std::min<int64_t>(tile_.whole.size, modulus / std::gcd(modulus, tile_.whole.step));
  }

  // The lines of a grid, without the lines and columns that are out of reach.
  void box(const Part& part, Reach& reach) {
    int64_t line = 1;
    for (int axis = 1; axis < layout_.axes; ++axis) line *= layout_.sizes[axis], reach.high[axis] = layout_.sizes[axis] - 1;
    reach.low[0] = (part.start - layout_.offset) / line;
    reach.high[0] = (part.stop - layout_.offset) / line - 1;
    const Reach all = reach;
    narrow(masks_, root_, tile_.whole, layout_.number, reach);
    Box keys;
    for (int axis = 0; axis < layout_.axes; ++axis) {
      if (reach.low[axis] > reach.high[axis]) return;
      // Aligned to box sides, so that tiles at equal places have equal regions.
      keys.low[axis] = std::max(all.low[axis], reach.low[axis] / box_side() * box_side());
      const int64_t last = std::min(all.high[axis], reach.high[axis] / box_side() * box_side() + box_side() - 1);
      keys.extent[axis] = static_cast<int32_t>(last - keys.low[axis] + 1);
    }
    walk(keys);
  }

  // Sides of the smallest boxes.
  int32_t box_side() const { return layout_.axes == 2 ? 4 : 2; }

  void flush(OpenBlock& open) {
    KeyBlock& block = open.block;
    if (!block.count) return;
    block.least_after = cursor_;
    for (const auto& row : open_)
      for (const OpenBlock& other : row)
        if (other.block.count && &other != &open) block.least_after = std::min<int64_t>(block.least_after, other.block.least);
    visit_(block);
    block.count = 0;
    block.repeats = 1;
    block.any_partial = false;
  }

  // Adds keys first, first + step, ...
  void add(int64_t first, int64_t step, int32_t count, int low, int high, uint8_t partial, bool is_line) {
    OpenBlock& open = open_[low][high - 1];
    KeyBlock& block = open.block;
    while (count > 0) {
      if (sizes_.counted && !block.count && !partial && count >= sizes_.most_keys) {
        block.count = sizes_.most_keys;
        block.repeats = count / sizes_.most_keys;
        first += step * block.count * block.repeats;
        count %= sizes_.most_keys;
        if (is_line) cursor_ = first;
        flush(open);
        continue;
      }
      if (!block.count || first < block.least) block.least = static_cast<int32_t>(first);
      const int32_t taken = std::min(count, sizes_.most_keys - block.count);
      int32_t* to = open.keys + block.count;
      for (int32_t i = 0; i < taken; ++i) to[i] = static_cast<int32_t>(first + i * step);
      std::fill(open.partial + block.count, open.partial + block.count + taken, partial);
      block.any_partial |= partial != 0;
      block.count += taken;
      first += taken * step;
      count -= taken;
      if (is_line) cursor_ = first;
      if (block.count == sizes_.most_keys) flush(open);
    }
  }

  void add(const Region& keys, int low, int high, uint8_t partial) {
    if (keys.grid < 0) return add(keys.base, keys.stride[0], keys.extent[0], low, high, partial, true);
    for (int32_t i = 0; i < keys.extent[0]; ++i)
      for (int32_t j = 0; j < keys.extent[1]; ++j) {
        const int64_t first = keys.base + i * keys.stride[0] + j * keys.stride[1];
        add(first, keys.stride[2], keys.extent[2], low, high, partial, false);
      }
  }

  // The verdict of the complete tile.
  Verdict classify(const Region& keys) const {
    Verdict out;
    masks_.classify(root_, b_, h_, &tile_.whole, 1, keys, &out);
    return out;
  }

  // Decides which vectors see a few keys; false if an edge may run through them.
  bool by_vector(const Region& keys, bool finest) {
    Verdict seen[tile_vectors];
    masks_.classify(root_, b_, h_, tile_.of_vector, tile_.vectors, keys, seen);
    int low = 0, high = tile_.vectors, undecided = 0, hidden = 0;
    while (low < high && seen[low] == EMPTY) ++low;
    while (high > low && seen[high - 1] == EMPTY) --high;
    if (low == high) return true;
    for (int j = low; j < high; ++j) {
      undecided += seen[j] == PARTIAL;
      // A vector that sees nothing, between others that do, is computed with them and hidden.
      hidden |= (seen[j] != FULL) << j;
    }
    if (!finest && undecided && undecided != tile_.vectors) return false;
    add(keys, low, high, static_cast<uint8_t>(hidden));
    return true;
  }

  void line(int64_t base, int64_t step, int64_t from, int64_t to) {
    const Region keys = Region::line(base + from * step, to - from, step);
    cursor_ = keys.first;
    const Verdict seen = classify(keys);
    if (seen == EMPTY) return;
    if (seen == FULL) return add(keys, 0, tile_.vectors, 0);
    const int64_t count = to - from;
    if (count <= sizes_.grain) {
      if (by_vector(keys, count <= sizes_.fine_grain)) return;
      for (int64_t at = from; at < to; at += sizes_.fine_grain)
        by_vector(Region::line(base + at * step, std::min<int64_t>(sizes_.fine_grain, to - at), step), true);
      return;
    }
    const int64_t cut = cut_of(from, to);
    line(base, step, from, cut);
    line(base, step, cut, to);
  }

  void walk(const Box& box) {
    const Region keys = box.region(layout_);
    cursor_ = layout_.offset + box.low[0] * keys.stride[0];
    const Verdict seen = classify(keys);
    if (seen == EMPTY) return;
    if (seen == FULL) return add(keys, 0, tile_.vectors, 0);
    // The slowest axis that is longer than a small box is cut, so that lines are walked in order.
    int axis = -1;
    const int32_t side = box_side();
    for (int i = layout_.axes - 1; i >= 0; --i)
      if (box.extent[i] > side) axis = i;
    if (axis < 0) {
      if (by_vector(keys, false)) return;
      const int last = layout_.axes - 1;
      for (int32_t at = 0; at < box.extent[last]; ++at) {
        Box column = box;
        column.low[last] += at;
        column.extent[last] = 1;
        by_vector(column.region(layout_), true);
      }
      return;
    }
    const int64_t from = box.low[axis], to = from + box.extent[axis], cut = cut_of(from, to);
    Box first = box, second = box;
    first.extent[axis] = static_cast<int32_t>(cut - from);
    second.low[axis] = cut;
    second.extent[axis] = static_cast<int32_t>(to - cut);
    walk(first);
    walk(second);
  }

  const Masks& masks_;
  int64_t b_, h_;
  const Layout& layout_;
  const TileRegions& tile_;
  const WalkSizes& sizes_;
  const Callback<const KeyBlock&>& visit_;
  int root_ = 0;
  int64_t cursor_ = 0;
  OpenBlock open_[tile_vectors][tile_vectors];
};

// The first and the last of the keys of a part that a tile sees, in units of lines of a grid, or of
// a few keys.
class Ends {
 public:
  Ends(const Masks& masks, int64_t b, int64_t h, const Layout& layout, const TileRegions& tile)
      : masks_(masks), b_(b), h_(h), layout_(layout), tile_(tile) {}

  KeyRange of(int root, const Part& part) {
    root_ = root;
    part_ = part;
    unit_ = 1;
    if (part.is_box)
      for (int axis = 1; axis < layout_.axes; ++axis) unit_ *= layout_.sizes[axis];
    const int64_t units = (part.stop - part.start) / unit_;
    const int64_t first = find(0, units, false);
    if (first == none) return no_keys;
    return {part.start + first * unit_, part.start + find(first, units, true) * unit_};
  }

 private:
  static constexpr int64_t none = -1, fine_keys = 64;

  Region region(int64_t from, int64_t to) const {
    if (!part_.is_box) return Region::line(part_.start + from, to - from, 1);
    Box box;
    for (int axis = 1; axis < layout_.axes; ++axis) box.extent[axis] = static_cast<int32_t>(layout_.sizes[axis]);
    box.low[0] = (part_.start - layout_.offset) / unit_ + from;
    box.extent[0] = static_cast<int32_t>(to - from);
    return box.region(layout_);
  }

  // The start of the first visible unit, or the end of the last one.
  int64_t find(int64_t from, int64_t to, bool last) const {
    Verdict seen;
    masks_.classify(root_, b_, h_, &tile_.whole, 1, region(from, to), &seen);
    if (seen == EMPTY) return none;
    if (seen == FULL || to - from <= (part_.is_box ? 1 : fine_keys)) return last ? to : from;
    const int64_t middle = from + (to - from) / 2;
    const int64_t near = last ? find(middle, to, last) : find(from, middle, last);
    if (near != none) return near;
    return last ? find(from, middle, last) : find(middle, to, last);
  }

  const Masks& masks_;
  int64_t b_, h_;
  const Layout& layout_;
  const TileRegions& tile_;
  int root_ = 0;
  Part part_{};
  int64_t unit_ = 1;
};

// Marks those of some ranges that a branch may see.
void mark_seen(const Masks& masks, int root, int64_t b, int64_t h, const TileRegions& tile, int64_t kv_len, int64_t length,
               const KeyRange& ranges, std::vector<bool>& seen) {
  const int64_t start = ranges.first * length, stop = std::min(kv_len, ranges.after * length);
  Verdict verdict;
  masks.classify(root, b, h, &tile.whole, 1, Region::line(start, stop - start, 1), &verdict);
  if (verdict == EMPTY) return;
  if (verdict == FULL || ranges.after - ranges.first == 1) {
    std::fill(seen.begin() + ranges.first, seen.begin() + ranges.after, true);
    return;
  }
  const int64_t middle = ranges.first + (ranges.after - ranges.first) / 2;
  mark_seen(masks, root, b, h, tile, kv_len, length, {ranges.first, middle}, seen);
  mark_seen(masks, root, b, h, tile, kv_len, length, {middle, ranges.after}, seen);
}

}  // namespace

KeyRange range_of_keys(const Masks& masks, int64_t b, int64_t h, const Group& group, const TileRegions& tile, int64_t kv_len) {
  Ends ends(masks, b, h, group.layout, tile);
  KeyRange range = no_keys;
  for (const Branch& branch : group.branches)
    for (const Part& part : parts_of(group.layout, 0, kv_len)) range.add(ends.of(branch.root, part));
  return range;
}

void walk_keys(const Masks& masks, int64_t b, int64_t h, const Group& group, const TileRegions& tile, const KeyRange& keys,
               const WalkSizes& sizes, const Callback<const Branch&, const KeyBlock&>& visit) {
  const Branch* branch = nullptr;
  const auto visit_block = [&](const KeyBlock& block) { visit(*branch, block); };
  const Callback<const KeyBlock&> visitor(visit_block);
  KeyWalk walk(masks, b, h, group.layout, tile, sizes, visitor);
  for (const Branch& next : group.branches) {
    branch = &next;
    walk.branch(next, keys);
  }
}

std::vector<int64_t> ranges_seen(const Masks& masks, int64_t b, int64_t h, const Group& group, const TileRegions& tile, int64_t kv_len,
                                 int64_t length) {
  const int64_t count = (kv_len + length - 1) / length;
  std::vector<bool> seen(static_cast<size_t>(count));
  for (const Branch& branch : group.branches) mark_seen(masks, branch.root, b, h, tile, kv_len, length, {0, count}, seen);
  std::vector<int64_t> numbers;
  for (int64_t i = 0; i < count; ++i)
    if (seen[static_cast<size_t>(i)]) numbers.push_back(i);
  return numbers;
}

}  // namespace native
