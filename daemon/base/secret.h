// Secrets: bytes that are wiped when they go, compared in constant time, and have no printer, order
// or hash. Values; copies are wiped each with its own end. What others copy (protobuf, gRPC, the
// libraries' contexts) is not reached by this.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace kvferry {

// Sets to zero, whatever the compiler thinks of it.
void wipe(std::span<uint8_t> bytes);
void wipe(std::string& text);

// Compares without leaking by time where the first difference stands; false if sizes differ.
bool equal_constant_time(std::span<const uint8_t> a, std::span<const uint8_t> b);

// Of fixed size; Tag keeps the kinds apart.
template <typename Tag, std::size_t N>
class SecretBytes {
 public:
  SecretBytes() = default;
  explicit SecretBytes(const std::array<uint8_t, N>& from) : bytes(from) {}
  SecretBytes(const SecretBytes&) = default;
  SecretBytes& operator=(const SecretBytes&) = default;
  ~SecretBytes() { wipe(bytes); }

  friend bool operator==(const SecretBytes& a, const SecretBytes& b) {
    return equal_constant_time(a.bytes, b.bytes);
  }
  bool is_zero() const { return *this == SecretBytes(); }
  std::span<const uint8_t> span() const { return bytes; }

  std::array<uint8_t, N> bytes{};
};

template <typename T>
struct WipingAllocator {
  using value_type = T;
  WipingAllocator() = default;
  template <typename U>
  // NOLINTNEXTLINE(google-explicit-constructor): allocators convert.
  WipingAllocator(const WipingAllocator<U>&) {}
  T* allocate(std::size_t count) { return std::allocator<T>().allocate(count); }
  void deallocate(T* at, std::size_t count) {
    wipe({reinterpret_cast<uint8_t*>(at), count * sizeof(T)});
    std::allocator<T>().deallocate(at, count);
  }
  friend bool operator==(const WipingAllocator&, const WipingAllocator&) { return true; }
};

// Of any size.
using SecretVector = std::vector<uint8_t, WipingAllocator<uint8_t>>;

}  // namespace kvferry
