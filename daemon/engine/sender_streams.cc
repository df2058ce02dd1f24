// Legs of a slice whose streams are equal: a chunk that has been gathered for one of them, or is
// being gathered, serves each other one that comes to need it for as long as its region is there.
// Nobody waits for others and no region is kept for them: who finds nothing gathers for itself.
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {

// The slice has been compiled. Where it is equal to another leg's, that one's plan is its own too.
void Sender::enter_stream(TxLeg& leg, uint64_t ordinal, TxSlice& slice) {
  if (leg.mapped || leg.link == kLoopedLink || slice.count == 0) return;  // nothing is staged
  const Link& link = *core_.lanes.find(leg.link);
  Send& send = sends_.at(leg.send);
  std::vector<uint64_t>& streams = send.sends[send.by_ordinal[ordinal]].streams;
  for (const uint64_t id : streams) {
    TxStream& stream = streams_.at(id);
    const Plan& plan = *stream.plan;
    if (plan.digest != slice.plan->digest || plan.bytes != slice.plan->bytes ||
        stream.chunk_bytes != link.chunk_bytes || stream.check != link.check ||
        link.check == CheckKind::kGmac /* whose key is the link's */ ||
        !(plan.same_source(*slice.plan) || flawed(Flaw::kShareByDigest)))
      continue;
    stream.legs.insert(leg.id);
    slice.stream = id;
    slice.plan = stream.plan;
    return;
  }
  slice.stream = core_.next_number();
  streams.push_back(slice.stream);
  streams_.emplace(
      slice.stream,
      TxStream{leg.send, ordinal, link.chunk_bytes, link.check, slice.plan, {leg.id}, {}});
}

// The slice is wholly acknowledged on this leg, or dropped, or the leg ends.
void Sender::leave_stream(const TxLeg& leg, TxSlice& slice) {
  const auto it = streams_.find(std::exchange(slice.stream, 0));
  if (it == streams_.end()) return;
  it->second.legs.erase(leg.id);
  if (!it->second.legs.empty()) return;
  Send& send = sends_.at(it->second.send);
  std::erase(send.sends[send.by_ordinal[it->second.slice]].streams, it->first);
  streams_.erase(it);
}

// A gather into the region has begun.
void Sender::list(const TxLeg& leg, const TxSlice& slice, StagingRegion& region) {
  TxStream& stream = streams_.at(slice.stream);
  region.stream = slice.stream;
  stream.regions[region.chunk] = region.id;
  for (const uint64_t other : stream.legs)
    if (const TxLeg& of = legs_.at(other); other != leg.id && of.queued && !of.queued_ahead)
      sharing_.insert(other);
}

void Sender::unlist(const StagingRegion& region) {
  const auto stream = streams_.find(region.stream);
  if (stream == streams_.end()) return;
  const auto it = stream->second.regions.find(region.chunk);
  if (it != stream->second.regions.end() && it->second == region.id)
    stream->second.regions.erase(it);
}

// A region that holds one of the chunks which the leg has yet to gather of the slice it is at, or
// is being filled with it. Slices go out in order, chunks of one in any.
StagingRegion* Sender::shareable(TxLeg& leg) {
  if (!next_idle(leg)) return nullptr;
  const TxSlice& slice = leg.slices.at(leg.cursor.first);
  const auto stream = streams_.find(slice.stream);
  if (stream == streams_.end() || stream->second.legs.size() < 2) return nullptr;
  for (const auto& [chunk, region] : stream->second.regions)
    if (slice.chunks[chunk].state == TxState::kIdle) return &regions_.at(region);
  return nullptr;
}

void Sender::share(TxLeg& leg, StagingRegion& region) {
  TxSlice& slice = leg.slices.at(region.slice);
  const Staging& staging = begin_chunk(leg, region);
  if (!region.gathering) {
    ++core_.stats.chunks_shared;
    slice.chunks[staging.chunk].state = TxState::kStaged;
    leg.staged.insert({staging.slice, staging.chunk});
    chunk_read(leg, slice);
  }
  update(leg);
  release(sends_.at(leg.send));
}

// A leg with a credit in hand: whether anything is there for it is seen by share_all().
void Sender::may_share(const TxLeg& leg) {
  const auto stream = streams_.find(leg.slices.at(leg.cursor.first).stream);
  if (stream == streams_.end()) return;
  if (stream->second.legs.size() > 1 && !stream->second.regions.empty()) sharing_.insert(leg.id);
}

// Who has a credit in hand takes what is there. That costs no region, and so no turn. A chunk
// without one may keep a region that is another leg's no more, so it counts as staged ahead: of
// those that go ahead, who has the turn takes what is there instead of gathering.
void Sender::share_all() {
  while (!sharing_.empty()) {
    const uint64_t id = *sharing_.begin();
    TxLeg& leg = legs_.at(id);
    StagingRegion* const region = leg.queued && !leg.queued_ahead ? shareable(leg) : nullptr;
    if (region != nullptr)
      share(leg, *region);
    else
      sharing_.erase(id);
  }
}

void Sender::check_streams() const {
  for (const auto& [id, region] : regions_) {
    KVFERRY_CHECK(!region.users.empty(), "a staging region that nobody uses is freed");
    KVFERRY_CHECK(region.users.size() == 1 || region.ours, "only regions here are shared");
    std::set<uint64_t> legs;
    for (const uint64_t user : region.users) {
      const Staging& staging = stagings_.at(user);
      KVFERRY_CHECK(staging.region == id && staging.send == region.send &&
                        staging.slice == region.slice && staging.chunk == region.chunk,
                    "who uses a region has its chunk");
      KVFERRY_CHECK(legs.insert(staging.leg).second, "a leg uses a region once");
    }
  }
  for (const auto& [id, staging] : stagings_)
    KVFERRY_CHECK(regions_.at(staging.region).users.contains(id), "a region knows its users");
  for (const auto& [id, stream] : streams_) {
    KVFERRY_CHECK(!stream.legs.empty(), "a stream that no leg brings is forgotten");
    for (const uint64_t leg : stream.legs) {
      const TxSlice& slice = legs_.at(leg).slices.at(stream.slice);
      KVFERRY_CHECK(slice.stream == id && slice.plan == stream.plan && !slice.dropped,
                    "legs of one stream have one plan");
    }
    for (const auto& [chunk, of] : stream.regions) {
      const StagingRegion& region = regions_.at(of);
      KVFERRY_CHECK(region.ours && region.stream == id && region.chunk == chunk &&
                        region.send == stream.send && region.slice == stream.slice,
                    "a stream knows its regions");
    }
  }
  uint64_t listed = 0;
  for (const auto& [id, send] : sends_)
    for (const SendSlice& slice : send.sends) {
      listed += slice.streams.size();
      for (const uint64_t stream : slice.streams)
        KVFERRY_CHECK(streams_.at(stream).send == id && streams_.at(stream).slice == slice.ordinal,
                      "a slice knows its streams");
    }
  KVFERRY_CHECK(listed == streams_.size(), "a stream is found by its slice");
}

}  // namespace kvferry::engine
