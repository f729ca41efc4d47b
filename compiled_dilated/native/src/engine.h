// Attention of one tile of queries over blocks of keys, in float32 or float64.
//
//   S^T[key][query] = K[key] . Q^T[query]         O^T[d][query] += V[key][d] * P^T[key][query]
//
// Vector lanes are queries: the softmax has no sum across lanes, and elements of K and V are
// broadcast from their rows in memory. A tile is `tile_vectors` vectors of queries; a block of keys
// is computed for those vectors only that see any of it.
#pragma once
#include <algorithm>

#include "ahead.h"
#include "callback.h"
#include "vectors.h"

namespace native {

// Changes of a block's scores or of their gradients by the caller; empty: none.
// Arguments: scores, leading dimension.
template <class T>
using ScoreEdit = Callback<T*, int>;
// Arguments: unedited products, which may be overwritten; gradients of the edited scores, which
// become those of the unedited ones; leading dimension.
template <class T>
using GradEdit = Callback<T*, T*, int>;

// Rows of a register block: rows * vectors sums, the vectors of queries and a broadcast fill the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int rows_at_once(int vectors) { return vectors == 1 ? 16 : vectors == 4 ? 6 : 8; }
constexpr int widths_at_once(int vectors) { return vectors == 1 ? 16 : vectors == 4 ? 4 : 8; }
#else
constexpr int rows_at_once(int vectors) { return vectors == 1 ? 8 : vectors == 4 ? 2 : 4; }
constexpr int widths_at_once(int vectors) { return vectors == 1 ? 8 : vectors == 4 ? 2 : 4; }
#endif

// scores[row][query] = rows[row] . columns[:][query] for `Rows` rows of `depth` numbers.
template <class T, int Rows, int Vectors>
NATIVE_INLINE void multiply(const T* const* rows, int depth, const T* columns, int ld, T* scores, int lds) {
  constexpr int W = lanes<T>;
  Vector<T> sums[Rows][Vectors];
  const T* row[Rows];
  for (int i = 0; i < Rows; ++i) {
    row[i] = rows[i];
    for (int j = 0; j < Vectors; ++j) sums[i][j] = Vector<T>{};
  }
#pragma GCC unroll 4
  for (int d = 0; d < depth; ++d) {
    Vector<T> column[Vectors];
    for (int j = 0; j < Vectors; ++j) column[j] = load(columns + d * ld + j * W);
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) sums[i][j] += row[i][d] * column[j];
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) store(scores + i * lds + j * W, sums[i][j]);
}

