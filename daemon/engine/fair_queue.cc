#include "daemon/engine/fair_queue.h"

#include "daemon/base/check.h"

namespace kvferry::engine {

FairQueue::Node& FairQueue::touch(Level& level, uint64_t child, uint64_t bytes, bool served) {
  const auto [it, fresh] = level.children.try_emplace(child);
  Place& place = it->second.place;
  if (fresh)
    place.bytes = level.order.empty() ? 0 : level.order.rbegin()->first.bytes;
  else if (served)
    level.order.erase(place);
  if (fresh || served) {
    place.bytes += bytes;
    place.turn = ++last_turn_;
    level.order.emplace(place, child);
  }
  return it->second;
}

void FairQueue::remove(Level& level, uint64_t child) {
  const auto it = level.children.find(child);
  level.order.erase(it->second.place);
  level.children.erase(it);
}

void FairQueue::insert(const FairKey& key, uint64_t peer) {
  Level& workers = touch(root_, key.tenant, 0, false).level;
  workers_ += workers.children.contains(key.worker) ? 0U : 1U;
  Level& transfers = touch(workers, key.worker, 0, false).level;
  Level& legs = touch(transfers, key.transfer, 0, false).level;
  if (legs.children.contains(key.leg)) return;
  touch(legs, key.leg, 0, false).peer = peer;
  ++peers_[peer];
  ++size_;
}

void FairQueue::erase(const FairKey& key) {
  const auto tenant = root_.children.find(key.tenant);
  if (tenant == root_.children.end()) return;
  Level& workers = tenant->second.level;
  const auto worker = workers.children.find(key.worker);
  if (worker == workers.children.end()) return;
  Level& transfers = worker->second.level;
  const auto transfer = transfers.children.find(key.transfer);
  if (transfer == transfers.children.end()) return;
  Level& legs = transfer->second.level;
  const auto leg = legs.children.find(key.leg);
  if (leg == legs.children.end()) return;
  const auto peer = peers_.find(leg->second.peer);
  if (--peer->second == 0) peers_.erase(peer);
  remove(legs, key.leg);
  --size_;
  if (!legs.children.empty()) return;
  remove(transfers, key.transfer);
  if (!transfers.children.empty()) return;
  remove(workers, key.worker);
  --workers_;
  if (!workers.children.empty()) return;
  remove(root_, key.tenant);
}

void FairQueue::served(const FairKey& key, uint64_t bytes) {
  Level& workers = touch(root_, key.tenant, bytes, true).level;
  Level& transfers = touch(workers, key.worker, bytes, true).level;
  Level& legs = touch(transfers, key.transfer, bytes, true).level;
  KVFERRY_CHECK(legs.children.contains(key.leg), "who is served waits");
  touch(legs, key.leg, bytes, true);
}

}  // namespace kvferry::engine
