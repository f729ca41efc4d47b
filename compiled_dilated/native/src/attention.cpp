#include "kernels.h"

namespace native {

namespace {

bool is_double(const Problem& problem) { return problem.q.type == Type::f64; }

}  // namespace

void forward(const Problem& problem, bool merge) {
  const Program program = read_program(problem);
  if (problem.q.type == Type::bf16 && has_amx()) return forward_amx(problem, program, merge);
  is_double(problem) ? forward_f64(problem, program, merge) : forward_f32(problem, program, merge);
}

void backward(const Problem& problem, const Gradients& gradients) {
  const Program program = read_program(problem);
  is_double(problem) ? backward_f64(problem, program, gradients) : backward_f32(problem, program, gradients);
}

void count(const Problem& problem) {
  const Program program = read_program(problem);
  const Shape shape(problem);
  constexpr int W = lanes<float>;
  const Stretches<W> stretches(problem, program, shape, shape.batch * shape.heads, 1);
  Counts counts;
  QueryTile<W> tile;
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h) {
      const Group& group = program.groups[program.group_of_head[h]];
      const QueryTiles<W>& tiles = stretches.tiles(offset_entry(problem, b), program.group_of_head[h]);
      for (int64_t index = 0; index < tiles.count(); ++index) {
        tiles.tile_at(index, tile);
        if (!tile.vectors) continue;
        ++counts.tiles;
        walk_keys<WideEngine<float>>(program.masks, b, h, group, tile, shape.kv_len,
                                     [&](const Branch&, const KeyBlock& block) { counts.add(block, W); });
      }
    }
  counts.write(problem.counts);
}

}  // namespace native
