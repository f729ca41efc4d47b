// A cache of the blocks of tiles, for heads with equal masks.
#pragma once
#include <vector>

#include "walk.h"

namespace native {

// The blocks of a stretch's tiles and which lanes see their keys, reused by a thread for the next
// head with an equal mask.
class BlockCache {
 public:
  static constexpr int64_t most_blocks = 2048;

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
      if (static_cast<int64_t>(blocks_.size()) < most_blocks) store(branch, complete);
      visit(branch, complete);
    };
    walk(take);
    range.stop = blocks_.size();
    // A tile that does not fit is walked again for every head.
    range.is_complete = static_cast<int64_t>(range.stop) < most_blocks;
  }

 private:
  struct Range {
    size_t start = 0, stop = 0;
    bool is_complete = false;
  };
  struct Entry {
    Branch branch;
    KeyBlock block;  // without its arrays
    size_t keys, seen;
  };

  void store(const Branch& branch, const KeyBlock& block) {
    blocks_.push_back({branch, block, keys_.size(), seen_.size()});
    keys_.insert(keys_.end(), block.keys, block.keys + block.count);
    partial_.insert(partial_.end(), block.partial, block.partial + block.count);
    if (block.any_partial) seen_.insert(seen_.end(), block.seen, block.seen + block.count);
  }

  KeyBlock with_arrays(const Entry& entry) const {
    KeyBlock block = entry.block;
    block.keys = keys_.data() + entry.keys;
    block.partial = partial_.data() + entry.keys;
    block.seen = seen_.data() + entry.seen;
    return block;
  }

  int64_t key_[3] = {-1, -1, -1};
  std::vector<Entry> blocks_;
  std::vector<int32_t> keys_;
  std::vector<uint8_t> partial_;
  std::vector<uint64_t> seen_;
  std::vector<Range> tiles_;
};

}  // namespace native
