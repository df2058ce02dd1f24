// Whose turn it is: legs that want a region, shared by bytes over tenants, then over each tenant's
// workers, then over each worker's transfers, then over each transfer's legs. Who has had least
// since it waits comes first, of several who waited longest; newcomers join as if they had had as
// much as who has had most. So the small chunks of a transfer with many legs do not each wait for a
// large one of everybody else, and nobody waits for more than a round. A leg's peer has no say in
// that; the queue only counts how many peers it serves. Deterministic.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace kvferry::engine {

struct FairKey {
  uint64_t tenant = 0;
  uint64_t worker = 0;
  uint64_t transfer = 0;
  uint64_t leg = 0;
  auto operator<=>(const FairKey&) const = default;
};

class FairQueue {
 public:
  // `peer`: that the leg is of, any number; that of its first insert counts.
  void insert(const FairKey& key, uint64_t peer = 0);
  void erase(const FairKey& key);
  bool empty() const { return size_ == 0; }
  std::size_t size() const { return size_; }
  // Of how many tenants, workers and peers somebody waits.
  std::size_t tenants() const { return root_.children.size(); }
  std::size_t workers() const { return workers_; }
  std::size_t peers() const { return peers_.size(); }
  // It is in the queue and had its turn and `bytes`, on each level.
  void served(const FairKey& key, uint64_t bytes);

  // Whose turn it is, if there is anybody.
  FairKey front() const {
    FairKey first;
    find_if([&](const FairKey& key) {
      first = key;
      return true;
    });
    return first;
  }
  // Calls visit(key) in turn until one answers true or all have been asked. `visit` may change the
  // queue only if it answers true. Returns whether one answered true.
  template <typename Visit>
  bool find_if(Visit&& visit) const {
    const auto nobody = [](uint64_t) { return false; };
    return find_if(visit, nobody, nobody);
  }
  // ... but those of tenants and workers that are to be skipped.
  template <typename Visit, typename SkipTenant, typename SkipWorker>
  bool find_if(Visit&& visit, SkipTenant&& skip_tenant, SkipWorker&& skip_worker) const {
    for (const auto& [ts, tenant] : root_.order) {
      if (skip_tenant(tenant)) continue;
      const Level& workers = root_.children.at(tenant).level;
      for (const auto& [ws, worker] : workers.order) {
        if (skip_worker(worker)) continue;
        const Level& transfers = workers.children.at(worker).level;
        for (const auto& [xs, transfer] : transfers.order) {
          const Level& legs = transfers.children.at(transfer).level;
          for (const auto& [ls, leg] : legs.order)
            if (visit(FairKey{tenant, worker, transfer, leg})) return true;
        }
      }
    }
    return false;
  }

 private:
  struct Node;
  struct Place {
    uint64_t bytes = 0;  // had, by the count of its level
    uint64_t turn = 0;
    auto operator<=>(const Place&) const = default;
  };
  struct Level {
    std::map<Place, uint64_t> order;  // -> child
    std::map<uint64_t, Node> children;
  };
  struct Node {
    Place place;
    uint64_t peer = 0;  // of a leaf
    Level level;        // empty in a leaf
  };

  // The child, which is put last if it is new, and behind those who have had as much if it was
  // served.
  Node& touch(Level& level, uint64_t child, uint64_t bytes, bool served);
  static void remove(Level& level, uint64_t child);

  Level root_;
  std::map<uint64_t, std::size_t> peers_;  // -> how many legs of it wait
  std::size_t size_ = 0;
  std::size_t workers_ = 0;
  uint64_t last_turn_ = 0;
};

}  // namespace kvferry::engine
