// Counts the work of a forward by its walk, without its arithmetic.
#include "decoding.h"

namespace native {

namespace {

template <class Engine>
void count_with(const Problem& problem, const Program& program) {
  const Shape shape(problem);
  WalkSizes sizes = Engine::sizes;
  sizes.counted = true;
  constexpr int W = Engine::W;
  const Stretches<W> stretches(problem, program, shape, shape.batch * shape.heads, 1);
  Counts counts;
  QueryTile<W> tile;
  // Heads of a group have equal masks, and so have entries of the batch unless data or functions
  // distinguish them: one is counted for all.
  const int64_t entries = program.varies_by_entry ? shape.batch : 1;
  for (int64_t b = 0; b < entries; ++b)
    for (int64_t group = 0; group < static_cast<int64_t>(program.groups.size()); ++group) {
      const auto first = std::find(program.group_of_head.begin(), program.group_of_head.end(), group);
      const int64_t h = first - program.group_of_head.begin();
      const int64_t equal_heads = std::count(first, program.group_of_head.end(), group) * (shape.batch / entries);
      const QueryTiles<W>& tiles = stretches.tiles(b, group);
      Counts of_group;
      for (int64_t index = 0; index < tiles.count(); ++index) {
        tiles.tile_at(index, tile);
        if (!tile.vectors) continue;
        ++of_group.tiles;
        const int computed = Engine::computed_lanes(tile);
        const auto add = [&](const Branch&, const KeyBlock& block) { of_group.add(block, computed); };
        const auto walk = [&](const KeyRange& keys) { walk_keys(program.masks, b, h, program.groups[group], tile, keys, sizes, add); };
        if (shape.q_len == 1)
          Cuts(shape, sizeof(typename Engine::Number)).chunks({0, shape.kv_len}, walk);
        else
          walk({0, shape.kv_len});
      }
      counts.pairs += of_group.pairs * equal_heads, counts.partial += of_group.partial * equal_heads;
      counts.blocks += of_group.blocks * equal_heads, counts.tiles += of_group.tiles * equal_heads;
    }
  counts.write(problem.counts);
}

void count_of_engine(const Problem& problem, const Program& program, bool amx) {
  if (amx) return count_with<AmxWalk>(problem, program);
  if (problem.q.type == Type::f64) return count_with<WideWalk<double>>(problem, program);
  count_with<WideWalk<float>>(problem, program);
}

const bool registered = (parts().count = &count_of_engine, true);

}  // namespace

}  // namespace native
