// Attention of one tile of queries in bfloat16, by AMX: products of tiles of 16 rows of 32 numbers, summed in float32.
//
//   S^T[key][query] = K[key] . Q^T[query]         O^T[d][query] += V^T[d][key] . P^T[key][query]
//
// As in engine.h vector lanes are queries. A product takes its left factor row by row, 32 numbers of a row at a time, and its right
// factor with numbers of two rows side by side ("paired"):
//
//   K     left    where it lies, if its rows are equally far apart
//   Q^T   right   paired along d, packed once for a tile of queries
//   V^T   left    packed for 32 keys at a time, and kept: the next tile of queries often sees the same keys
//   P^T   right   paired along keys, as the softmax rounds two keys at a time
#pragma once
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "vectors.h"

namespace native {

// While it lives, its thread's tile registers are set up: eight of 16 rows of 64 bytes.
struct AmxTiles {
  // Whether the system lets this process use tiles; asked for once.
  static bool allowed() {
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
  }

  AmxTiles() {
    struct alignas(64) Shape {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    asm volatile("" ::"r"(&shape) : "memory");  // GCC's intrinsic names the first eight bytes alone as read
    _tile_loadconfig(&shape);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

namespace amx {

constexpr int tile_rows = 16;
constexpr int tile_depth = 32;                         // numbers of a left tile's row, and rows of a right tile before pairing
constexpr int tile_numbers = tile_rows * tile_depth;   // of a tile of bfloat16
constexpr int group_keys = 32;                         // keys are taken two left tiles at a time, which is also one tile's depth
constexpr int row_bytes = 64;                          // of a packed tile

constexpr int whole_tiles(int numbers) { return (numbers + tile_depth - 1) / tile_depth * tile_depth; }

// Hands out parts of a workspace; with none it counts them.
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

// Rows of a left factor as they lie in memory: 16 of them, so many bytes apart.
struct Left {
  const uint16_t* first;
  int64_t stride;
};

// Tiles of a product of 32 rows by one or two tiles of columns: 0 to 3 are sums (0 and 1 of the upper rows), 4 and 5 the left
// factor's, 6 and 7 the right's.
template <int Columns>
NATIVE_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (Columns == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
}

// right: one tile, or two one after the other.
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

// GCC's tile loads do not say that they read memory: what they read must have been written before this.
NATIVE_INLINE void finish_writes() { asm volatile("" ::: "memory"); }

// Packing -----------------------------------------------------------------------------------------------------------------

// 32 numbers of a row from `at`, zeros past its width.
NATIVE_INLINE __m512i part_of_row(const uint16_t* row, int at, int width) {
  if (at + tile_depth <= width) return _mm512_loadu_si512(row + at);
  return _mm512_maskz_loadu_epi16((1u << (width - at)) - 1u, row + at);
}

// Numbers 0 .. 15 (half 0) or 16 .. 31 (half 1) of two vectors, in turn.
NATIVE_INLINE __m512i in_turn(__m512i a, __m512i b, int half) {
  alignas(64) static constexpr uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i index = _mm512_add_epi16(_mm512_load_si512(order), _mm512_set1_epi16(static_cast<short>(16 * half)));
  return _mm512_permutex2var_epi16(a, index, b);
}

// The transpose of 16 rows as right tiles, paired along their width: to[part] is d from 32 * part; tiles lie `apart` numbers apart.
inline void pack_paired_columns(const uint16_t* const* rows, int width, uint16_t* to, int apart) {
  for (int at = 0; at < width; at += tile_depth, to += apart) {
    __m512i pairs[16];
    for (int i = 0; i < tile_rows; ++i) pairs[i] = part_of_row(rows[i], at, width);
    transpose16(pairs);
    for (int i = 0; i < tile_rows; ++i) _mm512_store_si512(to + i * tile_depth, pairs[i]);
  }
}

// The transpose of up to 32 rows: to[d][row], zeros where there is no row, and up to a multiple of 32 of d.
inline void pack_transposed(const uint16_t* const* rows, int count, int width, uint16_t* to) {
  for (int at = 0; at < width; at += tile_depth) {
    __m512i low[16], high[16];  // of two rows each, the first and the last 16 numbers paired
    for (int i = 0; i < 16; ++i) {
      const __m512i even = 2 * i < count ? part_of_row(rows[2 * i], at, width) : _mm512_setzero_si512();
      const __m512i odd = 2 * i + 1 < count ? part_of_row(rows[2 * i + 1], at, width) : _mm512_setzero_si512();
      low[i] = in_turn(even, odd, 0);
      high[i] = in_turn(even, odd, 1);
    }
    transpose16(low);
    transpose16(high);
    for (int i = 0; i < 16; ++i) {
      _mm512_store_si512(to + (at + i) * group_keys, low[i]);
      _mm512_store_si512(to + (at + 16 + i) * group_keys, high[i]);
    }
  }
}

// The bytes from row to row, if they are as many for all.
template <int Count>
NATIVE_INLINE bool equally_spaced(const uint16_t* const* rows, int64_t& stride) {
  const int64_t step = reinterpret_cast<intptr_t>(rows[1]) - reinterpret_cast<intptr_t>(rows[0]);
  int64_t differs = 0;
  for (int i = 1; i + 1 < Count; ++i)
    differs |= reinterpret_cast<intptr_t>(rows[i + 1]) - reinterpret_cast<intptr_t>(rows[i]) - step;
  stride = step;
  return differs == 0;
}

// Rows so far apart that they would fall into few sets of the first cache.
inline bool crowded(int64_t stride, int width) {
  return stride % 512 == 0 && std::abs(stride) > 2 * width * static_cast<int64_t>(sizeof(uint16_t));
}

// Rows of a block as left tiles: where they lie, or copied to `room` (of whole tiles) where they are spread, crowded, few or of odd
// width.
inline void rows_as_tiles(const uint16_t* const* rows, int count, int width, uint16_t* room, Left* tiles) {
  const int padded = whole_tiles(width), groups = (count + group_keys - 1) / group_keys;
  for (int t = 0; t < 2 * groups; ++t) {
    const int first = t * tile_rows;
    if (width == padded && first + tile_rows <= count) {
      tiles[t].first = rows[first];
      if (equally_spaced<tile_rows>(rows + first, tiles[t].stride) && !crowded(tiles[t].stride, width)) continue;
    }
    uint16_t* const copy = room + first * padded;
    for (int i = 0; i < tile_rows; ++i)
      for (int at = 0; at < padded; at += tile_depth)
        _mm512_store_si512(copy + i * padded + at, first + i < count ? part_of_row(rows[first + i], at, width) : _mm512_setzero_si512());
    tiles[t] = {copy, padded * static_cast<int64_t>(sizeof(uint16_t))};
  }
}

// Transposes of groups of 32 rows, kept under where the first row lies and how far apart they are. A new group takes the place of
// another of the same slot.
class TransposedGroups {
 public:
  static constexpr size_t kept_bytes = 512 * 1024;

  TransposedGroups(Parts& parts, int width, int most_keys)
      : width_(width), group_numbers_(whole_tiles(width) * group_keys),
        slots_(static_cast<unsigned>(kept_bytes / (group_numbers_ * sizeof(uint16_t)))) {
    kept_ = parts.take<uint16_t>(static_cast<size_t>(slots_) * group_numbers_);
    names_ = parts.take<Name>(slots_);
    room_ = parts.take<uint16_t>(static_cast<size_t>(most_keys) / group_keys * group_numbers_);
  }

  void forget() { std::fill(names_, names_ + slots_, Name{}); }

  // The transpose of group number `group` of a block, [d][key]: valid until the next block.
  const uint16_t* of(const uint16_t* const* rows, int count, int group) {
    rows += group * group_keys;
    count = std::min(count - group * group_keys, group_keys);
    Name name{rows[0], 0};
    if (count < group_keys || !equally_spaced<group_keys>(rows, name.stride)) {
      uint16_t* const to = room_ + group * group_numbers_;
      pack_transposed(rows, count, width_, to);
      return to;
    }
    const unsigned slot = slot_of(name);
    uint16_t* const to = kept_ + static_cast<size_t>(slot) * group_numbers_;
    if (names_[slot].first != name.first || names_[slot].stride != name.stride) {
      pack_transposed(rows, count, width_, to);
      names_[slot] = name;
    }
    return to;
  }

 private:
  struct Name {
    const uint16_t* first = nullptr;
    int64_t stride = 0;
  };

  // Groups that follow each other have slots that follow each other, so that a block's are apart.
  unsigned slot_of(const Name& name) const {
    const uint64_t address = reinterpret_cast<uintptr_t>(name.first);
    const uint64_t span = static_cast<uint64_t>(std::max<int64_t>(std::abs(name.stride), 1)) * group_keys;
    // Of rows by residues many groups begin within one span.
    const uint64_t number = address / span + address % span / row_bytes * 37;
    return static_cast<unsigned>(number) % slots_;
  }

  int width_, group_numbers_;
  unsigned slots_;
  uint16_t *kept_, *room_;
  Name* names_;
};

// Arithmetic --------------------------------------------------------------------------------------------------------------

// 2^x with an error of 8e-5, a twentieth of what rounding to bfloat16 adds; 2^0 rounds to 1. Below the normal numbers 0, since
// denormals cost a hundred cycles; NaN stays NaN.
NATIVE_INLINE __m512 exp2_rough(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  constexpr int minus_floor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512 rest = _mm512_reduce_ps(x, minus_floor);
  __m512 power = _mm512_set1_ps(0.0780245227f);
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.226067155f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.695833541f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.999925219f));
  return _mm512_maskz_scalef_ps(normal, power, x);  // which takes the floor of x itself
}

// Rows that follow are most often read next: they come from the second cache while these are multiplied.
NATIVE_INLINE void fetch_after(const Left& upper, const Left& lower, int depth) {
  for (const Left* half : {&upper, &lower})
    for (int i = 0; i < tile_rows; ++i) {
      const char* const row = reinterpret_cast<const char*>(half->first) + (group_keys + i) * half->stride;
      for (int at = 0; at < depth; at += tile_depth) _mm_prefetch(row + at * sizeof(uint16_t), _MM_HINT_T0);
    }
}

// to[row][key] = rows . columns, for groups of 32 keys and tiles low .. high - 1 of 16 queries each, packed by pack_paired_columns.
template <int Tiles>
inline void multiply_keys(const Left* keys, int groups, int depth, const uint16_t* queries, int low, int high, float* to) {
  constexpr int ld = Tiles * tile_rows;
  for (int group = 0; group < groups; ++group) {
    const Left &upper = keys[2 * group], &lower = keys[2 * group + 1];
    float* const rows = to + group * group_keys * ld;
    const auto columns = [&]<int Columns>(int j) {
      clear_sums<Columns>();
      for (int at = 0; at < depth; at += tile_depth)
        add_product<Columns>(upper, lower, at, queries + (at / tile_depth * Tiles + j) * tile_numbers);
      store_sums<Columns>(rows + j * tile_rows, ld);
    };
    int j = low;
    for (; j + 2 <= high; j += 2) columns.template operator()<2>(j);
    if (j < high) columns.template operator()<1>(j);
  }
}

// to[query][d] = from[d][query] for 16 queries; from has `ld` numbers a row.
inline void transpose_result(const float* from, int ld, int width, __m512 factor, float* to) {
  for (int at = 0; at < width; at += tile_rows) {
    const __mmask16 within = width - at >= tile_rows ? 0xffff : static_cast<__mmask16>((1u << (width - at)) - 1u);
    __m512i rows[16];
    for (int i = 0; i < tile_rows; ++i)
      rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(from + (at + i) * ld), factor));
    transpose16(rows);
    for (int i = 0; i < tile_rows; ++i) _mm512_mask_storeu_epi32(to + i * width + at, within, rows[i]);
  }
}

}  // namespace amx

