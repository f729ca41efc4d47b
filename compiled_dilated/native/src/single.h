// Attention of a tile of one query, as in decoding: vector lanes are the numbers of a row, and each
// key and value is read once. In a tile of many queries lanes are queries, and all but one would be
// empty.
#pragma once
#include "engine.h"

namespace native {

// scores[i] = rows[i] . query for a vector's lanes of rows of `depth` numbers.
template <class T>
NATIVE_INLINE void dots(const T* const* rows, const T* query, int depth, T* scores) {
  constexpr int W = lanes<T>;
  Vector<T> sums[W] = {};
  int d = 0;
  for (; d + W <= depth; d += W) {
    const Vector<T> part = load(query + d);
    for (int i = 0; i < W; ++i) sums[i] += load(rows[i] + d) * part;
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
  for (; d < depth; ++d)
    for (int i = 0; i < W; ++i) scores[i] += rows[i][d] * query[d];
}

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
    result_ = query_ + padded<T>(head_dim);
    scores_ = result_ + padded<T>(value_dim);
    wide_ = scores_ + block_keys;
  }

  // A pair's weight is 2^(factor * (score - the maximum)); factor > 0.
  void begin(const T* row, double factor) {
    exact_factor_ = factor;
    factor_ = static_cast<T>(factor);
    std::copy(row, row + head_dim_, query_);
    std::fill(result_, result_ + value_dim_, T(0));
    most_ = -infinity<T>;
    sum_ = T(0);
  }

  // Continues from a result and its natural log-sum-exp.
  void start_from(const T* row, T lse) {
    if (lse == -infinity<T>) return;
    std::copy(row, row + value_dim_, result_);
    most_ = score_from(lse, exact_factor_);
    sum_ = T(1);
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
      result_[d] = result_[d] * factor + total;
    }
  }

  // Writes the row and the natural log-sum-exp: 0 and -inf if nothing is seen. Returns whether a
  // number is not finite.
  bool result(T* row, T* lse) const {
    const T inverse = sum_ == T(0) ? T(0) : T(1) / sum_;
    T trace = 0;
    for (int d = 0; d < value_dim_; ++d) {
      row[d] = result_[d] * inverse;
      trace += row[d] * T(0);
    }
    *lse = lse_from(most_, sum_, exact_factor_);
    return trace != trace;
  }

 private:
  // scores of n keys. The last rows are repeated to a complete vector. Values are prefetched: they
  // are read next.
  __attribute__((noinline)) void score(const T* const* keys, const T* const* values, int n) {
    int i = 0;
    for (; i + W <= n; i += W) {
      fetch(keys + i + W, std::min(W, n - i - W), head_dim_);
      fetch(values + i, W, value_dim_);
      dots(keys + i, query_, head_dim_, scores_ + i);
    }
    if (i == n) return;
    const T* rows[W];
    for (int j = 0; j < W; ++j) rows[j] = keys[std::min(i + j, n - 1)];
    dots(rows, query_, head_dim_, scores_ + i);
  }

  // Turns the scores into weights; returns the factor for the sums of earlier blocks.
  __attribute__((noinline)) T weigh(int n) {
    const int whole = padded<T>(n);
    std::fill(scores_ + n, scores_ + whole, -infinity<T>);
    Vector<T> most = all(-infinity<T>);
    for (int i = 0; i < whole; i += W) most = larger<T>(most, load(scores_ + i));
    T now = most_;
    for (int lane = 0; lane < W; ++lane) now = most[lane] > now ? most[lane] : now;
    // Without a visible key so far, -inf - -inf would be NaN.
    const T safe = now == -infinity<T> ? T(0) : now;
    const T factor = exp2_of(all(most_ - safe), factor_)[0];
    Vector<T> sums{};
    for (int i = 0; i < whole; i += W) {
      const Vector<T> weight = exp2_of(load(scores_ + i) - safe, factor_);
      store(scores_ + i, weight);
      sums += weight;
    }
    most_ = now;
    sum_ = sum_ * factor + sum_of<T>(sums);
    return factor;
  }

  // result[d] = result[d] * factor + weights . values[:][d] for `Parts` vectors from d on.
  template <int Parts>
  NATIVE_INLINE void accumulate(const T* const* values, int n, int d, T factor) {
    // Two keys at a time: one sum would wait for each product.
    Vector<T> even[Parts] = {}, odd[Parts] = {};
    int i = 0;
    for (; i + 2 <= n; i += 2)
      for (int j = 0; j < Parts; ++j) {
        even[j] += scores_[i] * load(values[i] + d + j * W);
        odd[j] += scores_[i + 1] * load(values[i + 1] + d + j * W);
      }
    if (i < n)
      for (int j = 0; j < Parts; ++j) even[j] += scores_[i] * load(values[i] + d + j * W);
    for (int j = 0; j < Parts; ++j) {
      T* at = result_ + d + j * W;
      store(at, load(at) * factor + (even[j] + odd[j]));
    }
  }

  int head_dim_, value_dim_;
  double exact_factor_ = 1;
  T factor_ = 1, most_ = 0, sum_ = 0;
  T *query_, *result_, *scores_, *wide_;
};

}  // namespace native
