// Attention of one tile of queries in bfloat16, by AMX: products of tiles of 16 rows of 32 numbers, summed in float32.
//
//   S^T[key][query] = K[key] . Q^T[query]         O^T[d][query] += V^T[d][key] . P^T[key][query]
//
// Vector lanes are queries, as in engine.h. A product reads its left factor row by row, 32 numbers
// of a row at a time, and its right factor with numbers of two rows interleaved ("paired"):
//
//   K     left    in place, if its rows are equally far apart
//   Q^T   right   paired along d, packed once per tile of queries
//   V^T   left    packed 32 keys at a time; cached, as the next tile often sees the same keys
//   P^T   right   paired along keys: the softmax rounds two keys at a time
#pragma once
#if defined(__AMX_BF16__)
#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "ahead.h"
#include "amx_tiles.h"
#include "vectors.h"

namespace native {

namespace amx {

constexpr int tile_rows = 16;
constexpr int tile_depth = 32;                         // numbers per row of a left tile, and rows of a right tile before pairing
constexpr int tile_numbers = tile_rows * tile_depth;   // of a tile of bfloat16
constexpr int group_keys = 32;                         // keys per step: two left tiles, and the depth of one tile
constexpr int row_bytes = 64;                          // of a packed tile

constexpr int whole_tiles(int numbers) { return (numbers + tile_depth - 1) / tile_depth * tile_depth; }

// Allocates parts of a workspace; without a workspace it counts their bytes.
class Parts {
 public:
  explicit Parts(void* workspace) : at_(reinterpret_cast<uintptr_t>(workspace)) {}
  template <class T>
  T* take(size_t count) {
    T* const part = reinterpret_cast<T*>(at_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return part;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t at_;
  size_t used_ = 0;
};

// Products ----------------------------------------------------------------------------------------------------------------

// 16 rows of a left factor in memory, `stride` bytes apart.
struct Left {
  const uint16_t* first;
  int64_t stride;
};

// Tile registers of a product of 32 rows by one or two tiles of columns: 0 to 3 are sums (0 and 1
// of the upper rows), 4 and 5 the left factor, 6 and 7 the right one.
template <int Columns>
NATIVE_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (Columns == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
}

// right: one tile, or two adjacent ones.
template <int Columns>
NATIVE_INLINE void add_product(const Left& upper, const Left& lower, int at, const uint16_t* right) {
  _tile_loadd(4, upper.first + at, upper.stride);
  _tile_loadd(6, right, row_bytes);
  _tile_loadd(5, lower.first + at, lower.stride);
  if constexpr (Columns == 2) _tile_loadd(7, right + tile_numbers, row_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (Columns == 2) _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  if constexpr (Columns == 2) _tile_dpbf16ps(3, 5, 7);
}

// Sums of two tiles of columns from memory: 16 rows each, `stride` bytes apart.
NATIVE_INLINE void load_sums(const float* upper, int64_t upper_stride, const float* lower, int64_t lower_stride) {
  _tile_loadd(0, upper, upper_stride);
  _tile_loadd(1, upper + tile_rows, upper_stride);
  _tile_loadd(2, lower, lower_stride);
  _tile_loadd(3, lower + tile_rows, lower_stride);
}

NATIVE_INLINE void store_sums(float* upper, int64_t upper_stride, float* lower, int64_t lower_stride) {
  _tile_stored(0, upper, upper_stride);
  _tile_stored(1, upper + tile_rows, upper_stride);
  _tile_stored(2, lower, lower_stride);
  _tile_stored(3, lower + tile_rows, lower_stride);
}

// to: 32 rows of `ld` numbers.
template <int Columns>
NATIVE_INLINE void store_sums(float* to, int ld) {
  const long stride = ld * static_cast<long>(sizeof(float));
  float* const lower = to + tile_rows * ld;
  _tile_stored(0, to, stride);
  _tile_stored(2, lower, stride);
  if constexpr (Columns == 2) {
    _tile_stored(1, to + tile_rows, stride);
    _tile_stored(3, lower + tile_rows, stride);
  }
}

// GCC's tile loads do not declare that they read memory: their operands must be written before
// this.
NATIVE_INLINE void finish_writes() { asm volatile("" ::: "memory"); }

// Packing -----------------------------------------------------------------------------------------------------------------

// 32 numbers of a row from `at`, zeros past its width.
NATIVE_INLINE __m512i part_of_row(const uint16_t* row, int at, int width) {
  if (at + tile_depth <= width) return _mm512_loadu_si512(row + at);
  return _mm512_maskz_loadu_epi16((1u << (width - at)) - 1u, row + at);
}

// Numbers 0 .. 15 (half 0) or 16 .. 31 (half 1) of two vectors, interleaved.
NATIVE_INLINE __m512i interleaved(__m512i a, __m512i b, int half) {
  alignas(64) static constexpr uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_add_epi16(_mm512_load_si512(order), _mm512_set1_epi16(static_cast<short>(16 * half)));
  return _mm512_permutex2var_epi16(a, index, b);
}

// The transpose of 16 rows as right tiles, paired along their width: to[part] is d from 32 * part;
// tiles are `apart` numbers apart.
inline void pack_paired_columns(const uint16_t* const* rows, int width, uint16_t* to, int apart) {
  for (int at = 0; at < width; at += tile_depth, to += apart) {
    __m512i pairs[16];
    for (int i = 0; i < tile_rows; ++i) pairs[i] = part_of_row(rows[i], at, width);
    transpose16(pairs);
    for (int i = 0; i < tile_rows; ++i) _mm512_store_si512(to + i * tile_depth, pairs[i]);
  }
}

// Rows as right tiles, paired row by row: to[pair / 16][d / 16] are tiles of 16 pairs of rows by 16 numbers.
inline void pack_paired_rows(const uint16_t* const* rows, int count, int width, uint16_t* to) {
  const int padded = whole_tiles(width);
  for (int pair = 0; pair < count / 2; ++pair) {
    uint16_t* const line = to + pair / tile_rows * tile_rows * 2 * padded + pair % tile_rows * tile_depth;
    for (int at = 0; at < width; at += tile_depth) {
      const __m512i even = part_of_row(rows[2 * pair], at, width), odd = part_of_row(rows[2 * pair + 1], at, width);
      for (int half = 0; half < 2; ++half)
        _mm512_store_si512(line + (at / tile_rows + half) * tile_numbers, interleaved(even, odd, half));
    }
  }
}

// The transpose of up to 32 rows: to[d][row], with zeros for missing rows and for d up to a
// multiple of 32.
inline void pack_transposed(const uint16_t* const* rows, int count, int width, uint16_t* to) {
  for (int at = 0; at < width; at += tile_depth) {
    __m512i low[16], high[16];  // of two rows each, the first and the last 16 numbers paired
    for (int i = 0; i < 16; ++i) {
      const __m512i even = 2 * i < count ? part_of_row(rows[2 * i], at, width) : _mm512_setzero_si512();
      const __m512i odd = 2 * i + 1 < count ? part_of_row(rows[2 * i + 1], at, width) : _mm512_setzero_si512();
      low[i] = interleaved(even, odd, 0);
      high[i] = interleaved(even, odd, 1);
    }
    transpose16(low);
    transpose16(high);
    for (int i = 0; i < 16; ++i) {
      _mm512_store_si512(to + (at + i) * group_keys, low[i]);
      _mm512_store_si512(to + (at + 16 + i) * group_keys, high[i]);
    }
  }
}

// Whether rows are equally far apart; stride: in bytes.
template <int Count, class T>
NATIVE_INLINE bool equally_spaced(const T* const* rows, int64_t& stride) {
  const int64_t step = reinterpret_cast<intptr_t>(rows[1]) - reinterpret_cast<intptr_t>(rows[0]);
  int64_t differs = 0;
  for (int i = 1; i + 1 < Count; ++i)
    differs |= reinterpret_cast<intptr_t>(rows[i + 1]) - reinterpret_cast<intptr_t>(rows[i]) - step;
  stride = step;
  return differs == 0;
}

// A group of rows as two left tiles: in place, or copied to `room` (of complete tiles) if they are
// irregular, few or of odd width. Returns whether any row is copied.
inline bool group_as_tiles(const uint16_t* const* rows, int count, int width, uint16_t* room, Left* tiles) {
  const int padded = whole_tiles(width);
  bool copied = false;
  for (int t = 0; t < 2; ++t) {
    const int first = t * tile_rows;
    if (width == padded && first + tile_rows <= count) {
      tiles[t].first = rows[first];
      if (equally_spaced<tile_rows>(rows + first, tiles[t].stride)) continue;
    }
    copied = true;
    uint16_t* const copy = room + first * padded;
    for (int i = 0; i < tile_rows; ++i)
      for (int at = 0; at < padded; at += tile_depth) {
        const bool is_row = first + i < count;
        _mm512_store_si512(copy + i * padded + at, is_row ? part_of_row(rows[first + i], at, width) : _mm512_setzero_si512());
      }
    tiles[t] = {copy, padded * static_cast<int64_t>(sizeof(uint16_t))};
  }
  return copied;
}

// Prefetches a group's rows: hardware prefetchers miss rows that are not adjacent.
inline void fetch_group(const uint16_t* const* rows, int count, int width) {
  for (int i = 0; i < std::min(count, group_keys); ++i)
    for (int at = 0; at < width; at += tile_depth) _mm_prefetch(reinterpret_cast<const char*>(rows[i] + at), _MM_HINT_T0);
}

// Prefetches `more` rows at the distance of the last two. Rows that are read for the first time are
// often followed by the next ones, which hardware prefetchers miss if they are not adjacent.
inline void fetch_after(const uint16_t* const* rows, int count, int more, int width) {
  const int64_t stride = reinterpret_cast<intptr_t>(rows[count - 1]) - reinterpret_cast<intptr_t>(rows[count - 2]);
  intptr_t row = reinterpret_cast<intptr_t>(rows[count - 1]);  // a number, not a pointer: there may be no memory past the last row
  for (int i = 0; i < more; ++i) {
    row += stride;
    for (int at = 0; at < width; at += tile_depth)
      _mm_prefetch(reinterpret_cast<const char*>(row + at * static_cast<int64_t>(sizeof(uint16_t))), _MM_HINT_T1);
  }
}

// A cache of transposes of groups of 32 rows, by the address of the first row and their distance. A
// new group replaces another one of the same slot.
class TransposedGroups {
 public:
  static constexpr size_t kept_bytes = 512 * 1024;

  TransposedGroups(Parts& parts, int width, int most_keys)
      : width_(width), group_numbers_(whole_tiles(width) * group_keys),
        slots_(static_cast<unsigned>(kept_bytes / (group_numbers_ * sizeof(uint16_t)))) {  // 32 of the widest rows
    copies_ = parts.take<uint16_t>(static_cast<size_t>(slots_) * group_numbers_);
    names_ = parts.take<Name>(slots_);
    room_ = parts.take<uint16_t>(static_cast<size_t>(most_keys) / group_keys * group_numbers_);
  }

  void forget() { std::fill(names_, names_ + slots_, Name{}); }

  // Transposes of all groups of a block, each [d][key], valid until the next block. Returns the
  // number of new groups.
  int of(const uint16_t* const* rows, int count, const uint16_t** transposes) {
    int met = 0;
    const int groups = (count + group_keys - 1) / group_keys;
    for (int group = 0; group < groups; ++group) {
      const uint16_t* const* const first = rows + group * group_keys;
      const int keys = std::min(count - group * group_keys, group_keys);
      Name name{first[0], 0};
      uint16_t* to = room_ + group * group_numbers_;
      if (keys == group_keys && equally_spaced<group_keys>(first, name.stride)) {
        const unsigned slot = slot_of(name);
        uint16_t* const copy = copies_ + static_cast<size_t>(slot) * group_numbers_;
        const bool is_current = names_[slot].first == name.first && names_[slot].stride == name.stride;
        // A group of the same block must not be overwritten.
        const bool is_used = std::find(transposes, transposes + group, copy) != transposes + group;
        if (is_current) {
          transposes[group] = copy;
          continue;
        }
        if (!is_used) {
          to = copy;
          names_[slot] = name;
        }
        ++met;
      }
      pack_transposed(first, keys, width_, to);
      transposes[group] = to;
    }
    return met;
  }

 private:
  struct Name {
    const uint16_t* first = nullptr;
    int64_t stride = 0;
  };

  // Consecutive groups have consecutive slots, so that the groups of a window do not replace each
  // other.
  unsigned slot_of(const Name& name) const {
    const uint64_t address = reinterpret_cast<uintptr_t>(name.first);
    const uint64_t span = static_cast<uint64_t>(std::max<int64_t>(std::abs(name.stride), 1)) * group_keys;
    // Many groups of rows by residue class begin within one span.
    const uint64_t number = address / span + address % span / row_bytes * 37;
    return static_cast<unsigned>(number) % slots_;
  }

  int width_, group_numbers_;
  unsigned slots_;
  uint16_t *copies_, *room_;
  Name* names_;
};

// Arithmetic --------------------------------------------------------------------------------------------------------------

// 2^(x * factor) for x <= 0 with an error of 3e-6, a thousandth of the rounding to bfloat16;
// exactly 1 at 0. Otherwise as exp2_of.
NATIVE_INLINE __m512 exp2_rough(__m512 x, __m512 factor) {
  const Exponent by(x, factor);
  __m512 power = _mm512_set1_ps(0.00958285f);
  power = _mm512_fmadd_ps(power, by.rest, _mm512_set1_ps(0.05590643f));
  power = _mm512_fmadd_ps(power, by.rest, _mm512_set1_ps(0.24024099f));
  power = _mm512_fmadd_ps(power, by.rest, _mm512_set1_ps(0.69312419f));
  power = _mm512_fmadd_ps(power, by.rest, _mm512_set1_ps(1.0f));
  return by.applied_to(power);
}

// to[key][query] = rows . queries, for `count` rows and for tiles low .. high - 1 of `Tiles` of 16
// queries, packed by pack_paired_columns. room: for one group. later: rows that are read after
// these. ahead: rows that are read after the block.
template <int Tiles>
inline void multiply_rows(const uint16_t* const* rows, int count, int width, uint16_t* room, const uint16_t* queries, int low, int high,
                          float* to, const uint16_t* const* later, int later_width, Ahead& ahead) {
  constexpr int ld = Tiles * tile_rows;
  for (int first = 0; first < count; first += group_keys, to += group_keys * ld) {
    Left tiles[2];
    const int left = count - first;
    if (group_as_tiles(rows + first, left, width, room, tiles)) {
      if (left > group_keys) fetch_group(rows + first + group_keys, left - group_keys, width);
      fetch_group(later + first, left, later_width);
    }
    finish_writes();
    const auto multiply_columns = [&](auto count, int j) {
      constexpr int Columns = count;
      ahead.fetch_some();
      clear_sums<Columns>();
      for (int at = 0; at < width; at += tile_depth)
        add_product<Columns>(tiles[0], tiles[1], at, queries + (at / tile_depth * Tiles + j) * tile_numbers);
      store_sums<Columns>(to + j * tile_rows, ld);
    };
    int j = low;
    for (; j + 2 <= high; j += 2) multiply_columns(std::integral_constant<int, 2>{}, j);
    if (j < high) multiply_columns(std::integral_constant<int, 1>{}, j);
  }
}

NATIVE_INLINE __mmask16 first_lanes(int count) {
  return count >= tile_rows ? 0xffff : static_cast<__mmask16>((1u << count) - 1u);
}

// rows[query][d] = from[d][query] * factor[query] for 16 queries; from has `ld` numbers per row.
// Returns 0 for queries with finite results and NaN for others.
template <class Stored>
inline __m512 transpose_result(const float* from, int ld, int width, __m512 factor, Stored* const* to) {
  __m512 trace = _mm512_setzero_ps();
  for (int at = 0; at < width; at += tile_rows) {
    const __mmask16 within = first_lanes(width - at);
    __m512i rows[16];
    for (int i = 0; i < tile_rows; ++i) {
      const __m512 product = _mm512_mul_ps(_mm512_load_ps(from + (at + i) * ld), factor);
      if (at + i < width) trace = _mm512_fmadd_ps(product, _mm512_setzero_ps(), trace);
      rows[i] = _mm512_castps_si512(product);
    }
    transpose16(rows);
    for (int i = 0; i < tile_rows; ++i) {
      if constexpr (sizeof(Stored) == sizeof(float))
        _mm512_mask_storeu_epi32(to[i] + at, within, rows[i]);
      else
        _mm256_mask_storeu_epi16(to[i] + at, within, (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(rows[i])));
    }
  }
  return trace;
}

inline int groups_of(int keys) { return (keys + group_keys - 1) / group_keys; }

}  // namespace amx

// The forward of one tile: an online softmax in base 2 over blocks of keys.
class AmxForward {
 public:
  static constexpr int W = amx::tile_rows, NV = 4, TQ = NV * W;
  static constexpr int KB = 128;  // most keys of a block

  // Bytes of one thread's workspace, which must be aligned to 64 bytes.
  static size_t bytes(int head_dim, int value_dim) {
    amx::Parts parts(nullptr);
    AmxForward(parts, head_dim, value_dim);
    return parts.used();
  }

  AmxForward(void* workspace, int head_dim, int value_dim) : AmxForward(amx::Parts(workspace), head_dim, value_dim) { forget(); }

  // Must be called when values at the same addresses may have changed: groups of 32 equally spaced
  // rows are packed once and cached by address. So v_rows must not point to copies in a reused
  // buffer without a call of this in between.
  void forget() { values_.forget(); }

  // q_rows: TQ rows. A pair's weight is 2^(factor * (score - the query's maximum)); factor > 0.
  void begin(const uint16_t* const* q_rows, double factor) {
    factor_ = factor;
    for (int j = 0; j < NV; ++j)
      amx::pack_paired_columns(q_rows + j * W, head_dim_, queries_ + j * amx::tile_numbers, NV * amx::tile_numbers);
    std::fill(result_, result_ + TQ * amx::whole_tiles(value_dim_), 0.0f);
    std::fill(most_, most_ + TQ, -infinity<float>);
    std::fill(sum_, sum_ + TQ, 0.0f);
  }

  // Continues from a result (TQ rows) and its natural log-sum-exps.
  void start_from(const float* const* rows, const float* lse) {
    for (int i = 0; i < TQ; ++i) {
      const bool seen = lse[i] != -infinity<float>;
      most_[i] = score_from(lse[i], factor_);
      sum_[i] = seen ? 1.0f : 0.0f;
      for (int d = 0; d < value_dim_; ++d) result_[d * TQ + i] = seen ? rows[i][d] : 0.0f;
    }
  }

  // n keys, 1 <= n <= KB, seen by vectors low .. high - 1. If `edits`, edit(scores, TQ, n) may change their products
  // scores[key * TQ + query], query from low * W to high * W - 1, hiding pairs by -inf.
  template <class Edit>
  void block(const uint16_t* const* k_rows, const uint16_t* const* v_rows, int n, int low, int high, bool edits, const Edit& edit) {
    multiply(k_rows, v_rows, n, low, high);
    if (edits) edit(scores_, TQ, n);
    weigh_and_sum(k_rows, v_rows, n, low, high);
  }

  // rows: TQ rows to write. lse: natural. Rows that see nothing get 0 and -inf. Returns whether a
  // result is not finite.
  bool result(uint16_t* const* rows, float* lse) const {
    __m512 trace = _mm512_setzero_ps();
    for (int j = 0; j < NV; ++j) {
      const __m512 sum = _mm512_load_ps(sum_ + j * W);
      const __mmask16 seen = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512 inverse = _mm512_maskz_div_ps(seen, _mm512_set1_ps(1.0f), sum);
      trace = _mm512_add_ps(trace, amx::transpose_result(result_ + j * W, TQ, value_dim_, inverse, rows + j * W));
    }
    for (int i = 0; i < TQ; ++i)
      lse[i] = lse_from(most_[i], sum_[i], factor_);
    return _mm512_cmp_ps_mask(trace, trace, _CMP_UNORD_Q) != 0;
  }

  Ahead ahead;

 private:
  AmxForward(amx::Parts&& parts, int head_dim, int value_dim) : AmxForward(parts, head_dim, value_dim) {}
  AmxForward(amx::Parts& parts, int head_dim, int value_dim)
      : head_dim_(head_dim), value_dim_(value_dim), values_(parts, value_dim, KB),
        queries_(parts.take<uint16_t>(TQ * amx::whole_tiles(head_dim))), weights_(parts.take<uint16_t>(KB * TQ)),
        key_copies_(parts.take<uint16_t>(amx::group_keys * amx::whole_tiles(head_dim))),
        result_(parts.take<float>(TQ * amx::whole_tiles(value_dim))), scores_(parts.take<float>(KB * TQ)),
        shares_(parts.take<float>(2 * shares_numbers)), most_(parts.take<float>(TQ)), sum_(parts.take<float>(TQ)) {}

  __attribute__((noinline)) void multiply(const uint16_t* const* k_rows, const uint16_t* const* v_rows, int n, int low, int high) {
    amx::multiply_rows<NV>(k_rows, n, head_dim_, key_copies_, queries_, low, high, scores_, v_rows, value_dim_, ahead);
  }

  __attribute__((noinline)) void weigh_and_sum(const uint16_t* const* k_rows, const uint16_t* const* v_rows, int n, int low,
                                               int high) {
    const int groups = amx::groups_of(n);
    for (int key = n; key < groups * amx::group_keys; ++key)  // no keys: hidden
      std::fill(scores_ + key * TQ + low * W, scores_ + key * TQ + high * W, -infinity<float>);
    __m512 factors[NV];
    for (int j = low; j < high; ++j) factors[j] = weigh(groups * amx::group_keys, j);
    const uint16_t* values[KB / amx::group_keys];
    if (const int met = values_.of(v_rows, n, values)) {
      amx::fetch_after(k_rows, n, met * amx::group_keys, head_dim_);
      amx::fetch_after(v_rows, n, met * amx::group_keys, value_dim_);
    }
    amx::finish_writes();
    int j = low;
    for (; j + 2 <= high; j += 2) add_values<2>(values, groups, j, factors + j);
    if (j < high) add_values<1>(values, groups, j, factors + j);
  }

  // Turns one vector's scores into weights; returns the factor for the sums of earlier blocks.
  //
  // The maximum is the exact one of all keys so far, although an older one would save a rescaling:
  // a query's greatest weight is then 1, which bfloat16 represents exactly. Its rounding would be
  // the largest error otherwise.
  NATIVE_INLINE __m512 weigh(int n, int j) {
    const float* const column = scores_ + j * W;
    const __m512 factor = _mm512_set1_ps(static_cast<float>(factor_));
    __m512 most[4];
    for (__m512& x : most) x = _mm512_set1_ps(-infinity<float>);
    for (int key = 0; key < n; key += 4)
      for (int i = 0; i < 4; ++i) most[i] = _mm512_max_ps(most[i], _mm512_load_ps(column + (key + i) * TQ));
    const __m512 before = _mm512_load_ps(most_ + j * W);
    const __m512 largest = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    const __m512 now = _mm512_max_ps(before, largest);
    // Without a visible key so far, -inf - -inf would be NaN.
    const __m512 safe = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(now, _mm512_set1_ps(-infinity<float>), _CMP_NEQ_UQ), now);
    const __m512 shrinks = (__m512)exp2_of((Vector<float>)_mm512_sub_ps(before, safe), static_cast<float>(factor_));

    // Two keys at a time: their weights are rounded and paired, as the product with V^T reads them.
    // The sums are of the weights before rounding, so that the log-sum-exp is better than bfloat16.
    alignas(64) static constexpr uint16_t pairing[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i paired = _mm512_load_si512(pairing);
    __m512 sum = _mm512_mul_ps(_mm512_load_ps(sum_ + j * W), shrinks);
    uint16_t* to = weights_ + j * amx::tile_numbers;
    for (int group = 0; group < n; group += amx::group_keys, to += NV * amx::tile_numbers) {
      for (int pair = 0; pair < amx::group_keys / 2; ++pair) {
        const float* const at = column + (group + 2 * pair) * TQ;
        const __m512 even = amx::exp2_rough(_mm512_sub_ps(_mm512_load_ps(at), safe), factor);
        const __m512 odd = amx::exp2_rough(_mm512_sub_ps(_mm512_load_ps(at + TQ), safe), factor);
        const __m512i both = _mm512_permutexvar_epi16(paired, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        _mm512_store_si512(to + pair * amx::tile_depth, both);
        sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
      }
    }
    _mm512_store_ps(most_ + j * W, now);
    _mm512_store_ps(sum_ + j * W, sum);
    return shrinks;
  }

  // Adds the weighted values of a block to the result of one or two vectors of queries, rescaled by
  // `factors`.
  template <int Columns>
  NATIVE_INLINE void add_values(const uint16_t* const* values, int groups, int j, const __m512* factors) {
    constexpr int ld = Columns * W;
    float* share = shares_;
    for (int d = 0; d < value_dim_; d += amx::tile_depth) {
      amx::clear_sums<Columns>();
      for (int group = 0; group < groups; ++group) {
        const uint16_t* const upper = values[group] + d * amx::group_keys;
        amx::add_product<Columns>({upper, amx::row_bytes}, {upper + amx::tile_numbers, amx::row_bytes}, 0,
                                  weights_ + (group * NV + j) * amx::tile_numbers);
      }
      amx::store_sums<Columns>(share, ld);
      for (int i = 0; i < amx::tile_depth; ++i)
        for (int column = 0; column < Columns; ++column) {
          float* const at = result_ + (d + i) * TQ + (j + column) * W;
          _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), factors[column], _mm512_load_ps(share + i * ld + column * W)));
        }
      // The next product goes to another buffer, so that it need not wait for the addition of this
      // one.
      share = share == shares_ ? shares_ + shares_numbers : shares_;
    }
  }

