// What dies, lies or is misconfigured.
#include <arpa/inet.h>
#include <signal.h>
#include <sys/socket.h>

#include <cstdlib>

#include "daemon/rails/process/listeners.h"
#include "daemon/rails/rails_process.h"
#include "tests/proc/rails_harness.h"

namespace kvferry::rails::testing {
namespace {

constexpr uint64_t kLane = 1;
constexpr uint64_t kOffers = 8;
constexpr uint64_t kOfferBytes = 8ULL << 20;

TEST_CASE("When the sender's rails are killed every posted receive ends and they are restarted") {
  const std::string transport = GENERATE("tcp", "shm");
  Node a(loopback(transport));
  Node b(loopback(transport));
  start({&a, &b});
  join(a, b, kLane);
  // The sender stands still, so that no receive can end well before the kill.
  const int first_pid = a.client->pid();
  for (uint64_t i = 0; i < kOffers; ++i)
    REQUIRE(a.client->send_offer(LaneKey{kLane}, Node::bytes_of(std::to_string(i)),
                                 {0, i * kOfferBytes, kOfferBytes}, SendToken{i + 1}));
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == kOffers; }));
  REQUIRE(::kill(first_pid, SIGSTOP) == 0);
  for (const auto& offer : b.offers) {
    const uint64_t i = std::stoull(Node::text_of(offer.header));
    REQUIRE(b.client->accept(offer.descriptor, LaneKey{kLane}, {0, i * kOfferBytes, offer.bytes},
                             LandingId{i + 1}));
  }
  REQUIRE(::kill(first_pid, SIGKILL) == 0);
  REQUIRE(pump({&a, &b}, [&] { return a.deaths.size() == 1; }));
  REQUIRE(a.deaths[0].signal == SIGKILL);
  // The death itself is the answer to everything that was under way.
  REQUIRE(a.sends.size() < kOffers);
  REQUIRE(
      a.client->send_control(LaneKey{kLane}, Node::bytes_of("x"), SendToken{99}).error().reason ==
      "RAILS_DOWN");

  REQUIRE(pump({&a, &b}, [&] { return b.receives.size() == kOffers; }));
  for (const auto& [landing, receive] : b.receives) REQUIRE_FALSE(receive.ok);

  // Lane error, close, and a new lane to the restarted process.
  REQUIRE(pump({&a, &b}, [&] { return b.lane_errors.size() == 1; }));
  REQUIRE(b.client->close(LaneKey{kLane}));
  REQUIRE(pump({&a, &b}, [&] { return a.ready_count == 2 && b.closed.size() == 1; }));
  REQUIRE(a.client->restarts() == 1);
  REQUIRE(a.client->pid() != first_pid);
  join(a, b, 2);
  REQUIRE(a.client->send_control(LaneKey{2}, Node::bytes_of("again"), SendToken{1}));
  REQUIRE(pump({&a, &b}, [&] { return b.controls.size() == 1; }));
}

TEST_CASE("A kill at any moment of a transfer leaves no operation without an end") {
  Node a(loopback());
  Node b(loopback());
  start({&a, &b});
  for (uint64_t round = 0; round < 4; ++round) {
    const uint64_t lane = 100 + round;
    join(a, b, lane);
    b.offers.clear();
    b.receives.clear();
    b.closed.clear();
    uint64_t accepted = 0;
    b.offer_handler = [&](const Node::Offer& offer) {
      const uint64_t i = std::stoull(Node::text_of(offer.header));
      if (b.client->accept(offer.descriptor, LaneKey{lane}, {0, i * kOfferBytes, offer.bytes},
                           LandingId{round * 100 + i + 1}))
        ++accepted;
    };
    for (uint64_t i = 0; i < kOffers; ++i)
      REQUIRE(a.client->send_offer(LaneKey{lane}, Node::bytes_of(std::to_string(i)),
                                   {0, i * kOfferBytes, kOfferBytes},
                                   SendToken{round * 100 + i + 1}));
    // After this many receives have ended.
    REQUIRE(pump({&a, &b}, [&] { return b.receives.size() >= round; }));
    const std::size_t deaths = a.deaths.size();
    a.client->kill("the test says so");
    REQUIRE(pump({&a, &b}, [&] { return a.deaths.size() == deaths + 1; }));
    REQUIRE(a.deaths.back().why == "the test says so");
    // The close is answered only when all receives have been.
    REQUIRE(b.client->close(LaneKey{lane}));
    REQUIRE(pump({&a, &b}, [&] { return b.closed.size() == 1; }));
    REQUIRE(b.receives.size() == accepted);
    const int ready = a.ready_count;
    REQUIRE(pump({&a, &b}, [&] { return a.ready_count > ready; }));
  }
  REQUIRE(b.client->stats(0).operations == 0);
}

