#include "daemon/engine/fair_queue.h"

namespace kvferry::engine {

FairQueue::Node& FairQueue::touch(Level& level, uint64_t child, bool move_last) {
  const auto [it, fresh] = level.children.try_emplace(child);
  if (fresh || move_last) {
    if (!fresh) level.order.erase(it->second.turn);
    it->second.turn = ++last_turn_;
    level.order.emplace(it->second.turn, child);
  }
  return it->second;
}

void FairQueue::remove(Level& level, uint64_t child) {
  const auto it = level.children.find(child);
  level.order.erase(it->second.turn);
  level.children.erase(it);
}

void FairQueue::insert(const FairKey& key) {
  Level& workers = touch(root_, key.tenant, false).level;
  Level& transfers = touch(workers, key.worker, false).level;
  Level& legs = touch(transfers, key.transfer, false).level;
  const std::size_t before = legs.children.size();
  touch(legs, key.leg, false);
  size_ += legs.children.size() - before;
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
  if (!legs.children.contains(key.leg)) return;
  remove(legs, key.leg);
  --size_;
  if (!legs.children.empty()) return;
  remove(transfers, key.transfer);
  if (!transfers.children.empty()) return;
  remove(workers, key.worker);
  if (!workers.children.empty()) return;
  remove(root_, key.tenant);
}

void FairQueue::served(const FairKey& key) {
  Level& workers = touch(root_, key.tenant, true).level;
  Level& transfers = touch(workers, key.worker, true).level;
  Level& legs = touch(transfers, key.transfer, true).level;
  const std::size_t before = legs.children.size();
  touch(legs, key.leg, true);
  size_ += legs.children.size() - before;
}

}  // namespace kvferry::engine