  static constexpr int shares_numbers = amx::tile_depth * 2 * W;

  int head_dim_, value_dim_;
  double factor_ = 1;
  amx::TransposedGroups values_;
  uint16_t *queries_, *weights_, *key_copies_;
  float *result_, *scores_, *shares_, *most_, *sum_;
};

// The backward of one tile, from its merged log-sum-exps and delta = sum over d of grad_out * out (less grad_lse).
//
//   P^T = 2^(K . Q^T - lse)        dS^T = scale * P^T * (V . dO^T - delta)        both rounded to bfloat16
//   dV += P^T . dO     dK += dS^T . Q     dQ^T += K^T . dS^T
//
//   K, V      left    in place              Q^T, dO^T   right   paired along d
//   P^T, dS^T left    row by row            Q, dO       right   paired along queries
//   K^T       left    packed and cached     dS^T        right   paired along keys
class AmxBackward {
 public:
  static constexpr int W = AmxForward::W, NV = AmxForward::NV, TQ = AmxForward::TQ, KB = AmxForward::KB;

  // Stands for the absence of an edit of gradients.
  struct NoEdit {
    void operator()(const float*, float*, int, int) const {}
  };

  static size_t bytes(int head_dim, int value_dim) {
    amx::Parts parts(nullptr);
    AmxBackward(parts, head_dim, value_dim);
    return parts.used();
  }

