// Shared by forward and backward, for one tile: the rows of a block's keys, and changed and hidden
// scores.
#pragma once
#include <vector>

#include "ahead.h"
#include "block_cache.h"
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

// The distance in tokens of a branch's keys, and whether they are patches of a grid.
struct Spacing {
  int64_t keys = 0;
  bool on_grid = false;
  bool operator==(const Spacing& other) const { return keys == other.keys && on_grid == other.on_grid; }
};

// Rows of keys or values of one head by position: the tensor's own, or copies if it has another
// type, or if its rows are so far apart that they share few cache sets. Copies are reused by the
// following tiles, which often see the same keys.
template <class T>
class Rows {
 public:
  // Numbers that a workspace needs.
  static size_t numbers(int width) { return static_cast<size_t>(capacity(width) + block_keys) * width; }

  // rereads: whether a block's rows are read more than once.
  Rows(T* workspace, int width, bool rereads)
      : width_(width), capacity_(capacity(width)), rereads_(rereads), copies_(workspace), spare_(workspace + static_cast<size_t>(capacity_) * width) {}

  // shared: whether several tiles read a block's rows before those of the next, which pays for copies.
  void start(const Head& head, const Spacing& spacing, bool shared) {
    if (head.base == head_.base && spacing == spacing_ && shared == shared_) return;
    head_ = head;
    spacing_ = spacing;
    shared_ = shared;
    const bool crowded = rereads_ && head.stride * spacing.keys % crowding_bytes == 0;
    direct_ = head.type == type_of<T> && !crowded && !shared;
    if (direct_) return;
    slots_.assign(static_cast<size_t>(capacity_), Slot{});
    // Consecutive keys have consecutive slots. Lines of a grid would share slots: their slots are
    // hashed by the golden ratio.
    factor_ = spacing.on_grid ? 0x9e3779b1u : 1u;
    shift_ = spacing.on_grid ? 32 - __builtin_ctz(capacity_) : std::min(__builtin_ctzll(spacing.keys), 31);
  }

  void of(const int32_t* positions, int count, const T** out) {
    if (direct_) {
      for (int i = 0; i < count; ++i) out[i] = static_cast<const T*>(head_.row(positions[i]));
      return;
    }
    ++block_;
    for (int i = 0; i < count; ++i) {
      const int number = static_cast<int>(static_cast<uint32_t>(positions[i]) * factor_ >> shift_) & (capacity_ - 1);
      Slot& slot = slots_[static_cast<size_t>(number)];
      T* copy = copies_ + number * width_;
      if (slot.position != positions[i]) {
        // A row of the same block must not be overwritten.
        if (slot.block == block_) copy = spare_ + i * width_;
        else slot.position = positions[i];
        read_row<T>(head_.row(positions[i]), head_.type, T(1), copy, width_);
      }
      if (copy != spare_ + i * width_) slot.block = block_;
      out[i] = copy;
    }
  }

  // The copies that are kept, a power of two.
  static int capacity(int width) {
    int rows = block_keys;
    while (2 * rows * width * sizeof(T) <= capacity_bytes) rows *= 2;
    return rows;
  }

 private:
  // Rows at a distance that is a multiple of this share sets of the L1 cache with every second one.
  static constexpr int64_t crowding_bytes = 2048;
  static constexpr size_t capacity_bytes = 512 * 1024;
  struct Slot {
    int32_t position = -1;
    int64_t block = -1;
  };

  Head head_{Array{}, 0, 0};
  Spacing spacing_;
  int64_t block_ = 0;
  int width_, capacity_, shift_ = 0;
  uint32_t factor_ = 1;
  bool rereads_, direct_ = false, shared_ = false;
  T *copies_, *spare_;
  std::vector<Slot> slots_;
};

// Multiplies a block's scores, or their gradients.
template <class T>
void scale_scores(T* scores, int ld, int keys, int queries, T factor) {
  for (int key = 0; key < keys; ++key)
    for (int i = 0; i < queries; ++i) scores[key * ld + i] *= factor;
}

// Where a call's scale is applied: inside the exponential; or before it, if a function changes
// scores, or the scale is not positive, or is so small that the maximum of products could overflow.
template <class T>
struct Scaling {
  static constexpr double least = 1e-20;

  bool first = false;
  double scale = 1;

  Scaling() = default;
  Scaling(double scale, bool changed) : first(changed || !(scale > least)), scale(scale) {}

  // The factor that remains for the exponential of base e.
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

  explicit Scores(const Program& program) : program_(program), answers_(static_cast<size_t>(at_once) * tile_vectors * W) {}

