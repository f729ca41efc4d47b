// What forward and backward share in one tile: the rows of a block's keys, and how scores are changed and hidden.
#pragma once
#include <bit>
#include <vector>

#include "geometry.h"
#include "parts.h"
#include "rows.h"

namespace native {

struct Shape {
  int64_t batch, heads, kv_heads, q_len, kv_len;
  int head_dim, value_dim;

  explicit Shape(const Problem& problem)
      : batch(problem.q.sizes[0]), heads(problem.q.sizes[1]), kv_heads(problem.k.sizes[1]), q_len(problem.q.sizes[2]),
        kv_len(problem.k.sizes[2]), head_dim(static_cast<int>(problem.q.sizes[3])), value_dim(static_cast<int>(problem.v.sizes[3])) {
    if (head_dim < 1 || head_dim > 256 || value_dim < 1 || value_dim > 256)
      throw std::runtime_error("the native kernel takes head_dim and value_dim from 1 to 256");
    if (kv_heads < 1 || heads % kv_heads) throw std::runtime_error("query heads must be a multiple of key heads");
  }

  int64_t kv_head(int64_t head) const { return head / (heads / kv_heads); }
};

// Rows of keys or values of one head by position: where they lie, or copies where that is of another type, or so far apart that
// rows that are read again and again would fall into few sets of the caches. Copies are kept: the next tile often sees the same.
template <class T>
class Rows {
 public:
  // Numbers of a workspace.
  static size_t numbers(int width) { return static_cast<size_t>(kept(width) + block_keys) * width; }

  // rereads: whether a block's rows are read more than once.
  Rows(T* workspace, int width, bool rereads)
      : width_(width), kept_(kept(width)), rereads_(rereads), copies_(workspace), spare_(workspace + static_cast<size_t>(kept_) * width) {}

  void start(const Head& head, int64_t key_step) {
    if (head.base == head_.base && key_step == key_step_) return;
    head_ = head;
    key_step_ = key_step;
    const bool crowded = rereads_ && head.stride * key_step % crowding_bytes == 0;
    direct_ = head.type == type_of<T> && !crowded;
    if (direct_) return;
    slots_.assign(static_cast<size_t>(kept_), Slot{});
    shift_ = std::countr_zero(static_cast<uint64_t>(key_step));
  }

  void of(const int32_t* positions, int count, const T** out) {
    if (direct_) {
      for (int i = 0; i < count; ++i) out[i] = static_cast<const T*>(head_.row(positions[i]));
      return;
    }
    ++block_;
    for (int i = 0; i < count; ++i) {
      const int number = positions[i] >> shift_ & (kept_ - 1);
      Slot& slot = slots_[static_cast<size_t>(number)];
      T* copy = copies_ + number * width_;
      if (slot.position != positions[i]) {
        // What this block has there already must stay.
        if (slot.block == block_) copy = spare_ + i * width_;
        else slot.position = positions[i];
        read_row<T>(head_.row(positions[i]), head_.type, T(1), copy, width_);
      }
      if (copy != spare_ + i * width_) slot.block = block_;
      out[i] = copy;
    }
  }

 private:
  // Rows that lie a multiple of this apart share sets of the first cache with every second one.
  static constexpr int64_t crowding_bytes = 2048;
  static constexpr size_t kept_bytes = 256 * 1024;
  struct Slot {
    int32_t position = -1;
    int64_t block = -1;
  };

  // A power of two, so that rows in turn have slots in turn.
  static int kept(int width) { return static_cast<int>(std::bit_floor(std::max<size_t>(kept_bytes / (width * sizeof(T)), block_keys))); }

  Head head_{Array{}, 0, 0};
  int64_t key_step_ = 0, block_ = 0;
  int width_, kept_, shift_ = 0;
  bool rereads_, direct_ = false;
  T *copies_, *spare_;
  std::vector<Slot> slots_;
};

// Multiplies a block's scores, or gradients of such.
template <class T>
void scale_scores(T* scores, int ld, int keys, int queries, T factor) {
  for (int key = 0; key < keys; ++key)
    for (int i = 0; i < queries; ++i) scores[key * ld + i] *= factor;
}

// Where a call's scale is applied: inside the exponential, or before it, where a function changes scores or the scale is not positive
// or so small that products would have no room for a maximum.
template <class T>
struct Scaling {
  static constexpr double least = 1e-20;

  bool first = false;
  double scale = 1;

  Scaling() = default;
  Scaling(double scale, bool changed) : first(changed || !(scale > least)), scale(scale) {}

  // What is left for the exponential of base e.
  double rest() const { return first ? 1.0 : scale; }

  void apply(T* scores, int ld, int keys, int queries) const {
    if (first) scale_scores(scores, ld, keys, queries, static_cast<T>(scale));
  }
};

// Changes and hides the scores of one tile.
template <class T>
class Scores {
 public:
  static constexpr int W = lanes<T>;
  using Ints = typename TileQueries<W>::Ints;

  explicit Scores(const Program& program) : program_(program), seen_(static_cast<size_t>(128) * tile_vectors * W) {}

  void start(int64_t b, int64_t h, const QueryTile<W>& tile) {
    b_ = b, h_ = h, tile_ = &tile;
    queries_.start(program_.masks, b, h, tile.positions, tile_vectors * W);
  }

  void of_branch(int root) { root_ = root; }

  bool changes(const KeyBlock& block) const { return program_.score_mod || block.any_partial; }

