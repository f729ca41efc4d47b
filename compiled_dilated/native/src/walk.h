// The keys that a tile of queries sees, in blocks that some of its vectors see.
#pragma once
#include <limits>

#include "callback.h"
#include "tiles.h"

namespace native {

// Keys that vectors low .. high - 1 of a tile see.
struct KeyBlock {
  int count = 0, low = 0, high = 0;
  bool any_partial = false;
  int64_t repeats = 1;      // blocks of as many keys that it represents, where blocks are counted only
  int32_t least = 0;        // the least of its keys
  int64_t least_after = 0;  // later blocks of a branch without a step have no key below it
  const int32_t* keys = nullptr;
  const uint8_t* partial = nullptr;  // per key: bit j is set if vector j sees only some of its pairs
  const uint64_t* seen = nullptr;    // per partial key: bit lane_bits * (j - low) + i is set if lane i of vector j sees it
};

constexpr int lane_bits = 16;
constexpr int most_block_keys = 128;  // of any engine

// most_keys: of a block. grain: runs of at most so many keys are classified vector by vector.
// fine_grain: the same where an edge runs through them. counted: blocks of visible keys may be passed
// as repeats of one, without their keys.
struct WalkSizes {
  int most_keys, grain, fine_grain;
  bool counted = false;
};

// The sizes of an engine: lanes of a vector, queries of a tile, and those of its walk.
template <class T>
struct WideWalk {
  static constexpr int W = lanes<T>, TQ = tile_queries<T>, most_keys = block_keys;
  static constexpr WalkSizes sizes{most_keys, 16, 4};
  using Number = T;

  // Lanes of a tile's vectors that are computed.
  static int computed_lanes(const QueryTile<W>& tile) { return tile.is_single() ? 1 : W; }
};

struct AmxWalk {
  static constexpr int W = 16, TQ = tile_vectors * W, most_keys = 128;
  static constexpr WalkSizes sizes{most_keys, 32, 32};
  using Number = float;

  static int computed_lanes(const QueryTile<W>&) { return W; }
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

// Bounds of the keys that a tile sees.
KeyRange range_of_keys(const Masks& masks, int64_t b, int64_t h, const Group& group, const TileRegions& tile, int64_t kv_len);

// Calls visit(branch, block) for all blocks of a tile among some keys, branch by branch; `seen` is not
// yet set.
void walk_keys(const Masks& masks, int64_t b, int64_t h, const Group& group, const TileRegions& tile, const KeyRange& keys,
               const WalkSizes& sizes, const Callback<const Branch&, const KeyBlock&>& visit);

// Numbers of the ranges that a tile may see, ascending: keys are cut into ranges of `length`.
std::vector<int64_t> ranges_seen(const Masks& masks, int64_t b, int64_t h, const Group& group, const TileRegions& tile, int64_t kv_len,
                                 int64_t length);

}  // namespace native
