#include "daemon/engine/workers.h"

#include <algorithm>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {

void Workers::attached(const WorkerAttached& event) {
  if (table_.contains(event.worker)) return;
  Worker worker;
  worker.tenant = tenants_.try_emplace(event.tenant, tenants_.size() + 1).first->second;
  worker.slots = std::min(event.slots, core_.config.max_transfers_per_worker);
  worker.socket = event.socket;
  sockets_[event.socket].limits = event.socket_limits;
  table_.emplace(event.worker, std::move(worker));
}

void Workers::gone(WorkerId worker) {
  const auto it = table_.find(worker);
  if (it == table_.end()) return;
  sockets_.at(it->second.socket).transfers -= static_cast<uint32_t>(it->second.handles.size());
  table_.erase(it);
  changed_.erase(changed_.lower_bound({worker, 0}), changed_.upper_bound({worker, UINT32_MAX}));
}

void Workers::refuse_for_socket(const OpRef& op, uint32_t most, const std::string& what,
                                const std::string& key) {
  core_.reply_error(op, Code::kResourceExhausted, "SOCKET_LIMIT",
                    "all workers of the socket may have " + std::to_string(most) + " " + what +
                        " together (limits." + key + ")");
}

bool Workers::enter(const OpRef& op, Transfer& transfer, Role role) {
  Worker& worker = table_.at(transfer.worker);
  Socket& socket = sockets_.at(worker.socket);
  if (socket.transfers >= socket.limits.transfers) {
    refuse_for_socket(op, socket.limits.transfers, "transfers", "max_transfers");
    return false;
  }
  if (!worker.free_slots.empty()) {
    transfer.slot = *worker.free_slots.begin();
    worker.free_slots.erase(worker.free_slots.begin());
  } else if (worker.next_slot < worker.slots) {
    transfer.slot = worker.next_slot++;
  } else {
    core_.reply_error(op, Code::kResourceExhausted, "STATUS_TABLE_FULL",
                      "the worker has no free slot in its status table of " +
                          std::to_string(worker.slots) + " (worker_limits.max_transfers)");
    return false;
  }
  ++socket.transfers;
  transfer.tenant = worker.tenant;
  transfer.socket = worker.socket;
  const bool fresh =
      worker.handles.emplace(transfer.record.client_handle, TransferRef{role, transfer.id}).second;
  KVFERRY_CHECK(fresh, "a handle names one transfer");
  return true;
}

void Workers::leave(const Transfer& transfer) {
  const auto it = table_.find(transfer.worker);
  if (it == table_.end()) return;
  if (it->second.handles.erase(transfer.record.client_handle) != 0)
    --sockets_.at(it->second.socket).transfers;
  it->second.free_slots.insert(transfer.slot);
  changed_.erase({transfer.worker, transfer.slot});
  core_.emit(FreeSlot{transfer.worker, transfer.slot});
}

std::optional<TransferRef> Workers::find(WorkerId worker, uint64_t handle) const {
  const auto it = table_.find(worker);
  if (it == table_.end()) return std::nullopt;
  const auto found = it->second.handles.find(handle);
  if (found == it->second.handles.end()) return std::nullopt;
  return found->second;
}

void Workers::changed(const Transfer& transfer, Role role) {
  if (transfer.attached) changed_[{transfer.worker, transfer.slot}] = {role, transfer.id};
}

void Workers::publish() {
  for (const auto& [where, ref] : changed_) {
    const Transfer* transfer = ref.role == Role::kSender
                                   ? static_cast<const Transfer*>(core_.sender.find(ref.id))
                                   : static_cast<const Transfer*>(core_.receiver.find(ref.id));
    if (transfer != nullptr) core_.emit(Publish{where.first, where.second, transfer->record});
  }
  changed_.clear();
}

void Workers::check_invariants() const {
  std::map<uint32_t, uint32_t> counted;
  for (const auto& [id, worker] : table_) {
    KVFERRY_CHECK(worker.handles.size() <= worker.slots, "a worker has a slot a transfer");
    counted[worker.socket] += static_cast<uint32_t>(worker.handles.size());
  }
  for (const auto& [number, socket] : sockets_) {
    KVFERRY_CHECK(socket.transfers == counted[number], "a socket counts its workers' transfers");
  }
}

void Workers::bury(Role role, const RankKey& of, Reason reason) {
  // Longer than any deadline; a table that is full forgets the oldest first.
  const Time until = core_.now + 2 * core_.config.max_deadline;
  const GraveKey key{role, of};
  graves_[key] = {reason, until};
  grave_order_.emplace_back(until, key);
  while (!grave_order_.empty() && (grave_order_.front().first <= core_.now ||
                                   grave_order_.size() > core_.config.max_tombstones)) {
    const auto it = graves_.find(grave_order_.front().second);
    if (it != graves_.end() && it->second.until == grave_order_.front().first) graves_.erase(it);
    grave_order_.pop_front();
  }
}

std::optional<Reason> Workers::buried(Role role, const RankKey& of) {
  const auto it = graves_.find({role, of});
  if (it == graves_.end()) return std::nullopt;
  if (it->second.until <= core_.now) {
    graves_.erase(it);
    return std::nullopt;
  }
  return it->second.reason;
}

}  // namespace kvferry::engine
