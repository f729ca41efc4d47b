#include "amx_tiles.h"
#include "forward.h"
#include "parts.h"

namespace native {

void forward_f32(const Problem& problem, const Program& program, bool merges);

namespace {

bool is_double(const Problem& problem) { return problem.q.type == Type::f64; }

// Whether this was compiled for a CPU that multiplies tiles of bfloat16, and the system lets this process use them.
bool has_amx() {
#if defined(__AMX_BF16__)
  return AmxTiles::allowed();
#else
  return false;
#endif
}

}  // namespace

void forward(const Problem& problem, bool merge) {
  const Program program = read_program(problem);
  if (problem.q.type == Type::bf16 && has_amx()) return part(&Parts::forward_amx, "amx")(problem, program, merge);
  if (is_double(problem)) return part(&Parts::forward_f64, "double")(problem, program, merge);
  forward_f32(problem, program, merge);
}

void backward(const Problem& problem, const Gradients& gradients) {
  const Program program = read_program(problem);
  if (problem.q.type == Type::bf16 && has_amx()) return part(&Parts::backward_amx, "backward_amx")(problem, program, gradients);
  if (is_double(problem)) return part(&Parts::backward_f64, "double")(problem, program, gradients);
  part(&Parts::backward_f32, "backward")(problem, program, gradients);
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

// Sets who loads a part by its name.
extern "C" __attribute__((visibility("default"))) void native_set_loader(void (*need)(const char*)) { native::parts().need = need; }
