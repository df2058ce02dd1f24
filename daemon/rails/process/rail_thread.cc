#include "daemon/rails/process/rail_thread.h"

#include <poll.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>

#include "daemon/base/units.h"

namespace kvferry::rails {
namespace {

constexpr int kCommandsPerRound = 64;
constexpr int kBusySleepMs = 1;
constexpr int kIdleSleepMs = 100;
constexpr int64_t kLeastSpinNs = 500;
constexpr int kExitCorrupt = 70;

void bump(std::atomic<uint64_t>& counter) {
  counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

}  // namespace

RailThread::RailThread(const ProcessSetup& setup, uint32_t index, Rail& rail)
    : rail_(rail),
      commands_(setup.layout.command_ring(setup.shared.base(), index)),
      doorbell_(setup.doorbells[index].get()),
      spin_limit_ns_(static_cast<int64_t>(std::min<uint64_t>(setup.setup.spin_ns, 1'000'000))),
      spin_ns_(spin_limit_ns_) {}

bool RailThread::work() {
  bool moved = false;
  Record command;
  for (int i = 0; i < kCommandsPerRound; ++i) {
    const RingState state = commands_.pop(command);
    // Main never writes such an index: the shared memory is damaged.
    if (state == RingState::kCorrupt) ::_exit(kExitCorrupt);
    if (state == RingState::kBlocked) break;
    rail_.obey(command);
    moved = true;
  }
  if (rail_.progress()) moved = true;
  if (rail_.flush()) moved = true;
  bump(rail_.counters().ticks);
  return moved;
}

void RailThread::run() {
  Time last_work = monotonic_now();
  for (;;) {
    if (work()) {
      last_work = monotonic_now();
      continue;
    }
    const int64_t idle_ns = (monotonic_now() - last_work).count();
    if (idle_ns < spin_ns_) {
      bump(rail_.counters().spins);
      // The peer or main may be waiting for this very core.
      ::sched_yield();
      continue;
    }
    sleep();
    last_work = monotonic_now();
  }
}

void RailThread::sleep() {
  const bool congested = rail_.congested();
  // What UCX has ready stays there while main does not keep up: its descriptor would not let us
  // sleep.
  if (!congested && ucp_worker_arm(rail_.worker().handle()) != UCS_OK) {
    spin_ns_ = std::min(std::max(spin_ns_, kLeastSpinNs) * 2, spin_limit_ns_);
    return;
  }
  // Slots that main gives back are worth waking for while messages wait for them.
  if (!commands_.prepare_sleep(congested ? Wake::kAny : Wake::kWork)) {
    spin_ns_ = std::min(std::max(spin_ns_, kLeastSpinNs) * 2, spin_limit_ns_);
    return;
  }
  pollfd waits[2] = {{doorbell_, POLLIN, 0}, {rail_.worker().event_fd(), POLLIN, 0}};
  const int limit_ms = congested || rail_.busy() ? kBusySleepMs : kIdleSleepMs;
  const Time before = monotonic_now();
  const int ready = ::poll(waits, congested ? 1 : 2, limit_ms);
  commands_.end_sleep();
  if (ready > 0 && waits[0].revents != 0) quiet_doorbell(doorbell_);
  bump(rail_.counters().sleeps);
  // A sleep shorter than the longest spin was not worth its system calls; a long one means that
  // spinning before it was wasted.
  if ((monotonic_now() - before).count() < spin_limit_ns_)
    spin_ns_ = std::min(std::max(spin_ns_, kLeastSpinNs) * 2, spin_limit_ns_);
  else
    spin_ns_ = std::max(spin_ns_ / 2, std::min(kLeastSpinNs, spin_limit_ns_));
}

}  // namespace kvferry::rails