  void start(int64_t b, int64_t h, const QueryTile<W>& tile) {
    b_ = b, h_ = h, tile_ = &tile;
    queries_.start(program_.masks, b, h, tile.positions, tile_vectors * W);
  }

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

  // Turns gradients of changed scores into those of the scores before.
  void change_back(const KeyBlock& block, const T* before, T* grads, int ld, T* const* sums) {
    const auto change_back = [] {
      if constexpr (sizeof(T) == 8) return functions().score_backward_f64;
      else return functions().score_backward_f32;
    }();
    change_back(*program_.score_mod, program_.operands.data(), pairs(block), before, grads, ld, sums, room_.get());
  }

  // Computes which lanes see the block's partially visible keys; bits as in KeyBlock.
  void answer(int root, const KeyBlock& block, uint64_t* seen) {
    const int vectors = block.high - block.low;
    int32_t positions[at_once];
    int places[at_once], count = 0;
    Ints* answers = reinterpret_cast<Ints*>(answers_.data());
    const auto evaluate = [&] {
      queries_.seen(root, block.low, block.high, positions, count, answers);
      for (int i = 0; i < count; ++i) {
        uint64_t bits = 0;
        for (int j = 0; j < vectors; ++j) bits |= static_cast<uint64_t>(lanes_of(answers[i * vectors + j])) << (lane_bits * j);
        seen[places[i]] = bits;
      }
      count = 0;
    };
    for (int i = 0; i < block.count; ++i) {
      if (!block.partial[i]) continue;
      positions[count] = block.keys[i];
      places[count++] = i;
      if (count == at_once) evaluate();
    }
    if (count) evaluate();
  }

  // Whether lane i of the block's vectors, counted from block.low on, sees its key.
  static bool sees(const KeyBlock& block, int key, int lane) {
    const int vector = lane / W;
    const bool is_evaluated = block.partial[key] >> (block.low + vector) & 1;
    return !is_evaluated || (block.seen[key] >> (lane_bits * vector + lane % W) & 1);
  }

 private:
  Pairs pairs(const KeyBlock& block) const {
    const Pairs out{b_, h_, tile_->positions + block.low * W, (block.high - block.low) * W, block.keys, block.count};
    return out;
  }

  // A few keys at a time, so that the results stay in the L1 cache.
  static constexpr int at_once = 8;

  // The lanes of a mask vector as bits.
  static uint32_t lanes_of(Ints answer) {
#if defined(__AVX512DQ__)
    if constexpr (W == 16) return _mm512_movepi32_mask((__m512i)answer);
#endif
    uint32_t bits = 0;
    for (int lane = 0; lane < W; ++lane) bits |= static_cast<uint32_t>(answer[lane] & 1) << lane;
    return bits;
  }

  static NATIVE_INLINE void hide_lanes(T* at, uint32_t seen) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return _mm512_mask_storeu_ps(at, static_cast<__mmask16>(~seen), _mm512_set1_ps(-infinity<float>));
#endif
    for (int lane = 0; lane < W; ++lane)
      if (!(seen >> lane & 1)) at[lane] = -infinity<T>;
  }

  void hide(const KeyBlock& block, T* scores, int ld) {
    for (int key = 0; key < block.count; ++key) {
      if (!block.partial[key]) continue;
      for (int j = 0; j < block.high - block.low; ++j)
        if (block.partial[key] >> (block.low + j) & 1)
          hide_lanes(scores + key * ld + j * W, static_cast<uint32_t>(block.seen[key] >> (lane_bits * j)));
    }
  }

  const Program& program_;
  TileQueries<W> queries_;
  const QueryTile<W>* tile_ = nullptr;
  int64_t b_ = 0, h_ = 0;
  std::vector<int32_t> answers_;
  LazyRoom room_;
};

// The blocks of a thread's tiles and their scores, for forward and backward.
template <class Engine>
class TileBlocks {
 public:
  using T = typename Engine::Number;
  static constexpr int W = Engine::W;

  TileBlocks(const Program& program, int64_t kv_len, int64_t most_stored = BlockCache::most_shared)
      : scores(program), program_(program), keys_{0, kv_len}, cache_(most_stored) {}

  // Starts tiles first .. first + tiles - 1 of a head.
  void stretch(int64_t b, int64_t h, int64_t first, int64_t tiles) {
    cache_.start(program_.varies_by_entry ? b : 0, program_.group_of_head[h], first, tiles);
  }

  // Starts the one tile of a head over some keys.
  void range(int64_t b, int64_t h, const KeyRange& keys) {
    keys_ = keys;
    stretch(b, h, keys.first, 1);
  }

