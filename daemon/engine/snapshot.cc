// What operators see: copies of the engine's state.
#include <algorithm>

#include "daemon/engine/core.h"

namespace kvferry::engine {

EngineSnapshot Core::snapshot(Time at) const {
  EngineSnapshot snapshot;
  for (const auto& [id, send] : sender.sends()) {
    TransferView view = view_of(send, Role::kSender, at);
    for (const auto& [key, place] : send.places) {
      for (const auto& [rank, leg] : place.legs) {
        ++view.legs;
        if (leg.fate != LegFate::kExpected && leg.fate != LegFate::kOpen) ++view.legs_ended;
      }
    }
    snapshot.transfers.push_back(std::move(view));
  }
  std::map<uint64_t, uint32_t> unclosed;
  for (const auto& [pull, leg] : receiver.legs()) ++unclosed[leg.receive];
  for (const auto& [id, receive] : receiver.receives()) {
    TransferView view = view_of(receive, Role::kReceiver, at);
    const auto legs = unclosed.find(id);
    view.legs = legs == unclosed.end() ? 0 : legs->second;
    view.legs_ended = view.legs - static_cast<uint32_t>(receive.legs.size());
    snapshot.transfers.push_back(std::move(view));
  }
  for (const auto& [id, link] : lanes.all()) {
    if (link.looped()) continue;  // no peer
    LinkView view;
    view.link = id;
    view.node = link.node;
    view.boot = link.boot;
    view.initiator = link.initiator;
    for (uint32_t index = 0; index < link.lanes.size(); ++index) {
      const Lane& lane = link.lanes[index];
      view.lanes.push_back({index, lane.epoch, lane.state == LaneState::kUp, lane.flow.rate(),
                            lane.flow.in_flight(), lane.flow.arrived_bytes()});
    }
    view.chunk_bytes = link.chunk_bytes;
    view.legs_out = link.legs_out;
    view.legs_in = static_cast<uint32_t>(link.own_pulls.size());
    view.parked = static_cast<uint32_t>(link.parked.size());
    view.mapped.assign(link.mapped.begin(), link.mapped.end());
    view.lent_to.assign(link.lent.begin(), link.lent.end());
    view.silent_for = at - link.heard;
    snapshot.links.push_back(std::move(view));
  }
  for (const Arena& arena : arenas) {
    ArenaView view;
    view.total_bytes = arena.total_bytes();
    view.free_bytes = view.total_bytes;
    view.reserved_bytes = arena.reserved_frames() * arena.frame_bytes();
    view.segments = arena.segment_count();
    view.mapped = config.arenas[snapshot.arenas.size()].mapped;
    snapshot.arenas.push_back(view);
  }
  for (const auto& [id, region] : receiver.regions()) {
    if (region.local) continue;
    ArenaView& view = snapshot.arenas[arena_of(region.region)];
    uint64_t* bytes = nullptr;
    switch (region.state) {
      case RegionState::kGranted:
        bytes = &view.granted_bytes;
        break;
      case RegionState::kLanding:
        bytes = &view.landing_bytes;
        break;
      case RegionState::kLanded:
        bytes = &view.landed_bytes;
        break;
      case RegionState::kScattering:
        bytes = &view.scattering_bytes;
        break;
      case RegionState::kQuarantined:
        bytes = &view.quarantined_bytes;
        ++view.quarantined_regions;
        break;
    }
    *bytes += region.region.bytes;
    view.free_bytes -= region.region.bytes;
    ++view.regions;
  }
  for (const auto& [id, region] : sender.staging_regions()) {
    if (!region.ours) continue;
    ArenaView& view = snapshot.arenas[arena_of(region.region)];
    view.staging_bytes += region.region.bytes;
    view.free_bytes -= region.region.bytes;
    ++view.regions;
  }
  snapshot.lent = receiver.lent();
  snapshot.reservations = static_cast<uint32_t>(reservations.count());
  snapshot.workers = workers.count();
  snapshot.packed_bytes = sender.packed_bytes();
  snapshot.packed_copies = sender.packed_copies();
  snapshot.reuse_entries = reuse.entries();
  snapshot.reuse_pins = reuse.pins();
  snapshot.draining = draining;
  return snapshot;
}

std::vector<LiveCredit> Core::live_credits() const {
  std::vector<LiveCredit> live;
  for (const auto& [pull, leg] : receiver.legs()) {
    const Link* link = lanes.find(leg.link);
    const bool told = link != nullptr && link->control && !link->resync_due;
    if (leg.state != RxLegState::kOpen || !told) continue;
    for (const auto& [credit, region] : leg.credits)
      live.push_back({leg.link, {config.boot, pull}, CreditId{credit}});
  }
  return live;
}

// In hand, under an offer that may still spend it, or under what was gathered into its region.
bool Core::knows(LinkId id, const PullId& pull, CreditId credit) const {
  const Link* link = lanes.find(id);
  if (link == nullptr || pull.receiver != link->boot) return false;
  const auto entry = link->pulls.find(pull.counter);
  if (entry == link->pulls.end()) return false;
  const auto among = [&](const auto& credits) {
    return std::any_of(credits.begin(), credits.end(),
                       [&](const CreditGrant& of) { return of.credit == credit; });
  };
  if (entry->second.kind == PeerPull::Kind::kParked) return among(entry->second.parked->credits);
  if (entry->second.kind == PeerPull::Kind::kEnded) return true;
  const TxLeg& leg = sender.legs().at(entry->second.leg);
  if (among(leg.credits) || among(leg.returned)) return true;
  for (const StrayOffer& offer : leg.stray_offers)
    if (offer.credit.credit == credit) return true;
  for (const auto& [of, write] : leg.dropped_writes)
    if (write.credit == credit) return true;
  return std::any_of(sender.stagings().begin(), sender.stagings().end(), [&](const auto& of) {
    const Staging& staging = of.second;
    return staging.leg == leg.id && staging.credit.credit == credit &&
           (staging.offered || staging.mapped);
  });
}

std::vector<TransferTrace> Core::find_traces(const TraceQuery& query, Time at) const {
  std::vector<TransferTrace> found;
  for (const auto& [id, send] : sender.sends())
    if (found.size() < query.most && wanted(query, send, Role::kSender))
      found.push_back(trace_of(send, Role::kSender, at));
  for (const auto& [id, receive] : receiver.receives())
    if (found.size() < query.most && wanted(query, receive, Role::kReceiver))
      found.push_back(trace_of(receive, Role::kReceiver, at));
  traces.find(query, at, found);
  return found;
}

}  // namespace kvferry::engine
