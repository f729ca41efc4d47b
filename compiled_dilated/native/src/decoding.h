// Attention of one query per head, as in decoding, where most of the time passes in reading keys and
// values. The keys are cut into ranges that threads take, so that few heads keep many threads busy.
// The query heads of a key head share a range: they take it chunk by chunk, and each chunk comes from
// memory once.
#pragma once
#include <stdexcept>

#include "forward.h"

namespace native {

// The cuts depend on sizes alone, so that the bits of results do not depend on threads.
struct Cuts {
  static constexpr int64_t range_keys = 1024;  // of a range
  int64_t chunk_keys = range_keys;             // of a chunk

  Cuts(const Shape& shape, size_t number_bytes) {
    if (shape.heads == shape.kv_heads) return;
    const int64_t row_bytes = (shape.head_dim + shape.value_dim) * static_cast<int64_t>(number_bytes);
    chunk_keys = std::clamp<int64_t>(chunk_bytes / row_bytes / block_keys * block_keys, block_keys, range_keys);
  }

  // Calls visit(chunk) for the chunks of some keys. No chunk is in two ranges.
  template <class Visit>
  void chunks(const KeyRange& keys, const Visit& visit) const {
    for (int64_t at = keys.first; at < keys.after;) {
      const int64_t range_after = (at / range_keys + 1) * range_keys;
      const int64_t after = std::min({keys.after, range_after, at + chunk_keys});
      visit(KeyRange{at, after});
      at = after;
    }
  }

 private:
  static constexpr int64_t chunk_bytes = 256 * 1024;  // they stay in the L2 cache
};

// The one tile of a head.
template <int W>
QueryTile<W> only_tile(const QueryTiles<W>& tiles) {
  QueryTile<W> tile;
  for (int64_t index = 0; index < tiles.count(); ++index) {
    tiles.tile_at(index, tile);
    if (tile.vectors) return tile;
  }
  throw std::runtime_error("a head has no query");
}

// A thread's work: a range of keys for query heads that share a key head.
struct RangeOfHeads {
  int64_t b, first, after;  // the entry and its heads
  KeyRange keys;
};

// One thread's work on single queries.
template <class Engine>
class DecodingWorker {
 public:
  using T = typename Engine::Number;
  static constexpr int W = Engine::W;

  DecodingWorker(const Problem& problem, const Program& program, const Shape& shape, const Stretches<W>& tiles, Room& room)
      : problem_(problem), program_(program), shape_(shape), tiles_(tiles), cuts_(shape, sizeof(T)), engine_(start(room, shape), shape),
        blocks_(program, shape.kv_len), out_(room.take<T>(static_cast<size_t>(shape.value_dim))) {}

  // sums: one per head, which this starts.
  void add(const RangeOfHeads& range, RowSums<T>* sums) {
    const int64_t kv_head = shape_.kv_head(range.first);
    const Head k(problem_.k, range.b, kv_head), v(problem_.v, range.b, kv_head);
    for (int64_t h = range.first; h < range.after; ++h) sums[h - range.first].clear(shape_.value_dim);
    cuts_.chunks(range.keys, [&](const KeyRange& chunk) {
      for (int64_t h = range.first; h < range.after; ++h) {
        const QueryTile<W>& tile = begin(range.b, h, &sums[h - range.first]);
        blocks_.range(range.b, h, chunk);
        blocks_.visit(engine_, k, v, range.b, h, 0, tile, [&](const KeyBlock& block) {
          counts.add(block, 1);
          const auto change = [&](T* products, int ld) { blocks_.scores.change(block, products, ld); };
          engine_.block(block, blocks_.scores.changes(block) ? ScoreEdit<T>(change) : ScoreEdit<T>());
        });
      }
    });
  }

  // Writes a head's result from its sums over ranges.
  template <class Ranges>
  void finish(int64_t b, int64_t h, bool merges, const Ranges& sums_of_ranges) {
    const Head out(problem_.out, b, h), lse(problem_.lse, b, h);
    begin(b, h, nullptr);
    T* row = out_;
    T* lse_at = static_cast<T*>(lse.mutable_row(0));
    if (merges) {
      read_row<T>(out.row(0), out.type, T(1), row, shape_.value_dim);
      engine_.start_from(&row, lse_at);
    }
    sums_of_ranges([&](const RowSums<T>& sums) { engine_.single.add(sums); });
    if (engine_.result(&row, lse_at)) met_nan = true;
    write_row<T>(row, out.type, out.mutable_row(0), shape_.value_dim);
    ++counts.tiles;
  }

  Counts counts;
  bool met_nan = false;

 private:
  static Room& start(Room& room, const Shape& shape) {
    room.reset(Engine::bytes(shape) + static_cast<size_t>(shape.value_dim) * sizeof(T), 8);
    return room;
  }

  const QueryTile<W>& begin(int64_t b, int64_t h, RowSums<T>* sums) {
    const int group = program_.group_of_head[h];
    if (b != b_ || group != group_) {
      tile_ = only_tile(tiles_.tiles(b, group));
      b_ = b;
      group_ = group;
    }
    engine_.begin(Head(problem_.q, b, h), tile_, problem_.scale, program_.score_mod != nullptr, sums);
    return tile_;
  }

