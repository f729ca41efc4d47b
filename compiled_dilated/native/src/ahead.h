// Rows to prefetch, a few cache lines at a time between products: all at once would wait for
// memory.
#pragma once
#include <cstdint>

namespace native {

class Ahead {
 public:
  void clear() { count_ = next_ = 0, at_ = 0; }

  void add(const void* row, int64_t bytes) {
    if (count_ < most) rows_[count_++] = {static_cast<const char*>(row), bytes};
  }

  void fetch_some() {
    for (int i = 0; i < at_once && next_ < count_; ++i) {
      __builtin_prefetch(rows_[next_].start + at_, 0, 2);
      at_ += line;
      if (at_ < rows_[next_].bytes) continue;
      at_ = 0;
      ++next_;
    }
  }

 private:
  static constexpr int most = 256, at_once = 6, line = 64;
  struct Row {
    const char* start;
    int64_t bytes;
  };
  Row rows_[most];
  int count_ = 0, next_ = 0;
  int64_t at_ = 0;
};

}  // namespace native