// The forward of one tile: an online softmax in base 2 over blocks of keys.
class AmxForward {
 public:
  static constexpr int W = amx::tile_rows, NV = 4, TQ = NV * W;
  static constexpr int KB = 128;  // most keys of a block

  // Of one thread's workspace, which is to be aligned to 64 bytes.
  static size_t bytes(int head_dim, int value_dim) {
    amx::Parts parts(nullptr);
    AmxForward(parts, head_dim, value_dim);
    return parts.used();
  }

  AmxForward(void* workspace, int head_dim, int value_dim) : AmxForward(amx::Parts(workspace), head_dim, value_dim) { forget(); }

  // Values may have changed where they lie: what was packed of them is packed again.
  void forget() { values_.forget(); }

  // q_rows: TQ rows. A pair's weight is 2^(factor * score - the query's maximum); factor > 0.
  void begin(const uint16_t* const* q_rows, float factor) {
    factor_ = factor;
    for (int j = 0; j < NV; ++j)
      amx::pack_paired_columns(q_rows + j * W, head_dim_, queries_ + j * amx::tile_numbers, NV * amx::tile_numbers);
    std::fill(result_, result_ + TQ * amx::whole_tiles(value_dim_), 0.0f);
    std::fill(most_, most_ + TQ, -infinity<float>);
    std::fill(sum_, sum_ + TQ, 0.0f);
  }

