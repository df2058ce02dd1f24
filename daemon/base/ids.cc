#include "daemon/base/ids.h"

#include <string_view>

namespace kvferry {
namespace {

constexpr std::string_view kHexDigits = "0123456789abcdef";
constexpr std::string_view kBase64Digits =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::string to_hex(std::span<const uint8_t> bytes) {
  std::string out;
  out.reserve(bytes.size() * 2);
  for (uint8_t b : bytes) {
    out.push_back(kHexDigits[b >> 4]);
    out.push_back(kHexDigits[b & 15]);
  }
  return out;
}

bool from_hex(std::string_view hex, std::span<uint8_t> out) {
  if (hex.size() != out.size() * 2) return false;
  for (char c : hex)
    if (hex_value(c) < 0) return false;
  for (std::size_t i = 0; i < out.size(); ++i)
    out[i] = static_cast<uint8_t>(hex_value(hex[2 * i]) * 16 + hex_value(hex[2 * i + 1]));
  return true;
}

std::string to_base64url(std::span<const uint8_t> bytes) {
  std::string out;
  uint32_t bits = 0;
  int count = 0;
  for (uint8_t b : bytes) {
    bits = (bits << 8) | b;
    count += 8;
    while (count >= 6) {
      count -= 6;
      out.push_back(kBase64Digits[(bits >> count) & 63]);
    }
  }
  if (count > 0) out.push_back(kBase64Digits[(bits << (6 - count)) & 63]);
  return out;
}

bool from_base64url(std::string_view text, std::string& out) {
  if (text.size() % 4 == 1) return false;
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  for (char c : text) {
    const std::size_t value = kBase64Digits.find(c);
    if (value == std::string_view::npos) return false;
    bits = (bits << 6) | static_cast<uint32_t>(value);
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes.push_back(static_cast<char>((bits >> count) & 255));
    }
  }
  if ((bits & ((1U << count) - 1)) != 0) return false;  // only the canonical form is taken
  out = std::move(bytes);
  return true;
}

}  // namespace kvferry
