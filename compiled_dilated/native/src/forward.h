// The forward: threads take stretches of tiles. A tile is computed by one thread in one order, so
// that the bits do not depend on threads.
#pragma once
#include <atomic>
#include <exception>
#include <mutex>

#include "single.h"
#include "tile.h"

namespace native {

// The first error of any thread, thrown once all have stopped.
class Failure {
 public:
  template <class Body>
  void run(const Body& body) {
    try {
      body();
    } catch (...) {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
  }
  bool failed() const { return failed_; }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
};

// Calls body(slot) on every thread of the call.
template <class Body>
void on_threads(const Parallel& parallel, int slots, const Body& body) {
  Failure failure;
  const auto guarded = [&](int slot) { failure.run([&] { body(slot, failure); }); };
  if (slots <= 1) {
    guarded(0);
  } else {
    parallel.run(
        parallel.context, slots, [](void* argument, int slot) { (*static_cast<decltype(guarded)*>(argument))(slot); },
        const_cast<void*>(static_cast<const void*>(&guarded)));
  }
  failure.rethrow();
}

// The engine of float32 and float64, and of narrower types, whose rows are widened.
template <class T>
struct WideEngine : WideWalk<T> {
  using WideWalk<T>::W, WideWalk<T>::TQ, WideWalk<T>::most_keys;
  using Stored = T;  // numbers of the rows that are written
  static constexpr bool can_be_careful = true;
  static constexpr int slots = Forward<T>::slots;

  static size_t bytes(const Shape& shape) {
    return (Forward<T>::numbers(shape.head_dim, shape.value_dim) + Single<T>::numbers(shape.head_dim, shape.value_dim) + TQ * shape.head_dim + Rows<T>::numbers(shape.head_dim) +
            Rows<T>::numbers(shape.value_dim)) * sizeof(T);
  }

  WideEngine(Room& room, const Shape& shape)
      : head_dim(shape.head_dim), value_dim(shape.value_dim),
        softmax(room.take<T>(Forward<T>::numbers(head_dim, value_dim)), head_dim, value_dim),
        single(room.take<T>(Single<T>::numbers(head_dim, value_dim)), head_dim, value_dim),
        q_rows(room.take<T>(TQ * head_dim)), keys(room.take<T>(Rows<T>::numbers(head_dim)), head_dim, false),
        values(room.take<T>(Rows<T>::numbers(value_dim)), value_dim, true) {}

  // The tile that the next calls are for.
  void select(int slot) { softmax.select(slot); }

  // changed: whether a function changes scores. sums: of a single query, to add to; null: its own,
  // which start empty.
  void begin(const Head& q, const QueryTile<W>& tile, double scale, bool changed, RowSums<T>* sums = nullptr) {
    scaling = Scaling<T>(scale, changed);
    is_single = tile.is_single();
    const T* rows[TQ];
    for (int i = 0; i < (is_single ? 1 : TQ); ++i) {
      const char* row = static_cast<const char*>(q.row(tile.sources[i]));
      rows[i] = reinterpret_cast<const T*>(row);
      if (q.type != type_of<T>) {
        read_row<T>(row, q.type, T(1), q_rows + i * head_dim, head_dim);
        rows[i] = q_rows + i * head_dim;
      }
    }
    const double factor = scaling.rest() * log2_of_e;
    if (is_single) return single.begin(rows[0], factor, sums);
    softmax.begin(rows, factor);
  }

  void start_from(const T* const* rows, const T* lse) {
    if (is_single) return single.start_from(rows[0], lse[0]);
    softmax.start_from(rows, lse);
  }

  void keys_from(const Head& k, const Head& v, const Spacing& spacing, bool shared) {
    keys.start(k, spacing, shared);
    values.start(v, spacing, shared);
  }

  void block(const KeyBlock& block, const ScoreEdit<T>& change) {
    const T *key_rows[most_keys], *value_rows[most_keys];
    keys.of(block.keys, block.count, key_rows);
    values.of(block.keys, block.count, value_rows);
    block_of(key_rows, value_rows, block, change);
  }

