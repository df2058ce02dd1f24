// The ends of hand-offs between two real daemons other than the good one: cancels, timers, wrong
// secrets, repeated calls, and daemons that are told to stop.
#include <signal.h>
#include <sys/wait.h>

#include <future>

#include "tests/proc/control.h"
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

using client::Code;
using client::TransferState;

// Two daemons, a sender of two ranks and a receiver of one.
struct Scene {
  std::unique_ptr<DaemonPair> pair;
  std::unique_ptr<Party> sender;
  std::unique_ptr<Party> receiver;
  std::string ticket;

  explicit Scene(std::vector<std::string> settings = {}) : pair(start_pair(std::move(settings))) {
    sender = attach("prefill", 0, true, "tp2");
    receiver = attach("decode", 1, false, "tp1");
    const auto got = sender->ticket();
    require_ok(got);
    ticket = *got;
  }
  std::unique_ptr<Party> attach(const std::string& instance, int side, bool sends,
                                const char* topology) {
    Party::Options options;
    options.instance = instance;
    options.socket = pair->side(side).socket();
    options.shape = small_shape();
    const auto parsed = bench::parse_topology(topology);
    require_ok(parsed);
    options.topology = *parsed;
    options.sends = sends;
    options.seed = sends ? 1 : 2;
    auto party = Party::make(options);
    require_ok(party);
    return std::move(*party);
  }

  // A first slice is sent and received; the last one stays out, so that the transfer stays open.
  TransferKey half_way(milliseconds sender_deadline = {}, milliseconds receiver_deadline = {}) {
    receiver->clean();
    const TransferKey key = new_key("prefill");
    Party::Send slice;
    slice.tokens = client::TokenRange{0, 256};
    slice.last = false;
    slice.deadline = sender_deadline;
    require_ok(sender->send(key, slice));
    Party::Receive receive;
    receive.deadline = receiver_deadline;
    require_ok(receiver->receive(key, ticket, receive));
    REQUIRE(comes_true([&] {
      const auto status = receiver->rank(0).status(receiver->handle(key.id, 0));
      return status && (status->slices > 0 || is_terminal(status->state));
    }));
    return key;
  }
  void send_rest(const TransferKey& key) {
    Party::Send slice;
    slice.index = 1;
    slice.tokens = client::TokenRange{256, 512};
    require_ok(sender->send(key, slice));
  }
  void require_hand_over() {
    receiver->clean();
    const TransferKey key = new_key("prefill");
    require_ok(sender->send(key, {}));
    require_ok(receiver->receive(key, ticket, {}));
    require_end(*receiver, key.id, TransferState::kCompleted, "NONE");
    require_end(*sender, key.id, TransferState::kDelivered, "NONE");
    CHECK(receiver->verify() == "");
  }
  void require_nothing_held() {
    for (int side = 0; side < 2; ++side) {
      CAPTURE(side, pair->side(side).log_tail());
      CHECK(comes_true([&] { return arena_in_use(pair->side(side)) == 0; }, seconds(5)));
      CHECK(metric(pair->side(side), "kvferry_arena_bytes", "quarantined") == 0);
    }
  }
  static void require_end(Party& party, const std::string& id, TransferState state,
                          const std::string& reason) {
    const auto ended = party.wait(id, kPatience);
    require_ok(ended);
    for (const TransferStatus& status : *ended) {
      CHECK(name_of(status.state) == name_of(state));
      CHECK(status.reason == reason);
      CHECK(status.released);
      CHECK_FALSE(status.memory_in_use);
    }
  }
};

Scene& scene() {
  static Scene shared({"engine.chunk_bytes=64KiB"});
  return shared;
}

// The next rejection of a rank; other events are passed over.
client::Error next_rejection(client::Client& rank) {
  const auto until = std::chrono::steady_clock::now() + kPatience;
  client::Event event;
  while (rank.wait_any({&event, 1}, until) == 1)
    if (event.kind == client::EventKind::kRejected) return event.error.value();
  FAIL("no operation was refused");
  return {};
}

}  // namespace