  // Goes on from a result (TQ rows) and its log-sum-exps, natural.
  void start_from(const float* rows, const float* lse) {
    for (int i = 0; i < TQ; ++i) {
      const bool seen = lse[i] != -infinity<float>;
      most_[i] = seen ? lse[i] * static_cast<float>(log2_of_e) : -infinity<float>;
      sum_[i] = seen ? 1.0f : 0.0f;
      for (int d = 0; d < value_dim_; ++d) result_[d * TQ + i] = seen ? rows[i * value_dim_ + d] : 0.0f;
    }
  }

  // n keys, 1 <= n <= KB, seen by vectors low .. high - 1. If `edits`, edit(scores, TQ, n) may change their products
  // scores[key * TQ + query], query from low * W to high * W - 1, hiding pairs by -inf.
  template <class Edit>
  void block(const uint16_t* const* k_rows, const uint16_t* const* v_rows, int n, int low, int high, bool edits, const Edit& edit) {
    multiply(k_rows, n, low, high);
    if (edits) edit(scores_, TQ, n);
    weigh_and_sum(v_rows, n, low, high);
  }

  // rows: TQ rows of value_dim numbers; lse: natural. Where nothing was seen 0 and -inf.
  void result(float* rows, float* lse) const {
    for (int j = 0; j < NV; ++j) {
      const __m512 sum = _mm512_load_ps(sum_ + j * W);
      const __mmask16 seen = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512 inverse = _mm512_maskz_div_ps(seen, _mm512_set1_ps(1.0f), sum);
      amx::transpose_result(result_ + j * W, TQ, value_dim_, inverse, rows + j * W * value_dim_);
    }
    for (int i = 0; i < TQ; ++i)
      lse[i] = sum_[i] == 0.0f ? -infinity<float> : static_cast<float>((most_[i] + std::log2(sum_[i])) * ln_of_2);
  }