  // The same for rows at other addresses.
  void block_of(const T* const* key_rows, const T* const* value_rows, const KeyBlock& block, const ScoreEdit<T>& change) {
    const auto edit = [&](T* scores, int ld) {
      scaling.apply(scores, ld, block.count, (block.high - block.low) * W);
      if (change) change(scores, ld);
    };
    const bool edits = scaling.first || change;
    const ScoreEdit<T> edit_or_none = edits ? ScoreEdit<T>(edit) : ScoreEdit<T>();
    if (is_single) return single.block(key_rows, value_rows, block.count, edit_or_none);
    softmax.block(key_rows, value_rows, block.count, block.low, block.high, edit_or_none);
  }

  // Of a single query the first row alone is written.
  bool result(T* const* rows, T* lse) {
    if (is_single) return single.result(rows[0], lse);
    return softmax.result(rows, lse);
  }

  Ahead& ahead() { return softmax.ahead; }

  int head_dim, value_dim;
  Scaling<T> scaling;
  Forward<T> softmax;
  Single<T> single;
  bool is_single = false;
  T* q_rows;
  Rows<T> keys, values;
};

// Non-finite keys and values of one tile: they affect the queries that see them, and no others.
template <class Engine>
class Careful {
 public:
  using T = typename Engine::Number;

  void start(int head_dim, int value_dim) {
    head_dim_ = head_dim;
    value_dim_ = value_dim;
    spoiled_.assign(static_cast<size_t>(Engine::TQ) * value_dim, 0);
    rows_.resize(static_cast<size_t>(Engine::most_keys) * (head_dim + value_dim));
  }

  void block(Engine& engine, Scores<T>& scores, const Head& k, const Head& v, const KeyBlock& block) {
    const T *key_rows[Engine::most_keys], *value_rows[Engine::most_keys];
    bool bad_key[Engine::most_keys];
    for (int i = 0; i < block.count; ++i) {
      T* key = rows_.data() + static_cast<size_t>(i) * (head_dim_ + value_dim_);
      T* value = key + head_dim_;
      read_row<T>(k.row(block.keys[i]), k.type, T(1), key, head_dim_);
      read_row<T>(v.row(block.keys[i]), v.type, T(1), value, value_dim_);
      bad_key[i] = clean(key, head_dim_, [](int) {});
      clean(value, value_dim_, [&](int d) {
        for (int lane = 0; lane < (block.high - block.low) * Engine::W; ++lane)
          if (scores.sees(block, i, lane)) spoiled_[static_cast<size_t>(block.low * Engine::W + lane) * value_dim_ + d] = 1;
      });
      key_rows[i] = key;
      value_rows[i] = value;
    }
    const auto change = [&](T* to, int ld) {
      if (scores.changes(block)) scores.change(block, to, ld);
      for (int i = 0; i < block.count; ++i) {
        if (!bad_key[i]) continue;
        for (int lane = 0; lane < (block.high - block.low) * Engine::W; ++lane)
          if (scores.sees(block, i, lane)) to[i * ld + lane] = std::numeric_limits<T>::quiet_NaN();
      }
    };
    engine.block_of(key_rows, value_rows, block, change);
  }

  void finish(T* rows, int ld) const {
    for (int i = 0; i < Engine::TQ; ++i)
      for (int d = 0; d < value_dim_; ++d)
        if (spoiled_[static_cast<size_t>(i) * value_dim_ + d]) rows[i * ld + d] = std::numeric_limits<T>::quiet_NaN();
  }

 private:
  template <class Bad>
  static bool clean(T* row, int count, const Bad& bad) {
    bool any = false;
    for (int d = 0; d < count; ++d) {
      if (std::isfinite(row[d])) continue;
      row[d] = T(0);
      any = true;
      bad(d);
    }
    return any;
  }

  int head_dim_ = 0, value_dim_ = 0;
  std::vector<char> spoiled_;
  std::vector<T> rows_;
};

struct Nothing {};

// One thread's work on the tiles of a forward.
template <class Engine>
class ForwardWorker {
 public:
  using T = typename Engine::Number;
  using Stored = typename Engine::Stored;
  static constexpr int W = Engine::W, TQ = Engine::TQ;