  AmxBackward(void* workspace, int head_dim, int value_dim) : AmxBackward(amx::Parts(workspace), head_dim, value_dim) {
    forget();
  }

  // Must be called when keys at the same addresses may have changed, as in the forward.
  void forget() { transposed_keys_.forget(); }

  // q_rows, go_rows: TQ rows each. lse: natural, +inf for rows without gradients. A pair's weight
  // is e^(factor * score - lse).
  void begin(const uint16_t* const* q_rows, const uint16_t* const* go_rows, const float* lse, const float* delta, float scale,
             float factor) {
    factor_ = factor;
    scale_ = scale;
    for (int j = 0; j < NV; ++j) {
      amx::pack_paired_columns(q_rows + j * W, head_dim_, queries_ + j * amx::tile_numbers, NV * amx::tile_numbers);
      amx::pack_paired_columns(go_rows + j * W, value_dim_, grad_outs_ + j * amx::tile_numbers, NV * amx::tile_numbers);
    }
    amx::pack_paired_rows(q_rows, TQ, head_dim_, query_rows_);
    amx::pack_paired_rows(go_rows, TQ, value_dim_, grad_out_rows_);
    std::fill(grad_q_, grad_q_ + TQ * amx::whole_tiles(head_dim_), 0.0f);
    for (int i = 0; i < TQ; ++i) {
      lse_[i] = lse[i];
      delta_[i] = delta[i];
    }
  }