TEST_CASE("a receiver cancels before anybody sends, and once more after that") {
  Scene& s = scene();
  const TransferKey key = new_key("prefill");
  require_ok(s.receiver->receive(key, s.ticket, {}));
  client::Client& rank = s.receiver->rank(0);
  REQUIRE(comes_true([&] { return rank.status(s.receiver->handle(key.id, 0)).ok(); }));
  for (int times = 0; times < 2; ++times) {
    const auto cancelled = rank.cancel(s.receiver->handle(key.id, 0));
    require_ok(cancelled);
    CHECK(cancelled->state == TransferState::kCancelled);
    CHECK_FALSE(cancelled->memory_in_use);
  }
  Scene::require_end(*s.receiver, key.id, TransferState::kCancelled, "CANCELLED");
  require_ok(s.receiver->close(key.id));
  // A sender that comes too late learns of it, or finds nobody if the receiver was that quick.
  Party::Send late;
  late.lease = milliseconds(500);
  require_ok(s.sender->send(key, late));
  const auto sent = s.sender->wait(key.id, kPatience);
  require_ok(sent);
  CHECK(sent->front().state == TransferState::kFailed);
  s.require_nothing_held();
}

TEST_CASE("a receiver cancels half way and both senders' ranks learn why") {
  Scene& s = scene();
  const TransferKey key = s.half_way();
  const auto cancelled = s.receiver->rank(0).cancel(s.receiver->handle(key.id, 0));
  require_ok(cancelled);
  CHECK(cancelled->state == TransferState::kCancelled);
  Scene::require_end(*s.receiver, key.id, TransferState::kCancelled, "CANCELLED");
  Scene::require_end(*s.sender, key.id, TransferState::kFailed, "CANCELLED");
  s.require_nothing_held();
  s.require_hand_over();
}

TEST_CASE("a sender's rank cancels half way and the receiver learns why") {
  Scene& s = scene();
  const TransferKey key = s.half_way();
  require_ok(s.sender->rank(1).cancel(s.sender->handle(key.id, 1)));
  Scene::require_end(*s.receiver, key.id, TransferState::kFailed, "CANCELLED");
  const auto sent = s.sender->wait(key.id, kPatience);
  require_ok(sent);
  CHECK(sent->at(0).state == TransferState::kFailed);  // its receiver has failed
  CHECK(sent->at(1).state == TransferState::kCancelled);
  s.require_nothing_held();
  s.require_hand_over();
}

TEST_CASE("a cancel after the end changes nothing") {
  Scene& s = scene();
  s.receiver->clean();
  const TransferKey key = new_key("prefill");
  require_ok(s.sender->send(key, {}));
  require_ok(s.receiver->receive(key, s.ticket, {}));
  Scene::require_end(*s.receiver, key.id, TransferState::kCompleted, "NONE");
  const auto cancelled = s.receiver->rank(0).cancel(s.receiver->handle(key.id, 0));
  require_ok(cancelled);
  CHECK(cancelled->state == TransferState::kCompleted);
  Scene::require_end(*s.sender, key.id, TransferState::kDelivered, "NONE");
  CHECK(s.receiver->verify() == "");
}

TEST_CASE("a receiver that waits in vain ends by its deadline") {
  Scene& s = scene();
  const TransferKey key = new_key("prefill");
  Party::Receive receive;
  receive.wait = milliseconds(300);
  require_ok(s.receiver->receive(key, s.ticket, receive));
  Scene::require_end(*s.receiver, key.id, TransferState::kFailed, "DEADLINE");
}

TEST_CASE("a send that nobody comes for expires and gives its pages back") {
  Scene& s = scene();
  const TransferKey key = new_key("prefill");
  Party::Send send;
  send.lease = milliseconds(300);
  require_ok(s.sender->send(key, send));
  Scene::require_end(*s.sender, key.id, TransferState::kFailed, "EXPIRED");
  // A receiver that comes after it hears that at once.
  require_ok(s.receiver->receive(key, s.ticket, {}));
  Scene::require_end(*s.receiver, key.id, TransferState::kFailed, "EXPIRED");
}

TEST_CASE("a transfer that stays open ends by the deadline of either side") {
  Scene& s = scene();
  SECTION("the sender's") {
    const TransferKey key = s.half_way(milliseconds(400), seconds(20));
    Scene::require_end(*s.sender, key.id, TransferState::kFailed, "DEADLINE");
    Scene::require_end(*s.receiver, key.id, TransferState::kFailed, "DEADLINE");
  }
  SECTION("the receiver's") {
    const TransferKey key = s.half_way(seconds(20), milliseconds(400));
    Scene::require_end(*s.receiver, key.id, TransferState::kFailed, "DEADLINE");
    Scene::require_end(*s.sender, key.id, TransferState::kFailed, "DEADLINE");
  }
  s.require_nothing_held();
}