 private:
  AmxForward(amx::Parts&& parts, int head_dim, int value_dim) : AmxForward(parts, head_dim, value_dim) {}
  AmxForward(amx::Parts& parts, int head_dim, int value_dim)
      : head_dim_(head_dim), value_dim_(value_dim), values_(parts, value_dim, KB),
        queries_(parts.take<uint16_t>(TQ * amx::whole_tiles(head_dim))), weights_(parts.take<uint16_t>(KB * TQ)),
        key_copies_(parts.take<uint16_t>(KB * amx::whole_tiles(head_dim))),
        result_(parts.take<float>(TQ * amx::whole_tiles(value_dim))), scores_(parts.take<float>(KB * TQ)),
        shares_(parts.take<float>(2 * shares_numbers)), most_(parts.take<float>(TQ)), sum_(parts.take<float>(TQ)) {}

  static int groups_of(int n) { return (n + amx::group_keys - 1) / amx::group_keys; }

  __attribute__((noinline)) void multiply(const uint16_t* const* k_rows, int n, int low, int high) {
    amx::Left keys[KB / amx::tile_rows];
    amx::rows_as_tiles(k_rows, n, head_dim_, key_copies_, keys);
    amx::finish_writes();
    amx::multiply_keys<NV>(keys, groups_of(n), head_dim_, queries_, low, high, scores_);
  }