  // n keys seen by vectors low .. high - 1; `edits` and edit as in the forward. edit_grad(before,
  // grads, TQ, n) turns gradients of edited scores into those of the unedited products `before`.
  // dk_rows, dv_rows: one row per key, distinct, to add to.
  template <class Edit, class EditGrad>
  void block(const uint16_t* const* k_rows, const uint16_t* const* v_rows, float* const* dk_rows, float* const* dv_rows, int n,
             int low, int high, bool edits, const Edit& edit, const EditGrad& edit_grad) {
    constexpr bool edits_grads = !std::is_same_v<EditGrad, NoEdit>;
    multiply(k_rows, v_rows, n, low, high);
    if constexpr (edits_grads) std::copy(scores_, scores_ + n * TQ, before_);
    if (edits) edit(scores_, TQ, n);
    if constexpr (edits_grads) {
      weigh<Stage::all_but_rounding>(n, low, high);
      edit_grad(before_, grads_, TQ, n);
      weigh<Stage::rounding>(n, low, high);
    } else {
      weigh<Stage::whole>(n, low, high);
    }
    add(k_rows, dk_rows, dv_rows, n, low, high);
  }

  // rows: TQ rows to write.
  void result(uint16_t* const* rows) const {
    for (int j = 0; j < NV; ++j) amx::transpose_result(grad_q_ + j * W, TQ, head_dim_, _mm512_set1_ps(1.0f), rows + j * W);
  }