TEST_CASE("Closing a lane ends its posted receives and sends before it is told closed") {
  const std::string transport = GENERATE("tcp", "shm");
  Node a(loopback(transport));
  Node b(loopback(transport));
  start({&a, &b});
  join(a, b, kLane);
  for (uint64_t i = 0; i < kOffers; ++i)
    REQUIRE(a.client->send_offer(LaneKey{kLane}, Node::bytes_of(std::to_string(i)),
                                 {0, i * kOfferBytes, kOfferBytes}, SendToken{i + 1}));
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == kOffers; }));
  // Half are accepted while the sender stands still, half stay held.
  REQUIRE(::kill(a.client->pid(), SIGSTOP) == 0);
  for (uint64_t i = 0; i < kOffers / 2; ++i)
    REQUIRE(b.client->accept(b.offers[i].descriptor, LaneKey{kLane},
                             {0, i * kOfferBytes, kOfferBytes}, LandingId{i + 1}));
  REQUIRE(b.client->close(LaneKey{kLane}));
  REQUIRE(b.client->close(LaneKey{kLane}).error().reason == "LANE_UNKNOWN");
  REQUIRE(pump({&b}, [&] { return b.closed.size() == 1; }));
  REQUIRE(b.receives.size() == kOffers / 2);
  for (const auto& [landing, receive] : b.receives) REQUIRE_FALSE(receive.ok);
  // Nobody may write the regions any more, whatever the sender does now.
  std::memset(b.arena(), 0, kOffers * kOfferBytes);
  REQUIRE(::kill(a.client->pid(), SIGCONT) == 0);
  REQUIRE(a.client->close(LaneKey{kLane}));
  REQUIRE(pump({&a, &b}, [&] { return a.closed.size() == 1; }));
  REQUIRE(a.sends.size() == kOffers);
  for (uint64_t i = kOffers / 2; i < kOffers; ++i) {
    // What was held of a closed lane can still be dropped, and is no use for a receive.
    REQUIRE_FALSE(b.client->accept(b.offers[i].descriptor, LaneKey{kLane},
                                   {0, i * kOfferBytes, kOfferBytes}, LandingId{i + 1}));
    REQUIRE(b.client->drop(b.offers[i].descriptor));
  }
  // A new lane between the same two processes works, and nothing was written meanwhile.
  join(a, b, 2);
  REQUIRE(a.client->send_control(LaneKey{2}, Node::bytes_of("after"), SendToken{77}));
  REQUIRE(pump({&a, &b}, [&] { return b.controls.size() == 1; }));
  REQUIRE(std::all_of(b.arena(), b.arena() + kOffers * kOfferBytes,
                      [](uint8_t byte) { return byte == 0; }));
  REQUIRE(b.client->stats(0).held_offers == 0);
}

