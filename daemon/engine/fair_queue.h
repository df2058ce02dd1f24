// Whose turn it is: legs that want a region, served round robin over tenants, then over each
// tenant's workers, then over each worker's transfers, then over each transfer's legs.
// Deterministic: who was served longest ago comes first, newcomers come last.
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
  void insert(const FairKey& key);
  void erase(const FairKey& key);
  bool empty() const { return size_ == 0; }
  std::size_t size() const { return size_; }
  // It had its turn: it goes last on each level.
  void served(const FairKey& key);

  // Calls visit(key) in turn until one answers true or all have been asked. `visit` may not change
  // the queue. Returns whether one answered true.
  template <typename Visit>
  bool find_if(Visit&& visit) const {
    for (const auto& [ts, tenant] : root_.order) {
      const Level& workers = root_.children.at(tenant).level;
      for (const auto& [ws, worker] : workers.order) {
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
  struct Level {
    std::map<uint64_t, uint64_t> order;  // turn -> child
    std::map<uint64_t, Node> children;
  };
  struct Node {
    uint64_t turn = 0;
    Level level;  // empty in a leaf
  };

  Node& touch(Level& level, uint64_t child, bool move_last);
  static void remove(Level& level, uint64_t child);

  Level root_;
  std::size_t size_ = 0;
  uint64_t last_turn_ = 0;
};

}  // namespace kvferry::engine