  Ahead ahead;

 private:
  AmxBackward(amx::Parts&& parts, int head_dim, int value_dim) : AmxBackward(parts, head_dim, value_dim) {}
  AmxBackward(amx::Parts& parts, int head_dim, int value_dim)
      : head_dim_(head_dim), value_dim_(value_dim), transposed_keys_(parts, head_dim, KB),
        queries_(parts.take<uint16_t>(TQ * amx::whole_tiles(head_dim))),
        grad_outs_(parts.take<uint16_t>(TQ * amx::whole_tiles(value_dim))),
        query_rows_(parts.take<uint16_t>(TQ * amx::whole_tiles(head_dim))),
        grad_out_rows_(parts.take<uint16_t>(TQ * amx::whole_tiles(value_dim))),
        key_copies_(parts.take<uint16_t>(amx::group_keys * amx::whole_tiles(head_dim))),
        value_copies_(parts.take<uint16_t>(amx::group_keys * amx::whole_tiles(value_dim))), weight_rows_(parts.take<uint16_t>(KB * TQ)),
        grad_rows_(parts.take<uint16_t>(KB * TQ)), grad_pairs_(parts.take<uint16_t>(KB * TQ)),
        grad_q_(parts.take<float>(TQ * amx::whole_tiles(head_dim))), scores_(parts.take<float>(KB * TQ)),
        grads_(parts.take<float>(KB * TQ)), before_(parts.take<float>(KB * TQ)),
        share_(parts.take<float>(amx::tile_depth * amx::tile_depth)), lse_(parts.take<float>(TQ)), delta_(parts.take<float>(TQ)) {}

