// Arena capacity promised to a transfer before its Receive. A reservation waits in line, then holds
// frames for its lease, then, once its Receive has come, until that has ended. Part of Core.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "daemon/engine/state.h"
#include "daemon/engine/timers.h"

namespace kvferry::engine {

class Core;

class Reservations {
 public:
  Reservations(Core& core, std::size_t arenas) : core_(core), lines_(arenas) {}

  void reserve(const ReserveOp& op);
  // Whether a Receive of this name cannot have what was reserved for it: its layout has another
  // arena than the Reserve's; then the call has its answer.
  bool elsewhere(const OpRef& op, const RankKey& key, const LayoutHandle& layout);
  // The Receive of this name has come: what was or will be promised is its until it ends. Returns
  // the reservation, 0 if there is none.
  uint64_t received(const RankKey& key);
  void receive_ended(uint64_t reservation);
  void worker_gone(WorkerId worker);
  void layout_gone(const LayoutHandle* layout);
  // Nobody is in line any more.
  void drain();
  void timer(TimerKey key);
  // Serves the lines.
  void flush();
  std::size_t count() const { return table_.size(); }
  void check_invariants() const;

 private:
  struct Reservation {
    uint64_t id = 0;
    RankKey key;
    std::shared_ptr<const ReserveOp> op;
    std::vector<OpRef> asking;  // calls without an answer: it stands in line
    uint32_t socket = 0;
    uint64_t frames = 0;
    Duration lease{};
    bool granted = false;
    bool received = false;
    uint32_t arena() const { return op->layout->arena; }
  };

  void repeated(Reservation& known, const ReserveOp& op);
  void answer(const OpRef& op, const Reservation& reservation, bool existing);
  void grant(Reservation& reservation);
  bool fits(uint32_t arena, uint64_t frames) const;
  void refuse(Reservation& reservation, Code code, const char* reason, const char* message);
  void forget(uint64_t id);

  Core& core_;
  std::map<uint64_t, Reservation> table_;
  std::map<RankKey, uint64_t> by_name_;
  std::map<WorkerId, uint32_t> per_worker_;
  std::map<uint32_t, uint32_t> per_socket_;
  std::vector<std::deque<uint64_t>> lines_;  // by arena
};

}  // namespace kvferry::engine
