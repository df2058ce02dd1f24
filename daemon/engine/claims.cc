#include "daemon/engine/claims.h"

#include <algorithm>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"
#include "daemon/engine/proofs.h"

namespace kvferry::engine {
namespace {

constexpr Duration kMostTtl = std::chrono::seconds(60);
constexpr Duration kMostRenewals = std::chrono::minutes(10);
constexpr Duration kLeastRenewal = std::chrono::milliseconds(100);

// A controller's has no layout, and no Receive will end it: it lasts its time, from when it was
// said last.
bool of_controller(const LayoutHandle& layout) {
  return layout.incarnation.is_zero();
}

// Told again, a call starts nothing.
Reply existing(const OpRef& op) {
  Reply reply;
  reply.op = op;
  reply.existing = true;
  return reply;
}

}  // namespace

// Whether there is no room for another word of this worker.
bool Claims::full(WorkerId worker, bool declines) const {
  const auto count = per_worker_.find({worker, declines});
  const uint64_t own = count == per_worker_.end() ? 0 : count->second;
  return own >= (declines ? core_.config.max_declines_per_worker
                          : core_.config.max_claims_per_worker) ||
         words_.size() >= core_.config.max_tombstones;
}

bool Claims::full(uint32_t socket) const {
  const auto count = per_socket_.find(socket);
  return count != per_socket_.end() && count->second >= core_.workers.limits_of(socket).claims;
}

bool Claims::refused(const OpRef& op, const LayoutHandle* layout, bool declines, bool replaces) {
  if (core_.refused(op, layout)) return true;
  const uint32_t socket = core_.workers.socket_of(op.worker);
  if (!replaces && full(socket)) {
    core_.workers.refuse_for_socket(op, core_.workers.limits_of(socket).claims,
                                    "claims and declines", "max_claims");
    return true;
  }
  if (!full(op.worker, declines)) return false;
  core_.reply_error(op, Code::kResourceExhausted, "TOO_MANY_CLAIMS",
                    "too many claims or declines are remembered");
  return true;
}

// After Close, both come too late.
bool Claims::closed(const OpRef& op, const RankKey& name) {
  if (!core_.workers.buried(Role::kReceiver, name)) return false;
  core_.reply_error(op, Code::kAlreadyExists, "TRANSFER_CLOSED",
                    "the transfer was closed; its id is not used again", "transfer.id");
  return true;
}

Claims::Word& Claims::add(const OpRef& op, uint32_t socket, const TransferKey& key,
                          const std::string& ticket,
                          const std::shared_ptr<const LayoutHandle>& registered, bool declines) {
  // Who speaks, without his memory: a word may outlast the worker, whose pages go at once.
  const auto layout = std::make_shared<const LayoutHandle>(*registered);
  Word fresh;
  fresh.registered = registered.get();
  fresh.id = core_.next_number();
  fresh.declines = declines;
  fresh.worker = op.worker;
  fresh.socket = socket;
  fresh.key = key;
  fresh.name = wire_name(key, key.incarnation);
  fresh.layout = layout;
  auto question = std::make_shared<ReceiveOp>();
  question->op = op;
  question->key = key;
  question->ticket = ticket;
  question->layout = layout;
  fresh.question = std::move(question);
  fresh.resolve = ResolveId{core_.next_number()};
  resolves_[fresh.resolve] = fresh.id;
  by_name_[rank_key(fresh.name, *layout)] = fresh.id;
  ++per_worker_[{op.worker, declines}];
  ++per_socket_[socket];
  core_.emit(Resolve{fresh.resolve, fresh.question, declines});
  if (op.op_id != 0)
    core_.emit(Reply{op, {Code::kOk, {}, {}, {}}, false, 0, TransferState::kOpen, false, {}});
  return words_.emplace(fresh.id, std::move(fresh)).first->second;
}

void Claims::claim(const ClaimOp& op) {
  const RankKey name = rank_key(wire_name(op.key, op.key.incarnation), *op.layout);
  const Duration ttl = std::min(kMostTtl, core_.limited(op.ttl, core_.config.default_lease));
  if (const auto it = by_name_.find(name); it != by_name_.end()) {
    const Word& word = words_.at(it->second);
    const char* field = word.client_handle != op.client_handle ? "client_handle"
                        : word.question->ticket != op.ticket   ? "ticket"
                        : word.ttl != ttl                      ? "ttl"
                                                               : nullptr;
    if (word.declines)
      core_.reply_error(op.op, Code::kAlreadyExists, "DECLINED", "the transfer was declined",
                        "transfer.id");
    else if (field != nullptr)
      core_.reply_error(op.op, Code::kAlreadyExists, "CLAIM_EXISTS",
                        "the claim exists with another " + std::string(field), field);
    else
      core_.emit(existing(op.op));
    if (field == nullptr && !word.declines && of_controller(*op.layout)) {
      tell(word);
      core_.timers.set({TimerKind::kClaimEnd, word.id, 0}, core_.now + ttl);
    }
    return;
  }
  if (closed(op.op, name)) return;
  if (const Receive* receive = core_.receiver.find(name)) {
    // It has come, as claimed. What its claim had said is forgotten, but for what both say.
    const char* field = receive->worker != op.op.worker                     ? "transfer.id"
                        : receive->record.client_handle != op.client_handle ? "client_handle"
                        : receive->asked->ticket != op.ticket               ? "ticket"
                                                                            : nullptr;
    if (field != nullptr)
      core_.reply_error(op.op, Code::kAlreadyExists, "TRANSFER_EXISTS",
                        "the transfer exists with another " + std::string(field), field);
    else
      core_.emit(existing(op.op));
    return;
  }
  if (refused(op.op, op.layout.get(), false, false)) return;
  const uint32_t socket = core_.workers.socket_of(op.op.worker);
  Word& word = add(op.op, socket, op.key, op.ticket, op.layout, false);
  word.client_handle = op.client_handle;
  word.ttl = ttl;
  core_.timers.set({TimerKind::kClaimEnd, word.id, 0},
                   core_.now + (of_controller(*op.layout) ? ttl : kMostRenewals));
}

void Claims::decline(const DeclineOp& op) {
  const RankKey name = rank_key(wire_name(op.key, op.key.incarnation), *op.layout);
  const auto it = by_name_.find(name);
  if (it != by_name_.end() && words_.at(it->second).declines) {
    if (words_.at(it->second).question->ticket != op.ticket)
      core_.reply_error(op.op, Code::kAlreadyExists, "DECLINED",
                        "the transfer was declined with another ticket", "ticket");
    else
      core_.emit(existing(op.op));
    return;
  }
  if (closed(op.op, name)) return;
  if (core_.receiver.find(name) != nullptr) {
    core_.reply_error(op.op, Code::kFailedPrecondition, "ALREADY_RECEIVING",
                      "a Receive is given up by Cancel", "transfer.id");
    return;
  }
  const bool claimed = it != by_name_.end();
  const uint32_t socket = core_.workers.socket_of(op.op.worker);
  const bool replaces = claimed && words_.at(it->second).socket == socket;
  if (refused(op.op, op.layout.get(), true, replaces)) return;
  if (claimed) forget(it->second);
  remember_decline(add(op.op, socket, op.key, op.ticket, op.layout, true));
}

void Claims::decline_unheard(const Receive& receive) {
  const RankKey name = rank_key(receive.name, *receive.layout);
  if (by_name_.contains(name) || full(receive.worker, true) || full(receive.socket)) return;
  remember_decline(add(OpRef{receive.worker, 0}, receive.socket, receive.key, receive.op->ticket,
                       receive.layout, true));
}

bool Claims::resolved(Resolved& event) {
  const auto it = resolves_.find(event.resolve);
  if (it == resolves_.end()) return false;
  const uint64_t id = it->second;
  resolves_.erase(it);
  Word& word = words_.at(id);
  word.resolve = {};
  if (event.reason != Reason::kNone) {
    forget(id);
    return true;
  }
  word.sender_incarnation = event.sender_incarnation;
  for (const ReceiverLeg& leg : event.legs) word.legs.emplace_back(leg.node, leg.sender_rank);
  tell(word);
  if (!word.declines && !of_controller(*word.layout))
    core_.timers.set({TimerKind::kClaimRenew, id, 0},
                     core_.now + std::max(word.ttl / 3, kLeastRenewal));
  return true;
}

void Claims::tell(const Word& word) {
  for (const auto& [node, rank] : word.legs)
    if (Link* link = core_.lanes.find_node(node)) tell(word, *link, rank);
}

void Claims::tell(const Word& word, Link& link, uint32_t sender_rank) {
  ProofFields fields;
  fields.pull = {core_.config.boot, 0};
  fields.id = word.name.id;
  fields.instance = word.name.instance;
  fields.incarnation = word.sender_incarnation;
  fields.sender_rank = sender_rank;
  fields.receiver_rank = word.layout->rank;
  fields.sender_node = link.node;
  fields.receiver_node = core_.config.node;
  const Proof proof = receiver_proof(word.key.secret, fields);
  TransferName name = word.name;
  name.incarnation = word.sender_incarnation;
  if (word.declines) {
    (void)core_.lanes.send(
        link, MsgDecline{name, proof, word.layout->instance, word.layout->incarnation, sender_rank,
                         word.layout->rank});
  } else {
    const auto ttl = std::chrono::duration_cast<std::chrono::milliseconds>(word.ttl).count();
    (void)core_.lanes.send(
        link, MsgClaim{name, proof, word.layout->instance, word.layout->incarnation, sender_rank,
                       word.layout->rank, static_cast<uint64_t>(ttl)});
  }
}

void Claims::received(WorkerId worker, const RankKey& key) {
  const auto it = by_name_.find(key);
  if (it == by_name_.end()) return;
  const Word& word = words_.at(it->second);
  if (!word.declines && word.worker == worker) forget(it->second);
}

// Who claimed will not come: the senders' pages wait for nobody. A controller comes for others.
void Claims::worker_gone(WorkerId worker) {
  std::vector<uint64_t> ids;
  for (const auto& [id, word] : words_)
    if (word.worker == worker && !word.declines) ids.push_back(id);
  for (const uint64_t id : ids) take_back(id);
}

void Claims::layout_gone(const LayoutHandle* layout) {
  std::vector<uint64_t> ids;
  for (const auto& [id, word] : words_)
    if (word.registered == layout && !word.declines) ids.push_back(id);
  for (const uint64_t id : ids) take_back(id);
}

// A claim becomes a decline. One that has not been told yet is as if it had not been made.
void Claims::take_back(uint64_t id) {
  Word& word = words_.at(id);
  if (word.resolve || of_controller(*word.layout) || full(word.worker, true)) {
    forget(id);
    return;
  }
  const auto count = per_worker_.find({word.worker, false});
  if (--count->second == 0) per_worker_.erase(count);
  ++per_worker_[{word.worker, true}];
  word.declines = true;
  word.registered = nullptr;
  core_.timers.cancel({TimerKind::kClaimRenew, id, 0});
  core_.timers.cancel({TimerKind::kClaimEnd, id, 0});
  remember_decline(word);
  tell(word);
}

// Long enough for every lane that may lose it; after that the sender's lease ends by itself.
void Claims::remember_decline(const Word& word) {
  core_.timers.set({TimerKind::kDeclineEnd, word.id, 0},
                   core_.now + 2 * core_.config.default_deadline);
}

void Claims::resync(Link& link) {
  for (const auto& [id, word] : words_)
    for (const auto& [node, rank] : word.legs)
      if (node == link.node) tell(word, link, rank);
}

void Claims::forget(uint64_t id) {
  const auto it = words_.find(id);
  if (it == words_.end()) return;
  const Word& word = it->second;
  if (word.resolve) {
    resolves_.erase(word.resolve);
    core_.emit(CancelResolve{word.resolve});
  }
  for (const TimerKind kind :
       {TimerKind::kClaimRenew, TimerKind::kClaimEnd, TimerKind::kDeclineEnd})
    core_.timers.cancel({kind, id, 0});
  by_name_.erase(rank_key(word.name, *word.layout));
  const auto count = per_worker_.find({word.worker, word.declines});
  if (--count->second == 0) per_worker_.erase(count);
  const auto of_socket = per_socket_.find(word.socket);
  if (--of_socket->second == 0) per_socket_.erase(of_socket);
  words_.erase(it);
}

void Claims::timer(TimerKey key) {
  if (key.kind != TimerKind::kClaimRenew) {
    forget(key.a);
    return;
  }
  const Word& word = words_.at(key.a);
  tell(word);
  core_.timers.set(key, core_.now + std::max(word.ttl / 3, kLeastRenewal));
}

void Claims::check_invariants() const {
  std::map<std::pair<WorkerId, bool>, uint64_t> of_workers;
  std::map<uint32_t, uint64_t> of_sockets;
  for (const auto& [id, word] : words_) {
    ++of_workers[{word.worker, word.declines}];
    ++of_sockets[word.socket];
  }
  KVFERRY_CHECK(of_workers == per_worker_, "a worker's claims and declines are counted");
  KVFERRY_CHECK(of_sockets == per_socket_, "a socket's claims and declines are counted");
  KVFERRY_CHECK(by_name_.size() == words_.size(), "a claim or decline is found by its name");
}

}  // namespace kvferry::engine
