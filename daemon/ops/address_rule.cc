#include "daemon/ops/address_rule.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <array>
#include <charconv>
#include <cstring>
#include <optional>

namespace kvferry::ops {
namespace {

struct Address {
  std::array<uint8_t, 16> bytes{};
  std::size_t size = 0;  // 4 or 16
};

// IPv4-mapped IPv6 becomes IPv4, so that a dual-stack socket's view of a peer compares equal.
std::optional<Address> parse_address(std::string_view text) {
  const std::string host(text);
  Address out;
  if (inet_pton(AF_INET, host.c_str(), out.bytes.data()) == 1) {
    out.size = 4;
    return out;
  }
  if (inet_pton(AF_INET6, host.c_str(), out.bytes.data()) != 1) return std::nullopt;
  out.size = 16;
  static constexpr std::array<uint8_t, 12> kMapped{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  if (std::memcmp(out.bytes.data(), kMapped.data(), kMapped.size()) == 0) {
    std::memmove(out.bytes.data(), out.bytes.data() + 12, 4);
    out.size = 4;
  }
  return out;
}

template <typename T>
bool parse_number(std::string_view text, T& out) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, out);
  return error == std::errc{} && stop == end && !text.empty();
}

bool is_host_name(std::string_view host) {
  if (host.empty() || host.size() > 253 || host.front() == '-' || host.front() == '.') return false;
  for (const char c : host) {
    const bool ok = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                    c == '.' || c == '-' || c == '_';
    if (!ok) return false;
  }
  return true;
}

struct Split {
  std::string_view host;
  std::optional<std::string_view> port;
};

// Takes "[v6]:port", "v6", "host:port" and "host" apart; nothing is checked but the brackets.
std::optional<Split> split_port(std::string_view text) {
  if (!text.empty() && text.front() == '[') {
    const std::size_t close = text.find(']');
    if (close == std::string_view::npos) return std::nullopt;
    const std::string_view rest = text.substr(close + 1);
    if (rest.empty()) return Split{text.substr(1, close - 1), std::nullopt};
    if (rest.front() != ':') return std::nullopt;
    return Split{text.substr(1, close - 1), rest.substr(1)};
  }
  const std::size_t colon = text.find(':');
  // More than one colon without brackets: an IPv6 address without a port.
  if (colon == std::string_view::npos || text.find(':', colon + 1) != std::string_view::npos)
    return Split{text, std::nullopt};
  return Split{text.substr(0, colon), text.substr(colon + 1)};
}

tl::unexpected<Error> bad(std::string_view text, std::string_view why) {
  std::string message = "\"";
  message.append(text).append("\" ").append(why);
  return invalid("", "BAD_ADDRESS", std::move(message));
}

bool same_prefix(const Address& a, const Address& b, std::size_t bits) {
  const std::size_t whole = bits / 8;
  if (std::memcmp(a.bytes.data(), b.bytes.data(), whole) != 0) return false;
  const std::size_t rest = bits % 8;
  if (rest == 0) return true;
  const auto mask = static_cast<uint8_t>(0xff00U >> rest);
  return (a.bytes.at(whole) & mask) == (b.bytes.at(whole) & mask);
}

}  // namespace

bool AddressRule::matches(std::string_view numeric_address, uint16_t to_port) const {
  if (!numeric || (port != 0 && port != to_port)) return false;
  const auto mine = parse_address(host);
  const auto other = parse_address(numeric_address);
  if (!mine || !other || mine->size != other->size) return false;
  return same_prefix(*mine, *other, prefix_bits);
}

std::string AddressRule::to_string() const {
  std::string out = host;
  if (numeric) {
    const auto address = parse_address(host);
    if (address && prefix_bits != address->size * 8) out += "/" + std::to_string(prefix_bits);
  }
  if (port == 0) return out;
  if (out.find(':') != std::string::npos) out = "[" + out + "]";
  return out + ":" + std::to_string(port);
}

Result<AddressRule> parse_address_rule(std::string_view text) {
  AddressRule rule;
  std::string_view host_text = text;
  std::optional<std::string_view> bits_text;
  std::optional<std::string_view> port_text;

  // "network/bits[:port]" first: the port stands behind the bits. "[network/bits]:port" works too.
  const bool bracketed = !text.empty() && text.front() == '[';
  const std::size_t slash = text.find('/');
  if (slash != std::string_view::npos && !bracketed) {
    host_text = text.substr(0, slash);
    std::string_view rest = text.substr(slash + 1);
    const std::size_t colon = rest.find(':');
    if (colon != std::string_view::npos) {
      port_text = rest.substr(colon + 1);
      rest = rest.substr(0, colon);
    }
    bits_text = rest;
  } else {
    const auto split = split_port(text);
    if (!split) return bad(text, "is not an address");
    host_text = split->host;
    port_text = split->port;
    const std::size_t inner = host_text.find('/');
    if (inner != std::string_view::npos) {
      bits_text = host_text.substr(inner + 1);
      host_text = host_text.substr(0, inner);
    }
  }

  rule.host = std::string(host_text);
  const auto address = parse_address(host_text);
  rule.numeric = address.has_value();
  if (!rule.numeric && (bits_text || !is_host_name(host_text)))
    return bad(text, "is neither an address, a network nor a host name");
  if (rule.numeric) {
    rule.prefix_bits = static_cast<uint8_t>(address->size * 8);
    if (bits_text) {
      uint8_t bits = 0;
      if (!parse_number(*bits_text, bits) || bits > rule.prefix_bits)
        return bad(text, "has a wrong number of network bits");
      rule.prefix_bits = bits;
    }
  }
  if (port_text && (!parse_number(*port_text, rule.port) || rule.port == 0))
    return bad(text, "has a wrong port");
  return rule;
}

Result<HostPort> parse_host_port(std::string_view text) {
  const auto split = split_port(text);
  HostPort out;
  if (!split || !split->port || !parse_number(*split->port, out.port))
    return bad(text, "is not host:port");
  if (!is_numeric_address(split->host) && !is_host_name(split->host))
    return bad(text, "names no host");
  out.host = std::string(split->host);
  return out;
}

std::string format_host_port(std::string_view host, uint16_t port) {
  std::string out(host);
  if (out.find(':') != std::string::npos) out = "[" + out + "]";
  return out + ":" + std::to_string(port);
}

bool is_numeric_address(std::string_view host) {
  return parse_address(host).has_value();
}

bool is_loopback(std::string_view host) {
  if (host == "localhost") return true;
  const auto address = parse_address(host);
  if (!address) return false;
  if (address->size == 4) return address->bytes[0] == 127;
  static constexpr std::array<uint8_t, 16> kOne{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
  return address->bytes == kOne;
}

bool same_address(std::string_view a, std::string_view b) {
  const auto left = parse_address(a);
  const auto right = parse_address(b);
  return left && right && left->size == right->size &&
         std::memcmp(left->bytes.data(), right->bytes.data(), left->size) == 0;
}

}  // namespace kvferry::ops
