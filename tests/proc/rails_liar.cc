// A rails process that has been taken over: it takes its set-up as the real one does and then lies
// to the main process in the way that LIAR names. Ends with its parent.
#include <poll.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "daemon/rails/process/setup.h"

namespace kvferry::rails {
namespace {

constexpr int kChannel = 3;

class Liar {
 public:
  explicit Liar(const ProcessSetup& setup)
      : setup_(setup),
        events_(setup.layout.event_ring(setup.shared.base(), 0)),
        slot_(setup.layout.inbound_small(0).first) {}

  void push(const Record& record) {
    while (events_.push(record) == RingState::kBlocked) ::poll(nullptr, 0, 1);
    ring();
  }
  void ready() {
    Record record;
    record.kind = static_cast<uint16_t>(Event::kReady);
    record.slot = slot_;
    record.slot_bytes = 16;
    push(record);
  }
  void garbage() {
    uint64_t seed = 42;
    const auto next = [&seed] {
      seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
      return seed >> 24;
    };
    for (int i = 0; i < 200000; ++i) {
      Record record;
      // Kinds that main refuses at once are left out, so that the lies go on.
      const Event kinds[] = {Event::kConnected, Event::kLaneError, Event::kControlIn,
                             Event::kOfferIn,   Event::kSendEnded, Event::kReceiveEnded};
      record.kind = static_cast<uint16_t>(kinds[next() % 6]);
      record.slot = slot_ + static_cast<uint32_t>(next() % 4);
      record.slot_bytes = static_cast<uint32_t>(next() % 4096);
      record.lane = next() % 6;
      record.token = next() % 40;
      record.descriptor = next() % 3;
      record.bytes = next();
      record.status = static_cast<int32_t>(next() % 3);
      if (static_cast<Event>(record.kind) == Event::kConnected) record.lane = 1000 + record.lane;
      push(record);
    }
  }
  void ring() {
    if (events_.take_wake()) ring_doorbell(setup_.doorbells[0].get());
  }

  void tell(std::string_view lie) {
    if (lie == "mute") return;
    Record record;
    if (lie == "tail") {
      setup_.layout.event_ring(setup_.shared.base(), 0).header->tail.store(1ULL << 50);
      ring_doorbell(setup_.doorbells[0].get());
      return;
    }
    if (lie == "ready-slot") {
      record.kind = static_cast<uint16_t>(Event::kReady);
      record.slot = 0;  // an outbound one
      record.slot_bytes = 16;
      return push(record);
    }
    ready();
    if (lie == "ready-twice") return ready();
    if (lie == "garbage") return garbage();
    record.slot = slot_;
    if (lie == "kind") record.kind = 999;
    if (lie == "length" || lie == "slot") record.kind = static_cast<uint16_t>(Event::kControlIn);
    if (lie == "length") record.slot_bytes = kSmallSlotBytes + 1;
    if (lie == "slot") record.slot = UINT32_MAX;
    push(record);
  }

 private:
  const ProcessSetup& setup_;
  RingProducer<Record> events_;
  uint32_t slot_;
};

int run() {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  auto setup = receive_setup(kChannel, std::chrono::seconds(10));
  const char* const lie = std::getenv("LIAR");
  if (!setup || lie == nullptr) return 1;
  Liar(*setup).tell(lie);
  pollfd wait = {kChannel, POLLIN, 0};
  ::poll(&wait, 1, 60000);
  return 0;
}

}  // namespace
}  // namespace kvferry::rails

int main() {
  return kvferry::rails::run();
}
