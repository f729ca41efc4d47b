// The backward: dQ by tiles of queries; dK and dV are added to by every tile that sees a key, in the order of the tiles.
#pragma once
#include <thread>

#include "forward.h"

namespace native {

// Makes tiles add to the gradients of a key head in the order of the tiles, on any thread, so that
// the bits do not depend on threads. Units are taken in order; a unit waits until earlier ones of
// its head have finished with the keys that it adds to.
class Turns {
 public:
  explicit Turns(int slots) : places_(slots) {}

  // Takes a unit for a slot: next() returns the unit, order_of(unit) its head and its place among
  // the units of that head. Until `limit` is called it may add to any key.
  template <class Next, class Order>
  int64_t take(int slot, const Next& next, const Order& order_of) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const int64_t unit = next();
    limit(slot, {0, no_more});
    const auto [head, order] = order_of(unit);
    places_[slot].head.store(head);
    places_[slot].order.store(order);
    return unit;
  }

  // Declares that the slot's unit adds to no other keys.
  void limit(int slot, const KeyRange& keys) {
    places_[slot].after.store(keys.after);
    places_[slot].first.store(keys.first);
  }

  // Waits until no earlier unit of the same head may still add to such keys.
  void wait(int slot, const KeyRange& keys) const {
    const int64_t head = places_[slot].head.load(), order = places_[slot].order.load();
    for (const Place& place : places_)
      while (place.head.load() == head && place.order.load() < order && place.first.load() < keys.after && place.after.load() > keys.first)
        std::this_thread::yield();
  }

  // Declares that the slot's unit adds to no more keys below `key`.
  void finish_below(int slot, int64_t key) { places_[slot].first.store(key); }

  void finish(int slot) { finish_below(slot, no_more); }

 private:
  static constexpr int64_t no_more = std::numeric_limits<int64_t>::max();
  struct alignas(64) Place {
    std::atomic<int64_t> head{-1}, order{-1}, first{0}, after{no_more};
  };
  std::vector<Place> places_;
  std::mutex mutex_;
};

// The order of a head's stretches, cut into parts: the first stretch of every part, then the second
// ones. Consecutive stretches are far apart, so that their threads seldom wait for the same keys.
// With one part: ascending.
class StretchOrder {
 public:
  StretchOrder(int64_t stretches, int64_t parts) : stretches_(stretches), parts_(parts), of_part_((stretches + parts - 1) / parts) {}

  int64_t count() const { return of_part_ * parts_; }

  // The stretch at a place of the order; -1 where there is none.
  int64_t at(int64_t place) const {
    // The bits of a part's number reversed: halves first, then quarters.
    int64_t part = 0;
    for (int64_t bit = 1, mirrored = parts_ / 2; mirrored; bit *= 2, mirrored /= 2)
      if (place & bit) part |= mirrored;
    const int64_t stretch = part * of_part_ + place / parts_;
    return stretch < stretches_ ? stretch : -1;
  }

 private:
  int64_t stretches_, parts_, of_part_;  // parts: a power of two
};

// The gradients of keys and values of some heads while tiles add to them: in the results
// themselves, or in wider buffers.
template <class T>
class KeyGradients {
 public:
  // For heads first .. first + count - 1 of all batch * kv_heads.
  KeyGradients(const Gradients& gradients, const Shape& shape, int64_t first, int64_t count)
      : gradients_(gradients), shape_(shape), first_(first), widths_{width(gradients.grad_k), width(gradients.grad_v)} {
    if (!in_place(gradients, shape)) sums_.assign(static_cast<size_t>(count * shape.kv_len * (widths_[0] + widths_[1])), T(0));
  }

  // Bytes of the buffers of one head.
  static int64_t bytes(const Shape& shape) {
    return shape.kv_len * (padded<T>(shape.head_dim) + padded<T>(shape.value_dim)) * static_cast<int64_t>(sizeof(T));
  }

  static bool in_place(const Gradients& gradients, const Shape& shape) {
    return gradients.grad_k.type == type_of<T> && shape.head_dim % lanes<T> == 0 && shape.value_dim % lanes<T> == 0;
  }

  // Rows of one head: of keys (which 0) or of values (1).
  T* rows(int64_t head, int which) {
    if (sums_.empty()) {
      const Array& to = which ? gradients_.grad_v : gradients_.grad_k;
      return to.writable<T>() + head * shape_.kv_len * widths_[which];
    }
    T* of_head = sums_.data() + (head - first_) * shape_.kv_len * (widths_[0] + widths_[1]);
    return of_head + (which ? shape_.kv_len * widths_[0] : 0);
  }

