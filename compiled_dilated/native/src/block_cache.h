// A cache of the blocks of tiles, for heads with equal masks.
#pragma once
#include <numeric>
#include <vector>

#include "walk.h"

namespace native {

// The blocks of a stretch's tiles and which lanes see their keys, reused by a thread for the next
// head with an equal mask.
class BlockCache {
 public:
  // The limits of blocks: those that stay in the L2 cache while heads share them, and those of long
  // tiles that are computed in turn.
  static constexpr int64_t most_shared = 2048, most_of_long = 6144;

  explicit BlockCache(int64_t most_blocks) : most_blocks_(most_blocks) {}

  // Starts a stretch; the blocks of the same stretch stay valid.
  void start(int64_t entry, int64_t group, int64_t first, int64_t tiles) {
    const int64_t key[3] = {entry, group, first};
    if (std::equal(key, key + 3, key_) && tiles == static_cast<int64_t>(tiles_.size())) return;
    std::copy(key, key + 3, key_);
    blocks_.clear();
    keys_.clear();
    partial_.clear();
    seen_.clear();
    tiles_.assign(static_cast<size_t>(tiles), {});
  }

  using Visit = Callback<const Branch&, const KeyBlock&>;

  // Calls visit(branch, block) for all blocks of tile `index` of the stretch: cached ones, or those
  // that walk(visit) yields and answer(branch, block, seen) completes.
  void blocks(int64_t index, const Callback<const Visit&>& walk, const Callback<const Branch&, const KeyBlock&, uint64_t*>& answer,
              const Visit& visit) {
    Range& range = tiles_[static_cast<size_t>(index)];
    if (range.is_complete) {
      for (size_t at = range.start; at < range.stop; ++at) visit(blocks_[at].branch, with_arrays(blocks_[at]));
      return;
    }
    range.start = blocks_.size();
    const auto take = [&](const Branch& branch, const KeyBlock& block) {
      uint64_t seen[most_block_keys];
      KeyBlock complete = block;
      complete.seen = seen;
      if (block.any_partial) answer(branch, block, seen);
      if (static_cast<int64_t>(blocks_.size()) < most_blocks_) store(branch, complete);
      visit(branch, complete);
    };
    walk(take);
    range.stop = blocks_.size();
    // A tile that does not fit is walked again for every head.
    range.is_complete = static_cast<int64_t>(range.stop) < most_blocks_;
  }

  // Stores the blocks of tile `index` without a visit; returns how many they are, 0 if not all fit.
  int64_t store_all(int64_t index, const Callback<const Visit&>& walk, const Callback<const Branch&, const KeyBlock&, uint64_t*>& answer) {
    const Range& range = tiles_[static_cast<size_t>(index)];
    if (!range.is_complete && static_cast<int64_t>(blocks_.size()) < most_blocks_) blocks(index, walk, answer, [](const Branch&, const KeyBlock&) {});
    return range.is_complete ? static_cast<int64_t>(range.stop - range.start) : 0;
  }

  // Calls visit(branch, block) for stored blocks first .. after - 1 of tile `index`.
  void some_blocks(int64_t index, int64_t first, int64_t after, const Visit& visit) {
    const Range& range = tiles_[static_cast<size_t>(index)];
    const size_t stop = std::min(range.stop, range.start + static_cast<size_t>(after));
    for (size_t at = range.start + static_cast<size_t>(first); at < stop; ++at) visit(blocks_[at].branch, with_arrays(blocks_[at]));
  }

 private:
  struct Range {
    size_t start = 0, stop = 0;
    bool is_complete = false;
  };
  struct Entry {
    Branch branch;
    KeyBlock block;  // without its arrays
    size_t keys, partial;
    bool is_run;  // its keys are block.least and those that follow, which are not stored
  };

  void store(const Branch& branch, const KeyBlock& block) {
    bool is_run = true;
    for (int i = 0; i < block.count; ++i) is_run &= block.keys[i] == block.least + i;
    blocks_.push_back({branch, block, keys_.size(), partial_.size(), is_run});
    if (!is_run) keys_.insert(keys_.end(), block.keys, block.keys + block.count);
    if (!block.any_partial) return;
    partial_.insert(partial_.end(), block.partial, block.partial + block.count);
    seen_.insert(seen_.end(), block.seen, block.seen + block.count);
  }

  // The block, valid until the next call.
  KeyBlock with_arrays(const Entry& entry) {
    static constexpr uint8_t none[most_block_keys] = {};
    KeyBlock block = entry.block;
    if (entry.is_run) std::iota(run_, run_ + block.count, block.least);
    block.keys = entry.is_run ? run_ : keys_.data() + entry.keys;
    block.partial = block.any_partial ? partial_.data() + entry.partial : none;
    block.seen = seen_.data() + entry.partial;
    return block;
  }

  const int64_t most_blocks_;
  int32_t run_[most_block_keys];
  int64_t key_[3] = {-1, -1, -1};
  std::vector<Entry> blocks_;
  std::vector<int32_t> keys_;
  std::vector<uint8_t> partial_;
  std::vector<uint64_t> seen_;
  std::vector<Range> tiles_;
};

}  // namespace native
