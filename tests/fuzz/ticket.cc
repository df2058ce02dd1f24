// Tickets as workers bring them.
#include "daemon/node/tickets.h"
#include "tests/fuzz/input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  using namespace kvferry;
  const auto ticket = node::parse_ticket(fuzz::text_of({data, size}));
  if (!ticket) return 0;
  FUZZ_CHECK(size <= node::kMaxTicketBytes, "a ticket is short");
  const std::string instance = node::instance_of(*ticket);
  FUZZ_CHECK(instance.find('/') != std::string::npos, "an instance has a tenant");
  if (const auto* full = std::get_if<node::InstanceTicket>(&*ticket)) {
    const auto text = node::format_ticket(*full);
    FUZZ_CHECK(text.has_value(), "what was read can be written");
    const auto again = node::parse_ticket(*text);
    FUZZ_CHECK(again && *again == *ticket, "and reads as the same");
  }
  return 0;
}