TEST_CASE("a receiver with the wrong secret gets no byte, the right one still does") {
  Scene& s = scene();
  s.receiver->clean();
  const TransferKey key = new_key("prefill");
  TransferKey wrong = key;
  wrong.secret[3] ^= 1;
  require_ok(s.sender->send(key, {}));
  // Another secret is another transfer: nobody learns that there is one under this id.
  Party::Receive receive;
  receive.wait = milliseconds(500);
  require_ok(s.receiver->receive(wrong, s.ticket, receive));
  const auto ended = s.receiver->wait(key.id, kPatience);
  require_ok(ended);
  CHECK(ended->front().state == TransferState::kFailed);
  CHECK((ended->front().reason == "DEADLINE" || ended->front().reason == "PERMISSION"));
  CHECK(ended->front().bytes_done == 0);
  CHECK(s.receiver->verify().find("4194304 wrong bytes of 4194304") != std::string::npos);
  {
    std::unique_ptr<Party> other = s.attach("other-decode", 1, false, "tp1");
    require_ok(other->receive(key, s.ticket, {}));
    Scene::require_end(*other, key.id, TransferState::kCompleted, "NONE");
    CHECK(other->verify() == "");
  }
  Scene::require_end(*s.sender, key.id, TransferState::kDelivered, "NONE");
}

TEST_CASE("a transfer whose pages have all been gathered survives its sender") {
  Scene& s = scene();
  std::unique_ptr<Party> sender = s.attach("brief-prefill", 0, true, "tp1");
  const auto ticket = sender->ticket();
  require_ok(ticket);
  s.receiver->clean();
  client::Client& rank = s.receiver->rank(0);
  const auto word = rank.alloc_word();
  require_ok(word);
  const TransferKey key = new_key("brief-prefill");
  Party::Send send;
  send.num_tokens = 32;  // as many bytes as there are credits
  require_ok(sender->send(key, send));
  Party::Receive receive;
  receive.num_tokens = 32;
  receive.ready = client::ReadyCondition::timeline(*word, 1);
  require_ok(s.receiver->receive(key, *ticket, receive));
  // Nothing can be delivered before the word says so.
  REQUIRE(comes_true([&] {
    const auto status = sender->rank(0).status(sender->handle(key.id, 0));
    return status && status->released;
  }));
  sender.reset();
  REQUIRE(comes_true([&] { return metric(s.pair->side(0), "kvferry_workers") == 2; }));
  require_ok(rank.signal(*word, 1));
  Scene::require_end(*s.receiver, key.id, TransferState::kCompleted, "NONE");
  CHECK(s.receiver->verify(32) == "");
  rank.free_word(*word);
  s.require_nothing_held();
}

TEST_CASE("the same Receive again starts nothing, another one under its id is refused") {
  Scene& s = scene();
  s.receiver->clean();
  client::Client& rank = s.receiver->rank(0);
  const TransferKey key = new_key("prefill");
  const uint64_t accepted = rank.stats().operations_accepted;
  require_ok(s.receiver->receive(key, s.ticket, {}));
  require_ok(s.receiver->receive(key, s.ticket, {}));
  REQUIRE(comes_true([&] { return rank.stats().operations_accepted == accepted + 2; }));
  Party::Receive shorter;
  shorter.num_tokens = 256;
  require_ok(s.receiver->receive(key, s.ticket, shorter));
  const client::Error error = next_rejection(rank);
  CHECK(error.code == Code::kAlreadyExists);
  CHECK_FALSE(error.field.empty());
  // The first one goes on.
  require_ok(s.sender->send(key, {}));
  Scene::require_end(*s.receiver, key.id, TransferState::kCompleted, "NONE");
  Scene::require_end(*s.sender, key.id, TransferState::kDelivered, "NONE");
  CHECK(s.receiver->verify() == "");
}

