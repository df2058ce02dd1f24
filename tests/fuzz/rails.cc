// The main process's side of the rails against a rails process that lies: any record, any index,
// any slot, in any order between the main process's own commands, also ends and restarts of the
// process. Whatever it says, what is told of a send, a receive, an offer or a lane is told once,
// and only if it exists.
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <map>
#include <set>

#include "daemon/rails/rails_client.h"
#include "tests/fuzz/fake_child.h"
#include "tests/fuzz/input.h"

namespace {

using namespace kvferry;
using namespace kvferry::rails;

constexpr uint32_t kRails = 2;
constexpr uint64_t kSegmentBytes = 64 * 1024;

Limits small_limits() {
  Limits limits;
  limits.ring_records = 8;
  limits.outbound_small = 4;
  limits.outbound_large = 1;
  limits.inbound_small = 3;
  limits.inbound_large = 1;
  limits.lanes = 3;
  limits.held_offers = 4;
  limits.operations = 4;
  return limits;
}

// What the main process believes; every callback is compared with it.
class Believer final : public RailsEvents {
 public:
  void on_ready(const RailsReady& ready) override {
    FUZZ_CHECK(!ready_, "ready once a life");
    FUZZ_CHECK(ready.rails.size() == kRails && !ready.rails[0].address.empty(), "a rail's address");
    ready_ = true;
  }
  void on_connected(LaneKey lane) override {
    FUZZ_CHECK(connecting_.erase(lane) == 1, "connected once, and only what connects");
  }
  void on_connect_failed(LaneKey lane, int) override {
    FUZZ_CHECK(connecting_.erase(lane) == 1 && lanes_.erase(lane) == 1, "failed once");
  }
  void on_lane_error(LaneKey lane, int) override {
    FUZZ_CHECK(lanes_.contains(lane) && !closing_.contains(lane), "an error of a lane there is");
  }
  void on_closed(LaneKey lane) override {
    FUZZ_CHECK(closing_.erase(lane) == 1 && lanes_.erase(lane) == 1, "closed once, when asked to");
    connecting_.erase(lane);
    for (const auto& [token, of] : sends_) FUZZ_CHECK(of != lane, "its sends have been told");
    for (const auto& [landing, of] : landings_)
      FUZZ_CHECK(of.first != lane, "its receives have been told");
  }
  void on_control(uint32_t rail, std::span<const uint8_t> message) override {
    FUZZ_CHECK(ready_ && rail < kRails && message.size() <= kLargeSlotBytes, "a message fits");
    sum(message);
  }
  void on_offer(const OfferIn& offer) override {
    FUZZ_CHECK(ready_ && offer.rail < kRails && offer.header.size() <= kLargeSlotBytes,
               "a header fits");
    sum(offer.header);
    if (!offer.descriptor) return;
    FUZZ_CHECK(offers_.emplace(offer.descriptor, offer.data_bytes).second, "a new descriptor");
    FUZZ_CHECK(offer.descriptor > last_descriptor_, "never one of another life");
    last_descriptor_ = offer.descriptor;
  }
  void on_send_ended(SendToken token, bool) override {
    FUZZ_CHECK(sends_.erase(token) == 1, "a send ends once");
  }
  void on_receive_ended(LandingId landing, bool ok, uint64_t bytes) override {
    const auto found = landings_.find(landing);
    FUZZ_CHECK(found != landings_.end(), "a receive ends once");
    FUZZ_CHECK(bytes == (ok ? found->second.second : 0), "with the bytes that were agreed");
    landings_.erase(found);
  }
  void on_died(const RailsExit& exit) override {
    FUZZ_CHECK(exit.why.size() <= 512, "last words are bounded");
    for (const char c : exit.why) FUZZ_CHECK(c >= ' ' && c <= '~', "and printable");
    forget();
  }
  void forget() {
    ready_ = false;
    lanes_.clear();
    connecting_.clear();
    closing_.clear();
    sends_.clear();
    landings_.clear();
    offers_.clear();
  }

  bool ready_ = false;
  std::set<LaneKey> lanes_, connecting_, closing_;
  std::map<SendToken, LaneKey> sends_;
  std::map<LandingId, std::pair<LaneKey, uint64_t>> landings_;
  std::map<DescriptorId, uint64_t> offers_;
  DescriptorId last_descriptor_;
  volatile uint8_t sum_ = 0;