  // careful: keys and values may be non-finite; queries that do not see them are protected from
  // them. is_long: whether tiles see so many keys that they may be computed in turn.
  ForwardWorker(const Problem& problem, const Program& program, const Shape& shape, bool careful, bool is_long, Room& room)
      : problem_(problem), program_(program), shape_(shape), careful_mode_(careful), is_long_(is_long),
        engine_(start(room, shape), shape), blocks_(program, shape.kv_len, is_long ? BlockCache::most_of_long : BlockCache::most_shared),
        out_(room.take<T>(static_cast<size_t>(TQ) * shape.value_dim)), lse_(room.take<T>(TQ)) {}

  void stretch(int64_t b, int64_t h, int64_t first, int64_t tiles) { blocks_.stretch(b, h, first, tiles); }

  // Computes `count` tiles of a stretch, the first of them its tile `index`. tiles: they, and the one
  // that follows.
  void tiles(int64_t b, int64_t h, int64_t index, const QueryTile<W>* tiles, int count, bool merges) {
    if (store_if_long(b, h, index, tiles, count)) return in_turn(b, h, index, tiles, count, merges);
    for (int i = 0; i < count; ++i)
      if (tiles[i].vectors) tile(b, h, index + i, tiles[i], tiles[i + 1], merges);
  }

  Counts counts;
  bool met_nan = false;

 private:
  static Room& start(Room& room, const Shape& shape) {
    room.reset(Engine::bytes(shape) + (static_cast<size_t>(TQ) * (shape.value_dim + 1)) * sizeof(T), 8);
    return room;
  }

  // The queries, keys and results of a head.
  struct Heads {
    Heads(const Problem& problem, const Shape& shape, int64_t b, int64_t h)
        : q(problem.q, b, h), out(problem.out, b, h), lse(problem.lse, b, h), k(problem.k, b, shape.kv_head(h)), v(problem.v, b, shape.kv_head(h)) {}

    Head q, out, lse, k, v;
  };

  // Stores the blocks of tiles that see many keys. Whether each has so many that its keys would leave
  // the cache before the next tile reads them.
  bool store_if_long(int64_t b, int64_t h, int64_t index, const QueryTile<W>* tiles, int count) {
    if (!is_long_ || careful_mode_ || count == 1 || !program_.groups[program_.group_of_head[h]].has_runs()) return false;
    for (int i = 0; i < count; ++i)
      if (!tiles[i].vectors || tiles[i].is_single() || blocks_.store(b, h, index + i, tiles[i]) < short_blocks) return false;
    return true;
  }

  // Computes some blocks of each tile in turn, so that their keys are read from memory once.
  void in_turn(int64_t b, int64_t h, int64_t index, const QueryTile<W>* tiles, int count, bool merges) {
    if constexpr (Engine::slots > 1) {
      const Heads heads(problem_, shape_, b, h);
      engine_.ahead().clear();
      for (int i = 0; i < count; ++i) {
        engine_.select(i);
        begin(heads, tiles[i], merges);
      }
      // No more blocks than copies of their keys are kept.
      const int64_t kept = Rows<T>::capacity(std::max(shape_.head_dim, shape_.value_dim)) / block_keys;
      const int64_t turn = std::min(blocks_in_turn, kept);
      bool is_done = false;
      for (int64_t at = 0; !is_done; at += turn) {
        is_done = true;
        for (int i = 0; i < count; ++i) {
          engine_.select(i);
          blocks_.visit_some(engine_, heads.k, heads.v, b, h, index + i, tiles[i], at, at + turn, [&](const KeyBlock& block) {
            is_done = false;
            compute(heads, tiles[i], block);
          });
        }
      }
      for (int i = 0; i < count; ++i) {
        engine_.select(i);
        finish(heads, tiles[i], ResultRows<Engine>(heads.out, tiles[i], shape_.value_dim, out_));
      }
      engine_.select(0);
    }
  }

