// Who holds how much of one arena's regions of one kind, and how much each may hold while another
// waits: a tenant's workers together and each of them `worker_share`, what lies at or waits for one
// peer `peer_share`. It knows numbers, not legs. Owned by the engine; one thread.
//
// A share is rounded up to whole regions of the largest chunk, so that nobody who holds nothing is
// ever beyond his. It says who comes first, not what may be used: where nobody else waits, or only
// others who have their share too, there is none.
#pragma once

#include <cstdint>
#include <map>
#include <set>

#include "daemon/engine/arena.h"
#include "daemon/engine/config.h"

namespace kvferry::engine {

struct Holder {
  uint64_t tenant = 0;
  uint64_t worker = 0;
  uint64_t peer = 0;
};

class Shares {
 public:
  Shares(const EngineConfig& config, const Arena& arena, RegionKind kind);

  void worker_took(const Holder& holder, uint64_t bytes);
  void worker_gave(const Holder& holder, uint64_t bytes);
  void peer_took(uint64_t peer, uint64_t bytes);
  void peer_gave(uint64_t peer, uint64_t bytes);

  // Whether it may hold so many bytes more (> 0) while another waits.
  bool tenant_may(uint64_t tenant, uint64_t bytes) const { return tenants_.may(tenant, bytes); }
  bool worker_may(uint64_t worker, uint64_t bytes) const { return workers_.may(worker, bytes); }
  bool peer_may(uint64_t peer, uint64_t bytes) const { return peers_.may(peer, bytes); }
  // Whether so many bytes may go from the one to the other: of what they are both nothing changes;
  // of the rest, `to` has no more than its shares then, and something that `from` is still has its
  // own.
  bool may_move(const Holder& from, const Holder& to, uint64_t bytes) const;
  // Whether anything that `to` is not has more than its share.
  bool somebody_spares(const Holder& to) const;

  // Ends the process unless these hold what is said here.
  void verify(const Shares& counted) const;

 private:
  class Level {
   public:
    explicit Level(uint64_t most) : most_(most) {}
    void took(uint64_t id, uint64_t bytes);
    void gave(uint64_t id, uint64_t bytes);
    uint64_t held(uint64_t id) const;
    bool may(uint64_t id, uint64_t bytes) const { return held(id) + bytes <= most_; }
    bool spares(uint64_t id, uint64_t bytes) const { return held(id) >= most_ + bytes; }
    // Whether anybody but `id` holds more than the share.
    bool another_beyond(uint64_t id) const {
      return beyond_.size() > (beyond_.contains(id) ? 1U : 0U);
    }
    bool operator==(const Level&) const = default;

   private:
    uint64_t most_;
    std::map<uint64_t, uint64_t> held_;
    std::set<uint64_t> beyond_;
  };

  Level tenants_;
  Level workers_;
  Level peers_;
};

}  // namespace kvferry::engine