TEST_CASE("a receiver on the sender's daemon gets every byte, and none by wire") {
  Scene& s = scene();
  // Two ranks to one, and one to two.
  const char* const there = GENERATE("tp1", "tp2");
  CAPTURE(there);
  const std::string name = std::string("local-") + there;
  std::unique_ptr<Party> sender = s.attach(name + "-from", 0, true, there);
  std::unique_ptr<Party> two =
      s.attach(name, 0, false, there == std::string("tp1") ? "tp2" : "tp1");
  const auto ticket = sender->ticket();
  require_ok(ticket);
  const bench::DaemonProcess& daemon = s.pair->side(0);
  const auto moved = [&](const char* direction) {
    return metric(daemon, "kvferry_transfer_bytes_total",
                  std::string("direction=\"") + direction + "\"");
  };
  const double sent = moved("sent");
  const double received = moved("received");
  const double local = moved("local");
  const double offered = metric(daemon, "kvferry_chunks_total", "event=\"offered\"");
  const auto hand_over = [&](bool receiver_first) {
    two->clean();
    const TransferKey key = new_key(name + "-from");
    if (receiver_first) require_ok(two->receive(key, *ticket, {}));
    Party::Send slice;
    slice.tokens = client::TokenRange{0, 256};
    slice.last = false;
    require_ok(sender->send(key, slice));
    slice.index = 1;
    slice.tokens = client::TokenRange{256, 512};
    slice.last = true;
    require_ok(sender->send(key, slice));
    if (!receiver_first) require_ok(two->receive(key, *ticket, {}));
    Scene::require_end(*two, key.id, TransferState::kCompleted, "NONE");
    Scene::require_end(*sender, key.id, TransferState::kDelivered, "NONE");
    CHECK(two->verify() == "");
  };
  hand_over(true);
  hand_over(false);
  // Of 4 layers, K and V, 4 heads of 256 bytes, 512 tokens.
  constexpr double kBytes = 2 * (4.0 * 2 * 4 * 256 * 512);
  CHECK(comes_true([&] { return moved("local") - local == kBytes; }, seconds(5)));
  CHECK(moved("sent") == sent);
  CHECK(moved("received") == received);
  CHECK(metric(daemon, "kvferry_chunks_total", "event=\"offered\"") == offered);
  CHECK(arena_in_use(daemon) == 0);
  s.require_hand_over();  // and by wire from the same daemon
}

TEST_CASE("a receiver on the sender's daemon has its KV from a packed copy, and without rails") {
  Scene s;
  std::unique_ptr<Party> local = s.attach("local-decode", 0, false, "tp1");
  bench::DaemonProcess& daemon = s.pair->side(0);
  const TransferKey key = new_key("prefill");
  Party::Send send;
  send.packed_copy = true;
  require_ok(s.sender->send(key, send));
  REQUIRE(comes_true([&] { return metric(daemon, "kvferry_packed_made_total") == 2; }));
  const pid_t rails = daemon.rails_pid();
  REQUIRE(rails > 0);
  REQUIRE(::kill(rails, SIGKILL) == 0);
  require_ok(local->receive(key, s.ticket, {}));
  Scene::require_end(*local, key.id, TransferState::kCompleted, "NONE");
  Scene::require_end(*s.sender, key.id, TransferState::kDelivered, "NONE");
  CHECK(local->verify() == "");
  CHECK(comes_true([&] { return metric(daemon, "kvferry_packed_bytes") == 0; }, seconds(5)));
}

TEST_CASE("a receiver on the sender's daemon that cancels ends the send") {
  Scene& s = scene();
  std::unique_ptr<Party> local = s.attach("local-cancel", 0, false, "tp1");
  const TransferKey key = new_key("prefill");
  Party::Send slice;
  slice.tokens = client::TokenRange{0, 256};
  slice.last = false;
  require_ok(s.sender->send(key, slice));
  require_ok(local->receive(key, s.ticket, {}));
  REQUIRE(comes_true([&] {
    const auto status = local->rank(0).status(local->handle(key.id, 0));
    return status && status->slices > 0;
  }));
  require_ok(local->rank(0).cancel(local->handle(key.id, 0)));
  Scene::require_end(*local, key.id, TransferState::kCancelled, "CANCELLED");
  Scene::require_end(*s.sender, key.id, TransferState::kFailed, "CANCELLED");
  s.require_hand_over();
}

