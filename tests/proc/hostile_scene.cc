#include "tests/proc/hostile_scene.h"

#include <signal.h>
#include <sys/stat.h>

#include <filesystem>

namespace kvferry::testing {
namespace {

// Freed memory that a daemon may keep: its allocator's heaps and gRPC's threads.
constexpr uint64_t kKeptBytes = 96 << 20;

}  // namespace

bench::Shape brief_shape() {
  return shape_of(4, 2, 128, 512);
}

// ---- the honest pair ---------------------------------------------------------------------------

HonestPair::HonestPair(std::unique_ptr<Party> sender, std::unique_ptr<Party> receiver,
                       Tolerate tolerate)
    : sender_(std::move(sender)), receiver_(std::move(receiver)), tolerate_(tolerate) {
  const auto ticket = sender_->ticket();
  require_ok(ticket);
  ticket_ = *ticket;
  thread_ = std::thread([this] { run(); });
}

HonestPair::~HonestPair() {
  stop_.store(true);
  thread_.join();
}

void HonestPair::run() {
  while (!stop_.load()) {
    const std::string fault = hand_over();
    if (fault.empty()) continue;
    const std::lock_guard<std::mutex> lock(mutex_);
    fault_ = fault;
    return;
  }
}

std::string HonestPair::end(Party& party, const std::string& id, client::TransferState wanted,
                            bool& failed) {
  const auto ended = party.wait(id, kPatience);
  if (!ended) return party.instance() + ": " + ended.error().to_string();
  for (const TransferStatus& status : *ended) {
    if (status.state == wanted) continue;
    failed = true;
    if (tolerate_ == Tolerate::kNothing)
      return party.instance() + ": " + std::string(name_of(status.state)) + " " +
             std::string(status.reason);
  }
  const Status closed = party.close(id);
  return closed ? "" : party.instance() + ": " + closed.error().to_string();
}

std::string HonestPair::hand_over() {
  receiver_->clean();
  const TransferKey key = new_key("");
  if (const Status sent = sender_->send(key, {}); !sent) return sent.error().to_string();
  TransferKey full = key;
  full.instance = sender_->instance();
  if (const Status asked = receiver_->receive(full, ticket_, {}); !asked)
    return asked.error().to_string();
  bool failed = false;
  std::string fault = end(*receiver_, key.id, client::TransferState::kCompleted, failed);
  const bool received = !failed;
  if (fault.empty()) fault = end(*sender_, key.id, client::TransferState::kDelivered, failed);
  if (fault.empty() && received) fault = receiver_->verify();
  // Nobody ever writes to the sender's pages.
  if (fault.empty()) fault = sender_->verify();
  if (fault.empty()) (failed ? failed_ : done_).fetch_add(1);
  return fault;
}

void HonestPair::require_more(uint64_t count) {
  const uint64_t wanted = done_.load() + count;
  std::string fault;
  const bool there = comes_true(
      [&] {
        const std::lock_guard<std::mutex> lock(mutex_);
        fault = fault_;
        return !fault.empty() || done_.load() >= wanted;
      },
      kPatience * 2);
  if (!fault.empty()) FAIL("an honest hand-off: " << fault);
  if (!there) FAIL("honest hand-offs do not go on: " << done_.load() << " of " << wanted);
}

// ---- the scene ---------------------------------------------------------------------------------

HostileScene::HostileScene(const Options& options) {
  char directory[] = "/tmp/kvferry-hostile.XXXXXX";
  REQUIRE(::mkdtemp(directory) != nullptr);
  directory_ = directory;
  // What keeps others out is the sockets' affair.
  REQUIRE(::chmod(directory, 0755) == 0);
  const std::string names[2] = {"sender", "receiver"};
  const uint16_t ports[2] = {bench::DaemonProcess::find_port(), bench::DaemonProcess::find_port()};
  for (int side = 0; side < 2; ++side) {
    bench::DaemonOptions how;
    how.binary_directory = binary_directory();
    how.settings = {"arena.bytes=32MiB", "arena.segment_bytes=16MiB"};
    if (const char* const rails = std::getenv("KVFERRY_RAILS_BINARY"))
      how.settings.push_back("rails.binary=" + std::string(rails));
    how.settings.insert(how.settings.end(), options.settings.begin(), options.settings.end());
    bench::DaemonProcess::Identity identity{names[side], ports[side], names[1 - side],
                                            ports[1 - side]};
    std::string more = options.toml;
    for (std::size_t at = 0; (at = more.find("NAME", at)) != std::string::npos;)
      more.replace(at, 4, path(names[side]));
    identity.toml =
        "[node]\nid = \"" + names[side] + "\"\n[[peers]]\nidentity = \"" + names[1 - side] +
        "\"\naddresses = [\"127.0.0.1:" + std::to_string(ports[1 - side]) + "\"]\n" + more;
    auto daemon = bench::DaemonProcess::start(directory_, identity, how);
    require_ok(daemon);
    daemons_[side] = std::move(*daemon);
  }
  for (auto& daemon : daemons_)
    if (const auto serving = daemon->wait_until_serving(); !serving)
      FAIL(serving.error().to_string());
  honest_ = std::make_unique<HonestPair>(attach("prefill", 0, true), attach("decode", 1, false),
                                         options.tolerate);
  honest_->require_more(5);
  for (int side = 0; side < 2; ++side) {
    before_[side] = level_of(*daemons_[side]);
    private_before_[side] = daemons_[side]->private_bytes();
  }
}

HostileScene::~HostileScene() {
  honest_.reset();
  for (auto& daemon : daemons_)
    if (daemon && daemon->pid() > 0) ::kill(daemon->pid(), SIGTERM);
  for (auto& daemon : daemons_) daemon.reset();
  std::error_code error;
  std::filesystem::remove_all(directory_, error);
}

std::unique_ptr<Party> HostileScene::attach(const std::string& instance, int side, bool sends,
                                            const std::string& socket) {
  Party::Options options;
  options.instance = instance;
  options.socket = socket.empty() ? daemons_[side]->socket() : socket;
  options.shape = brief_shape();
  options.sends = sends;
  options.seed = sends ? 1 : 2;
  auto party = Party::make(options);
  require_ok(party);
  return std::move(*party);
}

void HostileScene::require_nothing_left() {
  honest_->require_more();
  for (int side = 0; side < 2; ++side) {
    const bench::DaemonProcess& daemon = *daemons_[side];
    CAPTURE(side);
    Level now;
    // Between two hand-offs, or in one: both are what was measured before.
    const bool back = comes_true([&] {
      now = level_of(daemon);
      return now.within(before_[side]);
    });
    INFO("before: " << before_[side].text() << "; now: " << now.text());
    CHECK(back);
    CHECK(metric(daemon, "kvferry_arena_bytes", "quarantined") == 0);
    CHECK(daemon.private_bytes() < private_before_[side] + kKeptBytes);
    CHECK_FALSE(daemon.http("/healthz").empty());
  }
}

std::string HostileScene::log_tail() const {
  return daemons_[0]->log_tail() + daemons_[1]->log_tail();
}

}  // namespace kvferry::testing
