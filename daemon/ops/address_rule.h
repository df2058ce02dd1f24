// Who may be where: one entry of a peer's `addresses`, a host name, an address or a network, with
// or without a port. Values without state; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "daemon/base/result.h"

namespace kvferry::ops {

struct AddressRule {
  std::string host;         // a name, or a numeric address without brackets
  bool numeric = false;     // `host` is an IPv4 or IPv6 address
  uint8_t prefix_bits = 0;  // numeric only: how many leading bits count; 32 or 128 for one address
  uint16_t port = 0;        // 0: any
  bool operator==(const AddressRule&) const = default;

  // True when a numeric address and port fall under this rule. A rule with a name never matches a
  // number: the caller resolves the name and asks with same_address().
  bool matches(std::string_view numeric_address, uint16_t to_port) const;
  std::string to_string() const;
};

// "10.0.0.7", "10.0.0.7:7400", "10.0.0.0/8", "10.0.0.0/8:7400", "[fd00::1]:7400", "fd00::/8",
// "node-b.example:7400". INVALID_ARGUMENT BAD_ADDRESS otherwise.
Result<AddressRule> parse_address_rule(std::string_view text);

struct HostPort {
  std::string host;  // without brackets
  uint16_t port = 0;
};
// "127.0.0.1:0", "[::]:7400", "host:7400"; the port must be there.
Result<HostPort> parse_host_port(std::string_view text);
std::string format_host_port(std::string_view host, uint16_t port);

bool is_numeric_address(std::string_view host);
// 127.0.0.0/8, ::1, an IPv4-mapped 127.0.0.0/8, or the name "localhost".
bool is_loopback(std::string_view host);
// Compares numeric addresses by value ("::1" = "0:0:0:0:0:0:0:1").
bool same_address(std::string_view a, std::string_view b);

}  // namespace kvferry::ops
