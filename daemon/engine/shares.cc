#include "daemon/engine/shares.h"

#include <algorithm>

#include "daemon/base/check.h"
#include "daemon/base/units.h"

namespace kvferry::engine {
namespace {

uint64_t most_of(const Arena& arena, RegionKind kind, uint32_t millionths) {
  const uint64_t frames = ceil_div(arena.share(kind) * millionths, 1'000'000);
  return std::max<uint64_t>(frames, 1) * arena.frame_bytes();
}

}  // namespace

Shares::Shares(const EngineConfig& config, const Arena& arena, RegionKind kind)
    : tenants_(most_of(arena, kind, config.worker_share)),
      workers_(most_of(arena, kind, config.worker_share)),
      peers_(most_of(arena, kind, config.peer_share)) {}

void Shares::Level::took(uint64_t id, uint64_t bytes) {
  if ((held_[id] += bytes) > most_) beyond_.insert(id);
}

void Shares::Level::gave(uint64_t id, uint64_t bytes) {
  const auto it = held_.find(id);
  KVFERRY_CHECK(it != held_.end() && it->second >= bytes, "who gives a region back had it");
  it->second -= bytes;
  if (it->second <= most_) beyond_.erase(id);
  if (it->second == 0) held_.erase(it);
}

uint64_t Shares::Level::held(uint64_t id) const {
  const auto it = held_.find(id);
  return it == held_.end() ? 0 : it->second;
}

void Shares::worker_took(const Holder& holder, uint64_t bytes) {
  tenants_.took(holder.tenant, bytes);
  workers_.took(holder.worker, bytes);
}

void Shares::worker_gave(const Holder& holder, uint64_t bytes) {
  tenants_.gave(holder.tenant, bytes);
  workers_.gave(holder.worker, bytes);
}

void Shares::peer_took(uint64_t peer, uint64_t bytes) {
  peers_.took(peer, bytes);
}

void Shares::peer_gave(uint64_t peer, uint64_t bytes) {
  peers_.gave(peer, bytes);
}

bool Shares::may_move(const Holder& from, const Holder& to, uint64_t bytes) const {
  bool spared = false;
  const auto allows = [&](const Level& level, uint64_t of, uint64_t other) {
    if (of == other) return true;
    spared = spared || level.spares(of, bytes);
    return level.may(other, bytes);
  };
  return allows(tenants_, from.tenant, to.tenant) && allows(workers_, from.worker, to.worker) &&
         allows(peers_, from.peer, to.peer) && spared;
}

bool Shares::somebody_spares(const Holder& to) const {
  return tenants_.another_beyond(to.tenant) || workers_.another_beyond(to.worker) ||
         peers_.another_beyond(to.peer);
}

void Shares::verify(const Shares& counted) const {
  KVFERRY_CHECK(tenants_ == counted.tenants_ && workers_ == counted.workers_,
                "a worker counts what it holds");
  KVFERRY_CHECK(peers_ == counted.peers_, "a peer counts what it holds");
}

}  // namespace kvferry::engine