  __attribute__((noinline)) void multiply(const uint16_t* const* k_rows, const uint16_t* const* v_rows, int n, int low, int high) {
    amx::multiply_rows<NV>(k_rows, n, head_dim_, key_copies_, queries_, low, high, scores_, v_rows, value_dim_, ahead);
    amx::multiply_rows<NV>(v_rows, n, value_dim_, value_copies_, grad_outs_, low, high, grads_, k_rows, head_dim_, ahead);
  }

  // From scores and products of values to rounded weights and gradients of scores; in two stages if
  // they are edited in between.
  enum class Stage { whole, all_but_rounding, rounding };

  template <Stage stage>
  __attribute__((noinline)) void weigh(int n, int low, int high) {
    if constexpr (stage != Stage::rounding)
      for (int key = n; key < amx::groups_of(n) * amx::group_keys; ++key)  // no keys: hidden
        std::fill(scores_ + key * TQ + low * W, scores_ + key * TQ + high * W, -infinity<float>);
    // Two vectors make a row of a left tile; vectors outside low .. high - 1 are 0.
    for (int j = low / 2 * 2; j < high; j += 2) {
      if (j < low)
        weigh_vectors<stage, false, true>(n, j);
      else if (j + 1 == high)
        weigh_vectors<stage, true, false>(n, j);
      else
        weigh_vectors<stage, true, true>(n, j);
    }
  }