  // Rounds the buffers of one head into the gradients.
  void write(int64_t head) {
    if (sums_.empty()) return;
    for (int which = 0; which < 2; ++which) {
      const Array& to = which ? gradients_.grad_v : gradients_.grad_k;
      const Head rows_to(to, head / shape_.kv_heads, head % shape_.kv_heads);
      const T* from = rows(head, which);
      const int width = static_cast<int>(to.sizes[3]);
      for (int64_t i = 0; i < shape_.kv_len; ++i) write_row<T>(from + i * widths_[which], to.type, rows_to.mutable_row(i), width);
    }
  }

 private:
  static int width(const Array& x) { return padded<T>(static_cast<int>(x.sizes[3])); }

  const Gradients& gradients_;
  const Shape& shape_;
  int64_t first_;
  int widths_[2];
  std::vector<T> sums_;
};

template <class T>
struct WideGradient : WideWalk<T> {
  using WideWalk<T>::W, WideWalk<T>::TQ, WideWalk<T>::most_keys;
  using Stored = T;  // numbers of the rows of grad_q

  static size_t bytes(const Shape& shape) {
    const int head_width = padded<T>(shape.head_dim), value_width = padded<T>(shape.value_dim);
    return (Backward<T>::numbers(shape.head_dim, shape.value_dim) + static_cast<size_t>(TQ) * (head_width + value_width) +
            Rows<T>::numbers(shape.head_dim) + Rows<T>::numbers(shape.value_dim)) * sizeof(T);
  }

  WideGradient(Room& room, const Shape& shape, double scale)
      : head_dim(shape.head_dim), value_dim(shape.value_dim), scale(scale),
        products(room.take<T>(Backward<T>::numbers(head_dim, value_dim)), head_dim, value_dim),
        q_rows(room.take<T>(TQ * padded<T>(head_dim))),
        grad_out_rows(room.take<T>(TQ * padded<T>(value_dim))),
        keys(room.take<T>(Rows<T>::numbers(head_dim)), head_dim, true),
        values(room.take<T>(Rows<T>::numbers(value_dim)), value_dim, false) {}

  // lse: natural; +inf for lanes past the end. changed: whether a function changes scores.
  void begin(const Head& q, const Head& grad_out, const int32_t* sources, bool changed, const T* lse, const T* delta) {
    scaling = Scaling<T>(scale, changed);
    const int ldq = padded<T>(head_dim), ldo = padded<T>(value_dim);
    for (int i = 0; i < TQ; ++i) {
      T *q_row = q_rows + i * ldq, *out_row = grad_out_rows + i * ldo;
      read_row<T>(q.row(sources[i]), q.type, T(1), q_row, head_dim);
      read_row<T>(grad_out.row(sources[i]), grad_out.type, T(1), out_row, value_dim);
      std::fill(q_row + head_dim, q_row + ldq, T(0));
      std::fill(out_row + value_dim, out_row + ldo, T(0));
    }
    products.begin(q_rows, ldq, grad_out_rows, ldo, lse, delta, static_cast<T>(scaling.rest()), static_cast<T>(scale));
  }

  void keys_from(const Head& k, const Head& v, const Spacing& spacing, bool shared) {
    keys.start(k, spacing, shared);
    values.start(v, spacing, shared);
  }

  void block(const KeyBlock& block, T* grad_k, T* grad_v, const ScoreEdit<T>& change, const GradEdit<T>& change_back) {
    const T *key_rows[most_keys], *value_rows[most_keys];
    T *grad_key_rows[most_keys], *grad_value_rows[most_keys];
    keys.of(block.keys, block.count, key_rows);
    values.of(block.keys, block.count, value_rows);
    for (int i = 0; i < block.count; ++i) {
      grad_key_rows[i] = grad_k + static_cast<int64_t>(block.keys[i]) * padded<T>(head_dim);
      grad_value_rows[i] = grad_v + static_cast<int64_t>(block.keys[i]) * padded<T>(value_dim);
    }
    const auto edit = [&](T* scores, int ld) {
      scaling.apply(scores, ld, block.count, (block.high - block.low) * W);
      if (change) change(scores, ld);
    };
    const auto edit_grad = [&](T* before, T* grads, int ld) {
      scaling.apply(before, ld, block.count, (block.high - block.low) * W);
      change_back(before, grads, ld);
    };
    products.block(key_rows, value_rows, grad_key_rows, grad_value_rows, block.count, block.low, block.high,
                   scaling.first || change ? ScoreEdit<T>(edit) : ScoreEdit<T>(),
                   change_back ? GradEdit<T>(edit_grad) : GradEdit<T>());
  }

