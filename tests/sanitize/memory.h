// Memory whose every byte is accounted for: what an op may touch lies between bands that it may not.
//
// AddressSanitizer reports an access to a band where the compiler instrumented it. It does not instrument streaming
// stores, and in builds without it nothing does, so the bands also carry a pattern that is compared.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#endif
#endif
#if !defined(ASAN_POISON_MEMORY_REGION)
#define ASAN_POISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#endif

namespace sanitize {

inline void check(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error(what);
}

constexpr int64_t kLine = 64, kBand = 2 * kLine;
constexpr unsigned char kPattern = 0xff;  // a NaN in every dtype: what is read from a band, or never written, shows

// One allocation: a band, `bytes` bytes that begin `offset` bytes past a cache line, a band. Live are the stretches
// that were claimed; the rest, bands and what lies between the stretches, belongs to nobody.
class Memory {
 public:
  Memory(int64_t bytes, int64_t offset) : begin_(kBand + offset), size_(begin_ + bytes + kBand) {
    const size_t whole = size_t((size_ + kLine - 1) / kLine * kLine);
    base_ = static_cast<unsigned char*>(std::aligned_alloc(size_t(kLine), whole));
    if (!base_) throw std::bad_alloc();
    std::memset(base_, kPattern, whole);
    expected_.assign(size_t(size_), kPattern);
  }
  ~Memory() {
    open();
    std::free(base_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return reinterpret_cast<char*>(base_ + begin_); }
  // What must stand at data() after the op: to be changed along with it.
  char* expected() { return reinterpret_cast<char*>(expected_.data() + begin_); }

  // Claims [at, at + bytes), with the values that `expected` already holds there.
  void claim(int64_t at, int64_t bytes) {
    live_.emplace_back(begin_ + at, begin_ + at + bytes);
    std::memcpy(base_ + begin_ + at, expected() + at, size_t(bytes));
  }
  // Closes whatever is not live to instrumented code; stretches must have been claimed in order.
  void close() {
    int64_t at = 0;
    for (const auto& [begin, end] : live_) {
      if (at < begin) ASAN_POISON_MEMORY_REGION(base_ + at, size_t(begin - at));
      at = end;
    }
    ASAN_POISON_MEMORY_REGION(base_ + at, size_t(size_ - at));
  }
  void open() { ASAN_UNPOISON_MEMORY_REGION(base_, size_t(size_)); }
  // The live stretches as they are now become what is expected: for values that nobody compares.
  void accept() {
    for (const auto& [begin, end] : live_) std::memcpy(expected_.data() + begin, base_ + begin, size_t(end - begin));
  }
  // Every byte, bands included, is what is expected.
  void verify(const char* what) {
    open();
    if (std::memcmp(base_, expected_.data(), size_t(size_)) == 0) return;
    int64_t at = 0;
    while (base_[at] == expected_[size_t(at)]) ++at;
    bool live = false;
    for (const auto& [begin, end] : live_) live = live || (at >= begin && at < end);
    throw std::logic_error(std::string(what) + ": byte " + std::to_string(at - begin_) + " of " +
                           std::to_string(size_ - begin_ - kBand) +
                           (live ? " is not what the plain loop gives" : ", in a guard band, was written"));
  }

 private:
  int64_t begin_, size_;
  unsigned char* base_;
  std::vector<unsigned char> expected_;
  std::vector<std::pair<int64_t, int64_t>> live_;
};

}  // namespace sanitize