  template <Stage stage, bool First, bool Second>
  NATIVE_INLINE void weigh_vectors(int n, int j) {
    constexpr bool seen[2] = {First, Second};
    const __m512 factor = _mm512_set1_ps(factor_), scale = _mm512_set1_ps(stage == Stage::whole ? scale_ : 1.0f);
    __m512 lse[2], delta[2];
    for (int i = 0; i < 2; ++i) {
      lse[i] = _mm512_load_ps(lse_ + (j + i) * W);
      delta[i] = _mm512_mul_ps(_mm512_load_ps(delta_ + (j + i) * W), scale);
    }
    const int whole = amx::groups_of(n) * amx::group_keys;
    for (int key = 0; key < whole; key += 2) {
      __m512i grad_rows[2];
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        __m512 weights[2], grads[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          float* const score = scores_ + (key + odd) * TQ + (j + i) * W;
          float* const grad = grads_ + (key + odd) * TQ + (j + i) * W;
          weights[i] = grads[i] = _mm512_setzero_ps();
          if (!seen[i]) continue;
          weights[i] = _mm512_load_ps(score);
          grads[i] = _mm512_load_ps(grad);
          if constexpr (stage == Stage::rounding) {
            grads[i] = _mm512_mul_ps(grads[i], _mm512_set1_ps(scale_));
            continue;
          }
          // Positive only by rounding, which the largest scores would raise to a large power.
          const __m512 below = _mm512_min_ps(_mm512_setzero_ps(), _mm512_fmsub_ps(weights[i], factor, lse[i]));
          weights[i] = amx::exp2_rough(below, _mm512_set1_ps(static_cast<float>(log2_of_e)));
          grads[i] = _mm512_mul_ps(weights[i], _mm512_fmsub_ps(grads[i], scale, delta[i]));
          if constexpr (stage == Stage::whole) continue;
          _mm512_store_ps(score, weights[i]);
          _mm512_store_ps(grad, grads[i]);
        }
        if constexpr (stage == Stage::all_but_rounding) continue;
        const int at = (key + odd) * TQ + j * W;
        _mm512_store_si512(weight_rows_ + at, (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]));
        grad_rows[odd] = (__m512i)_mm512_cvtne2ps_pbh(grads[1], grads[0]);
        _mm512_store_si512(grad_rows_ + at, grad_rows[odd]);
      }
      if constexpr (stage == Stage::all_but_rounding) continue;
      uint16_t* const tile = grad_pairs_ + (key / amx::group_keys * NV + j) * amx::tile_numbers;
      uint16_t* const pair = tile + key % amx::group_keys / 2 * amx::tile_depth;
      _mm512_store_si512(pair, amx::interleaved(grad_rows[0], grad_rows[1], 0));
      _mm512_store_si512(pair + amx::tile_numbers, amx::interleaved(grad_rows[0], grad_rows[1], 1));
    }
  }

