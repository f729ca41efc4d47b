#if defined(__AMX_BF16__)
#include "amx.h"
#include "forward.h"

namespace native {

bool wide_f32(const Problem& problem, const Program& program, bool merges, bool careful);

namespace {

// The engine of bfloat16 on AMX.
struct AmxEngine : AmxWalk {
  using Stored = uint16_t;
  static constexpr bool can_be_careful = false;
  static constexpr int slots = 1;

  static size_t bytes(const Shape& shape) { return AmxForward::bytes(shape.head_dim, shape.value_dim); }

  AmxEngine(Room& room, const Shape& shape)
      : softmax(room.take<char>(bytes(shape)), shape.head_dim, shape.value_dim) {}

  void begin(const Head& q, const QueryTile<W>& tile, double scale, bool changed) {
    scaling = Scaling<float>(scale, changed);
    const uint16_t* q_rows[TQ];
    for (int i = 0; i < TQ; ++i) q_rows[i] = static_cast<const uint16_t*>(q.row(tile.sources[i]));
    softmax.begin(q_rows, scaling.rest() * log2_of_e);
  }

  void start_from(const float* const* rows, const float* lse) { softmax.start_from(rows, lse); }

  void keys_from(const Head& k, const Head& v, const Spacing&, bool) { keys = k, values = v; }

  void block(const KeyBlock& block, const ScoreEdit<float>& change) {
    const uint16_t *key_rows[most_keys], *value_rows[most_keys];
    for (int i = 0; i < block.count; ++i) {
      key_rows[i] = static_cast<const uint16_t*>(keys.row(block.keys[i]));
      value_rows[i] = static_cast<const uint16_t*>(values.row(block.keys[i]));
    }
    const auto edit = [&](float* scores, int ld, int n) {
      float* from = scores + block.low * W;
      scaling.apply(from, ld, n, (block.high - block.low) * W);
      if (change) change(from, ld);
    };
    softmax.block(key_rows, value_rows, block.count, block.low, block.high, scaling.first || change, edit);
  }

  bool result(Stored* const* rows, float* lse) { return softmax.result(rows, lse); }

  Ahead& ahead() { return softmax.ahead; }

  AmxTiles tiles;
  AmxForward softmax;
  Scaling<float> scaling;
  Head keys{Array{}, 0, 0}, values{Array{}, 0, 0};
};

void forward_amx(const Problem& problem, const Program& program, bool merges) {
  const Shape shape(problem);
  with_care<float>(problem, shape, merges, [&](bool careful) {
    return careful ? wide_f32(problem, program, merges, true) : forward_tiles<AmxEngine>(problem, program, shape, merges, false);
  });
}

const bool registered = (parts().forward_amx = &forward_amx, true);

}  // namespace

}  // namespace native
#endif  // __AMX_BF16__