  void result(T* const* rows) { products.result(rows); }

  Ahead& ahead() { return products.ahead; }

  int head_dim, value_dim;
  double scale;
  Scaling<T> scaling;
  Backward<T> products;
  T *q_rows, *grad_out_rows;
  Rows<T> keys, values;
};

template <class Engine>
class BackwardWorker {
 public:
  using T = typename Engine::Number;
  static constexpr int W = Engine::W, TQ = Engine::TQ;

  BackwardWorker(const Problem& problem, const Program& program, const Gradients& gradients, const Shape& shape, Room& room)
      : problem_(problem), program_(program), gradients_(gradients), shape_(shape),
        engine_(start(room, shape), shape, problem.scale), blocks_(program, shape.kv_len), rows_(room.take<T>(static_cast<size_t>(TQ) * shape.head_dim)),
        lse_(room.take<T>(TQ)), delta_(room.take<T>(TQ)) {}

  void stretch(int64_t b, int64_t h, int64_t first, int64_t tiles) { blocks_.stretch(b, h, first, tiles); }

  // Prefetches the rows of the next tile.
  void expect(int64_t b, int64_t h, const QueryTile<W>& next) {
    next_.clear();
    if (!next.vectors) return;
    const Head q(problem_.q, b, h), grad_out(gradients_.grad_out, b, h), out(problem_.out, b, h);
    for (const int32_t row : next.sources) {
      next_.add(q.row(row), shape_.head_dim * size_of(q.type));
      next_.add(grad_out.row(row), shape_.value_dim * size_of(grad_out.type));
      next_.add(out.row(row), shape_.value_dim * size_of(out.type));
    }
  }

  KeyRange range_of_keys(int64_t b, int64_t h, const QueryTile<W>& tile) const {
    return native::range_of_keys(program_.masks, b, h, program_.groups[program_.group_of_head[h]], tile, shape_.kv_len);
  }

  // Adds the gradients of a tile. index: the tile's place in its stretch. is_last: whether it is
  // the last tile of the slot's unit.
  void tile(int64_t b, int64_t h, int64_t index, const QueryTile<W>& tile, KeyGradients<T>& to, Turns& turns, int slot, bool is_last, T* const* sums) {
    const Head q(problem_.q, b, h), grad_out(gradients_.grad_out, b, h), grad_q(gradients_.grad_q, b, h);
    read_statistics(b, h, tile, grad_out);
    const bool natural = program_.score_mod != nullptr;
    engine_.begin(q, grad_out, tile.sources, natural, lse_, delta_);
    const ResultRows<Engine> results(grad_q, tile, shape_.head_dim, rows_);
    Ahead& ahead = engine_.ahead();
    ahead = next_;
    results.add_to(ahead);
    const int64_t kv_head = shape_.kv_head(h), head = b * shape_.kv_heads + kv_head;
    const Head k(problem_.k, b, kv_head), v(problem_.v, b, kv_head);
    T *grad_k = to.rows(head, 0), *grad_v = to.rows(head, 1);
    const std::vector<Branch>& branches = program_.groups[program_.group_of_head[h]].branches;
    // The keys of a single branch without a step come in order: other threads need not wait for the
    // complete tile.
    const bool in_order = is_last && branches.size() == 1 && branches[0].key_step == 1;
    Scores<T>& scores = blocks_.scores;
    blocks_.visit(engine_, k, v, b, h, index, tile, [&](const KeyBlock& block) {
      const auto [least, most] = std::minmax_element(block.keys, block.keys + block.count);
      turns.wait(slot, {*least, *most + 1});
      const auto change = [&](T* products, int ld) { scores.change(block, products, ld); };
      const auto change_back = [&](T* before, T* grads, int ld) { scores.change_back(block, before, grads, ld, sums); };
      engine_.block(block, grad_k, grad_v, scores.changes(block) ? ScoreEdit<T>(change) : ScoreEdit<T>(),
                    natural ? GradEdit<T>(change_back) : GradEdit<T>());
      if (in_order) turns.finish_below(slot, block.least_after);
    });
    engine_.result(results.rows());
    results.finish();
  }