  // index: the tile's place in its stretch. next: the tile that follows.
  void tile(int64_t b, int64_t h, int64_t index, const QueryTile<W>& tile, const QueryTile<W>& next, bool merges) {
    const Heads heads(problem_, shape_, b, h);
    const ResultRows<Engine> results(heads.out, tile, shape_.value_dim, out_, !careful_mode_);
    Ahead& ahead = engine_.ahead();
    ahead.clear();
    for (int i = 0; next.vectors && i < TQ; ++i) ahead.add(heads.q.row(next.sources[i]), shape_.head_dim * size_of(heads.q.type));
    results.add_to(ahead);
    begin(heads, tile, merges);
    if constexpr (Engine::can_be_careful)
      if (careful_mode_) careful_.start(shape_.head_dim, shape_.value_dim);
    blocks_.visit(engine_, heads.k, heads.v, b, h, index, tile, [&](const KeyBlock& block) { compute(heads, tile, block); });
    finish(heads, tile, results);
  }

  void begin(const Heads& heads, const QueryTile<W>& tile, bool merges) {
    engine_.begin(heads.q, tile, problem_.scale, program_.score_mod != nullptr);
    if (!merges) return;
    const T* from[TQ];
    for (int i = 0; i < TQ; ++i) {
      T* row = out_ + i * shape_.value_dim;
      from[i] = row;
      // Rows that other tiles write are not read.
      if (tile.rows[i] < 0) {
        std::fill(row, row + shape_.value_dim, T(0));
        lse_[i] = -std::numeric_limits<T>::infinity();
        continue;
      }
      read_row<T>(heads.out.row(tile.sources[i]), heads.out.type, T(1), row, shape_.value_dim);
      lse_[i] = *static_cast<const T*>(heads.lse.row(tile.sources[i]));
    }
    engine_.start_from(from, lse_);
  }

  void compute(const Heads& heads, const QueryTile<W>& tile, const KeyBlock& block) {
    Scores<T>& scores = blocks_.scores;
    counts.add(block, Engine::computed_lanes(tile));
    if constexpr (Engine::can_be_careful)
      if (careful_mode_) return careful_.block(engine_, scores, heads.k, heads.v, block);
    const auto change = [&](T* products, int ld) { scores.change(block, products, ld); };
    engine_.block(block, scores.changes(block) ? ScoreEdit<T>(change) : ScoreEdit<T>());
  }

  void finish(const Heads& heads, const QueryTile<W>& tile, const ResultRows<Engine>& results) {
    if (engine_.result(results.rows(), lse_)) met_nan = true;
    if constexpr (Engine::can_be_careful)
      if (careful_mode_) careful_.finish(out_, shape_.value_dim);
    results.finish();
    for (int i = 0; i < TQ; ++i)
      if (tile.rows[i] >= 0) *static_cast<T*>(heads.lse.mutable_row(tile.rows[i])) = lse_[i];
    ++counts.tiles;
  }

  // Of fewer blocks the keys stay in the L2 cache. So do those that tiles compute in turn, beside the
  // tiles.
  static constexpr int64_t short_blocks = 32, blocks_in_turn = 8;

  const Problem& problem_;
  const Program& program_;
  const Shape& shape_;
  bool careful_mode_, is_long_;
  Engine engine_;
  TileBlocks<Engine> blocks_;
  T *out_, *lse_;
  std::conditional_t<Engine::can_be_careful, Careful<Engine>, Nothing> careful_;
};

// Tiles of all heads, in stretches that threads take one after the other.
template <int W>
class Stretches {
 public:
  Stretches(const Problem& problem, const Program& program, const Shape& shape, int64_t heads, int threads) : heads_(heads) {
    groups_ = static_cast<int64_t>(program.groups.size());
    entries_ = has_entries(problem, program) ? shape.batch : 1;
    for (int64_t b = 0; b < entries_; ++b)
      for (const Group& group : program.groups) {
        const int64_t start = problem.q_offsets[problem.q_offsets.size() == 1 ? 0 : b];
        tiles_.emplace_back(group.layout, shape.q_len, start, program.global_queries(group, b, start, start + shape.q_len));
        most_ = std::max(most_, tiles_.back().count());
      }
    length_ = std::clamp<int64_t>(most_ * heads / (8 * std::max(threads, 1)), 1, 32);
    // The answers of a function are reused for all heads if those of a stretch fit into the cache.
    const int64_t blocks = shape.kv_len / block_keys + 1;
    if (program.has_function()) length_ = std::clamp<int64_t>(BlockCache::most_shared / blocks, 1, length_);
    count_ = (most_ + length_ - 1) / length_ * heads;
  }