TEST_CASE("a daemon told to stop finishes what runs and exits with 0") {
  for (const int side : {0, 1}) {
    CAPTURE(side);
    Scene s({"drain.limit=20s"});
    const TransferKey key = s.half_way();
    auto status = std::async(std::launch::async, [&] { return s.pair->side(side).terminate(); });
    Party& here = side == 0 ? *s.sender : *s.receiver;
    REQUIRE(comes_true([&] { return here.rank(0).draining(); }));
    // New work is refused.
    const TransferKey late = new_key("prefill");
    if (side == 0)
      require_ok(here.send(late, {}));
    else
      require_ok(here.receive(late, s.ticket, {}));
    const auto refused = here.wait(late.id, kPatience);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().code == Code::kUnavailable);
    // What runs may even go on.
    s.send_rest(key);
    Scene::require_end(*s.receiver, key.id, TransferState::kCompleted, "NONE");
    Scene::require_end(*s.sender, key.id, TransferState::kDelivered, "NONE");
    CHECK(s.receiver->verify() == "");
    CHECK(status.get() == 0);
  }
}

TEST_CASE("a daemon told to stop fails what does not end and tells its peer") {
  for (const int side : {0, 1}) {
    CAPTURE(side);
    Scene s({"drain.limit=500ms"});
    const TransferKey key = s.half_way();
    auto status = std::async(std::launch::async, [&] { return s.pair->side(side).terminate(); });
    Scene::require_end(*s.sender, key.id, TransferState::kFailed, "SHUTDOWN");
    Scene::require_end(*s.receiver, key.id, TransferState::kFailed, "SHUTDOWN");
    CHECK(status.get() == 0);
    CAPTURE(s.pair->side(1 - side).log_tail());
    CHECK(comes_true([&] { return arena_in_use(s.pair->side(1 - side)) == 0; }, seconds(5)));
  }
}

TEST_CASE("a daemon drained by an operator finishes what runs, stays, and then stops at once") {
  Scene s({"drain.limit=1h"});
  const TransferKey key = s.half_way();
  const bench::DaemonProcess& daemon = s.pair->side(1);
  auto drained = std::async(std::launch::async, [&] { return control(daemon, "drain"); });
  REQUIRE(comes_true([&] { return s.receiver->rank(0).draining(); }));
  CHECK(control(daemon, "status").at("draining") == true);
  CHECK(drained.wait_for(milliseconds(0)) == std::future_status::timeout);
  s.send_rest(key);
  Scene::require_end(*s.receiver, key.id, TransferState::kCompleted, "NONE");
  drained.get();
  control(daemon, "drain");  // again: at once
  CHECK(s.pair->side(1).terminate() == 0);
}

TEST_CASE("a drain's limit may be set anew, and what does not end by then fails") {
  Scene s({"drain.limit=1h"});
  const TransferKey key = s.half_way();
  const bench::DaemonProcess& daemon = s.pair->side(0);
  auto first = std::async(std::launch::async, [&] { return control(daemon, "drain"); });
  REQUIRE(comes_true([&] { return s.sender->rank(0).draining(); }));
  control(daemon, "drain --limit 0.2");
  first.get();
  Scene::require_end(*s.sender, key.id, TransferState::kFailed, "SHUTDOWN");
  Scene::require_end(*s.receiver, key.id, TransferState::kFailed, "SHUTDOWN");
}

TEST_CASE("a crash leaves the signal and the stack in the log") {
  Scene s;
  for (const int signal : {SIGSEGV, SIGBUS, SIGABRT}) {
    CAPTURE(signal);
    bench::DaemonProcess& daemon = s.pair->side(0);
    ::kill(daemon.pid(), signal);
    siginfo_t end{};
    REQUIRE(comes_true([&] {
      return ::waitid(P_PID, static_cast<id_t>(daemon.pid()), &end, WEXITED | WNOHANG | WNOWAIT) ==
                 0 &&
             end.si_pid != 0;
    }));
    CHECK(end.si_status == signal);
    const std::string log = daemon.log_tail();
    INFO(log);
    CHECK(log.find(signal == SIGSEGV  ? "*** SIGSEGV received"
                   : signal == SIGBUS ? "*** SIGBUS received"
                                      : "*** SIGABRT received") != std::string::npos);
    CHECK(log.find("kvferry::") != std::string::npos);
    require_ok(s.pair->restart(0));
  }
}

}  // namespace kvferry::testing
