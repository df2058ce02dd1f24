// Legs whose sender has mapped the arena that they land in: it writes the regions of its credits by
// itself and tells what is WRITTEN. So what it may still write when the transfer has ended is freed
// by evidence alone: DRAINED, the end of its process, an operator's word. Neither its END nor the
// link's end is any, for a gather that runs ends when it ends.
#include <algorithm>
#include <tuple>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {

void Receiver::mapped_in(Link& link, const MsgMapped& message) {
  // Whoever was given nothing cannot write, and would have old bytes scattered as his.
  if (!link.lendable.contains(message.arena)) {
    core_.lanes.protocol_error(link.id);
    return;
  }
  link.lent.insert(message.arena);
}

// A new leg's arena: its layout's mapped one if its sender has mapped that. Where nothing of it
// comes back any more, as its writers are gone without evidence, and where room was promised, the
// ordinary one.
void Receiver::choose_mapped(RxLeg& leg, const Receive& receive, const Link& link) const {
  const std::optional<uint32_t>& beside = receive.layout->mapped_arena;
  if (!beside || !link.lent.contains(*beside) || leg.expected_bytes == 0) return;
  if (receive.reservation != 0) return;
  if (core_.arenas[*beside].lost() ||
      (link.check != CheckKind::kNone && core_.config.arenas[*beside].on_device)) {
    ++core_.stats.mapped_unused;
    return;
  }
  leg.mapped = true;
  leg.arena = *beside;
  leg.lent_over = link.id;
  leg.boot = link.boot;
  leg.node = link.node;
}

// ---- WRITTEN ----------------------------------------------------------------------------------

void Receiver::written_in(Link& link, const MsgWritten& message) {
  if (RxLeg* leg = live_leg(link, message.pull)) written(*leg, message);
}

// One WRITTEN against the table. The leg's transfer may be terminal afterwards.
void Receiver::written(RxLeg& leg, const MsgWritten& of) {
  const Link& link = *core_.lanes.find(leg.link);
  const auto fail = [&] {
    core_.dropped(DropCause::kProtocol);
    const uint64_t id = leg.receive;
    end_receive(receives_.at(id), TransferState::kFailed, Reason::kProtocol);
    forget_if_done(id);
  };
  // Its SLICE or DROP came before it, on whichever lane.
  const auto it = leg.slices.find(of.slice);
  if (!leg.mapped || it == leg.slices.end() || of.credit.value == 0 ||
      of.credit.value >= leg.next_credit || of.check.kind != link.check) {
    fail();
    return;
  }
  RxSlice& slice = it->second;
  const auto credit = leg.credits.find(of.credit.value);
  const bool live = credit != leg.credits.end();
  if (slice.state == RxSlice::State::kDropped) {
    // Nobody writes the region any more, and its sender will not use the credit again.
    if (!flawed(Flaw::kKeepWritten)) spend(leg, of.credit.value);
    ack(leg, {of.slice, of.chunk});
    return;
  }
  if (slice.state == RxSlice::State::kCompiling) {
    const auto [held, fresh] = leg.held_writes.emplace(of.credit.value, of);
    if (!live || (!fresh && held->second != of)) fail();
    return;
  }
  if (of.chunk >= slice.count) {
    fail();
    return;
  }
  const RxState state = slice.chunk_state(of.chunk);
  if (live != (state == RxState::kNeeded)) {
    fail();
    return;
  }
  if (!live) {  // told again
    core_.dropped(DropCause::kDuplicate);
    if (state == RxState::kDone) ack(leg, {of.slice, of.chunk});
    return;
  }
  RxRegion& region = regions_.at(credit->second);
  leg.credits.erase(credit);
  ++core_.stats.credits_ended;
  region.slice = of.slice;
  region.chunk = of.chunk;
  region.bytes = chunk_size(link.chunk_bytes, slice.bytes, of.chunk);
  region.check = of.check;
  ++core_.stats.chunks_mapped;
  landed(region);
}

// Decides again what came while a slice was being compiled.
void Receiver::decide_writes(uint64_t pull) {
  auto it = legs_.find(pull);
  if (it == legs_.end() || it->second.held_writes.empty()) return;
  const std::map<uint64_t, MsgWritten> held = std::exchange(it->second.held_writes, {});
  for (const auto& [credit, message] : held) {
    it = legs_.find(pull);
    if (it == legs_.end() || it->second.state != RxLegState::kOpen) return;
    written(it->second, message);
  }
}

// ---- a leg's end ------------------------------------------------------------------------------

// The credits of a leg that ends. Their regions are free, but not those that the peer writes by
// itself: it may be at it.
void Receiver::end_credits(RxLeg& leg) {
  leg.held_writes.clear();
  const bool evident =
      !leg.mapped || flawed(Flaw::kFreeLent) || (flawed(Flaw::kFreeUnproven) && leg.peer_ended);
  while (!leg.credits.empty()) {
    const auto [credit, region] = *leg.credits.begin();
    if (evident) {
      spend(leg, credit);
    } else {
      leg.credits.erase(leg.credits.begin());
      ++core_.stats.credits_ended;
      quarantine(regions_.at(region));
    }
  }
}

