// An instance whose ranks are on two daemons, joined at one of them, and a receiver on a third.
#include <stdlib.h>

#include <array>
#include <filesystem>
#include <map>

#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

using client::TransferState;

// Each may talk to both others.
class ThreeDaemons {
 public:
  ThreeDaemons() {
    char directory[] = "/tmp/kvferry-three.XXXXXX";
    REQUIRE(::mkdtemp(directory) != nullptr);
    directory_ = directory;
    std::map<std::string, uint16_t> ports;
    for (const char* name : kNames) ports[name] = bench::DaemonProcess::find_port();
    bench::DaemonOptions options;
    options.binary_directory = binary_directory();
    options.settings = {"arena.bytes=32MiB", "arena.segment_bytes=16MiB",
                        "engine.chunk_bytes=64KiB"};
    if (const char* const rails = std::getenv("KVFERRY_RAILS_BINARY"))
      options.settings.push_back("rails.binary=" + std::string(rails));
    for (std::size_t i = 0; i < kNames.size(); ++i) {
      std::map<std::string, uint16_t> others = ports;
      others.erase(kNames[i]);
      const auto first = others.begin();
      bench::DaemonProcess::Identity identity{
          kNames[i], ports[kNames[i]], first->first, first->second, {}};
      others.erase(first);
      identity.more = others;
      auto daemon = bench::DaemonProcess::start(directory_, identity, options);
      require_ok(daemon);
      daemons_[i] = std::move(*daemon);
    }
    for (auto& daemon : daemons_)
      if (const auto serving = daemon->wait_until_serving(); !serving)
        FAIL(serving.error().to_string());
  }
  ~ThreeDaemons() {
    for (auto& daemon : daemons_) daemon.reset();
    std::error_code error;
    std::filesystem::remove_all(directory_, error);
  }
  ThreeDaemons(const ThreeDaemons&) = delete;
  ThreeDaemons& operator=(const ThreeDaemons&) = delete;

  const std::string& socket(std::size_t i) const { return daemons_[i]->socket(); }

 private:
  static constexpr std::array<const char*, 3> kNames = {"first", "second", "third"};
  std::string directory_;
  std::array<std::unique_ptr<bench::DaemonProcess>, 3> daemons_;
};

std::unique_ptr<Party> make(Party::Options options, const char* topology) {
  const auto parsed = bench::parse_topology(topology);
  require_ok(parsed);
  options.topology = *parsed;
  options.shape = small_shape();
  auto party = Party::make(options);
  require_ok(party);
  return std::move(*party);
}

}  // namespace

