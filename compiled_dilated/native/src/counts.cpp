// What a forward computes, counted by the walk that it takes, without its arithmetic.
#include "forward.h"

namespace native {

namespace {

// How the engine of bfloat16 tiles walks; as in forward_amx.cpp.
struct AmxWalk {
  static constexpr int W = 16, most_keys = 128, grain = 32, fine_grain = 32;
};

template <class Engine>
void count_with(const Problem& problem, const Program& program) {
  const Shape shape(problem);
  constexpr int W = Engine::W;
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
        walk_keys<Engine>(program.masks, b, h, group, tile, shape.kv_len,
                          [&](const Branch&, const KeyBlock& block) { counts.add(block, W); });
      }
    }
  counts.write(problem.counts);
}

void count_of_engine(const Problem& problem, const Program& program, bool amx) {
  if (amx) return count_with<AmxWalk>(problem, program);
  if (problem.q.type == Type::f64) return count_with<WideEngine<double>>(problem, program);
  count_with<WideEngine<float>>(problem, program);
}

const bool registered = (parts().count = &count_of_engine, true);

}  // namespace

}  // namespace native
