#include "tests/sim/totals.h"

#include <cstdio>
#include <utility>
#include <vector>

namespace kvferry::sim {
namespace {

std::vector<std::pair<std::string, uint64_t>> counts(const Totals& totals) {
  const engine::EngineStats& e = totals.engine;
  const auto dropped = [&](engine::DropCause cause) {
    return e.dropped[static_cast<size_t>(cause)];
  };
  return {{"completed", totals.completed},
          {"delivered", totals.delivered},
          {"slices sent anew", totals.resent_slices},
          {"receivers before senders", totals.early_receivers},
          {"late receivers", totals.late_receivers},
          {"several receivers", totals.several_receivers},
          {"receivers beside senders", totals.local_receivers},
          {"... and beside some", totals.mixed_receivers},
          {"claims", totals.claims},
          {"claims kept", totals.claims_kept},
          {"claims repeated", totals.claims_again},
          {"declines", totals.declines},
          {"cancels", totals.cancels},
          {"revokes", totals.revokes},
          {"reservations", totals.reservations},
          {"needs told", totals.needs_told},
          {"gathers on devices", totals.gathers_on_devices},
          {"scatters on devices", totals.scatters_on_devices},
          {"gathers beside their pages", totals.gathers_beside},
          {"packed copies", e.packed_made},
          {"packed copies refused", totals.packed_refused},
          {"receives published", totals.reuse_commits},
          {"look-ups that found", e.reuse_lookup_hits},
          {"blocks from the node", e.reuse_blocks},
          {"bytes from the node", e.reuse_bytes},
          {"blocks withdrawn", e.reuse_withdrawn},
          {"blocks evicted", e.reuse_evicted},
          {"chunks gathered", e.chunks_gathered},
          {"chunks staged ahead", e.chunks_ahead},
          {"chunks shared", e.chunks_shared},
          {"chunks written mapped", e.chunks_written},
          {"chunks landed mapped", e.chunks_mapped},
          {"written after the end", totals.late_writes},
          {"asked over a later link", totals.asked_again},
          {"unmapped after a link", totals.unmapped},
          {"regions drained", e.regions_drained},
          {"regions proven free", e.regions_proven},
          {"regions released", e.regions_released},
          {"clock leaps", totals.leaps},
          {"transfers with the enemy", totals.hostile_transfers},
          {"links to the enemy", totals.hostile_links},
          {"... by a daemon's boot id", totals.hostile_boots},
          {"messages of the enemy", totals.hostile_messages},
          {"offers of the enemy", totals.hostile_offers},
          {"... that were accepted", totals.hostile_landings},
          {"offers to the enemy", totals.hostile_served},
          {"gathers into the enemy's", totals.hostile_gathers},
          {"DRAINED told to the enemy", totals.hostile_drained},
          {"mapped writes of the enemy", totals.hostile_writes},
          {"dropped for wrong proofs", dropped(engine::DropCause::kProof)},
          {"dropped as wrong", dropped(engine::DropCause::kProtocol)},
          {"chunks scattered", e.chunks_scattered},
          {"chunks copied locally", e.chunks_local},
          {"offers sent", e.offers_sent},
          {"offers on slow lanes", totals.offers_on_slow_lanes},
          {"offers accepted", e.offers_accepted},
          {"offers refused", e.offers_refused},
          {"credits granted", e.credits_granted},
          {"credits withdrawn", e.credits_withdrawn},
          {"credits found known", totals.credits_known},
          {"quarantines", e.quarantines},
          {"lanes down", e.lane_downs},
          {"links lost", e.links_lost},
          {"resyncs", e.resyncs},
          {"dropped as duplicates", dropped(engine::DropCause::kDuplicate)},
          {"dropped of an old epoch", dropped(engine::DropCause::kOldEpoch)},
          {"dropped as late", dropped(engine::DropCause::kLate)}};
}

}  // namespace

void Totals::add(const engine::EngineStats& stats) {
  for (size_t i = 0; i < engine::kDropCauseCount; ++i) engine.dropped[i] += stats.dropped[i];
  engine.lane_downs += stats.lane_downs;
  engine.links_lost += stats.links_lost;
  engine.resyncs += stats.resyncs;
  engine.offers_sent += stats.offers_sent;
  engine.offers_accepted += stats.offers_accepted;
  engine.offers_refused += stats.offers_refused;
  engine.credits_granted += stats.credits_granted;
  engine.credits_withdrawn += stats.credits_withdrawn;
  engine.quarantines += stats.quarantines;
  engine.packed_made += stats.packed_made;
  engine.reuse_lookup_hits += stats.reuse_lookup_hits;
  engine.reuse_blocks += stats.reuse_blocks;
  engine.reuse_bytes += stats.reuse_bytes;
  engine.reuse_withdrawn += stats.reuse_withdrawn;
  engine.reuse_evicted += stats.reuse_evicted;
  engine.chunks_ahead += stats.chunks_ahead;
  engine.chunks_gathered += stats.chunks_gathered;
  engine.chunks_shared += stats.chunks_shared;
  engine.chunks_written += stats.chunks_written;
  engine.chunks_mapped += stats.chunks_mapped;
  engine.regions_drained += stats.regions_drained;
  engine.regions_proven += stats.regions_proven;
  engine.regions_released += stats.regions_released;
  engine.chunks_scattered += stats.chunks_scattered;
  engine.chunks_local += stats.chunks_local;
}

void Totals::add(const Totals& run) {
  completed += run.completed;
  delivered += run.delivered;
  resent_slices += run.resent_slices;
  early_receivers += run.early_receivers;
  late_receivers += run.late_receivers;
  several_receivers += run.several_receivers;
  local_receivers += run.local_receivers;
  mixed_receivers += run.mixed_receivers;
  claims += run.claims;
  claims_kept += run.claims_kept;
  claims_again += run.claims_again;
  declines += run.declines;
  cancels += run.cancels;
  revokes += run.revokes;
  reservations += run.reservations;
  reuse_commits += run.reuse_commits;
  packed_refused += run.packed_refused;
  needs_told += run.needs_told;
  gathers_on_devices += run.gathers_on_devices;
  scatters_on_devices += run.scatters_on_devices;
  late_writes += run.late_writes;
  asked_again += run.asked_again;
  unmapped += run.unmapped;
  gathers_beside += run.gathers_beside;
  offers_on_slow_lanes += run.offers_on_slow_lanes;
  leaps += run.leaps;
  credits_known += run.credits_known;
  hostile_transfers += run.hostile_transfers;
  hostile_links += run.hostile_links;
  hostile_boots += run.hostile_boots;
  hostile_messages += run.hostile_messages;
  hostile_offers += run.hostile_offers;
  hostile_landings += run.hostile_landings;
  hostile_served += run.hostile_served;
  hostile_gathers += run.hostile_gathers;
  hostile_drained += run.hostile_drained;
  hostile_writes += run.hostile_writes;
  for (const auto& [name, count] : run.reasons) reasons[name] += count;
  add(run.engine);
}

void Totals::print() const {
  for (const auto& [name, count] : counts(*this))
    std::printf("  %-24s %llu\n", name.c_str(), static_cast<unsigned long long>(count));
  for (const auto& [name, count] : reasons)
    std::printf("  ended %-18s %llu\n", name.c_str(), static_cast<unsigned long long>(count));
}

std::string Totals::missing() const {
  for (const auto& [name, count] : counts(*this))
    if (count == 0) return name;
  for (const Reason reason :
       {Reason::kCancelled, Reason::kDeadline, Reason::kExpired, Reason::kDeclined,
        Reason::kRefused, Reason::kNotOffered, Reason::kLayoutMismatch, Reason::kNotReady,
        Reason::kPeerLost, Reason::kGatherFailed, Reason::kScatterFailed, Reason::kDataLoss})
    if (!reasons.contains(std::string(name_of(reason))))
      return "end " + std::string(name_of(reason));
  return {};
}

}  // namespace kvferry::sim
