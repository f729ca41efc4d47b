#if defined(__AMX_BF16__)
#include "amx.h"
#include "backward.h"

namespace native {

namespace {

// The gradients of bfloat16 where the CPU multiplies tiles; sums over queries stay in float32.
struct AmxGradient : AmxWalk {
  using Stored = uint16_t;

  static size_t bytes(const Shape& shape) { return AmxBackward::bytes(shape.head_dim, shape.value_dim); }

  AmxGradient(Room& room, const Shape& shape, double scale)
      : head_dim(shape.head_dim), value_dim(shape.value_dim), scale(scale),
        products(room.take<char>(bytes(shape)), head_dim, value_dim) {}

  // lse: natural; +inf for lanes past the end.
  void begin(const Head& q, const Head& grad_out, const int32_t* sources, bool changed, const float* lse, const float* delta) {
    scaling = Scaling<float>(scale, changed);
    const uint16_t *q_rows[TQ], *grad_rows[TQ];
    for (int i = 0; i < TQ; ++i) {
      q_rows[i] = static_cast<const uint16_t*>(q.row(sources[i]));
      grad_rows[i] = static_cast<const uint16_t*>(grad_out.row(sources[i]));
    }
    products.begin(q_rows, grad_rows, lse, delta, static_cast<float>(scale), static_cast<float>(scaling.rest()));
  }

  void keys_from(const Head& k, const Head& v, const Spacing&, bool) { keys = k, values = v; }

  void block(const KeyBlock& block, float* grad_k, float* grad_v, const ScoreEdit<float>& change, const GradEdit<float>& change_back) {
    const uint16_t *key_rows[most_keys], *value_rows[most_keys];
    float *grad_key_rows[most_keys], *grad_value_rows[most_keys];
    for (int i = 0; i < block.count; ++i) {
      const int64_t key = block.keys[i];
      key_rows[i] = static_cast<const uint16_t*>(keys.row(key));
      value_rows[i] = static_cast<const uint16_t*>(values.row(key));
      grad_key_rows[i] = grad_k + key * padded<float>(head_dim);
      grad_value_rows[i] = grad_v + key * padded<float>(value_dim);
    }
    const int first = block.low * W, lanes_seen = (block.high - block.low) * W;
    const auto edit = [&](float* scores, int ld, int n) {
      scaling.apply(scores + first, ld, n, lanes_seen);
      if (change) change(scores + first, ld);
    };
    const auto run = [&](const auto& edit_grad) {
      products.block(key_rows, value_rows, grad_key_rows, grad_value_rows, block.count, block.low, block.high,
                     scaling.first || change, edit, edit_grad);
    };
    if (!change_back) return run(AmxBackward::NoEdit{});
    run([&](float* before, float* grads, int ld, int n) {
      scaling.apply(before + first, ld, n, lanes_seen);
      change_back(before + first, grads + first, ld);
    });
  }

  void result(Stored* const* rows) { products.result(rows); }

  int head_dim, value_dim;
  double scale;
  Ahead& ahead() { return products.ahead; }

  AmxTiles tiles;
  AmxBackward products;
  Scaling<float> scaling;
  Head keys{Array{}, 0, 0}, values{Array{}, 0, 0};
};

const bool registered = (parts().backward_amx = &backward_with<AmxGradient>, true);

}  // namespace

}  // namespace native
#endif  // __AMX_BF16__