  int64_t count() const { return count_; }
  int64_t length() const { return length_; }
  void set_length(int64_t length) { length_ = length, count_ = (most_ + length - 1) / length * heads_; }
  int64_t most() const { return most_; }

  // Returns whether some tiles see more keys than the L2 cache takes. Stretches are then so short
  // that the blocks of their tiles can be stored.
  bool shorten_for_long_tiles(const Program& program, const Shape& shape) {
    const int64_t ranges = ranges_of_tiles(program, shape);
    if (ranges <= short_ranges) return false;
    set_length(std::clamp<int64_t>(BlockCache::most_of_long / (ranges * range_blocks + 1), 1, length_));
    return true;
  }

  const QueryTiles<W>& tiles(int64_t b, int64_t group) const { return tiles_[(entries_ == 1 ? 0 : b) * groups_ + group]; }

 private:
  // Whether entries of the batch are tiled differently.
  static bool has_entries(const Problem& problem, const Program& program) {
    bool reads_data = false;
    for (const Group& group : program.groups)
      for (const int node : group.globals) reads_data |= program.masks.nodes[node].op == Op::global_data;
    return problem.q_offsets.size() > 1 || reads_data;
  }

  // The most ranges of keys that one of some tiles sees: the first, the last and one between them.
  // 0 if neighboring tiles see other keys.
  int64_t ranges_of_tiles(const Program& program, const Shape& shape) const {
    constexpr int64_t range_keys = range_blocks * block_keys;
    if (most_ < 2 || shape.kv_len <= short_ranges * range_keys) return 0;
    int64_t most = 0;
    for (size_t group = 0; group < program.groups.size(); ++group) {
      if (!program.groups[group].has_runs()) continue;
      const int64_t h = std::find(program.group_of_head.begin(), program.group_of_head.end(), static_cast<int>(group)) - program.group_of_head.begin();
      const QueryTiles<W>& tiles = tiles_[group];
      for (const int64_t index : {int64_t{0}, tiles.count() / 2, tiles.count() - 1}) {
        QueryTile<W> tile;
        tiles.tile_at(index, tile);
        if (!tile.vectors) continue;
        const auto ranges = ranges_seen(program.masks, 0, h, program.groups[group], tile, shape.kv_len, range_keys);
        most = std::max(most, static_cast<int64_t>(ranges.size()));
      }
    }
    return most;
  }

  // Copies of the keys of so many ranges stay in the cache from tile to tile.
  static constexpr int64_t range_blocks = 16, short_ranges = 8;

  std::vector<QueryTiles<W>> tiles_;
  int64_t heads_, entries_ = 1, groups_ = 0, most_ = 0, length_ = 1, count_ = 0;
};

// Distributes the heads of stretches to threads. A thread takes all heads of one stretch, which
// often have equal masks, so that its blocks are computed once; when no stretch is left, it takes
// heads of other threads' stretches.
class Deal {
 public:
  Deal(int64_t stretches, int64_t heads) : heads_(heads), taken_(static_cast<size_t>(stretches)) {}

  // The next head. stretch: in, the thread's last one, -1 at first; out, that of the head. False
  // when all are taken.
  bool take(int64_t& stretch, int64_t& head) {
    if (stretch >= 0 && take_head(stretch, head)) return true;
    const int64_t count = static_cast<int64_t>(taken_.size());
    while ((stretch = next_.fetch_add(1)) < count)
      if (take_head(stretch, head)) return true;
    for (stretch = 0; stretch < count; ++stretch)
      if (take_head(stretch, head)) return true;
    return false;
  }

 private:
  bool take_head(int64_t stretch, int64_t& head) {
    std::atomic<int64_t>& taken = taken_[static_cast<size_t>(stretch)];
    return taken.load() < heads_ && (head = taken.fetch_add(1)) < heads_;
  }