  // Calls visit(block) for every block of tile `index` of the stretch, after the engine got its key
  // rows.
  template <class Visit>
  void visit(Engine& engine, const Head& k, const Head& v, int64_t b, int64_t h, int64_t index, const QueryTile<W>& tile,
             const Visit& visit) {
    scores.start(b, h, tile);
    with_walk(b, h, tile, [&](const auto& walk, const auto& answer) {
      with_rows(engine, k, v, h, false, visit, [&](const auto& compute) { cache_.blocks(index, walk, answer, compute); });
    });
  }

  // Stores a tile's blocks; returns how many they are, 0 if they are too many.
  int64_t store(int64_t b, int64_t h, int64_t index, const QueryTile<W>& tile) {
    scores.start(b, h, tile);
    int64_t count = 0;
    with_walk(b, h, tile, [&](const auto& walk, const auto& answer) { count = cache_.store_all(index, walk, answer); });
    return count;
  }

  // As `visit`, for stored blocks first .. after - 1, whose rows other tiles read next.
  template <class Visit>
  void visit_some(Engine& engine, const Head& k, const Head& v, int64_t b, int64_t h, int64_t index, const QueryTile<W>& tile,
                  int64_t first, int64_t after, const Visit& visit) {
    scores.start(b, h, tile);
    with_rows(engine, k, v, h, true, visit, [&](const auto& compute) { cache_.some_blocks(index, first, after, compute); });
  }

  Scores<T> scores;

 private:
  // Calls run(walk, answer), the arguments of a `BlockCache`.
  template <class Run>
  void with_walk(int64_t b, int64_t h, const QueryTile<W>& tile, const Run& run) {
    const Group& group = program_.groups[program_.group_of_head[h]];
    const auto walk = [&](const BlockCache::Visit& take) { walk_keys(program_.masks, b, h, group, tile, keys_, Engine::sizes, take); };
    const auto answer = [&](const Branch& branch, const KeyBlock& block, uint64_t* seen) { scores.answer(branch.root, block, seen); };
    run(walk, answer);
  }

  // Calls run(compute): compute(branch, block) gives the engine its key rows before visit(block).
  template <class Visit, class Run>
  void with_rows(Engine& engine, const Head& k, const Head& v, int64_t h, bool shared, const Visit& visit, const Run& run) const {
    Spacing spacing{0, program_.groups[program_.group_of_head[h]].layout.axes > 1};
    const auto compute = [&](const Branch& branch, const KeyBlock& block) {
      if (branch.key_step != spacing.keys) {
        spacing.keys = branch.key_step;
        engine.keys_from(k, v, spacing, shared);
      }
      visit(block);
    };
    run(compute);
  }

  const Program& program_;
  KeyRange keys_;
  BlockCache cache_;
};

// The rows of a tile's results: in the tensor itself, or in a workspace if they have another type,
// are past the end or not `direct`.
template <class Engine>
class ResultRows {
 public:
  using T = typename Engine::Number;
  using Stored = typename Engine::Stored;

  ResultRows(const Head& to, const QueryTile<Engine::W>& tile, int width, T* workspace, bool direct = true)
      : to_(to), tile_(tile), width_(width), workspace_(workspace), direct_(direct && size_of(to.type) == sizeof(Stored)) {
    for (int i = 0; i < Engine::TQ; ++i) {
      rows_[i] = reinterpret_cast<Stored*>(workspace + i * width);
      if (direct_ && tile.rows[i] >= 0) rows_[i] = static_cast<Stored*>(to.mutable_row(tile.rows[i]));
    }
  }

  Stored* const* rows() const { return rows_; }

  void add_to(Ahead& ahead) const {
    for (int i = 0; direct_ && i < Engine::TQ; ++i) ahead.add(rows_[i], width_ * size_of(to_.type));
  }

  // Copies rows from the workspace to the tensor.
  void finish() const {
    for (int i = 0; !direct_ && i < Engine::TQ; ++i)
      if (tile_.rows[i] >= 0) write_row<T>(workspace_ + i * width_, to_.type, to_.mutable_row(tile_.rows[i]), width_);
  }

 private:
  const Head& to_;
  const QueryTile<Engine::W>& tile_;
  const int width_;
  T* const workspace_;
  const bool direct_;
  Stored* rows_[Engine::TQ];
};

// Counts of work, summed over threads.
struct Counts {
  int64_t pairs = 0;    // with computed scores
  int64_t partial = 0;  // with an evaluated mask
  int64_t blocks = 0;
  int64_t tiles = 0;

  // width: computed lanes of a vector.
  void add(const KeyBlock& block, int width) {
    pairs += block.repeats * block.count * (block.high - block.low) * width;
    blocks += block.repeats;
    if (!block.any_partial) return;
    for (int i = 0; i < block.count; ++i) partial += static_cast<int64_t>(__builtin_popcount(block.partial[i])) * width;
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