 private:
  // Reads every byte, for the address sanitizer.
  void sum(std::span<const uint8_t> bytes) {
    for (const uint8_t b : bytes) sum_ = static_cast<uint8_t>(sum_ + b);
  }
};

int segment_fd() {
  static const UniqueFd fd = [] {
    auto made = make_sealed_memfd("kvferry-fuzz", kSegmentBytes);
    FUZZ_CHECK(made.has_value(), "a segment");
    return std::move(*made);
  }();
  return fd.get();
}

class World {
 public:
  World() {
    RailsConfig config;
    config.executable = "/bin/sh";  // is not started
    config.rails = {{"tcp", "lo"}, {"shm", ""}};
    config.limits = small_limits();
    const Segment segment{segment_fd(), kSegmentBytes};
    auto made = RailsClient::make(std::move(config), std::span(&segment, 1));
    FUZZ_CHECK(made.has_value(), "the configuration is good");
    client_ = std::move(*made);
    FUZZ_CHECK(client_->start(now_).has_value(), "it starts");
  }

  // An honest start, so that more than the first record is looked at.
  void become_ready() {
    for (uint32_t rail = 0; rail < kRails; ++rail) {
      Record record;
      record.kind = static_cast<uint16_t>(Event::kReady);
      record.slot = child().layout->inbound_small(rail).first;
      record.slot_bytes = 5;
      push_event(rail, record);
    }
    client_->poll(now_, believer_);
    FUZZ_CHECK(client_->phase() == RailsClient::Phase::kReady, "two good records and it is ready");
    for (uint32_t rail = 0; rail < kRails; ++rail) read_commands(rail);
  }

  void step(fuzz::Input& in) {
    switch (in.below(16)) {
      case 0:
      case 1:
      case 2:
        return push_event(in.below(kRails), any_record(in));
      case 3:
        return spoil_memory(in);
      case 4:
        return spoil_index(in);
      case 5:
        return read_commands(in.below(kRails));
      case 6:
      case 7:
        client_->poll(now_, believer_, 1 + in.below(8));
        return check();
      case 8:
        return sleep(in);
      case 9:
        now_ = now_ + Duration(in.number<uint32_t>() * int64_t{16});
        return;
      case 10:
        return end_of_child(in);
      default:
        return command(in);
    }
  }

  void finish() {
    client_->stop();
    believer_.forget();
    FUZZ_CHECK(client_->phase() == RailsClient::Phase::kStopped, "it stops");
  }

 private:
  static fuzz::FakeChild& child() { return fuzz::fake_child(); }
  static std::byte* base() { return child().memory.base(); }

  // As an honest producer would, but that it never waits for room.
  void push_event(uint32_t rail, const Record& record) {
    const RingMemory ring = child().layout->event_ring(base(), rail);
    const uint64_t tail = ring.header->tail.load();
    std::memcpy(ring.records + (tail & (ring.capacity - 1)) * kRecordBytes, &record, sizeof record);
    ring.header->tail.store(tail + 1);
  }
  void read_commands(uint32_t rail) {
    const RingMemory ring = child().layout->command_ring(base(), rail);
    ring.header->head.store(ring.header->tail.load());
  }

  Record any_record(fuzz::Input& in) {
    Record record;
    record.kind = static_cast<uint16_t>(in.below(11));
    if (record.kind == 10) record.kind = in.number<uint16_t>();
    record.status = in.chance() ? 0 : static_cast<int32_t>(in.byte()) - 128;
    record.slot = in.chance() ? in.below(20) : in.number<uint32_t>();
    record.slot_bytes = static_cast<uint32_t>(in.size());
    record.lane = 1 + in.below(4);
    record.token = 1 + in.below(6);
    record.descriptor = in.below(4);
    record.bytes = in.chance() ? 100 : in.size();
    record.offset = in.chance() ? 0 : in.size();
    return record;
  }

