#include "daemon/node/tickets.h"

#include <algorithm>

#include "daemon/base/crypto.h"
#include "daemon/link/codec.h"
#include "daemon/ops/address_rule.h"

namespace kvferry::node {
namespace {

constexpr uint8_t kVersion = 1;
constexpr std::size_t kChecksumBytes = 4;
constexpr std::string_view kNamePrefix = "kvferry:";

tl::unexpected<Error> bad_ticket(std::string message) {
  return invalid("ticket", "BAD_TICKET", std::move(message));
}

// Against tickets mangled on their way; whom to trust is decided elsewhere.
std::array<uint8_t, kChecksumBytes> checksum(Bytes bytes) {
  return cut<kChecksumBytes>(sha256({bytes_of("kvferry ticket"), bytes}));
}

bool append_text(std::string& out, const std::string& text) {
  if (text.empty() || text.size() > 255) return false;
  out.push_back(static_cast<char>(text.size()));
  out += text;
  return true;
}

bool take_text(std::string_view& from, std::string& out) {
  if (from.empty()) return false;
  const std::size_t size = static_cast<uint8_t>(from[0]);
  if (size == 0 || from.size() < 1 + size) return false;
  out = from.substr(1, size);
  from.remove_prefix(1 + size);
  return true;
}

template <std::size_t N>
void append_bytes(std::string& out, const std::array<uint8_t, N>& bytes) {
  out.append(reinterpret_cast<const char*>(bytes.data()), N);
}

template <std::size_t N>
bool take_bytes(std::string_view& from, std::array<uint8_t, N>& out) {
  if (from.size() < N) return false;
  std::copy(from.begin(), from.begin() + N, out.begin());
  from.remove_prefix(N);
  return true;
}

Result<Ticket> parse_named(std::string_view text) {
  text.remove_prefix(kNamePrefix.size());
  const std::size_t slash = text.find('/');
  if (slash == std::string_view::npos)
    return bad_ticket("a ticket by name is kvferry:host:port/instance");
  NamedTicket ticket;
  ticket.address = text.substr(0, slash);
  ticket.instance = text.substr(slash + 1);
  if (ticket.instance.find('/') == std::string::npos) ticket.instance.insert(0, "default/");
  const Result<ops::HostPort> address = ops::parse_host_port(ticket.address);
  if (!address || address->port == 0) return bad_ticket("the ticket's address is not host:port");
  if (!link::valid_instance_name(ticket.instance))
    return bad_ticket("the ticket's instance has no valid name");
  return ticket;
}

}  // namespace

Result<std::string> format_ticket(const InstanceTicket& ticket) {
  std::string bytes(1, static_cast<char>(kVersion));
  if (!append_text(bytes, ticket.node) || !append_text(bytes, ticket.address) ||
      !append_text(bytes, ticket.instance))
    return invalid("ticket", "TICKET_TOO_LONG", "a name of the ticket is empty or too long");
  append_bytes(bytes, ticket.incarnation.bytes);
  append_bytes(bytes, ticket.generations.bytes);
  append_bytes(bytes, checksum(bytes_of(bytes)));
  std::string text = to_base64url(bytes_of(bytes));
  if (text.size() > kMaxTicketBytes)
    return invalid("ticket", "TICKET_TOO_LONG",
                   "node id, address and instance name are too long for a ticket of 256 bytes");
  return text;
}

Result<Ticket> parse_ticket(std::string_view text) {
  if (text.empty()) return bad_ticket("the ticket is empty");
  if (text.size() > kMaxTicketBytes) return bad_ticket("a ticket has at most 256 bytes");
  if (text.starts_with(kNamePrefix)) return parse_named(text);
  std::string bytes;
  if (!from_base64url(text, bytes) || bytes.size() < 1 + kChecksumBytes)
    return bad_ticket("neither base64url nor kvferry:host:port/instance");
  std::string_view left(bytes);
  std::array<uint8_t, kChecksumBytes> told{};
  std::string_view tail = left.substr(left.size() - kChecksumBytes);
  take_bytes(tail, told);
  left.remove_suffix(kChecksumBytes);
  if (checksum(bytes_of(left)) != told) return bad_ticket("the ticket is damaged");
  if (static_cast<uint8_t>(left[0]) != kVersion)
    return bad_ticket("the ticket is of another version");
  left.remove_prefix(1);
  InstanceTicket ticket;
  if (!take_text(left, ticket.node) || !take_text(left, ticket.address) ||
      !take_text(left, ticket.instance) || !take_bytes(left, ticket.incarnation.bytes) ||
      !take_bytes(left, ticket.generations.bytes) || !left.empty())
    return bad_ticket("the ticket is damaged");
  if (!ops::parse_host_port(ticket.address) || !link::valid_instance_name(ticket.instance))
    return bad_ticket("the ticket's address or instance is not valid");
  return ticket;
}

std::string instance_of(const Ticket& ticket) {
  return std::visit([](const auto& t) { return t.instance; }, ticket);
}

Incarnation incarnation_of(const Ticket& ticket) {
  const auto* full = std::get_if<InstanceTicket>(&ticket);
  return full != nullptr ? full->incarnation : Incarnation{};
}

}  // namespace kvferry::node