// Prefetches rows that are read soon: hardware prefetchers miss rows that are not adjacent.
template <class T>
NATIVE_INLINE void fetch(const T* const* rows, int count, int width) {
  for (int i = 0; i < count; ++i)
    for (int at = 0; at < width; at += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(rows[i] + at, 0, 3);
}

// multiply for all rows of a block. later: rows of another width that are read after these. ahead:
// rows that are read after the block.
template <class T, int Vectors>
NATIVE_INLINE void multiply_all(const T* const* rows, int count, int depth, const T* columns, int ld, T* scores, int lds,
                                const T* const* later, int later_width, Ahead& ahead) {
  constexpr int most = rows_at_once(Vectors);
  int i = 0;
  for (; i + most <= count; i += most) {
    fetch(rows + i + most, std::min(most, count - i - most), depth);
    fetch(later + i, most, later_width);
    ahead.fetch_some();
    multiply<T, most, Vectors>(rows + i, depth, columns, ld, scores + i * lds, lds);
  }
  if constexpr (most > 4)
    for (; i + 4 <= count; i += 4) multiply<T, 4, Vectors>(rows + i, depth, columns, ld, scores + i * lds, lds);
  for (; i + 2 <= count; i += 2) multiply<T, 2, Vectors>(rows + i, depth, columns, ld, scores + i * lds, lds);
  for (; i < count; ++i) multiply<T, 1, Vectors>(rows + i, depth, columns, ld, scores + i * lds, lds);
}

// sums[d][query] = sums[d][query] * factors[query] + rows[:][d] . weights[:][query] for d of `Widths` numbers from `first`.
template <class T, int Widths, int Vectors>
NATIVE_INLINE void accumulate(const T* const* rows, int count, int first, const T* weights, int ldw, const Vector<T>* factors, T* sums, int ld) {
  constexpr int W = lanes<T>;
  Vector<T> total[Widths][Vectors];
  for (int i = 0; i < Widths; ++i)
    for (int j = 0; j < Vectors; ++j) total[i][j] = Vector<T>{};
#pragma GCC unroll 2
  for (int key = 0; key < count; ++key) {
    Vector<T> weight[Vectors];
    for (int j = 0; j < Vectors; ++j) weight[j] = load(weights + key * ldw + j * W);
    const T* row = rows[key] + first;
    for (int i = 0; i < Widths; ++i)
      for (int j = 0; j < Vectors; ++j) total[i][j] += row[i] * weight[j];
  }
  for (int i = 0; i < Widths; ++i)
    for (int j = 0; j < Vectors; ++j) {
      // The block is summed by itself first, so that its rounding errors are relative to its own
      // size.
      T* at = sums + (first + i) * ld + j * W;
      store(at, load(at) * factors[j] + total[i][j]);
    }
}

template <class T, int Vectors>
NATIVE_INLINE void accumulate_all(const T* const* rows, int count, int width, const T* weights, int ldw, const Vector<T>* factors, T* sums, int ld) {
  constexpr int most = widths_at_once(Vectors);
  int d = 0;
  for (; d + most <= width; d += most) accumulate<T, most, Vectors>(rows, count, d, weights, ldw, factors, sums, ld);
  for (; d < width; ++d) accumulate<T, 1, Vectors>(rows, count, d, weights, ldw, factors, sums, ld);
}

// to[i] += factor * sum over queries of weights[i][query] * rows[query], for `Keys` keys and `Parts` vectors of a row.
template <class T, int Keys, int Parts>
NATIVE_INLINE void spread(const T* weights, int ldw, const T* rows, int ldr, int queries, T* const* to, int at, T factor) {
  constexpr int W = lanes<T>;
  Vector<T> total[Keys][Parts];
  for (int i = 0; i < Keys; ++i)
    for (int j = 0; j < Parts; ++j) total[i][j] = Vector<T>{};
#pragma GCC unroll 2
  for (int query = 0; query < queries; ++query) {
    Vector<T> row[Parts];
    for (int j = 0; j < Parts; ++j) row[j] = load(rows + query * ldr + at + j * W);
    for (int i = 0; i < Keys; ++i)
      for (int j = 0; j < Parts; ++j) total[i][j] += weights[i * ldw + query] * row[j];
  }
  for (int i = 0; i < Keys; ++i)
    for (int j = 0; j < Parts; ++j) store(to[i] + at + j * W, load(to[i] + at + j * W) + total[i][j] * factor);
}

template <class T, int Keys>
NATIVE_INLINE void spread_rows(const T* weights, int ldw, const T* rows, int ldr, int queries, int width, T* const* to, T factor) {
  constexpr int W = lanes<T>;
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int parts = 4;
#else
  constexpr int parts = 2;
#endif
  int at = 0;
  for (; at + parts * W <= width; at += parts * W) spread<T, Keys, parts>(weights, ldw, rows, ldr, queries, to, at, factor);
  for (; at < width; at += W) spread<T, Keys, 1>(weights, ldw, rows, ldr, queries, to, at, factor);
}

template <class T>
void spread_all(const T* weights, int ldw, int count, const T* rows, int ldr, int queries, int width, T* const* to, T factor) {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int keys = 6;
#else
  constexpr int keys = 4;
#endif
  int i = 0;
  for (; i + keys <= count; i += keys) spread_rows<T, keys>(weights + i * ldw, ldw, rows, ldr, queries, width, to + i, factor);
  for (; i < count; ++i) spread_rows<T, 1>(weights + i * ldw, ldw, rows, ldr, queries, width, to + i, factor);
}

// A vector's lanes of rows, transposed: to[column][lane] = rows[lane][column].
template <class T>
void transpose_rows(const T* const* rows, int columns, T* to, int ld) {
  constexpr int W = lanes<T>;
  int column = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    for (; column + W <= columns; column += W) {
      __m512i square[W];
      for (int lane = 0; lane < W; ++lane) square[lane] = _mm512_loadu_si512(rows[lane] + column);
      transpose16(square);
      for (int i = 0; i < W; ++i) _mm512_storeu_si512(to + (column + i) * ld, square[i]);
    }
  }
#endif
  for (; column < columns; ++column)
    for (int lane = 0; lane < W; ++lane) to[column * ld + lane] = rows[lane][column];
}

