// Memory for intermediate results: aligned to vector registers, not initialized.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace ternary {

// Large blocks that this thread gave back, for its next call: fresh memory from the system costs a page fault every
// 4 KB, a tenth of a product of many rows.
class BlockCache {
 public:
  static BlockCache& of_thread() {
    static thread_local BlockCache cache;
    return cache;
  }

  ~BlockCache() {
    for (const auto& [data, bytes] : blocks_) std::free(data);
  }

  void* take(size_t bytes) {
    for (auto& block : blocks_) {
      if (block.second != bytes) continue;
      void* data = block.first;
      held_bytes_ -= bytes;
      block = blocks_.back();
      blocks_.pop_back();
      return data;
    }
    return nullptr;
  }

  void give(void* data, size_t bytes) {
    while (!blocks_.empty() && held_bytes_ + bytes > kMaxHeldBytes) {
      std::free(blocks_.front().first);
      held_bytes_ -= blocks_.front().second;
      blocks_.erase(blocks_.begin());
    }
    if (bytes > kMaxHeldBytes) return std::free(data);
    blocks_.emplace_back(data, bytes);
    held_bytes_ += bytes;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kMaxHeldBytes = 0;  // the sanitizer should see every block come and go
#else
  static constexpr size_t kMaxHeldBytes = size_t{64} << 20;
#endif
  std::vector<std::pair<void*, size_t>> blocks_;
  size_t held_bytes_ = 0;
};

template <class Element>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(Element) + 63) / 64 * 64;
    void* data = bytes >= kWorthKeeping ? BlockCache::of_thread().take(bytes) : nullptr;
    if (!data) data = std::aligned_alloc(64, bytes);
    if (!data) throw std::bad_alloc();
    data_ = Holder(static_cast<Element*>(data), Release{bytes});
  }

  Element* get() const { return data_.get(); }
  Element& operator[](int64_t index) const { return data_.get()[index]; }

 private:
  static constexpr size_t kWorthKeeping = 128 << 10;  // smaller blocks stay in the allocator's own lists

  struct Release {
    size_t bytes = 0;
    void operator()(Element* data) const {
      if (bytes < kWorthKeeping) return std::free(data);
      BlockCache::of_thread().give(data, bytes);
    }
  };
  using Holder = std::unique_ptr<Element[], Release>;
  Holder data_;
};

}  // namespace ternary
