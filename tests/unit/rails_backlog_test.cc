// What waits for room in the rails.
#include "daemon/node/rails_backlog.h"

#include <catch2/catch.hpp>
#include <string>
#include <vector>

namespace kvferry::node {
namespace {

// Rails with room for so many.
struct Rails {
  int room = 0;
  std::vector<std::string> taken;

  bool take(const std::string& what) {
    if (room == 0) return false;
    --room;
    taken.push_back(what);
    return true;
  }
  auto messages() {
    return [this](const RailsBacklog::Message& of) {
      return take(std::string(of.message.begin(), of.message.end()));
    };
  }
  auto accepts() {
    return [this](const engine::AcceptOffer& of) {
      return take("accept " + std::to_string(of.landing.value));
    };
  }
};

RailsBacklog::Message message(const std::string& text) {
  return {{}, {text.begin(), text.end()}, {}};
}
engine::AcceptOffer accepted(uint64_t landing) {
  return {{}, {}, LandingId{landing}, {}, 0};
}

TEST_CASE("an accepted offer that finds no room waits for it") {
  RailsBacklog backlog(10);
  Rails rails;
  backlog.accept(accepted(1), rails.accepts());
  CHECK_FALSE(backlog.empty());
  rails.room = 1;
  backlog.accept(accepted(2), rails.accepts());  // behind the first
  CHECK(rails.taken.empty());
  backlog.retry(rails.accepts(), rails.messages());
  CHECK(rails.taken == std::vector<std::string>{"accept 1"});
  rails.room = 1;
  backlog.retry(rails.accepts(), rails.messages());
  CHECK(backlog.empty());
  rails.room = 1;
  backlog.accept(accepted(3), rails.accepts());
  CHECK(rails.taken == std::vector<std::string>{"accept 1", "accept 2", "accept 3"});
  CHECK(backlog.empty());
}

TEST_CASE("messages keep their order, and accepted offers go before them") {
  RailsBacklog backlog(10);
  Rails rails;
  CHECK(backlog.send(message("one"), rails.messages()));
  CHECK(backlog.send(message("two"), rails.messages()));
  backlog.accept(accepted(1), rails.accepts());
  CHECK(backlog.bytes() == 6);
  rails.room = 2;
  CHECK(backlog.send(message("tri"), rails.messages()));
  CHECK(rails.taken.empty());
  CHECK_FALSE(backlog.send(message("four"), rails.messages()));  // 13 bytes
  backlog.retry(rails.accepts(), rails.messages());
  CHECK(rails.taken == std::vector<std::string>{"accept 1", "one"});
  CHECK(backlog.bytes() == 6);
  backlog.clear();
  CHECK(backlog.empty());
  CHECK(backlog.bytes() == 0);
}

}  // namespace
}  // namespace kvferry::node
