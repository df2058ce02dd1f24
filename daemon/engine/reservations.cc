#include "daemon/engine/reservations.h"

#include <algorithm>

#include "daemon/base/check.h"
#include "daemon/base/units.h"
#include "daemon/engine/core.h"
#include "daemon/engine/proofs.h"

namespace kvferry::engine {
namespace {

constexpr std::size_t kMostAsking = 8;  // repeats of a call that waits

// The field in which a repeated call differs from the first.
const char* different(const ReserveOp& first, const ReserveOp& op) {
  return first.op.worker != op.op.worker ? "transfer.id"
         : first.layout != op.layout     ? "layout"
         : first.bytes != op.bytes       ? "bytes"
         : first.may_wait != op.may_wait ? "arena_full"
         : first.lease != op.lease       ? "lease"
                                         : nullptr;
}

}  // namespace

void Reservations::reserve(const ReserveOp& op) {
  RankKey key = rank_key(wire_name(op.key, op.key.incarnation), *op.layout);
  if (const auto known = by_name_.find(key); known != by_name_.end()) {
    repeated(table_.at(known->second), op);
    return;
  }
  if (core_.workers.buried(Role::kReceiver, key)) {
    core_.reply_error(op.op, Code::kAlreadyExists, "TRANSFER_CLOSED",
                      "the transfer was closed; its id is not used again", "transfer.id");
    return;
  }
  if (core_.receiver.knows(key)) {
    core_.reply_error(op.op, Code::kFailedPrecondition, "ALREADY_RECEIVING",
                      "room is reserved before the Receive", "transfer.id");
    return;
  }
  if (core_.refused(op.op, op.layout.get())) return;
  const uint32_t number = op.layout->arena;
  const Arena& arena = core_.arenas[number];
  const uint64_t frames = std::max<uint64_t>(1, ceil_div(op.bytes, arena.frame_bytes()));
  if (frames > arena.most_reserved_ever()) {
    core_.reply_error(op.op, Code::kInvalidArgument, "RESERVATION_TOO_LARGE",
                      "an empty arena could promise " +
                          std::to_string(arena.most_reserved_ever() * arena.frame_bytes()) +
                          " bytes at most",
                      "bytes");
    return;
  }
  const auto count = per_worker_.find(op.op.worker);
  if (count != per_worker_.end() && count->second >= core_.config.max_transfers_per_worker) {
    core_.reply_error(op.op, Code::kResourceExhausted, "TOO_MANY_RESERVATIONS",
                      "the worker has too many reservations");
    return;
  }
  const uint32_t socket = core_.workers.socket_of(op.op.worker);
  const uint32_t most = core_.workers.limits_of(socket).reservations;
  const auto of_socket = per_socket_.find(socket);
  if (of_socket != per_socket_.end() && of_socket->second >= most) {
    core_.workers.refuse_for_socket(op.op, most, "reservations", "max_reservations");
    return;
  }
  if (!op.may_wait && !fits(number, frames)) {
    core_.reply_error(op.op, Code::kResourceExhausted,
                      std::string(name_of(Reason::kArenaExhausted)),
                      "the arena cannot promise so much now");
    return;
  }
  Reservation fresh;
  fresh.id = core_.next_number();
  fresh.key = key;
  fresh.op = std::make_shared<const ReserveOp>(op);
  fresh.asking.push_back(op.op);
  fresh.socket = socket;
  fresh.frames = frames;
  fresh.lease = core_.limited(op.lease, core_.config.default_lease);
  ++per_worker_[op.op.worker];
  ++per_socket_[socket];
  by_name_.emplace(std::move(key), fresh.id);
  lines_[number].push_back(fresh.id);
  core_.timers.set({TimerKind::kReservation, fresh.id, 0}, core_.now + core_.config.default_wait);
  table_.emplace(fresh.id, std::move(fresh));
  flush();
}

void Reservations::repeated(Reservation& known, const ReserveOp& op) {
  if (const char* field = different(*known.op, op)) {
    core_.reply_error(op.op, Code::kAlreadyExists, "RESERVATION_EXISTS",
                      "the reservation exists with another " + std::string(field), field);
  } else if (known.granted) {
    answer(op.op, known, true);
  } else if (known.asking.size() < kMostAsking) {
    known.asking.push_back(op.op);
  } else {
    core_.reply_error(op.op, Code::kResourceExhausted, "TOO_MANY_CALLS",
                      "the same call waits already, several times");
  }
}

void Reservations::answer(const OpRef& op, const Reservation& reservation, bool existing) {
  Reply reply;
  reply.op = op;
  reply.existing = existing;
  reply.reserved_bytes = reservation.frames * core_.arenas[reservation.arena()].frame_bytes();
  reply.lease = reservation.lease;
  core_.emit(std::move(reply));
}

// One frame more must stay for all transfers without a reservation.
bool Reservations::fits(uint32_t number, uint64_t frames) const {
  const Arena& arena = core_.arenas[number];
  return lines_[number].empty() && arena.asked() + frames <= arena.most_reserved();
}

void Reservations::flush() {
  for (std::size_t number = 0; number < lines_.size(); ++number) {
    const Arena& arena = core_.arenas[number];
    std::deque<uint64_t>& line = lines_[number];
    while (!line.empty()) {
      Reservation& next = table_.at(line.front());
      if (arena.asked() + next.frames > arena.most_reserved()) break;
      line.pop_front();
      grant(next);
    }
  }
}

void Reservations::grant(Reservation& reservation) {
  reservation.granted = true;
  core_.arenas[reservation.arena()].reserve(reservation.id, reservation.frames);
  const TimerKey timer{TimerKind::kReservation, reservation.id, 0};
  if (reservation.received)
    core_.timers.cancel(timer);
  else
    core_.timers.set(timer, core_.now + reservation.lease);
  for (std::size_t i = 0; i < reservation.asking.size(); ++i)
    answer(reservation.asking[i], reservation, i > 0);
  reservation.asking.clear();
}

bool Reservations::elsewhere(const OpRef& op, const RankKey& key, const LayoutHandle& layout) {
  const auto it = by_name_.find(key);
  if (it == by_name_.end() || table_.at(it->second).arena() == layout.arena) return false;
  core_.reply_error(op, Code::kAlreadyExists, "RESERVATION_EXISTS",
                    "what is reserved for the transfer lies in another layout's arena", "layout");
  return true;
}

uint64_t Reservations::received(const RankKey& key) {
  const auto it = by_name_.find(key);
  if (it == by_name_.end()) return 0;
  Reservation& reservation = table_.at(it->second);
  reservation.received = true;
  if (reservation.granted) core_.timers.cancel({TimerKind::kReservation, reservation.id, 0});
  return reservation.id;
}

void Reservations::receive_ended(uint64_t id) {
  if (flawed(Flaw::kKeepReservation)) return;
  const auto it = table_.find(id);
  if (it == table_.end()) return;
  refuse(it->second, Code::kAborted, "TRANSFER_ENDED", "the transfer has ended");
}

// Whoever still waits for it is told why; then it is gone.
void Reservations::refuse(Reservation& reservation, Code code, const char* reason,
                          const char* message) {
  for (const OpRef& op : reservation.asking) core_.reply_error(op, code, reason, message);
  forget(reservation.id);
}

void Reservations::forget(uint64_t id) {
  const auto it = table_.find(id);
  const Reservation& reservation = it->second;
  core_.timers.cancel({TimerKind::kReservation, id, 0});
  if (reservation.granted)
    core_.arenas[reservation.arena()].unreserve(id);
  else
    std::erase(lines_[reservation.arena()], id);
  const auto count = per_worker_.find(reservation.op->op.worker);
  if (--count->second == 0) per_worker_.erase(count);
  const auto of_socket = per_socket_.find(reservation.socket);
  if (--of_socket->second == 0) per_socket_.erase(of_socket);
  by_name_.erase(reservation.key);
  table_.erase(it);
}

void Reservations::worker_gone(WorkerId worker) {
  std::vector<uint64_t> ids;
  for (const auto& [id, reservation] : table_)
    if (reservation.op->op.worker == worker) ids.push_back(id);
  for (const uint64_t id : ids)
    refuse(table_.at(id), Code::kFailedPrecondition, "NOT_ATTACHED", "the worker is not attached");
}

void Reservations::layout_gone(const LayoutHandle* layout) {
  std::vector<uint64_t> ids;
  for (const auto& [id, reservation] : table_)
    if (reservation.op->layout.get() == layout) ids.push_back(id);
  for (const uint64_t id : ids)
    refuse(table_.at(id), Code::kFailedPrecondition, name_of(Reason::kUnregistered).data(),
           "the layout is being taken back");
}

void Reservations::drain() {
  const std::vector<std::deque<uint64_t>> lines = lines_;
  for (const std::deque<uint64_t>& line : lines)
    for (const uint64_t id : line)
      refuse(table_.at(id), Code::kUnavailable, "DRAINING", "the daemon takes no new transfers");
}

void Reservations::timer(TimerKey key) {
  Reservation& reservation = table_.at(key.a);
  refuse(reservation, Code::kResourceExhausted, name_of(Reason::kArenaExhausted).data(),
         "the arena could not promise so much in time");
}

void Reservations::check_invariants() const {
  std::vector<std::size_t> waiting(lines_.size());
  std::vector<uint64_t> asked(lines_.size());
  std::map<WorkerId, uint32_t> of_workers;
  std::map<uint32_t, uint32_t> of_sockets;
  for (const auto& [id, reservation] : table_) {
    waiting[reservation.arena()] += !reservation.granted;
    if (reservation.granted) asked[reservation.arena()] += reservation.frames;
    ++of_workers[reservation.op->op.worker];
    ++of_sockets[reservation.socket];
    KVFERRY_CHECK(reservation.granted == reservation.asking.empty(),
                  "a call waits as long as its reservation does");
    KVFERRY_CHECK(core_.timers.pending({TimerKind::kReservation, id, 0}) ==
                      !(reservation.granted && reservation.received),
                  "a reservation without a Receive ends by itself");
  }
  KVFERRY_CHECK(by_name_.size() == table_.size(), "a reservation is found by its name");
  KVFERRY_CHECK(of_workers == per_worker_, "a worker's reservations are counted");
  KVFERRY_CHECK(of_sockets == per_socket_, "a socket's reservations are counted");
  for (std::size_t number = 0; number < lines_.size(); ++number) {
    KVFERRY_CHECK(waiting[number] == lines_[number].size(), "a reservation is in line or promised");
    KVFERRY_CHECK(asked[number] == core_.arenas[number].asked(),
                  "an arena promises what was reserved in it");
  }
}

}  // namespace kvferry::engine