TEST_CASE("ranks on two daemons are joined once and send to a receiver on a third") {
  ThreeDaemons daemons;
  const client::Bytes16 key = client::random_bytes16();
  Party::Options prefill;
  prefill.instance = "prefill";
  prefill.sockets = {daemons.socket(0), daemons.socket(1)};
  prefill.incarnation = client::random_bytes16();
  prefill.instance_key = key;
  prefill.sends = true;
  const auto sender = make(prefill, "tp2");

  const auto early = sender->ticket();
  REQUIRE_FALSE(early);
  CHECK(early.error().reason == "INSTANCE_INCOMPLETE");
  const auto keyless = sender->rank(0).join_instance("prefill", sender->cards());
  REQUIRE_FALSE(keyless);
  CHECK(keyless.error().reason == "INSTANCE_FOREIGN");

  const auto joined = sender->rank(0).join_instance("prefill", sender->cards(), key);
  require_ok(joined);
  CHECK(joined->complete);
  CHECK(joined->missing_ranks.empty());
  CHECK(joined->incarnation == *prefill.incarnation);
  CHECK_FALSE(joined->existing);
  const auto again = sender->rank(0).join_instance("prefill", sender->cards(), key);
  require_ok(again);
  CHECK(again->complete);
  CHECK(again->existing);
  // The other daemon has been told, and completes by itself.
  REQUIRE(comes_true([&] { return sender->rank(1).ticket("prefill").ok(); }));

  Party::Options decode;
  decode.instance = "decode";
  decode.socket = daemons.socket(2);
  const auto receiver = make(decode, "tp1");
  for (uint32_t asked = 0; asked < 2; ++asked) {
    const auto ticket = sender->rank(asked).ticket("prefill");
    require_ok(ticket);
    receiver->clean();
    const TransferKey transfer = new_key("prefill");
    require_ok(receiver->receive(transfer, *ticket, {}));
    require_ok(sender->send(transfer, {}));
    for (Party* party : {sender.get(), receiver.get()}) {
      const auto ended = party->wait(transfer.id, kPatience);
      require_ok(ended);
      for (const auto& status : *ended)
        CHECK(status.state ==
              (party == sender.get() ? TransferState::kDelivered : TransferState::kCompleted));
    }
    CHECK(receiver->verify() == "");
  }

  // A scheduler without a layout gives a transfer up, before and after it is sent.
  client::AttachOptions attach;
  attach.socket = daemons.socket(2);
  attach.name = "scheduler";
  attach.role = client::WorkerRole::kController;
  const auto scheduler = client::Client::attach(attach);
  require_ok(scheduler);
  const auto ticket = sender->ticket();
  require_ok(ticket);
  for (const bool sent_first : {true, false}) {
    client::ClaimRequest given_up;
    given_up.key = new_key("prefill");
    given_up.ticket = *ticket;
    if (sent_first) require_ok(sender->send(given_up.key, {}));
    require_ok((*scheduler)->decline(given_up));
    if (!sent_first) require_ok(sender->send(given_up.key, {}));
    const auto ended = sender->wait(given_up.key.id, kPatience);
    require_ok(ended);
    for (const auto& status : *ended) CHECK(status.reason == "DECLINED");
  }
  // Takes a claim back, answered or not: nothing of it stays with the client.
  for (const bool answered : {true, false}) {
    CAPTURE(answered);
    client::ClaimRequest back;
    back.key = new_key("prefill");
    back.ticket = *ticket;
    const uint64_t before = (*scheduler)->stats().operations_accepted;
    require_ok((*scheduler)->claim(back));
    if (answered)
      REQUIRE(comes_true([&] { return (*scheduler)->stats().operations_accepted > before; }));
    CHECK((*scheduler)->stats().open_transfers == 1);
    require_ok((*scheduler)->decline(back));
    CHECK(comes_true([&] { return (*scheduler)->stats().open_transfers == 0; }));
  }
  // Or keeps it: its claim holds the pages beyond their lease.
  client::ClaimRequest held;
  held.key = new_key("prefill");
  held.ticket = *ticket;
  held.ttl = milliseconds(20'000);
  require_ok((*scheduler)->claim(held));
  Party::Send brief;
  brief.lease = milliseconds(400);
  require_ok(sender->send(held.key, brief));
  const auto still = sender->wait(held.key.id, milliseconds(1200));
  REQUIRE_FALSE(still);
  CHECK(still.error().reason == "WAIT_TIMEOUT");
  require_ok(receiver->receive(held.key, *ticket, {}));
  const auto kept = receiver->wait(held.key.id, kPatience);
  require_ok(kept);
  CHECK((*kept)[0].state == TransferState::kCompleted);
  // Not one whose receiver has come.
  const TransferKey taken = new_key("prefill");
  require_ok(receiver->receive(taken, *ticket, {}));
  Party::Send half;
  half.tokens = client::TokenRange{0, 256};
  half.last = false;
  require_ok(sender->send(taken, half));
  REQUIRE(comes_true([&] {
    const auto status = sender->rank(0).status(sender->handle(taken.id, 0));
    const auto other = sender->rank(1).status(sender->handle(taken.id, 1));
    return status && other && status->bytes_done > 0 && other->bytes_done > 0;
  }));
  client::ClaimRequest late;
  late.key = taken;
  late.ticket = *ticket;
  require_ok((*scheduler)->decline(late));
  half.index = 1;
  half.tokens = client::TokenRange{256, 512};
  half.last = true;
  require_ok(sender->send(taken, half));
  const auto ended = receiver->wait(taken.id, kPatience);
  require_ok(ended);
  CHECK((*ended)[0].state == TransferState::kCompleted);
}

}  // namespace kvferry::testing
