// Attention of a tile of one query, as in decoding: vector lanes are the numbers of a row, and each
// key and value is read once. In a tile of many queries lanes are queries, and all but one would be
// empty.
#pragma once
#include "engine.h"

namespace native {

// Prefetches a row into the L2 cache, which takes more requests at a time than the L1 cache.
template <class T>
NATIVE_INLINE void fetch_row(const T* row, int width) {
  for (int at = 0; at < width; at += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + at, 0, 2);
}

// The distance, in numbers, of the row that is prefetched while one is read: some rows ahead, and so
// into the next block, if rows are equally spaced.
template <class T>
ptrdiff_t ahead_of(const T* const* rows, int n) {
  constexpr ptrdiff_t rows_ahead = 32;
  return n < 2 ? 0 : (rows[1] - rows[0]) * rows_ahead;
}

// scores[i] = rows[i] . query for a vector's lanes of rows of `depth` numbers. Rows are read one after
// the other, as they are stored.
template <class T>
NATIVE_INLINE void dots(const T* const* rows, const T* query, int depth, ptrdiff_t ahead, T* scores) {
  constexpr int W = lanes<T>;
  const int whole = depth / W * W;
  alignas(64) Vector<T> sums[W];
  for (int i = 0; i < W; ++i) {
    fetch_row(rows[i] + ahead, depth);
    Vector<T> sum{};
    for (int d = 0; d < whole; d += W) sum += load(rows[i] + d) * load(query + d);
    sums[i] = sum;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    transpose16(reinterpret_cast<__m512i*>(sums));
    // In pairs: a sum of sixteen one after the other would wait for each.
    for (int step = W / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
    store(scores, sums[0]);
  } else
#endif
  {
    for (int i = 0; i < W; ++i) scores[i] = sum_of<T>(sums[i]);
  }
  for (int d = whole; d < depth; ++d)
    for (int i = 0; i < W; ++i) scores[i] += rows[i][d] * query[d];
}

// The sums of one query over some keys, each weight relative to that of the largest score.
template <class T>
struct RowSums {
  T* values = nullptr;  // of weights times values, value_dim numbers
  T weights = 0;
  T most = -infinity<T>;  // the largest score

  void clear(int value_dim) {
    std::fill(values, values + value_dim, T(0));
    weights = 0;
    most = -infinity<T>;
  }
};

// An online softmax in base 2 over blocks of keys, as `Forward` of one query.
template <class T>
class Single {
 public:
  static constexpr int W = lanes<T>;
  static size_t numbers(int head_dim, int value_dim) {
    return static_cast<size_t>(padded<T>(head_dim) + padded<T>(value_dim) + block_keys * (1 + W));
  }

  Single(T* workspace, int head_dim, int value_dim) : head_dim_(head_dim), value_dim_(value_dim) {
    query_ = workspace;
    own_.values = query_ + padded<T>(head_dim);
    scores_ = own_.values + padded<T>(value_dim);
    wide_ = scores_ + block_keys;
  }

  // A pair's weight is 2^(factor * (score - the maximum)); factor > 0. sums: to add to; null: this
  // object's own, which start empty.
  void begin(const T* row, double factor, RowSums<T>* sums) {
    exact_factor_ = factor;
    factor_ = static_cast<T>(factor);
    std::copy(row, row + head_dim_, query_);
    if (!sums) own_.clear(value_dim_);
    sums_ = sums ? sums : &own_;
  }

  // Continues from a result and its natural log-sum-exp.
  void start_from(const T* row, T lse) {
    if (lse == -infinity<T>) return;
    std::copy(row, row + value_dim_, sums_->values);
    sums_->most = score_from(lse, exact_factor_);
    sums_->weights = T(1);
  }

  // Adds the sums over other keys.
  void add(const RowSums<T>& other) {
    // The other keys are hidden. Where all of their scores are NaN, so are their weights.
    if (other.weights == T(0)) return;
    const T now = std::max(sums_->most, other.most);
    const T safe = now == -infinity<T> ? T(0) : now;
    const T factor = exp2_of(all(sums_->most - safe), factor_)[0], other_factor = exp2_of(all(other.most - safe), factor_)[0];
    for (int d = 0; d < value_dim_; ++d) sums_->values[d] = sums_->values[d] * factor + other.values[d] * other_factor;
    sums_->weights = sums_->weights * factor + other.weights * other_factor;
    sums_->most = now;
  }

  // n keys. edit(scores, ld) changes the scores of a vector of queries, of which the first counts.
  void block(const T* const* keys, const T* const* values, int n, const ScoreEdit<T>& edit) {
    score(keys, values, n);
    if (edit) {
      for (int i = 0; i < n; ++i) store(wide_ + i * W, all(scores_[i]));
      edit(wide_, W);
      for (int i = 0; i < n; ++i) scores_[i] = wide_[i * W];
    }
    const T factor = weigh(n);
    int d = 0;
    for (; d + 4 * W <= value_dim_; d += 4 * W) accumulate<4>(values, n, d, factor);
    for (; d + W <= value_dim_; d += W) accumulate<1>(values, n, d, factor);
    for (; d < value_dim_; ++d) {
      T total = 0;
      for (int i = 0; i < n; ++i) total += scores_[i] * values[i][d];
      sums_->values[d] = sums_->values[d] * factor + total;
    }
  }

  // Writes the row and the natural log-sum-exp: 0 and -inf if nothing is seen. Returns whether a
  // number is not finite.
  bool result(T* row, T* lse) const {
    const T inverse = sums_->weights == T(0) ? T(0) : T(1) / sums_->weights;
    T trace = 0;
    for (int d = 0; d < value_dim_; ++d) {
      row[d] = sums_->values[d] * inverse;
      trace += row[d] * T(0);
    }
    *lse = lse_from(sums_->most, sums_->weights, exact_factor_);
    return trace != trace;
  }

 private:
  // scores of n keys. The last rows are repeated to a complete vector.
  __attribute__((noinline)) void score(const T* const* keys, const T* const* values, int n) {
    const ptrdiff_t ahead = ahead_of(keys, n);
    int i = 0;
    for (; i + W <= n; i += W) dots(keys + i, query_, head_dim_, ahead, scores_ + i);
    for (int j = 0; j < std::min(2 * W, n); ++j) fetch_row(values[j], value_dim_);
    if (i == n) return;
    const T* rows[W];
    for (int j = 0; j < W; ++j) rows[j] = keys[std::min(i + j, n - 1)];
    dots(rows, query_, head_dim_, 0, scores_ + i);
  }

  // Turns the scores into weights; returns the factor for the sums of earlier blocks.
  __attribute__((noinline)) T weigh(int n) {
    const int whole = padded<T>(n);
    std::fill(scores_ + n, scores_ + whole, -infinity<T>);
    Vector<T> most = all(-infinity<T>);
    for (int i = 0; i < whole; i += W) most = larger<T>(most, load(scores_ + i));
    T now = sums_->most;
    for (int lane = 0; lane < W; ++lane) now = most[lane] > now ? most[lane] : now;
    // Without a visible key so far, -inf - -inf would be NaN.
    const T safe = now == -infinity<T> ? T(0) : now;
    const T factor = exp2_of(all(sums_->most - safe), factor_)[0];
    Vector<T> sums{};
    for (int i = 0; i < whole; i += W) {
      const Vector<T> weight = exp2_of(load(scores_ + i) - safe, factor_);
      store(scores_ + i, weight);
      sums += weight;
    }
    sums_->most = now;
    sums_->weights = sums_->weights * factor + sum_of<T>(sums);
    return factor;
  }

  // sums[d] = sums[d] * factor + weights . values[:][d] for `Parts` vectors from d on.
  template <int Parts>
  NATIVE_INLINE void accumulate(const T* const* values, int n, int d, T factor) {
    const ptrdiff_t ahead = ahead_of(values, n);
    // Two keys at a time: one sum would wait for each product.
    Vector<T> even[Parts] = {}, odd[Parts] = {};
    int i = 0;
    for (; i + 2 <= n; i += 2) {
      fetch_row(values[i] + ahead + d, Parts * W);
      fetch_row(values[i + 1] + ahead + d, Parts * W);
      for (int j = 0; j < Parts; ++j) {
        even[j] += scores_[i] * load(values[i] + d + j * W);
        odd[j] += scores_[i + 1] * load(values[i + 1] + d + j * W);
      }
    }
    if (i < n)
      for (int j = 0; j < Parts; ++j) even[j] += scores_[i] * load(values[i] + d + j * W);
    for (int j = 0; j < Parts; ++j) {
      T* at = sums_->values + d + j * W;
      store(at, load(at) * factor + (even[j] + odd[j]));
    }
  }

  int head_dim_, value_dim_;
  double exact_factor_ = 1;
  T factor_ = 1;
  T *query_, *scores_, *wide_;
  RowSums<T> own_, *sums_ = &own_;
};

}  // namespace native