  void spoil_memory(fuzz::Input& in) {
    const uint64_t at = in.number<uint32_t>() % child().memory.bytes();
    const auto bytes = in.bytes(std::min<uint64_t>(in.byte(), child().memory.bytes() - at));
    if (!bytes.empty()) std::memcpy(base() + at, bytes.data(), bytes.size());
  }
  void spoil_index(fuzz::Input& in) {
    const uint32_t rail = in.below(kRails);
    const RingMemory ring = in.chance() ? child().layout->event_ring(base(), rail)
                                        : child().layout->command_ring(base(), rail);
    const uint32_t which = in.below(3);
    // Around what it is, or anything.
    const bool near = in.chance();
    const uint64_t change = in.size();
    if (which == 2)
      ring.header->consumer_sleeps.store(static_cast<uint32_t>(change));
    else if (which == 1)
      ring.header->head.store(near ? ring.header->head.load() + change - 4 : change);
    else
      ring.header->tail.store(near ? ring.header->tail.load() + change - 4 : change);
  }
  void sleep(fuzz::Input& in) {
    if (!client_->prepare_wait(in.chance() ? Wake::kAny : Wake::kWork)) return;
    std::vector<pollfd> fds = client_->pollfds();
    for (pollfd& fd : fds) fd.revents = in.chance() ? POLLIN : 0;
    client_->waited(fds);
  }
  void end_of_child(fuzz::Input& in) {
    const auto words = in.bytes(in.byte());
    if (!words.empty())
      (void)!::send(child().channel.get(), words.data(), words.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (in.chance() || client_->pid() < 0) return;
    child().exited = true;
    // The first poll may go by what poll(2) saw before the end.
    for (int i = 0; i < 2 && client_->pid() >= 0; ++i) {
      now_ = now_ + std::chrono::milliseconds(10);
      client_->poll(now_, believer_);
    }
    FUZZ_CHECK(client_->phase() == RailsClient::Phase::kWaiting, "its end is noticed");
    now_ = now_ + std::chrono::seconds(20);
    client_->poll(now_, believer_);
    FUZZ_CHECK(client_->phase() == RailsClient::Phase::kStarting, "and it starts again");
    if (in.chance()) become_ready();
  }

  void command(fuzz::Input& in) {
    const LaneKey lane{1 + in.below(4)};
    const SendToken token{1 + in.below(6)};
    const LandingId landing{1 + in.below(6)};
    const Region region{in.below(2), in.size(), in.chance() ? 100 : in.size()};
    std::vector<uint8_t> bytes(in.size() % (kLargeSlotBytes + 2), 1);
    bool inside = region.segment == 0 && region.bytes > 0 && region.bytes <= kSegmentBytes &&
                  region.offset <= kSegmentBytes - region.bytes;
    switch (in.below(6)) {
      case 0:
        if (!client_->connect(lane, in.below(3), bytes)) return;
        FUZZ_CHECK(believer_.lanes_.insert(lane).second, "a lane's key is not in use");
        believer_.connecting_.insert(lane);
        return;
      case 1:
        if (!client_->close(lane)) return;
        FUZZ_CHECK(believer_.lanes_.contains(lane), "only a lane there is can be closed");
        FUZZ_CHECK(believer_.closing_.insert(lane).second, "and once");
        return;
      case 2:
        if (!client_->send_control(lane, bytes, token)) return;
        FUZZ_CHECK(believer_.sends_.emplace(token, lane).second, "a token names one send");
        return;
      case 3:
        if (!client_->send_offer(lane, bytes, region, token)) return;
        FUZZ_CHECK(inside, "only what lies in its segment is offered");
        FUZZ_CHECK(believer_.sends_.emplace(token, lane).second, "a token names one send");
        return;
      case 4: {
        const DescriptorId descriptor = some_offer(in);
        if (!client_->accept(descriptor, lane, region, landing)) return;
        FUZZ_CHECK(inside, "only into its segment is received");
        const auto held = believer_.offers_.extract(descriptor);
        FUZZ_CHECK(!held.empty() && held.mapped() == region.bytes, "an offer that is held");
        FUZZ_CHECK(believer_.landings_.emplace(landing, std::pair(lane, region.bytes)).second,
                   "a landing names one receive");
        return;
      }
      default: {
        const DescriptorId descriptor = some_offer(in);
        const bool dropped = client_->drop(descriptor).has_value();
        FUZZ_CHECK(dropped == (believer_.offers_.erase(descriptor) == 1), "a held offer goes once");
      }
    }
  }
  DescriptorId some_offer(fuzz::Input& in) {
    if (believer_.offers_.empty() || in.below(8) == 0) return DescriptorId{in.size()};
    auto it = believer_.offers_.begin();
    std::advance(it, in.below(static_cast<uint32_t>(believer_.offers_.size())));
    return it->first;
  }

  void check() {
    FUZZ_CHECK(believer_.ready_ == (client_->phase() == RailsClient::Phase::kReady), "its phase");
    FUZZ_CHECK(believer_.offers_.size() <= uint64_t{kRails} * small_limits().held_offers,
               "bounded");
    for (uint32_t rail = 0; rail < kRails; ++rail) (void)client_->stats(rail);
  }

  Believer believer_;
  Time now_{1'000'000'000};
  std::unique_ptr<RailsClient> client_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  fuzz::Input in(data, size);
  World world;
  if (in.byte() % 8 != 0) world.become_ready();
  for (int steps = 0; !in.empty() && steps < 500; ++steps) world.step(in);
  world.finish();
  return 0;
}