TEST_CASE("A process that is killed again and again is restarted with growing pauses") {
  RailsConfig config = loopback();
  config.backoff_first = std::chrono::milliseconds(20);
  Node a(config);
  REQUIRE(a.client->start(monotonic_now()));
  Duration last{};
  for (std::size_t round = 1; round <= 3; ++round) {
    a.client->kill("again");
    REQUIRE(pump({&a}, [&] { return a.deaths.size() == round; }));
    const Duration pause = a.deaths.back().restart_at - monotonic_now();
    REQUIRE(pause > last);
    last = pause;
    REQUIRE(a.client->next_wakeup() == a.deaths.back().restart_at);
    REQUIRE(pump({&a}, [&] { return a.client->restarts() == round; }));
  }
  a.client->stop();
  REQUIRE(a.client->pid() == -1);
  REQUIRE(a.client->phase() == RailsClient::Phase::kStopped);
}

// --- The self-test.

RailsExit death_of(RailsConfig config) {
  Node node(std::move(config));
  REQUIRE(node.client->start(monotonic_now()));
  REQUIRE(pump({&node}, [&] { return !node.deaths.empty() || node.ready_count != 0; }));
  REQUIRE(node.ready_count == 0);
  return node.deaths[0];
}

TEST_CASE("Rails with UCX's protocol v2 never become ready") {
  RailsConfig config = loopback();
  config.unchecked_environment = {"UCX_PROTO_ENABLE=y"};
  // With memory hooks a receive whose peer is killed does not end in v2.
  if (GENERATE(false, true))
    config.unchecked_environment.push_back("UCX_MEM_MMAP_HOOK_MODE=bistro");
  const RailsExit exit = death_of(config);
  // The self-test's verdict, or UCX's own crash, depending on the release.
  INFO(exit.why);
  REQUIRE((exit.status == 78 || exit.signal != 0));
}

TEST_CASE("Shared-memory rails without UCX's error handling never become ready") {
  RailsConfig config = loopback("shm");
  config.unchecked_environment = {"UCX_POSIX_ERROR_HANDLING=n"};
  const RailsExit exit = death_of(config);
  INFO(exit.why);
  REQUIRE(exit.status == 78);
  REQUIRE(exit.why.find("self-test of rail 0 (shm)") != std::string::npos);
}

TEST_CASE("A device that does not exist is a configuration fault") {
  RailsConfig config = loopback();
  config.rails[0].device = "nosuchdev0";
  const RailsExit exit = death_of(config);
  INFO(exit.why);
  REQUIRE(exit.status == 78);
}

TEST_CASE("Listeners stay in the configured port range, and one outside it is a fault") {
  RailsConfig config = loopback();
  config.ucx.port_first = 23810;
  config.ucx.port_last = 23829;
  Node node(config);
  start({&node});
  REQUIRE(node.ready.rails[0].tcp_port >= 23810);
  REQUIRE(node.ready.rails[0].tcp_port <= 23829);
  config.unchecked_environment = {"UCX_TCP_PORT_RANGE=23840-23859"};
  const RailsExit exit = death_of(config);
  REQUIRE(exit.status == 78);
  REQUIRE(exit.why.find("outside the port range") != std::string::npos);
}

// Of 127.0.0.1 on lo, where the other addresses of its network can be bound too.
TEST_CASE("A listener at another address than its device's is a fault, and so is one at any") {
  Setup setup;
  setup.port_first = 1;
  setup.port_last = 65535;
  SetupRail rail;
  std::strcpy(rail.device, "lo");
  CHECK(check_listeners({}, setup, rail).error().message == "UCX has no tcp listener");
  const auto verdict = [&](const char* address) {
    const auto before = tcp_listeners();
    const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in at = {};
    at.sin_family = AF_INET;
    REQUIRE(::inet_pton(AF_INET, address, &at.sin_addr) == 1);
    REQUIRE(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at) == 0);
    REQUIRE(::listen(fd.get(), 1) == 0);
    const auto added = added_listeners(before, tcp_listeners());
    REQUIRE(added.size() == 1);
    CHECK(listens(added[0]));
    const Status status = check_listeners(added, setup, rail);
    return status ? std::string() : status.error().message;
  };
  CHECK(verdict("127.0.0.1") == "");
  CHECK(verdict("127.0.0.2").find("is not bound to lo") != std::string::npos);
  CHECK(verdict("0.0.0.0").find("is not bound to lo") != std::string::npos);
  std::strcpy(rail.device, "nosuchdev0");
  CHECK(verdict("127.0.0.1").find("is not bound to nosuchdev0") != std::string::npos);
}

