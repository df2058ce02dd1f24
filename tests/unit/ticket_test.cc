#include <catch2/catch.hpp>

#include "daemon/node/tickets.h"

using namespace kvferry;
using namespace kvferry::node;

namespace {

InstanceTicket some_ticket() {
  InstanceTicket ticket{"node-a", "10.0.0.7:7400", "default/llama-prefill", {}, {}};
  ticket.incarnation.bytes.fill(7);
  ticket.generations.bytes.fill(9);
  return ticket;
}

bool refused(std::string_view text) {
  const Result<Ticket> ticket = parse_ticket(text);
  return !ticket && ticket.error().reason == "BAD_TICKET" && ticket.error().field == "ticket";
}

}  // namespace

TEST_CASE("an instance ticket comes back as it was made and fits a header field") {
  const Result<std::string> text = format_ticket(some_ticket());
  REQUIRE(text);
  CHECK(text->size() <= kMaxTicketBytes);
  CHECK(
      text->find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") ==
      std::string::npos);
  const Result<Ticket> back = parse_ticket(*text);
  REQUIRE(back);
  CHECK(std::get<InstanceTicket>(*back) == some_ticket());
  CHECK(instance_of(*back) == "default/llama-prefill");
  CHECK(incarnation_of(*back) == some_ticket().incarnation);
}

TEST_CASE("every changed, missing or added character of a ticket is noticed") {
  const std::string text = *format_ticket(some_ticket());
  for (std::size_t i = 0; i < text.size(); ++i) {
    std::string changed = text;
    changed[i] = changed[i] == 'A' ? 'B' : 'A';
    INFO("character " << i);
    CHECK(refused(changed));
    CHECK(refused(text.substr(0, i)));
  }
  CHECK(refused(text + "A"));
  CHECK(refused(text + "="));
  CHECK(refused(" " + text));
}

TEST_CASE("a ticket that would not fit is not made") {
  InstanceTicket ticket = some_ticket();
  ticket.node = std::string(120, 'n');
  ticket.address = std::string(100, 'a') + ":1";
  const Result<std::string> text = format_ticket(ticket);
  REQUIRE_FALSE(text);
  CHECK(text.error().reason == "TICKET_TOO_LONG");
  ticket = some_ticket();
  ticket.node.clear();
  CHECK_FALSE(format_ticket(ticket));
}

TEST_CASE("a ticket by name says address and instance, the tenant being optional") {
  const Result<Ticket> plain = parse_ticket("kvferry:node-a.example:7400/llama");
  REQUIRE(plain);
  CHECK(std::get<NamedTicket>(*plain) == NamedTicket{"node-a.example:7400", "default/llama"});
  CHECK(incarnation_of(*plain).is_zero());
  const Result<Ticket> tenant = parse_ticket("kvferry:[::1]:7400/team/llama");
  REQUIRE(tenant);
  CHECK(std::get<NamedTicket>(*tenant) == NamedTicket{"[::1]:7400", "team/llama"});
}

TEST_CASE("what is no ticket is refused") {
  for (const char* bad : {"", "x", "kvferry:", "kvferry:host:1", "kvferry:host/llama",
                          "kvferry:host:0/llama", "kvferry:host:99999/llama", "kvferry:host:1/",
                          "kvferry:host:1/a/b/c", "kvferry:host:1/-x", "not base64!"})
    CHECK(refused(bad));
  CHECK(refused(std::string(257, 'A')));
}