  const Problem& problem_;
  const Program& program_;
  const Shape& shape_;
  const Stretches<W>& tiles_;
  const Cuts cuts_;
  Engine engine_;
  TileBlocks<Engine> blocks_;
  T* out_;
  int64_t b_ = -1;
  int group_ = -1;
  QueryTile<W> tile_;
};

// The work of a call: ranges of keys that query heads see, those of a key head one after the other.
template <int W>
class RangesOfHeads {
 public:
  // threads: heads of a key head are divided where there are fewer ranges than threads.
  RangesOfHeads(const Program& program, const Shape& shape, const Stretches<W>& tiles, int threads) : program_(program), shape_(shape), tiles_(tiles) {
    const int64_t group = shape.heads / shape.kv_heads, ranges = (shape.kv_len + Cuts::range_keys - 1) / Cuts::range_keys;
    const int64_t parts = std::clamp<int64_t>(4 * threads / (shape.batch * shape.kv_heads * ranges), 1, group);
    const int64_t heads = (group + parts - 1) / parts;
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head)
        for (int64_t first = kv_head * group; first < (kv_head + 1) * group; first += heads) add(b, first, std::min(first + heads, (kv_head + 1) * group));
  }

  const std::vector<RangeOfHeads>& all() const { return all_; }

 private:
  void add(int64_t b, int64_t first, int64_t after) {
    const int64_t length = Cuts::range_keys;
    std::vector<int64_t> numbers;
    int last = -1;
    for (int64_t h = first; h < after; ++h) {
      if (program_.group_of_head[h] == last) continue;
      last = program_.group_of_head[h];
      const std::vector<int64_t>& seen = ranges_of_group(b, h);
      numbers.insert(numbers.end(), seen.begin(), seen.end());
    }
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
    for (const int64_t number : numbers) all_.push_back({b, first, after, {number * length, std::min(shape_.kv_len, (number + 1) * length)}});
  }

  // Those of the last group are stored: most heads have the same one.
  const std::vector<int64_t>& ranges_of_group(int64_t b, int64_t h) {
    const int group = program_.group_of_head[h];
    const int64_t entry = program_.varies_by_entry ? b : 0;
    if (entry != entry_ || group != group_) {
      const QueryTile<W> tile = only_tile(tiles_.tiles(b, group));
      seen_ = ranges_seen(program_.masks, b, h, program_.groups[group], tile, shape_.kv_len, Cuts::range_keys);
      entry_ = entry;
      group_ = group;
    }
    return seen_;
  }

  const Program& program_;
  const Shape& shape_;
  const Stretches<W>& tiles_;
  std::vector<RangeOfHeads> all_;
  std::vector<int64_t> seen_;
  int64_t entry_ = -1;
  int group_ = -1;
};

// Computes one query of every head; returns whether a result is NaN. Keys and values are finite, or
// all are seen.
template <class Engine>
bool decode(const Problem& problem, const Program& program, const Shape& shape, bool merges) {
  using T = typename Engine::Number;
  constexpr int64_t numbers_of_a_thread = 1 << 16;  // below, a second thread would cost more than it takes over
  const int64_t heads = shape.batch * shape.heads;
  const Stretches<Engine::W> tiles(problem, program, shape, heads, 1);
  const RangesOfHeads<Engine::W> ranges(program, shape, tiles, problem.parallel.threads);
  const std::vector<RangeOfHeads>& work = ranges.all();
  // 1. Sums of every range and head, those of a head at the same distance.
  std::vector<size_t> starts{0};
  for (const RangeOfHeads& range : work) starts.push_back(starts.back() + static_cast<size_t>(range.after - range.first));
  const std::unique_ptr<T[]> values(new T[starts.back() * shape.value_dim]);
  std::vector<RowSums<T>> sums(starts.back());
  for (size_t i = 0; i < sums.size(); ++i) sums[i].values = &values[i * shape.value_dim];
  // 2. Threads take ranges.
  std::atomic<size_t> next{0};
  std::atomic<bool> met_nan{false};
  const auto worker_on = [&](int slots, const auto& body) {
    on_threads(problem.parallel, slots, [&](int, const Failure& failure) {
      thread_local Room room;
      DecodingWorker<Engine> worker(problem, program, shape, tiles, room);
      body(worker, failure);
      worker.counts.write(problem.counts);
      if (worker.met_nan) met_nan = true;
    });
  };
  const auto slots_for = [&](size_t parts) { return static_cast<int>(std::min<size_t>(problem.parallel.threads, parts)); };
  worker_on(slots_for(work.size()), [&](DecodingWorker<Engine>& worker, const Failure& failure) {
    for (size_t i; !failure.failed() && (i = next++) < work.size();) worker.add(work[i], &sums[starts[i]]);
  });
  // 3. The sums of each head are added in the order of the keys.
  std::atomic<size_t> next_head{0};
  worker_on(slots_for(1 + sums.size() * shape.value_dim / numbers_of_a_thread), [&](DecodingWorker<Engine>& worker, const Failure& failure) {
    for (size_t i; !failure.failed() && (i = next_head++) < static_cast<size_t>(heads);) {
      const int64_t b = static_cast<int64_t>(i) / shape.heads, h = static_cast<int64_t>(i) % shape.heads;
      const auto before = [](const RangeOfHeads& range, const std::pair<int64_t, int64_t>& head) {
        return std::make_pair(range.b, range.after - 1) < head;
      };
      auto at = std::lower_bound(work.begin(), work.end(), std::make_pair(b, h), before);
      worker.finish(b, h, merges, [&](const auto& take) {
        for (; at != work.end() && at->b == b && at->first <= h; ++at) take(sums[starts[at - work.begin()] + static_cast<size_t>(h - at->first)]);
      });
    }
  });
  return met_nan;
}

// Computes all queries in float32 or float64; returns whether a result is NaN.
template <class T>
bool forward_wide(const Problem& problem, const Program& program, bool merges, bool careful) {
  const Shape shape(problem);
  if (shape.q_len == 1 && !careful) return decode<WideEngine<T>>(problem, program, shape, merges);
  return forward_tiles<WideEngine<T>>(problem, program, shape, merges, careful);
}

}  // namespace native