TEST_CASE("UCX signal handlers are noticed") {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  SUCCEED("the sanitizer has handlers of its own");
#else
  RailsConfig config = loopback();
  config.unchecked_environment = {"UCX_DEBUG_SIGNO=HUP"};
  config.ready_timeout = std::chrono::seconds(20);
  const RailsExit exit = death_of(config);
  INFO(exit.why);
  REQUIRE(exit.status == 78);
#endif
}

// --- Lies on the rings, told by a main process that speaks the raw protocol.

class RawMain {
 public:
  RawMain() {
    auto memory = make_sealed_memfd("raw", 1 << 20);
    REQUIRE(memory);
    memory_ = std::move(*memory);
    RailsProcess::Plan plan;
    plan.executable = rails_binary();
    plan.environment = *make_rails_environment({});
    plan.setup.rail_count = 1;
    plan.setup.segment_count = 1;
    plan.setup.segments[0].bytes = 1 << 20;
    std::strcpy(plan.setup.rails[0].transport, "tcp");
    std::strcpy(plan.setup.rails[0].device, "lo");
    plan.segment_fds = {memory_.get()};
    auto made = RailsProcess::spawn(plan);
    REQUIRE(made);
    process = std::move(*made);
    REQUIRE(wait([&] { return find(Event::kReady) != nullptr; }));
  }
  ~RawMain() { process->child().end(std::chrono::seconds(1)); }

  bool wait(const std::function<bool()>& done) {
    const Time deadline = monotonic_now() + std::chrono::seconds(20);
    while (!done()) {
      Record record;
      while (process->pop(0, record) == RingState::kOk) events.push_back(record);
      if (done()) return true;
      if (monotonic_now() >= deadline) return false;
      if (!process->prepare_wait()) continue;
      std::vector<pollfd> waits;
      process->append_pollfds(waits);
      ::poll(waits.data(), waits.size(), 20);
      process->end_wait(waits);
    }
    return true;
  }
  const Record* find(Event event, uint64_t token = 0, uint64_t lane = 0) const {
    for (const Record& record : events)
      if (record.kind == static_cast<uint16_t>(event) && record.lane == lane &&
          (event == Event::kReady || record.token == token))
        return &record;
    return nullptr;
  }

  std::unique_ptr<RailsProcess> process;
  std::vector<Record> events;

 private:
  UniqueFd memory_;
};

Record command(Command kind, uint64_t token = 0) {
  Record record;
  record.kind = static_cast<uint16_t>(kind);
  record.token = token;
  return record;
}

