// Bounds of the keys of a tile, from its mask's arithmetic: walks start there instead of at the
// complete sequence.
#pragma once
#include <algorithm>

#include "masks.h"

namespace native {

// Positions first .. after - 1, and coordinates low .. high of the layout's grid.
struct Reach {
  int64_t first, after;
  int64_t low[3], high[3];

  void keep_positions(int64_t from, int64_t to) {
    first = std::max(first, from);
    after = std::min(after, to);
  }

  // The hull of both.
  void add(const Reach& other) {
    first = std::min(first, other.first);
    after = std::max(after, other.after);
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = std::min(low[axis], other.low[axis]);
      high[axis] = std::max(high[axis], other.high[axis]);
    }
  }
};

// Narrows `reach` to the keys that node `index` allows for a region of queries. Masks without a
// rule here narrow nothing.
inline void narrow(const Masks& masks, int index, const Region& q, int grid, Reach& reach) {
  const Node& node = masks.nodes[index];
  const std::vector<int64_t>& x = node.arguments;
  switch (node.op) {
    case Op::all_of:
      for (const int64_t part : x) narrow(masks, static_cast<int>(part), q, grid, reach);
      return;
    case Op::any_of: {
      Reach hull = reach;
      for (size_t at = 0; at < x.size(); ++at) {
        Reach of_part = reach;
        narrow(masks, static_cast<int>(x[at]), q, grid, of_part);
        if (at)
          hull.add(of_part);
        else
          hull = of_part;
      }
      reach = hull;
      return;
    }
    case Op::causal: return reach.keep_positions(0, q.last + 1);
    case Op::window: return reach.keep_positions(q.first - x[0], q.last + x[1] + 1);
    case Op::sinks: return reach.keep_positions(0, x[0]);
    case Op::segments: return reach.keep_positions(floor_div(q.first, x[0]) * x[0], (floor_div(q.last, x[0]) + 1) * x[0]);
    case Op::block_window:
      return reach.keep_positions((floor_div(q.first, x[0]) - x[1]) * x[0], (floor_div(q.last, x[0]) + x[2] + 1) * x[0]);
    case Op::neighborhood: {
      reach.keep_positions(node.grid.offset, node.grid.offset + node.grid.cells);
      if (node.grid.number != grid || q.grid != grid) return;
      for (int i = 0; i < node.grid.axes; ++i) {
        const Axis& axis = node.grid.axis[i];
        // Shifted windows reach further at the border.
        if (axis.shifts && !axis.causal) continue;
        const int64_t far = axis.radius * axis.dilation;
        reach.low[i] = std::max(reach.low[i], q.low[i] - far);
        reach.high[i] = std::min(reach.high[i], q.low[i] + q.extent[i] - 1 + (axis.causal ? 0 : far));
      }
      return;
    }
    default: return;
  }
}

}  // namespace native