  const int64_t heads_;
  std::vector<std::atomic<int64_t>> taken_;
  std::atomic<int64_t> next_{0};
};

// Whether all keys and values of a call are finite.
template <class T>
bool all_finite(const Problem& problem, const Shape& shape) {
  std::atomic<bool> finite{true};
  std::atomic<int64_t> next{0};
  const int64_t heads = shape.batch * shape.kv_heads;
  on_threads(problem.parallel, static_cast<int>(std::min<int64_t>(problem.parallel.threads, heads)), [&](int, const Failure&) {
    std::vector<T> row(std::max(shape.head_dim, shape.value_dim));
    for (int64_t head; (head = next.fetch_add(1)) < heads;)
      for (const Array* x : {&problem.k, &problem.v}) {
        const Head rows(*x, head / shape.kv_heads, head % shape.kv_heads);
        const int width = static_cast<int>(x->sizes[3]);
        T sum = 0;
        for (int64_t i = 0; i < shape.kv_len && sum == 0; ++i) {
          read_row<T>(rows.row(i), rows.type, T(0), row.data(), width);  // 0 times a finite number is 0
          for (int d = 0; d < width; ++d) sum += row[d];
        }
        if (sum != 0) finite = false;
      }
  });
  return finite;
}

// Whether rows of keys or values are converted, or are so far apart that a page of memory has few of
// them: copies of these rows serve several tiles.
template <class T>
bool copies_rows(const Problem& problem) {
  constexpr int64_t far_bytes = 1024;
  const Head k(problem.k, 0, 0), v(problem.v, 0, 0);
  return k.type != type_of<T> || v.type != type_of<T> || k.stride >= far_bytes || v.stride >= far_bytes;
}

// Computes all tiles; returns whether a result is NaN.
template <class Engine>
bool forward_tiles(const Problem& problem, const Program& program, const Shape& shape, bool merges, bool careful) {
  Stretches<Engine::W> stretches(problem, program, shape, shape.batch * shape.heads, problem.parallel.threads);
  bool is_long = false;
  if constexpr (Engine::slots > 1) is_long = !careful && copies_rows<typename Engine::Number>(problem) && stretches.shorten_for_long_tiles(program, shape);
  std::atomic<bool> met_nan{false};
  const int slots = static_cast<int>(std::min<int64_t>(problem.parallel.threads, stretches.count()));
  const int64_t per_head = stretches.count() / (shape.batch * shape.heads);
  Deal deal(shape.batch * per_head, shape.heads);
  on_threads(problem.parallel, slots, [&](int, const Failure& failure) {
    thread_local Room room;
    ForwardWorker<Engine> worker(problem, program, shape, careful, is_long, room);
    constexpr int at_once = Engine::slots;
    QueryTile<Engine::W> some[at_once + 1];  // and the one that follows
    int64_t unit = -1, h = 0;
    while (!failure.failed() && deal.take(unit, h)) {
      const int64_t b = unit / per_head, stretch = unit % per_head;
      const QueryTiles<Engine::W>& tiles = stretches.tiles(b, program.group_of_head[h]);
      const int64_t stop = std::min(tiles.count(), (stretch + 1) * stretches.length());
      const int64_t first = stretch * stretches.length();
      if (first >= stop) continue;
      worker.stretch(b, h, first, stop - first);
      tiles.tile_at(first, some[0]);
      for (int64_t index = first; index < stop; index += at_once) {
        const int count = static_cast<int>(std::min<int64_t>(at_once, stop - index));
        for (int i = 1; i <= count; ++i) {
          some[i].vectors = 0;
          if (index + i < stop) tiles.tile_at(index + i, some[i]);
        }
        worker.tiles(b, h, index - first, some, count, merges);
        std::swap(some[0], some[count]);
      }
    }
    if (!careful) worker.counts.write(problem.counts);
    if (worker.met_nan) met_nan = true;
  });
  return met_nan;
}

// Hidden non-finite numbers leave NaN in results: then all is computed again carefully. A merge
// overwrites its inputs, so it checks keys and values first. tiles(careful) computes all tiles and
// returns whether a result is NaN.
template <class T, class Tiles>
void with_care(const Problem& problem, const Shape& shape, bool merges, const Tiles& tiles) {
  const bool careful = merges && !all_finite<T>(problem, shape);
  if (tiles(careful) && !merges && !all_finite<T>(problem, shape)) tiles(true);
}

}  // namespace native