// The inverse, with a factor per lane: rows[lane][column] = from[column][lane] * factors[lane].
// Returns 0 for lanes with finite results and NaN for others.
template <class T>
Vector<T> transpose_columns(const T* from, int ld, int columns, Vector<T> factors, T* const* rows) {
  constexpr int W = lanes<T>;
  Vector<T> trace{};
  int column = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    for (; column + W <= columns; column += W) {
      __m512i square[W];
      for (int i = 0; i < W; ++i) {
        const Vector<T> product = load(from + (column + i) * ld) * factors;
        trace += product * T(0);
        square[i] = (__m512i)product;
      }
      transpose16(square);
      for (int lane = 0; lane < W; ++lane) _mm512_storeu_si512(rows[lane] + column, square[lane]);
    }
  }
#endif
  for (; column < columns; ++column) {
    const Vector<T> product = load(from + column * ld) * factors;
    trace += product * T(0);
    for (int lane = 0; lane < W; ++lane) rows[lane][column] = product[lane];
  }
  return trace;
}

template <class T>
bool any_nan(Vector<T> x) {
  for (int lane = 0; lane < lanes<T>; ++lane)
    if (x[lane] != x[lane]) return true;
  return false;
}

// A width padded to complete vectors, so that rows of a workspace can be read vector by vector.
template <class T>
constexpr int padded(int width) {
  return (width + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// The forward of a tile, or of some in turn: an online softmax in base 2 over blocks of keys.
template <class T>
class Forward {
 public:
  static constexpr int W = lanes<T>, TQ = tile_queries<T>;
  static constexpr int slots = 4;  // of tiles that are computed in turn
  static size_t numbers(int head_dim, int value_dim) {
    return static_cast<size_t>(TQ) * (slots * (head_dim + value_dim + 2) + block_keys);
  }

  Forward(T* workspace, int head_dim, int value_dim)
      : head_dim_(head_dim), value_dim_(value_dim), slots_(workspace),
        scores_(workspace + static_cast<size_t>(slots) * TQ * (head_dim + value_dim + 2)) {
    select(0);
  }

  // The tile that the next calls are for.
  void select(int slot) {
    queries_ = slots_ + static_cast<size_t>(slot) * TQ * (head_dim_ + value_dim_ + 2);
    result_ = queries_ + TQ * head_dim_;
    most_ = result_ + TQ * value_dim_;
    sum_ = most_ + TQ;
  }

  // rows: TQ rows of q. A pair's weight is 2^(factor * (score - the query's maximum)); factor > 0.
  void begin(const T* const* rows, double factor) {
    exact_factor_ = factor;
    factor_ = static_cast<T>(factor);
    for (int j = 0; j < tile_vectors; ++j) transpose_rows(rows + j * W, head_dim_, queries_ + j * W, TQ);
    std::fill(result_, result_ + TQ * value_dim_, T(0));
    std::fill(most_, most_ + TQ, -infinity<T>);
    std::fill(sum_, sum_ + TQ, T(0));
  }

  // Continues from a result (TQ rows) and its natural log-sum-exps.
  void start_from(const T* const* rows, const T* lse) {
    for (int j = 0; j < tile_vectors; ++j) transpose_rows(rows + j * W, value_dim_, result_ + j * W, TQ);
    for (int i = 0; i < TQ; ++i) {
      const bool seen = lse[i] != -infinity<T>;
      most_[i] = score_from(lse[i], exact_factor_);
      sum_[i] = seen ? T(1) : T(0);
      if (!seen)
        for (int d = 0; d < value_dim_; ++d) result_[d * TQ + i] = T(0);
    }
  }

  // n keys seen by vectors low .. high - 1. edit(scores, ld) changes their scores, hiding pairs by -inf.
  void block(const T* const* keys, const T* const* values, int n, int low, int high, const ScoreEdit<T>& edit) {
    switch (high - low) {
      case 1: return block_of<1>(keys, values, n, low, edit);
      case 2: return block_of<2>(keys, values, n, low, edit);
      case 3: return block_of<3>(keys, values, n, low, edit);
      default: return block_of<4>(keys, values, n, low, edit);
    }
  }

  // rows: TQ rows to write. lse: natural. Rows that see nothing get 0 and -inf. Returns whether a
  // result is not finite.
  bool result(T* const* rows, T* lse) {
    Vector<T> trace{};
    for (int j = 0; j < tile_vectors; ++j) {
      const Vector<T> sum = load(sum_ + j * W);
      const Vector<T> inverse = sum == T(0) ? Vector<T>{} : T(1) / sum;
      trace += transpose_columns(result_ + j * W, TQ, value_dim_, inverse, rows + j * W);
    }
    for (int i = 0; i < TQ; ++i) lse[i] = lse_from(most_[i], sum_[i], exact_factor_);
    return any_nan<T>(trace);
  }

  Ahead ahead;

 private:
  template <int Vectors>
  __attribute__((noinline)) void block_of(const T* const* keys, const T* const* values, int n, int low, const ScoreEdit<T>& edit) {
    constexpr int ld = Vectors * W;
    T* scores = scores_;
    multiply_all<T, Vectors>(keys, n, head_dim_, queries_ + low * W, TQ, scores, ld, values, value_dim_, ahead);
    if (edit) edit(scores, ld);
    Vector<T> factors[Vectors];
    for (int j = 0; j < Vectors; ++j) factors[j] = weigh(scores + j * W, ld, n, (low + j) * W);
    accumulate_all<T, Vectors>(values, n, value_dim_, scores, ld, factors, result_ + low * W, TQ);
  }

  // Turns one vector's scores into weights; returns the factor for the sums of earlier blocks.
  NATIVE_INLINE Vector<T> weigh(T* column, int ld, int n, int at) {
    Vector<T> most[2] = {all(-infinity<T>), all(-infinity<T>)};
    int k = 0;
    for (; k + 2 <= n; k += 2)
      for (int i = 0; i < 2; ++i) most[i] = larger<T>(most[i], load(column + (k + i) * ld));
    if (k < n) most[0] = larger<T>(most[0], load(column + k * ld));
    const Vector<T> before = load(most_ + at), now = larger<T>(before, larger<T>(most[0], most[1]));
    // Without a visible key so far, -inf - -inf would be NaN.
    const Vector<T> safe = now == -infinity<T> ? Vector<T>{} : now;
    const Vector<T> factor = exp2_of(before - safe, factor_);
    Vector<T> sums[2] = {};
    for (k = 0; k + 2 <= n; k += 2)
      for (int i = 0; i < 2; ++i) {
        const Vector<T> weight = exp2_of(load(column + (k + i) * ld) - safe, factor_);
        store(column + (k + i) * ld, weight);
        sums[i] += weight;
      }
    if (k < n) {
      const Vector<T> weight = exp2_of(load(column + k * ld) - safe, factor_);
      store(column + k * ld, weight);
      sums[0] += weight;
    }
    store(most_ + at, now);
    store(sum_ + at, load(sum_ + at) * factor + sums[0] + sums[1]);
    return factor;
  }

  int head_dim_, value_dim_;
  double exact_factor_ = 1;
  T factor_ = 1;
  T *slots_, *scores_;
  T *queries_, *result_, *most_, *sum_;  // of the selected slot
};

// The backward of one tile, from its merged log-sum-exps and delta = sum over d of grad_out * out (less grad_lse).
template <class T>
class Backward {
 public:
  static constexpr int W = lanes<T>, TQ = tile_queries<T>;
  static size_t numbers(int head_dim, int value_dim) {
    return static_cast<size_t>(TQ) * (2 * head_dim + value_dim + 2 + 3 * block_keys);
  }

  Backward(T* workspace, int head_dim, int value_dim) : head_dim_(head_dim), value_dim_(value_dim) {
    queries_ = workspace;
    grad_out_ = queries_ + TQ * head_dim;
    grad_q_ = grad_out_ + TQ * value_dim;
    lse_ = grad_q_ + TQ * head_dim;
    delta_ = lse_ + TQ;
    weights_ = delta_ + TQ;
    grads_ = weights_ + TQ * block_keys;
    before_ = grads_ + TQ * block_keys;
  }

  // q, grad_out: TQ rows, padded to complete vectors. lse: natural; +inf for rows without
  // gradients. factor: of products of q and k, which makes them the scores that lse is of. scale:
  // of dS K and dS^T Q.
  void begin(const T* q, int ldq, const T* grad_out, int ldo, const T* lse, const T* delta, T factor, T scale) {
    q_rows_ = q, out_rows_ = grad_out, ldq_ = ldq, ldo_ = ldo, factor_ = factor, scale_ = scale;
    const T *q_of[TQ], *out_of[TQ];
    for (int i = 0; i < TQ; ++i) q_of[i] = q + i * ldq, out_of[i] = grad_out + i * ldo;
    for (int j = 0; j < tile_vectors; ++j) {
      transpose_rows(q_of + j * W, head_dim_, queries_ + j * W, TQ);
      transpose_rows(out_of + j * W, value_dim_, grad_out_ + j * W, TQ);
    }
    std::fill(grad_q_, grad_q_ + TQ * head_dim_, T(0));
    std::copy(lse, lse + TQ, lse_);
    std::copy(delta, delta + TQ, delta_);
  }

  // edit as in Forward. edit_grad(before, grads, ld) turns gradients of edited scores into those of
  // the unedited ones. grad_keys, grad_values: one row per key, padded to complete vectors, to add
  // to.
  void block(const T* const* keys, const T* const* values, T* const* grad_keys, T* const* grad_values, int n, int low, int high,
             const ScoreEdit<T>& edit, const GradEdit<T>& edit_grad) {
    switch (high - low) {
      case 1: return block_of<1>(keys, values, grad_keys, grad_values, n, low, edit, edit_grad);
      case 2: return block_of<2>(keys, values, grad_keys, grad_values, n, low, edit, edit_grad);
      case 3: return block_of<3>(keys, values, grad_keys, grad_values, n, low, edit, edit_grad);
      default: return block_of<4>(keys, values, grad_keys, grad_values, n, low, edit, edit_grad);
    }
  }

  // rows: TQ rows to write.
  void result(T* const* rows) {
    for (int j = 0; j < tile_vectors; ++j) transpose_columns(grad_q_ + j * W, TQ, head_dim_, all(scale_), rows + j * W);
  }

  Ahead ahead;

 private:
  template <int Vectors>
  __attribute__((noinline)) void block_of(const T* const* keys, const T* const* values, T* const* grad_keys, T* const* grad_values,
                                          int n, int low, const ScoreEdit<T>& edit, const GradEdit<T>& edit_grad) {
    constexpr int ld = Vectors * W;
    T *weights = weights_, *grads = grads_;
    multiply_all<T, Vectors>(keys, n, head_dim_, queries_ + low * W, TQ, weights, ld, values, value_dim_, ahead);
    multiply_all<T, Vectors>(values, n, value_dim_, grad_out_ + low * W, TQ, grads, ld, keys, head_dim_, ahead);
    if (edit_grad) std::copy(weights, weights + n * ld, before_);
    if (edit) edit(weights, ld);
    for (int j = 0; j < Vectors; ++j) {
      const Vector<T> lse = load(lse_ + (low + j) * W), delta = load(delta_ + (low + j) * W);
#pragma GCC unroll 2
      for (int k = 0; k < n; ++k) {
        T *weight = weights + k * ld + j * W, *grad = grads + k * ld + j * W;
        // Positive only by rounding, which the largest scores would raise to a large power.
        const Vector<T> share = exp2_of(smaller<T>(load(weight) * factor_ - lse, Vector<T>{}), static_cast<T>(log2_of_e));
        store(weight, share);
        store(grad, share * (load(grad) - delta));
      }
    }
    // dV is computed from the weights, dK and dQ from the gradients of the scores.
    spread_all<T>(weights, ld, n, out_rows_ + low * W * ldo_, ldo_, ld, padded<T>(value_dim_), grad_values, T(1));
    if (edit_grad) edit_grad(before_, grads, ld);
    Vector<T> ones[Vectors];
    for (int j = 0; j < Vectors; ++j) ones[j] = all(T(1));
    accumulate_all<T, Vectors>(keys, n, head_dim_, grads, ld, ones, grad_q_ + low * W, TQ);
    spread_all<T>(grads, ld, n, q_rows_ + low * W * ldq_, ldq_, ld, padded<T>(head_dim_), grad_keys, scale_);
  }

  int head_dim_, value_dim_, ldq_ = 0, ldo_ = 0;
  T factor_ = 1, scale_ = 1;
  const T *q_rows_ = nullptr, *out_rows_ = nullptr;
  T *queries_, *grad_out_, *grad_q_, *lse_, *delta_, *weights_, *grads_, *before_;
};

}  // namespace native
