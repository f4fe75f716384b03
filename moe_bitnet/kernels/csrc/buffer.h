// Memory for intermediate results: aligned to vector registers, not initialized.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace ternary {

template <class Element>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(Element) + 63) / 64 * 64;
    data_.reset(static_cast<Element*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
  }

  Element* get() const { return data_.get(); }
  Element& operator[](int64_t index) const { return data_.get()[index]; }

 private:
  struct Free {
    void operator()(Element* data) const { std::free(data); }
  };
  std::unique_ptr<Element[], Free> data_;
};

}  // namespace ternary