// END, until DRAINED: on the leg's link, or on a later one to the same life of the peer. With
// neither a leg that has regions waits for what else is evidence.
void Receiver::end_mapped(RxLeg& leg) {
  Link* link = core_.lanes.find(leg.link);
  if (link == nullptr && leg.lent > 0 &&
      (link = core_.lanes.find_life(leg.node, leg.boot)) != nullptr) {
    leg.link = link->id;
    link->own_pulls.insert(leg.pull);
  }
  if (link != nullptr && !link->dying)
    answer_end(*link, leg);
  else if (leg.lent == 0)
    close_leg(leg.pull);
}

// A new link: its peer is asked about what an earlier link to it has left.
void Receiver::link_up(Link& link) {
  for (auto& [pull, leg] : legs_) {
    const bool over = leg.state == RxLegState::kEnded || leg.state == RxLegState::kReleased;
    const bool same = leg.boot == link.boot && (leg.node == link.node || flawed(Flaw::kLifeByBoot));
    if (!leg.mapped || !over || !same || core_.lanes.find(leg.link) != nullptr) continue;
    leg.link = link.id;
    link.own_pulls.insert(pull);
  }
}

// ---- evidence ---------------------------------------------------------------------------------

uint64_t Receiver::free_lent(const RxLeg& leg) {
  if (leg.lent == 0) return 0;
  std::vector<uint64_t> free;
  for (const auto& [id, region] : regions_)
    if (region.leg == leg.pull && region.mapped && region.state == RegionState::kQuarantined)
      free.push_back(id);
  for (const uint64_t id : free) free_region(id);
  return free.size();
}

void Receiver::drained_in(Link& link, const MsgDrained& message) {
  const auto it =
      message.pull.receiver == core_.config.boot ? legs_.find(message.pull.counter) : legs_.end();
  if (it == legs_.end() || it->second.link != link.id) {
    core_.dropped(DropCause::kUnknownPull);
    return;
  }
  RxLeg& leg = it->second;
  if (!leg.mapped || leg.state == RxLegState::kOpen || leg.state == RxLegState::kUnsent) {
    core_.lanes.protocol_error(link.id);  // it answers our END
    return;
  }
  core_.stats.regions_drained += free_lent(leg);
  close_leg(leg.pull);
}

// Their link has ended by now.
void Receiver::process_gone(const PeerProcessGone& event) {
  std::vector<uint64_t> pulls;
  for (const auto& [pull, leg] : legs_)
    if (leg.mapped && leg.boot == event.boot && leg.node == event.node) pulls.push_back(pull);
  written_no_more(pulls);
}

void Receiver::peer_unmapped(LinkId link) {
  std::vector<uint64_t> pulls;
  for (const auto& [pull, leg] : legs_)
    if (leg.mapped && leg.lent_over == link) pulls.push_back(pull);
  written_no_more(pulls);
}

void Receiver::written_no_more(const std::vector<uint64_t>& pulls) {
  for (const uint64_t pull : pulls) {
    RxLeg& leg = legs_.at(pull);
    // One whose chunks are all here may be open still, for the sake of others.
    while (!leg.credits.empty()) spend(leg, leg.credits.begin()->first);
    core_.stats.regions_proven += free_lent(leg);
    if (leg.state != RxLegState::kOpen) close_leg(pull);
  }
}

void Receiver::release_quarantine(const ReleaseQuarantine& event) {
  QuarantineReleased answer;
  answer.call = event.call;
  std::vector<uint64_t> pulls;
  for (const auto& [pull, leg] : legs_) {
    if (leg.lent == 0 || event.node != leg.node) continue;
    if (event.boot && *event.boot != leg.boot) continue;
    if (core_.lanes.find(leg.link) == nullptr)
      pulls.push_back(pull);
    else
      answer.linked += static_cast<uint32_t>(leg.lent);
  }
  for (const auto& [id, region] : regions_)
    if (region.mapped && region.state == RegionState::kQuarantined &&
        std::binary_search(pulls.begin(), pulls.end(), region.leg))
      answer.bytes += region.region.bytes;
  for (const uint64_t pull : pulls) {
    answer.regions += static_cast<uint32_t>(free_lent(legs_.at(pull)));
    close_leg(pull);
  }
  core_.stats.regions_released += answer.regions;
  core_.emit(answer);
}

// ---- views ------------------------------------------------------------------------------------

Lent Receiver::lent(const memory::Region& region) const {
  for (const auto& [id, of] : regions_) {
    if (!of.mapped || of.region != region) continue;
    const bool quarantined = of.state == RegionState::kQuarantined;
    if (quarantined || of.state == RegionState::kGranted) return {id, quarantined};
  }
  return {};
}

std::vector<LentView> Receiver::lent() const {
  std::map<std::tuple<uint32_t, std::string, BootId>, LentView> views;
  for (const auto& [id, region] : regions_) {
    if (!region.mapped || region.state != RegionState::kQuarantined) continue;
    const RxLeg& leg = legs_.at(region.leg);
    LentView& view = views[{leg.arena, leg.node, leg.boot}];
    view.arena = leg.arena;
    view.node = leg.node;
    view.boot = leg.boot;
    view.linked = core_.lanes.find(leg.link) != nullptr;
    ++view.regions;
    view.bytes += region.region.bytes;
  }
  std::vector<LentView> out;
  for (auto& [key, view] : views) out.push_back(std::move(view));
  return out;
}

}  // namespace kvferry::engine
