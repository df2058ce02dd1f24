// Attached workers: their status slots, the handles by which they name transfers, which slots
// changed, and the transfers that were closed and whose ids stay dead for a while. Part of Core.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "daemon/engine/state.h"

namespace kvferry::engine {

class Core;

struct TransferRef {
  Role role = Role::kSender;
  uint64_t id = 0;
};

class Workers {
 public:
  explicit Workers(Core& core) : core_(core) {}

  void attached(const WorkerAttached& event);
  void gone(WorkerId worker);
  bool known(WorkerId worker) const { return table_.contains(worker); }
  uint32_t count() const { return static_cast<uint32_t>(table_.size()); }

  // By which an attached worker came.
  uint32_t socket_of(WorkerId worker) const { return table_.at(worker).socket; }
  const SocketLimits& limits_of(uint32_t socket) const { return sockets_.at(socket).limits; }
  // The call's answer: the socket's workers have `most` of `what`, as the key of limits.* says.
  void refuse_for_socket(const OpRef& op, uint32_t most, const std::string& what,
                         const std::string& key);

  // Gives the transfer a slot and enters its handle. False, and the call is refused: the worker or
  // all workers of its socket together have as many as they may. STATUS_TABLE_FULL, SOCKET_LIMIT.
  bool enter(const OpRef& op, Transfer& transfer, Role role);
  // The worker has closed the transfer: slot and handle are free.
  void leave(const Transfer& transfer);
  std::optional<TransferRef> find(WorkerId worker, uint64_t handle) const;

  // Its status slot is written with the next flush.
  void changed(const Transfer& transfer, Role role);
  void publish();
  void check_invariants() const;

  // The transfer is over for good: calls and pulls that name it learn its end for a while.
  void bury(Role role, const RankKey& key, Reason reason);
  std::optional<Reason> buried(Role role, const RankKey& key);

 private:
  struct Worker {
    uint64_t tenant = 0;
    uint32_t slots = 0;
    uint32_t socket = 0;
    uint32_t next_slot = 0;
    std::set<uint32_t> free_slots;
    std::map<uint64_t, TransferRef> handles;
  };
  struct Socket {
    SocketLimits limits;
    uint32_t transfers = 0;  // open ones of attached workers
  };
  using GraveKey = std::pair<Role, RankKey>;
  struct Grave {
    Reason reason = Reason::kNone;
    Time until;
  };

  Core& core_;
  std::map<WorkerId, Worker> table_;
  std::map<std::string, uint64_t> tenants_;
  std::map<uint32_t, Socket> sockets_;  // those by which workers ever came
  std::map<std::pair<WorkerId, uint32_t>, TransferRef> changed_;
  std::map<GraveKey, Grave> graves_;
  std::deque<std::pair<Time, GraveKey>> grave_order_;
};

}  // namespace kvferry::engine
