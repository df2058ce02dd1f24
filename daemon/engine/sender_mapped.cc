// Chunks of mapped legs: gathered straight into the regions that the receiver lends, told as
// WRITTEN until they are acknowledged; and DRAINED, which says that nothing of a pull is written
// any more.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {

// A mapped PULL for what this daemon has not mapped, or with credits, which come after a SLICE.
bool Sender::bad_mapped(const Link& link, const MsgPull& pull) const {
  return pull.mapped && (!link.mapped.contains(*pull.mapped) || !pull.credits.empty());
}

// After any change of credits or chunks. Nothing is staged, so there is nothing ahead: what may be
// gathered has a region to go to.
void Sender::update_mapped(TxLeg& leg) {
  const bool may = leg.resolved && !leg.credits.empty() && next_idle(leg);
  if (leg.queued && !may) leave_queues(leg);
  if (may && !leg.queued) {
    leg.queued = true;
    mapped_turns_.insert(leg.turn);
  }
}

void Sender::gather_mapped() {
  while (mapped_gathers_ < core_.config.mapped_gathers && !mapped_turns_.empty()) {
    const FairKey next = mapped_turns_.front();
    TxLeg& leg = legs_.at(next.leg);
    mapped_turns_.served(next,
                         chunk_size(core_.lanes.find(leg.link)->chunk_bytes,
                                    leg.slices.at(leg.cursor.first).bytes, leg.cursor.second));
    gather_into_peer(leg);
  }
}

void Sender::gather_into_peer(TxLeg& leg) {
  const auto [ordinal, chunk] = leg.cursor;
  const CreditGrant credit = leg.credits.front();
  const Link& link = *core_.lanes.find(leg.link);
  const TxSlice& slice = leg.slices.at(ordinal);
  if (credit.bytes < chunk_size(link.chunk_bytes, slice.bytes, chunk)) {
    leg_over(leg.id, LegFate::kFailed, Outcome::kFailed, Reason::kProtocol);
    return;
  }
  leg.credits.pop_front();
  ++leg.cursor.second;
  StagingRegion& region = begin_gather(leg, ordinal, chunk);
  region.region = {credit.place->segment, credit.place->offset, credit.bytes};
  Staging& staging = begin_chunk(leg, region);
  staging.mapped = true;
  staging.pull = leg.pull->pull;
  staging.credit = credit;
  ++mapped_gathers_;
  ++writing_[{staging.peer, staging.pull}];
  Gather command;
  command.copy = CopyId{core_.next_number()};
  command.plan = slice.plan;
  command.offset = chunk * link.chunk_bytes;
  command.bytes = staging.bytes;
  command.region = region.region;
  command.link = leg.link;
  command.check_kind = link.check;
  command.mapped = PeerArena{leg.link, *leg.mapped};
  gathers_[command.copy] = region.id;
  core_.emit(std::move(command));
  update(leg);
  Send& send = sends_.at(leg.send);
  if (!slice.packed && !send.record.memory_in_use)
    release(send);  // which tells that a copy reads the source
}

// The chunk lies in its region. Its record stays until the ack.
void Sender::written(TxLeg& leg, TxSlice& slice, Staging& staging) {
  ++core_.stats.chunks_written;
  sends_.at(leg.send).timeline.note(Step::kOffered, core_.now);
  TxChunk& chunk = slice.chunks[staging.chunk];
  chunk.state = TxState::kWritten;
  chunk.offered_once = true;
  staging.since = core_.now;
  (void)core_.lanes.send(*core_.lanes.find(leg.link),
                         MsgWritten{leg.pull->pull, staging.slice, staging.chunk,
                                    staging.credit.credit, regions_.at(staging.region).check});
}

// How many chunks wait for a credit.
uint64_t Sender::idle_chunks(const TxLeg& leg) {
  uint64_t idle = 0;
  for (const auto& [ordinal, slice] : leg.slices) {
    if (slice.dropped || slice.state != TxSlice::State::kAnnounced) continue;
    idle += static_cast<uint64_t>(
        std::count_if(slice.chunks.begin(), slice.chunks.end(),
                      [](const TxChunk& chunk) { return chunk.state == TxState::kIdle; }));
  }
  return idle;
}