 private:
  static Room& start(Room& room, const Shape& shape) {
    room.reset(Engine::bytes(shape) + static_cast<size_t>(TQ) * (shape.head_dim + 2) * sizeof(T), 9);
    return room;
  }

  // Each query's log-sum-exp and delta. Rows that see nothing get +inf, which makes all weights 0.
  void read_statistics(int64_t b, int64_t h, const QueryTile<W>& tile, const Head& grad_out) {
    const Head out(problem_.out, b, h), lse(problem_.lse, b, h);
    std::vector<T>& a = out_row_;
    std::vector<T>& g = grad_row_;
    a.resize(shape_.value_dim);
    g.resize(shape_.value_dim);
    for (int i = 0; i < TQ; ++i) {
      lse_[i] = infinity<T>;
      delta_[i] = 0;
      const int32_t row = tile.rows[i];
      if (row < 0) continue;
      const T value = *static_cast<const T*>(lse.row(row));
      if (value == -infinity<T>) continue;
      lse_[i] = value;
      read_row<T>(out.row(row), out.type, T(1), a.data(), shape_.value_dim);
      read_row<T>(grad_out.row(row), grad_out.type, T(1), g.data(), shape_.value_dim);
      delta_[i] = dot(a.data(), g.data(), shape_.value_dim);
      if (gradients_.grad_lse.data) delta_[i] -= *static_cast<const T*>(Head(gradients_.grad_lse, b, h).row(row));
    }
  }

  const Problem& problem_;
  const Program& program_;
  const Gradients& gradients_;
  const Shape& shape_;
  Engine engine_;
  TileBlocks<Engine> blocks_;
  Ahead next_;
  T *rows_, *lse_, *delta_;
  std::vector<T> out_row_, grad_row_;
};

// Adds numbers to a vector of float or double.
template <class T>
void add_to(const Array& totals, const T* numbers) {
  for (int64_t i = 0; i < totals.sizes[0]; ++i) {
    if (totals.type == Type::f64)
      totals.writable<double>()[i] += numbers[i];
    else
      totals.writable<float>()[i] += static_cast<float>(numbers[i]);
  }
}

// Addresses of the gradient sums of the score_mod's operands; null for operands without gradients.
template <class T>
std::vector<T*> learned_sums(const Program& program, const Gradients& gradients, T* at) {
  std::vector<T*> out(program.score_mod_operands.size(), nullptr);
  // The sums are stored in the order of `learned`.
  for (const int64_t number : gradients.learned) {
    int64_t size = 1;
    bool read = false;
    for (size_t i = 0; i < out.size(); ++i) {
      if (program.score_mod_operands[i] != number) continue;
      out[i] = at;
      read = true;
      size = 1;
      for (int axis = 0; axis < program.operands[i].dims; ++axis) size *= program.operands[i].sizes[axis];
    }
    if (!read) throw std::runtime_error("a learned operand is not read by the score_mod");
    at += size;
  }
  return out;
}

// How many key heads are summed at a time, so that buffers beside the gradients stay small.
template <class T>
int64_t heads_at_once(const Gradients& gradients, const Shape& shape, int64_t heads) {
  if (KeyGradients<T>::in_place(gradients, shape)) return heads;
  constexpr int64_t most_bytes = 16 << 20;
  return std::clamp<int64_t>(most_bytes / KeyGradients<T>::bytes(shape), 1, heads);
}

// Whether queries that are far apart may see the same keys.
template <int W>
bool shares_keys(const Program& program, const Shape& shape, const Stretches<W>& stretches) {
  const int64_t group = program.group_of_head[0];
  const QueryTiles<W>& tiles = stretches.tiles(0, group);
  const auto range = [&](int64_t index) {
    QueryTile<W> tile;
    tiles.tile_at(index, tile);
    return tile.vectors ? range_of_keys(program.masks, 0, 0, program.groups[group], tile, shape.kv_len) : no_keys;
  };
  const KeyRange first = range(0), other = range(tiles.count() / 2);
  return first.first < other.after && other.first < first.after;
}