  __attribute__((noinline)) void weigh_and_sum(const uint16_t* const* v_rows, int n, int low, int high) {
    const int groups = groups_of(n);
    for (int key = n; key < groups * amx::group_keys; ++key)  // no keys: hidden
      std::fill(scores_ + key * TQ + low * W, scores_ + key * TQ + high * W, -infinity<float>);
    __m512 factors[NV];
    for (int j = low; j < high; ++j) factors[j] = weigh(groups * amx::group_keys, j);
    const uint16_t* values[KB / amx::group_keys];
    for (int group = 0; group < groups; ++group) values[group] = values_.of(v_rows, n, group);
    amx::finish_writes();
    int j = low;
    for (; j + 2 <= high; j += 2) add_values<2>(values, groups, j, factors + j);
    if (j < high) add_values<1>(values, groups, j, factors + j);
  }

  // Turns one vector's scores into weights; returns by how much what was summed before shrinks.
  //
  // The maximum is the exact one of all keys so far, although a stale one would save shrinking: a query's greatest weight is then 1,
  // which bfloat16 holds exactly. It would have most of the error otherwise.
  NATIVE_INLINE __m512 weigh(int n, int j) {
    const float* const column = scores_ + j * W;
    const __m512 factor = _mm512_set1_ps(factor_);
    __m512 most[4];
    for (__m512& x : most) x = _mm512_set1_ps(-infinity<float>);
    for (int key = 0; key < n; key += 4)
      for (int i = 0; i < 4; ++i) most[i] = _mm512_max_ps(most[i], _mm512_load_ps(column + (key + i) * TQ));
    const __m512 before = _mm512_load_ps(most_ + j * W);
    const __m512 largest = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    const __m512 now = _mm512_max_ps(before, _mm512_mul_ps(largest, factor));
    // Where nothing has been seen yet, -inf - -inf would be NaN.
    const __m512 safe = _mm512_max_ps(now, _mm512_set1_ps(-1e30f));
    const __m512 shrinks = exp2_exact(_mm512_sub_ps(before, safe));

    // Two keys at a time: their weights are rounded and lie paired, as the product with V^T reads them. What is summed are the
    // rounded ones, so that the weights of a query add to 1.
    alignas(64) static constexpr uint16_t pairing[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i paired = _mm512_load_si512(pairing);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 sum = _mm512_mul_ps(_mm512_load_ps(sum_ + j * W), shrinks);
    uint16_t* to = weights_ + j * amx::tile_numbers;
    for (int group = 0; group < n; group += amx::group_keys, to += NV * amx::tile_numbers) {
#pragma GCC unroll 1
      for (int pair = 0; pair < amx::group_keys / 2; ++pair) {
        const float* const at = column + (group + 2 * pair) * TQ;
        const __m512 even = amx::exp2_rough(_mm512_fmsub_ps(_mm512_load_ps(at), factor, safe));
        const __m512 odd = amx::exp2_rough(_mm512_fmsub_ps(_mm512_load_ps(at + TQ), factor, safe));
        const __m512i both = _mm512_permutexvar_epi16(paired, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        _mm512_store_si512(to + pair * amx::tile_depth, both);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)both, ones);
      }
    }
    _mm512_store_ps(most_ + j * W, now);
    _mm512_store_ps(sum_ + j * W, sum);
    return shrinks;
  }

  static NATIVE_INLINE __m512 exp2_exact(__m512 x) { return (__m512)exp2_of((Vector<float>)x); }

  // Adds the weighted values of a block to the result of one or two vectors of queries, which shrinks by `factors`.
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
      // In turn two places, so that the next product need not wait.
      share = share == shares_ ? shares_ + shares_numbers : shares_;
    }
  }

  static constexpr int shares_numbers = amx::tile_depth * 2 * W;

  int head_dim_, value_dim_;
  float factor_ = 1;
  amx::TransposedGroups values_;
  uint16_t *queries_, *weights_, *key_copies_;
  float *result_, *scores_, *shares_, *most_, *sum_;
};

}  // namespace native
#endif  // __AMX_BF16__