TEST_CASE("Commands that name nothing are answered, whatever they hold") {
  RawMain main;
  Record record = command(Command::kSendControl, 1);
  record.lane = 5;
  record.slot = UINT32_MAX;
  record.slot_bytes = 10;
  REQUIRE(main.process->push(0, record));
  record = command(Command::kSendControl, 2);
  record.slot = 0;
  record.slot_bytes = UINT32_MAX;
  REQUIRE(main.process->push(0, record));
  record = command(Command::kSendControl, 3);
  record.lane = 77;
  record.slot = 0;
  record.slot_bytes = 10;
  REQUIRE(main.process->push(0, record));
  record = command(Command::kSendOffer, 4);
  record.slot = 0;
  record.slot_bytes = 10;
  record.offset = UINT64_MAX - 10;
  record.bytes = 100;
  REQUIRE(main.process->push(0, record));
  record = command(Command::kAccept, 5);
  record.descriptor = 12345;
  REQUIRE(main.process->push(0, record));
  record = command(Command::kClose);
  record.lane = 99;
  REQUIRE(main.process->push(0, record));
  record = command(Command::kDrop);
  record.descriptor = 4242;
  REQUIRE(main.process->push(0, record));
  record = command(Command::kReturnSlot);
  record.slot = 3;
  REQUIRE(main.process->push(0, record));
  record = command(Command::kConnect);
  record.lane = 6;
  REQUIRE(main.process->push(0, record));
  record.kind = 60000;
  REQUIRE(main.process->push(0, record));
  REQUIRE(main.wait([&] {
    return main.find(Event::kSendEnded, 1) && main.find(Event::kSendEnded, 2) &&
           main.find(Event::kSendEnded, 3) && main.find(Event::kSendEnded, 4) &&
           main.find(Event::kReceiveEnded, 5) && main.find(Event::kClosed, 0, 99) &&
           main.find(Event::kConnectFailed, 0, 6);
  }));
  REQUIRE(main.find(Event::kSendEnded, 1)->status == kStatusBadRecord);
  REQUIRE(main.find(Event::kSendEnded, 2)->status == kStatusBadRecord);
  REQUIRE(main.find(Event::kSendEnded, 3)->status == kStatusUnknownLane);
  REQUIRE(main.find(Event::kSendEnded, 4)->status == kStatusBadRecord);
  REQUIRE(main.find(Event::kReceiveEnded, 5)->status == kStatusUnknownOffer);
  REQUIRE(main.process->child().alive());
}

TEST_CASE("Random commands by the thousand do not end the process") {
  RawMain main;
  uint64_t seed = 1;
  const auto next = [&seed] {
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    return seed >> 24;
  };
  uint64_t pushed = 0;
  Record record;
  while (pushed < 20000) {
    // kConnect is left out: what an address may hold is for UCX to survive, in this process.
    record.kind = static_cast<uint16_t>(2 + next() % 9);
    record.slot = static_cast<uint32_t>(next() % 3 == 0 ? next() : next() % 8);
    record.slot_bytes = static_cast<uint32_t>(next() % 5000);
    record.lane = next() % 4;
    record.token = next();
    record.descriptor = next() % 4;
    record.segment = next() % 3;
    record.offset = next() % 2 == 0 ? next() % (2 << 20) : next() << 30;
    record.bytes = next() % (2 << 20);
    if (main.process->push(0, record)) ++pushed;
    Record answer;
    while (main.process->pop(0, answer) == RingState::kOk) continue;
  }
  record = command(Command::kClose);
  record.lane = 1234567;
  REQUIRE(main.wait([&] { return main.process->push(0, record); }));
  REQUIRE(main.wait([&] { return main.find(Event::kClosed, 0, 1234567) != nullptr; }));
  ChildProcess::Exit exit;
  REQUIRE_FALSE(main.process->child().reap(exit));
}

TEST_CASE("The process ends when its channel closes") {
  auto raw = std::make_unique<RawMain>();
  ChildProcess child = std::move(raw->process->child());
  const int pidfd = child.pidfd();
  raw.reset();
  pollfd wait = {pidfd, POLLIN, 0};
  REQUIRE(::poll(&wait, 1, 20000) == 1);
  ChildProcess::Exit exit;
  REQUIRE(child.reap(exit));
  REQUIRE(exit.exited);
  REQUIRE(exit.status == 0);
}

TEST_CASE("Inherited UCX variables do not reach the rails") {
  // Would make the self-test fail.
  REQUIRE(::setenv("UCX_TLS", "self", 1) == 0);
  REQUIRE(::setenv("UCX_PROTO_ENABLE", "y", 1) == 0);
  Node node(loopback());
  start({&node});
  REQUIRE(node.ready_count == 1);
  ::unsetenv("UCX_TLS");
  ::unsetenv("UCX_PROTO_ENABLE");
}

}  // namespace
}  // namespace kvferry::rails::testing