// The slice is dropped, and `idle` are its chunks that nobody has gathered. The receiver withdraws
// no region of this leg, so credits for which no chunk is left go back, or others would wait for
// them until something is sent anew: as if these chunks had been written before the Revoke.
void Sender::give_back_credits(TxLeg& leg, uint64_t ordinal, const std::vector<uint64_t>& idle) {
  const uint64_t left = idle_chunks(leg);
  for (const uint64_t chunk : idle) {
    if (leg.credits.size() <= left) return;
    give_back_credit(leg, {ordinal, chunk}, leg.credits.back(), {});
    leg.credits.pop_back();
  }
}

void Sender::give_back_credit(TxLeg& leg, const std::pair<uint64_t, uint64_t>& of,
                              const CreditGrant& credit, Check check) {
  Link& link = *core_.lanes.find(leg.link);
  check.kind = link.check;
  leg.dropped_writes[of] = {credit.credit, check};
  (void)core_.lanes.send(link,
                         MsgWritten{leg.pull->pull, of.first, of.second, credit.credit, check});
}

void Sender::writing_ended(const Staging& staging) {
  --mapped_gathers_;
  const auto writing = writing_.find({staging.peer, staging.pull});
  if (--writing->second == 0) writing_.erase(writing);
  if (staging.wanted) return;
  const auto leg = legs_.find(staging.leg);
  if (leg != legs_.end()) {
    // Its slice was dropped meanwhile: what it has written is nobody's, and the peer knows nothing
    // of it, so the region may be written again.
    if (idle_chunks(leg->second) > leg->second.credits.size())
      leg->second.credits.push_back(staging.credit);
    else
      give_back_credit(leg->second, {staging.slice, staging.chunk}, staging.credit,
                       regions_.at(staging.region).check);
    update(leg->second);
  } else if (Link* link = core_.lanes.find_life(staging.peer, staging.pull.receiver)) {
    const auto ended = link->pulls.find(staging.pull.counter);
    if (ended != link->pulls.end()) tell_drained(*link, staging.pull, ended->second);
  }
}

// The peer has ended a mapped pull, which it tells until it hears that nothing of it is written any
// more: by this link or an earlier one, whose end stopped all but the gathers that ran.
void Sender::ask_drained(Link& link, const PullId& pull) {
  const auto ended = link.pulls.find(pull.counter);
  if (ended != link.pulls.end()) {
    ended->second.drain_asked = true;
    tell_drained(link, pull, ended->second);
  } else if (!writing_.contains(
                 {link.peer, pull})) {  // of which there is not even a tombstone any more
    (void)core_.lanes.send(link, MsgDrained{pull});
  }
}

void Sender::tell_drained(Link& link, const PullId& pull, const PeerPull& ended) {
  if (ended.kind != PeerPull::Kind::kEnded || !ended.drain_asked) return;
  if (writing_.contains({link.peer, pull}) && !flawed(Flaw::kDrainEarly)) return;
  (void)core_.lanes.send(link, MsgDrained{pull});
}

// WRITTEN until the ack, also of what was dropped since: the receiver spends its credit then.
void Sender::resync_writes(Link& link, const TxLeg& leg) {
  if (!leg.mapped) return;
  for (const auto& [ordinal, slice] : leg.slices) {
    for (uint64_t chunk = 0; chunk < slice.chunks.size(); ++chunk) {
      if (slice.chunks[chunk].state != TxState::kWritten) continue;
      const Staging& staging = stagings_.at(slice.chunks[chunk].staging);
      (void)core_.lanes.send(link, MsgWritten{leg.pull->pull, ordinal, chunk, staging.credit.credit,
                                              regions_.at(staging.region).check});
    }
  }
  if (flawed(Flaw::kForgetWritten)) return;
  for (const auto& [of, write] : leg.dropped_writes)
    (void)core_.lanes.send(
        link, MsgWritten{leg.pull->pull, of.first, of.second, write.credit, write.check});
}

}  // namespace kvferry::engine