  // scores[key * ld + query] of the block, in natural units where there is a score_mod.
  void change(const KeyBlock& block, T* scores, int ld) {
    if (program_.score_mod) {
      const auto change = [] {
        if constexpr (sizeof(T) == 8) return functions().score_f64;
        else return functions().score_f32;
      }();
      change(*program_.score_mod, program_.operands.data(), pairs(block), scores, ld, room_.get());
    }
    if (block.any_partial) hide(block, scores, ld);
  }

  // Of gradients of changed scores those of the scores before.
  void change_back(const KeyBlock& block, const T* before, T* grads, int ld, T* const* sums) {
    const auto change_back = [] {
      if constexpr (sizeof(T) == 8) return functions().score_backward_f64;
      else return functions().score_backward_f32;
    }();
    change_back(*program_.score_mod, program_.operands.data(), pairs(block), before, grads, ld, sums, room_.get());
  }

  // Which of the block's queries see one key: bit i of lane i of the vectors from block.low on.
  uint64_t seen_lanes(const KeyBlock& block, int key) {
    queries_.seen(root_, block.low, block.high, block.keys + key, 1, reinterpret_cast<Ints*>(seen_.data()));
    uint64_t bits = 0;
    for (int j = 0; j < block.high - block.low; ++j)
      for (int lane = 0; lane < W; ++lane)
        if (seen_[j * W + lane]) bits |= uint64_t{1} << (j * W + lane);
    return bits;
  }

 private:
  Pairs pairs(const KeyBlock& block) const {
    const Pairs out{b_, h_, tile_->positions + block.low * W, (block.high - block.low) * W, block.keys, block.count};
    return out;
  }

  void hide(const KeyBlock& block, T* scores, int ld) {
    // A few keys at a time: the answers stay in the first cache beside the scores.
    constexpr int at_once = 8;
    const int vectors = block.high - block.low;
    Ints* answers = reinterpret_cast<Ints*>(seen_.data());
    int32_t asked[at_once];
    int keys[at_once], count = 0;
    const auto apply = [&] {
      queries_.seen(root_, block.low, block.high, asked, count, answers);
      for (int i = 0; i < count; ++i)
        for (int j = 0; j < vectors; ++j) {
          if (!(block.partial[keys[i]] >> (block.low + j) & 1)) continue;
          T* at = scores + keys[i] * ld + j * W;
          const VectorMask<T> seen = __builtin_convertvector(answers[i * vectors + j], VectorMask<T>);
          store<T>(at, seen ? load<T>(at) : all(-infinity<T>));
        }
      count = 0;
    };
    for (int i = 0; i < block.count; ++i) {
      if (!block.partial[i]) continue;
      asked[count] = block.keys[i];
      keys[count++] = i;
      if (count == at_once) apply();
    }
    if (count) apply();
  }

  const Program& program_;
  TileQueries<W> queries_;
  const QueryTile<W>* tile_ = nullptr;
  int64_t b_ = 0, h_ = 0;
  int root_ = 0;
  std::vector<int32_t> seen_;
  LazyRoom room_;
};

// The blocks of a thread's tiles, and their scores: what forward and backward do alike.
template <class Engine>
class TileBlocks {
 public:
  using T = typename Engine::Number;
  static constexpr int W = Engine::W;

  TileBlocks(const Program& program, int64_t kv_len) : scores(program), program_(program), kv_len_(kv_len) {}

  // Tiles first .. first + tiles - 1 of a head follow.
  void stretch(int64_t b, int64_t h, int64_t first, int64_t tiles) {
    cache_.start(program_.varies_by_entry ? b : 0, program_.group_of_head[h], first, tiles);
  }

  // visit(block) for every block of tile `index` of the stretch, once the engine knows where its keys lie.
  template <class Visit>
  void visit(Engine& engine, const Head& k, const Head& v, int64_t b, int64_t h, int64_t index, const QueryTile<W>& tile,
             const Visit& visit) {
    scores.start(b, h, tile);
    const Group& group = program_.groups[program_.group_of_head[h]];
    const auto walk = [&](const auto& take) { walk_keys<Engine>(program_.masks, b, h, group, tile, kv_len_, take); };
    int root = -1;
    int64_t key_step = 0;
    cache_.blocks(index, walk, [&](const Branch& branch, const KeyBlock& block) {
      if (branch.root != root || branch.key_step != key_step) {
        root = branch.root, key_step = branch.key_step;
        scores.of_branch(root);
        engine.keys_from(k, v, key_step);
      }
      visit(block);
    });
  }

  Scores<T> scores;

 private:
  const Program& program_;
  const int64_t kv_len_;
  BlockCache cache_;
};

// Sums over what threads did.
struct Counts {
  int64_t pairs = 0;    // of which scores were computed
  int64_t partial = 0;  // of which the mask was asked one by one
  int64_t blocks = 0;
  int64_t tiles = 0;

  void add(const KeyBlock& block, int width) {
    pairs += static_cast<int64_t>(block.count) * (block.high - block.low) * width;
    for (int i = 0; i < block.count; ++i) partial += static_cast<int64_t>(__builtin_popcount(block.partial[i])) * width;
    ++blocks;
  }

  void write(int64_t* to) const {
    if (!to) return;
    __atomic_fetch_add(to, pairs, __ATOMIC_RELAXED);
    __atomic_fetch_add(to + 1, partial, __ATOMIC_RELAXED);
    __atomic_fetch_add(to + 2, blocks, __ATOMIC_RELAXED);
    __atomic_fetch_add(to + 3, tiles, __ATOMIC_RELAXED);
  }
};

}  // namespace native
