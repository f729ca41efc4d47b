// Sets of positions of tiles, and verdicts of masks on pairs of them, as in regions.py.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>

namespace native {

// Ordered, so that `and` is the minimum, `or` the maximum and `not` the mirror image.
enum Verdict : int { EMPTY = 0, PARTIAL = 1, FULL = 2 };

// What a region's queries are to masks of global tokens.
enum class Globals : uint8_t { some, none, all };

// A box of a lattice: base + sum over axes of index * stride, 0 <= index < extent. Unused axes have extent 1.
struct Region {
  int64_t base = 0;
  int32_t extent[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1};
  int64_t first = 0, last = 0;
  int64_t step = 0;  // all positions are congruent to base modulo it; 0 where there is one position
  int64_t size = 1;
  int grid = -1;               // for a box of a grid: the grid's number
  int32_t low[3] = {0, 0, 0};  // and its least coordinates
  Globals globals = Globals::some;

  static Region line(int64_t base, int64_t count, int64_t stride) {
    Region region;
    region.base = region.first = base;
    region.extent[0] = static_cast<int32_t>(count);
    region.stride[0] = stride;
    region.last = base + (count - 1) * stride;
    region.step = count > 1 ? stride : 0;
    region.size = count;
    return region;
  }

  // A box of a grid: each stride is a multiple of the next.
  static Region box(int64_t base, const int32_t* extent, const int64_t* stride) {
    Region region;
    region.base = region.first = region.last = base;
    for (int axis = 0; axis < 3; ++axis) {
      region.extent[axis] = extent[axis];
      region.stride[axis] = stride[axis];
      region.last += (extent[axis] - 1) * stride[axis];
      region.size *= extent[axis];
      if (extent[axis] > 1) region.step = stride[axis];
    }
    return region;
  }

  // Whether it contains every position from first to last in its step.
  bool dense() const { return last - first == (size - 1) * step; }
};

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
inline int64_t modulo(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

inline Verdict verdict(bool full, bool empty) { return empty ? EMPTY : full ? FULL : PARTIAL; }

}  // namespace native
