// Which keys a tile of queries sees, in blocks that some of its vectors see.
#pragma once
#include <limits>

#include "callback.h"
#include "tiles.h"

namespace native {

// Keys that the same vectors of a tile see, low .. high - 1.
struct KeyBlock {
  int count = 0, low = 0, high = 0;
  bool any_partial = false;
  int32_t least = 0;        // of its keys
  int64_t least_after = 0;  // no later block of the branch has a key below this, where its keys are walked without a step
  const int32_t* keys = nullptr;
  const uint8_t* partial = nullptr;  // of each key: bit j says that vector j sees some of its pairs only
  const uint64_t* seen = nullptr;    // of each key with such vectors: bit lane_bits * (j - low) + i says that lane i of vector j sees it
};

constexpr int lane_bits = 16;
constexpr int most_block_keys = 128;  // of any engine

// Most keys of a block. Keys of so many as the grain or fewer are asked about vector by vector; edges are followed down to the finer
// grain.
struct WalkSizes {
  int most_keys, grain, fine_grain;
};

// How an engine cuts a sequence: lanes of a vector, queries of a tile, and what its walk does.
template <class T>
struct WideWalk {
  static constexpr int W = lanes<T>, TQ = tile_queries<T>, most_keys = block_keys;
  static constexpr WalkSizes sizes{most_keys, 16, 4};
  using Number = T;
};

struct AmxWalk {
  static constexpr int W = 16, TQ = tile_vectors * W, most_keys = 128;
  static constexpr WalkSizes sizes{most_keys, 32, 32};
  using Number = float;
};

// Keys first .. after - 1.
struct KeyRange {
  int64_t first, after;

  void add(const KeyRange& other) {
    first = std::min(first, other.first);
    after = std::max(after, other.after);
  }
};

constexpr KeyRange no_keys{std::numeric_limits<int64_t>::max(), 0};

// No key that a tile sees lies outside.
KeyRange range_of_keys(const Masks& masks, int64_t b, int64_t h, const Group& group, const TileRegions& tile, int64_t kv_len);

// All blocks of a tile, branch by branch: visit(branch, block). Blocks come without who sees their keys.
void walk_keys(const Masks& masks, int64_t b, int64_t h, const Group& group, const TileRegions& tile, int64_t kv_len,
               const WalkSizes& sizes, const Callback<const Branch&, const KeyBlock&>& visit);

}  // namespace native
