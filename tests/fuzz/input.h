// What the fuzz targets share: bytes taken one after the other as numbers, and a check that ends
// the process whatever the build.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string_view>

// Every target defines it; libFuzzer, or replay_main.cc, calls it. Returns 0.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size);

#define FUZZ_CHECK(condition, what)                                          \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, what); \
      std::abort();                                                          \
    }                                                                        \
  } while (false)

namespace kvferry::fuzz {

// Reads zeros past its end.
class Input {
 public:
  Input(const uint8_t* data, std::size_t size) : bytes_(data, size) {}

  bool empty() const { return at_ == bytes_.size(); }
  uint8_t byte() { return empty() ? uint8_t{0} : bytes_[at_++]; }
  // 0 ... n - 1 (n at most 256).
  uint32_t below(uint32_t n) { return n == 0 ? 0 : byte() % n; }
  bool chance() { return (byte() & 1) != 0; }
  template <typename U>
  U number() {
    uint64_t value = 0;
    for (std::size_t i = 0; i < sizeof(U); ++i) value |= uint64_t{byte()} << (8 * i);
    return static_cast<U>(value);
  }
  // Mostly small, sometimes at a limit, sometimes anything.
  uint64_t size() {
    const uint8_t kind = byte();
    if (kind < 192) return kind;
    if (kind < 224) return number<uint16_t>();
    if (kind < 240) return (uint64_t{1} << (byte() % 64)) - (kind & 1);
    return number<uint64_t>();
  }
  std::span<const uint8_t> bytes(std::size_t most) {
    const std::size_t n = std::min(most, bytes_.size() - at_);
    at_ += n;
    return bytes_.subspan(at_ - n, n);
  }
  std::span<const uint8_t> rest() { return bytes(bytes_.size()); }
  // Up to the next zero byte, which is taken too.
  std::span<const uint8_t> until_zero() {
    const auto left = bytes_.subspan(at_);
    const auto end = std::find(left.begin(), left.end(), uint8_t{0});
    const auto n = static_cast<std::size_t>(end - left.begin());
    at_ += std::min(n + 1, left.size());
    return left.first(n);
  }

 private:
  std::span<const uint8_t> bytes_;
  std::size_t at_ = 0;
};

inline std::string_view text_of(std::span<const uint8_t> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace kvferry::fuzz