  __attribute__((noinline)) void add(const uint16_t* const* k_rows, float* const* dk_rows, float* const* dv_rows, int n, int low,
                                     int high) {
    amx::finish_writes();
    add_to_rows(weight_rows_, grad_out_rows_, value_dim_, dv_rows, n, low, high);
    add_to_rows(grad_rows_, query_rows_, head_dim_, dk_rows, n, low, high);
    const uint16_t* keys[KB / amx::group_keys];
    transposed_keys_.of(k_rows, n, keys);
    amx::finish_writes();
    for (int d = 0; d < head_dim_; d += amx::tile_depth)
      for (int j = low / 2 * 2; j < high; j += 2) {
        float* const at = grad_q_ + d * TQ + j * W;
        constexpr int64_t stride = TQ * sizeof(float);
        amx::load_sums(at, stride, at + amx::tile_rows * TQ, stride);
        for (int group = 0; group < amx::groups_of(n); ++group) {
          const uint16_t* const upper = keys[group] + d * amx::group_keys;
          amx::add_product<2>({upper, amx::row_bytes}, {upper + amx::tile_numbers, amx::row_bytes}, 0,
                              grad_pairs_ + (group * NV + j) * amx::tile_numbers);
        }
        amx::store_sums(at, stride, at + amx::tile_rows * TQ, stride);
      }
  }

  // to[key] += left[key][query] . right[query] over queries of vectors low .. high - 1.
  NATIVE_INLINE void add_to_rows(const uint16_t* left, const uint16_t* right, int width, float* const* to, int n, int low,
                                 int high) {
    const int tiles_of_row = amx::whole_tiles(width) / amx::tile_rows;
    for (int key = 0; key < n; key += amx::group_keys) {
      int64_t upper_stride = 0, lower_stride = 0;
      float* const* const rows = to + key;
      const bool in_place = key + amx::group_keys <= n && amx::equally_spaced<amx::tile_rows>(rows, upper_stride) &&
                            amx::equally_spaced<amx::tile_rows>(rows + amx::tile_rows, lower_stride);
      constexpr int64_t left_stride = TQ * sizeof(uint16_t);
      const amx::Left upper{left + key * TQ, left_stride}, lower{left + (key + amx::tile_rows) * TQ, left_stride};
      for (int d = 0; d < width; d += amx::tile_depth) {
        const bool direct = in_place && d + amx::tile_depth <= width;
        if (direct)
          amx::load_sums(rows[0] + d, upper_stride, rows[amx::tile_rows] + d, lower_stride);
        else
          amx::clear_sums<2>();
        for (int j = low / 2 * 2; j < high; j += 2)
          amx::add_product<2>(upper, lower, j * W, right + (j / 2 * tiles_of_row + d / amx::tile_rows) * amx::tile_numbers);
        if (direct) {
          amx::store_sums(rows[0] + d, upper_stride, rows[amx::tile_rows] + d, lower_stride);
          continue;
        }
        amx::store_sums<2>(share_, amx::tile_depth);
        for (int i = 0; i < std::min(n - key, amx::group_keys); ++i)
          for (int part = 0; part < amx::tile_depth; part += W) {
            const __mmask16 within = amx::first_lanes(std::max(width - d - part, 0));
            float* const at = rows[i] + d + part;
            const __m512 share = _mm512_load_ps(share_ + i * amx::tile_depth + part);
            _mm512_mask_storeu_ps(at, within, _mm512_add_ps(_mm512_maskz_loadu_ps(within, at), share));
          }
      }
    }
  }

  int head_dim_, value_dim_;
  float factor_ = 1, scale_ = 1;
  amx::TransposedGroups transposed_keys_;
  uint16_t *queries_, *grad_outs_, *query_rows_, *grad_out_rows_, *key_copies_, *value_copies_;
  uint16_t *weight_rows_, *grad_rows_, *grad_pairs_;
  float *grad_q_, *scores_, *grads_, *before_, *share_, *lse_, *delta_;
};

}  // namespace native
#endif  // __AMX_BF16__
