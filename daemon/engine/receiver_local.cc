// Chunks of legs whose sender is on this daemon: copied from page to page as the sender announces
// them, with neither credit nor arena, only a few at a time in all.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {

const LayoutHandle* Receiver::layout_of(uint64_t pull) const {
  const auto leg = legs_.find(pull);
  const Receive* receive = leg == legs_.end() ? nullptr : find(leg->second.receive);
  return receive == nullptr ? nullptr : receive->layout.get();
}

void Receiver::slice_to_copy(Receive& receive, RxLeg& leg, uint64_t ordinal) {
  if (leg.slices.at(ordinal).count == 0) return;
  leg.to_copy.insert(ordinal);
  if (receive.ready) return;
  const TimerKey key{TimerKind::kReady, receive.id, 0};
  if (!core_.timers.pending(key)) core_.timers.set(key, core_.now + core_.config.ready_timeout);
}

// After any change of what the leg has to copy or whether it may.
void Receiver::update_local(RxLeg& leg) {
  // No copy runs beside one of a dropped slice, which still writes the same pages.
  const bool may = leg.state == RxLegState::kOpen && !leg.to_copy.empty() &&
                   leg.dropped_scatters == 0 && receives_.at(leg.receive).ready;
  if (leg.queued && !may) leave_queues(leg);
  if (may && !leg.queued) {
    leg.queued = true;
    local_turns_.insert(leg.turn);
  }
}

void Receiver::run_local() {
  while (local_copies_ < core_.config.local_copies && !local_turns_.empty()) {
    const FairKey next = local_turns_.front();
    RxLeg& leg = legs_.at(next.leg);
    const RxSlice& slice = leg.slices.at(*leg.to_copy.begin());
    local_turns_.served(
        next, chunk_size(core_.lanes.find(leg.link)->chunk_bytes, slice.bytes, slice.begun));
    copy_chunk(leg);
  }
}

// The leg's next chunk: a landing and its scatter in one, straight from what the sender lends.
void Receiver::copy_chunk(RxLeg& leg) {
  const uint64_t ordinal = *leg.to_copy.begin();
  RxSlice& slice = leg.slices.at(ordinal);
  const Sender::Loan loan = core_.sender.lend(leg.pull, ordinal, slice.begun);
  if (loan.plan == nullptr) {  // its DROP or the leg's END is on its way
    leg.to_copy.erase(ordinal);
    update(leg);
    return;
  }
  const uint64_t chunk = slice.begun++;
  if (slice.begun == slice.count) leg.to_copy.erase(ordinal);
  slice.chunks[chunk] = RxState::kScattering;
  Receive& receive = receives_.at(leg.receive);
  const uint64_t chunk_bytes = core_.lanes.find(leg.link)->chunk_bytes;
  RxRegion fresh;
  fresh.id = core_.next_number();
  fresh.state = RegionState::kScattering;
  fresh.link = leg.link;
  fresh.leg = leg.pull;
  fresh.receive = leg.receive;
  fresh.slice = ordinal;
  fresh.chunk = chunk;
  fresh.bytes = chunk_size(chunk_bytes, slice.bytes, chunk);
  fresh.since = core_.now;
  fresh.local = true;
  fresh.loan = loan.id;
  ++leg.regions_held;
  ++receive.scatters;
  ++local_copies_;
  receive.timeline.note(Step::kScattering, core_.now);
  if (!receive.moved) {
    receive.moved = true;
    receive.first_move = core_.now;
  }
  LocalCopy command;
  command.copy = CopyId{core_.next_number()};
  command.source = loan.plan;
  command.destination = slice.plan;
  command.offset = chunk * chunk_bytes;
  command.bytes = fresh.bytes;
  const CopyId copy = command.copy;
  scatters_[copy] = fresh.id;
  RxRegion& region = regions_.emplace(fresh.id, std::move(fresh)).first->second;
  core_.emit(std::move(command));
  if (flawed(Flaw::kRepayEarly)) {
    --local_copies_;
    core_.sender.repay(std::exchange(region.loan, 0), {copy, CopyOutcome::kOk, {}});
  }
  update(leg);
  release(receive);
}

}  // namespace kvferry::engine