template <class Engine>
void backward_with(const Problem& problem, const Program& program, const Gradients& gradients) {
  using T = typename Engine::Number;
  const Shape shape(problem);
  const int threads = std::max(problem.parallel.threads, 1);
  const int64_t heads = shape.batch * shape.kv_heads, group = shape.heads / shape.kv_heads;
  const bool learns = gradients.sums.data && !gradients.learned.empty();
  int64_t at_once = heads_at_once<T>(gradients, shape, heads);
  int64_t parts = 1;
  Stretches<Engine::W> stretches(problem, program, shape, heads, threads);
  if (learns) {
    // The gradients of operands are summed head by head: a head is one unit.
    at_once = std::min<int64_t>(heads, std::max<int64_t>(at_once, threads));
    stretches.set_length(stretches.most());
  } else if (!shares_keys(program, shape, stretches)) {
    // The order of additions depends on the length, which must not depend on threads.
    stretches.set_length(std::clamp<int64_t>(stretches.most() * at_once / 64, 1, 32));
    parts = 16;
  } else if (at_once < 2 * threads) {
    // Later tiles of a longer unit would block other threads.
    stretches.set_length(1);
  }
  const StretchOrder stretch_order(stretches.count() / heads, parts);
  const int64_t per_head = stretch_order.count();
  // Each head's sums of learned operands, added in the order of heads.
  const int64_t numbers = learns ? gradients.sums.sizes[0] : 0;
  std::vector<T> sums;
  for (int64_t first = 0; first < heads; first += at_once) {
    const int64_t count = std::min(at_once, heads - first);
    KeyGradients<T> to(gradients, shape, first, count);
    if (learns) sums.assign(static_cast<size_t>(count * numbers), T(0));
    const int slots = static_cast<int>(std::min<int64_t>(threads, per_head * count));
    Turns turns(slots);
    int64_t units = 0;
    on_threads(problem.parallel, slots, [&](int slot, const Failure& failure) {
      thread_local Room room;
      BackwardWorker<Engine> worker(problem, program, gradients, shape, room);
      QueryTile<Engine::W> two_tiles[2];
      QueryTile<Engine::W> *tile = two_tiles, *next = two_tiles + 1;
      const auto order_of = [&](int64_t unit) { return std::pair<int64_t, int64_t>{first + unit % count, unit / count}; };
      struct Finish {
        Turns& turns;
        int slot;
        ~Finish() { turns.finish(slot); }  // also after an error, so that no thread waits for the unit
      };
      while (!failure.failed()) {
        const int64_t unit = turns.take(slot, [&] { return units++; }, order_of);
        const Finish finish{turns, slot};
        if (unit >= per_head * count) break;
        const auto [head, place] = order_of(unit);
        const int64_t stretch = stretch_order.at(place);
        if (stretch < 0) continue;
        const int64_t b = head / shape.kv_heads;
        std::vector<T*> sums_of_head = learned_sums(program, gradients, sums.data() + (head - first) * numbers);
        const int64_t first_tile = stretch * stretches.length();
        const int64_t stop = std::min(stretches.most(), first_tile + stretches.length());
        const int64_t first_head = head % shape.kv_heads * group, steps = (stop - first_tile) * group;
        // All heads of a group at one place of the sequence, then at the next.
        const auto place_of = [&](int64_t step) { return std::pair<int64_t, int64_t>{first_tile + step / group, first_head + step % group}; };
        const auto tile_of = [&](int64_t step, QueryTile<Engine::W>& to_fill) {
          to_fill.vectors = 0;
          if (step >= steps) return;
          const auto [index, h] = place_of(step);
          const QueryTiles<Engine::W>& tiles = stretches.tiles(b, program.group_of_head[h]);
          if (index < tiles.count()) tiles.tile_at(index, to_fill);
        };
        KeyRange range = no_keys;
        for (int64_t step = 0; step < steps; ++step) {
          tile_of(step, *next);
          if (next->vectors) range.add(worker.range_of_keys(b, place_of(step).second, *next));
        }
        turns.limit(slot, range);
        tile_of(0, *next);
        for (int64_t step = 0; step < steps; ++step) {
          std::swap(tile, next);
          tile_of(step + 1, *next);
          const auto [index, h] = place_of(step);
          worker.stretch(b, h, first_tile, stop - first_tile);
          worker.expect(b, place_of(step + 1).second, *next);
          if (tile->vectors) worker.tile(b, h, index - first_tile, *tile, to, turns, slot, step + 1 == steps, sums_of_head.data());
        }
      }
    });
    for (int64_t head = 0; head < count; ++head) {
      to.write(first + head);
      if (learns) add_to(gradients.sums, sums.data() + head * numbers);
    }
  }
}

}  // namespace native
