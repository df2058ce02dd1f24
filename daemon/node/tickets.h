// Instance tickets: what leads a receiver to an instance. A hint, never authority: whoever it names
// still has to be allowed and to prove itself. Pure functions; any thread; any input is safe.
#pragma once

#include <string>
#include <string_view>
#include <variant>

#include "daemon/base/ids.h"
#include "daemon/base/result.h"

namespace kvferry::node {

inline constexpr std::size_t kMaxTicketBytes = 256;

// Base64url, fits an HTTP field.
struct InstanceTicket {
  std::string node;      // identity of the daemon to ask first
  std::string address;   // where it takes handshakes, host:port
  std::string instance;  // "tenant/name"
  Incarnation incarnation;
  Digest16 generations;  // digest of the instance's cards
  bool operator==(const InstanceTicket&) const = default;
};

// "kvferry:host:port/instance", the instance being "name" (tenant "default") or "tenant/name". What
// it leads to is found out at first contact.
struct NamedTicket {
  std::string address;
  std::string instance;  // "tenant/name"
  bool operator==(const NamedTicket&) const = default;
};

using Ticket = std::variant<InstanceTicket, NamedTicket>;

// INVALID_ARGUMENT TICKET_TOO_LONG if it would not fit kMaxTicketBytes.
Result<std::string> format_ticket(const InstanceTicket& ticket);
// INVALID_ARGUMENT BAD_TICKET, naming the field "ticket".
Result<Ticket> parse_ticket(std::string_view text);

// "tenant/name" of either form; the incarnation is zero for a name.
std::string instance_of(const Ticket& ticket);
Incarnation incarnation_of(const Ticket& ticket);

}  // namespace kvferry::node
