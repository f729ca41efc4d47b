// The tiling of queries into tiles of `tile_vectors` vectors: runs of a residue class, or patches
// of a grid.
#pragma once
#include <algorithm>
#include <vector>

#include "program.h"

namespace native {

// The regions of a tile's queries, which masks classify.
struct TileRegions {
  int vectors = 0;  // vectors with at least one query
  Region whole;
  Region of_vector[tile_vectors];
};

// Queries that are computed together. Lanes past the end repeat a valid query; they are not
// written.
template <int W>
struct QueryTile : TileRegions {
  int32_t positions[tile_vectors * W];
  int32_t sources[tile_vectors * W];  // rows of q
  int32_t rows[tile_vectors * W];     // the same, -1 past the end

  // Whether its one query is in the first lane: a decoded token, or the last of a class.
  bool is_single() const {
    return vectors == 1 && rows[0] >= 0 && std::all_of(rows + 1, rows + W, [](int32_t row) { return row < 0; });
  }
};

// A run of positions, or complete lines of a grid.
struct Part {
  bool is_box;
  int64_t start, stop;  // positions; for a box its first one and one past its last
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
  // globals: queries that get tiles of their own. They see many keys that their neighbors do not.
  QueryTiles(const Layout& layout, int64_t q_len, int64_t q_offset, GlobalQueries globals)
      : layout_(layout), offset_(q_offset), stop_(q_offset + q_len), globals_(std::move(globals)) {
    step_ = step_of(layout.step, q_len);
    for (const Part& part : parts_of(layout, q_offset, stop_)) {
      starts_.push_back(count_);
      parts_.push_back(part);
      count_ += part.is_box ? patches(part) : (part.stop - part.start + step_ * tile - 1) / (step_ * tile) * step_;
    }
    global_start_ = count_;
    count_ += (static_cast<int64_t>(globals_.positions.size()) + tile - 1) / tile;
  }

  int64_t count() const { return count_; }

  // Tile `index`; it has no vectors if its class has no more queries.
  void tile_at(int64_t index, QueryTile<W>& out) const {
    if (index >= global_start_) return global(index - global_start_, out);
    size_t part = parts_.size() - 1;
    while (starts_[part] > index) --part;
    if (parts_[part].is_box)
      patch(parts_[part], index - starts_[part], out);
    else
      line(parts_[part], index - starts_[part], out);
    if (!globals_.positions.empty()) skip_globals(out);
  }

 private:
  static constexpr int tile = tile_vectors * W;
  static constexpr int64_t band_rows = 8;
  // Vectors are patches of nearly equal sides.
  static constexpr int patch_sides[4][3] = {{1, 1, W}, {1, 1, W}, {1, W >= 16 ? 4 : 2, W / (W >= 16 ? 4 : 2)}, {W >= 8 ? 2 : 1, 2, W / (W >= 8 ? 4 : 2)}};

  // The step, reduced for short sequences: classes shorter than a vector would leave lanes empty.
  static int64_t step_of(int64_t step, int64_t q_len) {
    while (step > 1 && q_len < step * W * 2) {
      if (step % 2 == 0) {
        step /= 2;
        continue;
      }
      // Without classes each query of a tile would see keys of its own: empty lanes cost less.
      if (step > W && q_len >= 2 * step) return step;
      return 1;
    }
    return step;
  }

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
    // Tiles of all classes of one stretch are consecutive: they share keys.
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
    // Along bands of a few lines of patches, column by column: consecutive patches see nearly the
    // same keys.
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
        Box of_vector = box;
        of_vector.low[last] += j * side(last);
        of_vector.extent[last] = std::min(side(last), box.extent[last] - j * side(last));
        out.of_vector[j] = of_vector.region(layout_);
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

  // Global queries in their order; the regions are their hulls.
  void global(int64_t index, QueryTile<W>& out) const {
    const std::vector<int32_t>& positions = globals_.positions;
    const int64_t start = index * tile, count = std::min<int64_t>(tile, static_cast<int64_t>(positions.size()) - start);
    const auto position = [&](int64_t i) { return positions[static_cast<size_t>(start + std::min(i, count - 1))]; };
    const auto hull = [&](int64_t from, int64_t to) {
      Region region = Region::line(position(from), position(to) - position(from) + 1, 1);
      if (globals_.alike) region.globals = Globals::all;
      return region;
    };
    for (int i = 0; i < tile; ++i) {
      out.positions[i] = position(i);
      out.sources[i] = static_cast<int32_t>(position(i) - offset_);
      out.rows[i] = i < count ? out.sources[i] : -1;
    }
    out.vectors = static_cast<int>((count + W - 1) / W);
    out.whole = hull(0, count - 1);
    for (int j = 0; j < out.vectors; ++j) out.of_vector[j] = hull(j * W, (j + 1) * W - 1);
  }

  // The results of global queries are computed by tiles of their own. Their lanes remain, with
  // results that are not written.
  void skip_globals(QueryTile<W>& out) const {
    if (!out.vectors) return;
    if (globals_.any_of(out.whole.first, out.whole.last)) {
      for (int i = 0; i < tile; ++i)
        if (globals_.any_of(out.positions[i], out.positions[i])) out.rows[i] = -1;
      if (std::all_of(out.rows, out.rows + tile, [](int32_t row) { return row < 0; })) out.vectors = 0;
    }
    out.whole.globals = Globals::none;
    for (int j = 0; j < out.vectors; ++j) out.of_vector[j].globals = Globals::none;
  }

  const Layout layout_;
  int64_t offset_, stop_, step_, count_ = 0, global_start_ = 0;
  GlobalQueries globals_;
  std::vector<Part> parts_;
  std::vector<int64_t> starts_;
};

}  // namespace native
