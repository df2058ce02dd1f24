// A writer and a reader with the same functions, so that one description of a message's fields
// serves both directions and a limit is checked alike on both. The first fault is kept and ends the
// work; everything after it does nothing. Used by codec.cc only.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "daemon/base/crypto.h"

namespace kvferry::link {

class Coder {
 public:
  // Whether the message has the form of a mapped pull's, which its type says.
  explicit Coder(bool mapped) : mapped_(mapped) {}
  bool mapped() const { return mapped_; }
  bool ok() const { return fault_ == nullptr; }
  const char* fault() const { return fault_; }
  void demand(bool condition, const char* field) {
    if (!condition && fault_ == nullptr) fault_ = field;
  }

 private:
  bool mapped_;
  const char* fault_ = nullptr;
};

class Writer : public Coder {
 public:
  static constexpr bool kReads = false;
  Writer(std::vector<uint8_t>& out, bool mapped) : Coder(mapped), out_(out) {}

  template <typename U>
  void number(const U& value, const char*) {
    static_assert(std::is_unsigned_v<U>);
    if (!ok()) return;
    const uint64_t wide = value;
    for (std::size_t i = 0; i < sizeof(U); ++i)
      out_.push_back(static_cast<uint8_t>(wide >> (8 * i)));
  }
  // Seven bits a byte, lowest first.
  void varint(uint64_t value, const char*) {
    if (!ok()) return;
    for (; value >= 0x80; value >>= 7) out_.push_back(static_cast<uint8_t>(value | 0x80));
    out_.push_back(static_cast<uint8_t>(value));
  }
  template <std::size_t N>
  void bytes(const std::array<uint8_t, N>& value, const char*) {
    if (ok()) out_.insert(out_.end(), value.begin(), value.end());
  }
  void boolean(const bool& value, const char*) {
    if (ok()) out_.push_back(value ? 1 : 0);
  }
  void text(const std::string& value, std::size_t most, const char* field) {
    demand(value.size() <= most, field);
    varint(value.size(), field);
    if (ok()) out_.insert(out_.end(), value.begin(), value.end());
  }
  template <typename T>
  void count(const std::vector<T>& items, std::size_t most, std::size_t, const char* field) {
    demand(items.size() <= most, field);
    varint(items.size(), field);
  }

 private:
  std::vector<uint8_t>& out_;
};

class Reader : public Coder {
 public:
  static constexpr bool kReads = true;
  Reader(Bytes in, bool mapped) : Coder(mapped), in_(in) {}

  bool at_end() const { return at_ == in_.size(); }
  std::size_t left() const { return in_.size() - at_; }

  template <typename U>
  void number(U& value, const char* field) {
    static_assert(std::is_unsigned_v<U>);
    if (!take(sizeof(U), field)) return;
    uint64_t wide = 0;
    for (std::size_t i = 0; i < sizeof(U); ++i)
      wide |= uint64_t{in_[at_ - sizeof(U) + i]} << (8 * i);
    value = static_cast<U>(wide);
  }
  // Only the shortest form is taken.
  void varint(uint64_t& value, const char* field) {
    uint64_t wide = 0;
    for (unsigned shift = 0;; shift += 7) {
      if (!take(1, field)) return;
      const uint64_t byte = in_[at_ - 1];
      if (shift == 63 && byte > 1) return demand(false, field);
      wide |= (byte & 0x7f) << shift;
      if (byte < 0x80) {
        demand(byte != 0 || shift == 0, field);
        break;
      }
    }
    value = wide;
  }
  template <std::size_t N>
  void bytes(std::array<uint8_t, N>& value, const char* field) {
    if (take(N, field)) std::memcpy(value.data(), in_.data() + at_ - N, N);
  }
  void boolean(bool& value, const char* field) {
    if (!take(1, field)) return;
    demand(in_[at_ - 1] <= 1, field);
    value = in_[at_ - 1] == 1;
  }
  void text(std::string& value, std::size_t most, const char* field) {
    uint64_t size = 0;
    varint(size, field);
    demand(size <= most, field);
    if (!ok() || !take(size, field)) return;
    value.assign(reinterpret_cast<const char*>(in_.data()) + at_ - size, size);
  }
  // `least` bytes must follow for each item, so a length alone reserves no memory.
  template <typename T>
  void count(std::vector<T>& items, std::size_t most, std::size_t least, const char* field) {
    uint64_t size = 0;
    varint(size, field);
    demand(size <= most && size <= left() / least, field);
    if (ok()) items.resize(size);
  }

 private:
  bool take(uint64_t size, const char* field) {
    demand(size <= left(), field);
    if (!ok()) return false;
    at_ += size;
    return true;
  }

  Bytes in_;
  std::size_t at_ = 0;
};

}  // namespace kvferry::link
