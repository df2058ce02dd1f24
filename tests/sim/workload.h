// The workers: instances of ranks with pages, and the transfers between them as engines would ask
// for them. Fills source pages when their condition holds, overwrites them the moment
// SOURCE_RELEASED is told, calls again, cancels, revokes, closes; keeps for every side what its
// daemon has told it.
//
// What must hold of these statements stands in checks.cc.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "tests/sim/mapping.h"
#include "tests/sim/world.h"

namespace kvferry::sim {

// Why a transfer may end otherwise than COMPLETED and DELIVERED. One without any of these must not.
enum Cause : uint32_t {
  kCauseCancel = 1U << 0,
  kCauseWorker = 1U << 1,
  kCauseDaemon = 1U << 2,
  kCauseLink = 1U << 3,
  kCauseCopy = 1U << 4,
  kCauseCorrupt = 1U << 5,
  kCauseSkewed = 1U << 6,
  kCauseNotOffered = 1U << 7,
  kCauseSecret = 1U << 8,
  kCauseTime = 1U << 9,
  kCauseDecline = 1U << 10,
  kCauseDrain = 1U << 11,
  kCauseUnregister = 1U << 12,
  kCauseCondition = 1U << 13,
  kCauseStale = 1U << 14,
  kCauseCrowd = 1U << 15,
  kCauseExhausted = 1U << 16,
  kCauseMissing = 1U << 17,
  kCauseUnfinished = 1U << 18,
  kCauseHostile = 1U << 19,  // the other side is the enemy's: any end is right, in time
};

struct Transfer;
struct Worker;

struct Slice {
  Range tokens;  // rounded; empty: offers nothing
  std::optional<Range> layers;
  bool last = false;
  uint32_t version = 0;
  engine::ReadyCondition ready;
  uint32_t send_index = 0;     // once sent
  uint32_t attempt = 0;        // counts its side's: who has taken one back makes another
  uint32_t after_revokes = 0;  // Revokes of its side that were called before it
  bool dropped = false;
  uint32_t dropped_by = 0;  // which of its side's Revokes, from 1
};

// One rank's side of a transfer, as its worker sees it.
struct Side {
  uint64_t uid = 0;
  Transfer* transfer = nullptr;
  engine::Role role = engine::Role::kSender;
  Worker* worker = nullptr;
  WorkerId attached;  // the worker's life that called
  uint64_t handle = 0;
  std::vector<std::vector<int32_t>> blocks;  // by group, positions from 0; empty once given back
  bool called = false;
  Time called_at = Time::never();
  bool done_calling = false;
  bool accepted = false;
  bool refused = false;  // the first call was
  bool lost = false;     // nobody is left to tell: the worker or its daemon is gone
  bool closing = false;
  bool closed = false;
  bool cancelled = false;  // Cancel was called before its end
  bool slot_freed = false;
  std::optional<uint32_t> slot;
  uint32_t open_calls = 0;  // without an answer yet
  std::optional<engine::TransferRecord> record;
  Time limit = Time::never();  // terminal by then
  uint32_t word = 0;
  bool short_lived = false;
  bool done_set = false;  // its done word

  // sender
  std::deque<Slice> to_send;
  std::vector<Slice> sent;
  uint32_t next_version = 1;
  uint64_t next_value = 1;
  bool revoking = false;
  uint32_t revokes = 0;
  bool sending_planned = false;
  bool packs = false;                         // most of its slices
  std::optional<engine::SendOp> packed_call;  // not answered yet
  bool take_back = false;                     // it was refused while a Revoke was under way
  uint32_t attempts = 0;
  bool opened = false;

  // receiver
  uint32_t place = 0;  // index into Transfer::receivers
  std::vector<engine::GroupNeed> needs;
  bool destination_ready = true;
  bool receives = true;
  bool declines = false;
  uint32_t reservations = 0;  // that were promised
  bool hashed = false;        // its Receive names the prompt's hashes
  uint64_t pin = 0;           // of its look-up
  bool took = false;          // some of its blocks may be published
  bool claimed = false;

  bool terminal() const {
    return record && record->state != engine::TransferState::kOpen &&
           record->state != engine::TransferState::kActive;
  }
  bool released() const { return record && record->released; }
  bool in(engine::TransferState state) const { return record && record->state == state; }
};

struct Instance {
  std::string name;
  Incarnation incarnation;
  Ranks ranks;
  std::vector<Worker*> workers;  // by rank
  bool usable = false;
};

struct PendingOp {
  enum class Kind : uint8_t {
    kFirst,
    kMore,
    kRepeat,
    kCancel,
    kRevoke,
    kClose,
    kClaim,
    kClaimAgain,
    kDecline,
    kReserve,
    kNeeds,
    kLookup,
    kCommit,
    kWithdraw
  };
  Kind kind = Kind::kFirst;
  Side* side = nullptr;
};

// Pages that a worker has kept of a receive and may have published.
struct Kept {
  std::vector<std::vector<int32_t>> blocks;  // by group and position; -1: written anew since
  bool committed = false;
  bool withdrawing = false;
};

struct Worker {
  uint32_t node = 0;
  Instance* instance = nullptr;
  uint32_t rank = 0;
  WorkerId id;        // 0: not attached
  uint64_t life = 0;  // of its daemon
  std::shared_ptr<SimLayout> layout;
  std::vector<uint64_t> words;
  uint64_t next_op = 1;
  uint64_t next_handle = 1;
  std::map<uint64_t, PendingOp> ops;
  std::map<uint64_t, Side*> sides;              // by handle
  std::vector<std::set<uint32_t>> free_blocks;  // by group
  std::map<uint64_t, Kept> cache;               // by the receiving side's uid
  bool quiet_due = false;
};

struct ReceiverGroup {
  Instance* instance = nullptr;
  uint32_t dp_group = 0;
  std::vector<Side*> sides;  // by rank in the dp group
};

struct Transfer {
  uint64_t uid = 0;
  std::string id;
  Secret secret;
  Instance* sender = nullptr;
  Incarnation sender_incarnation;
  uint32_t sender_group = 0;
  uint64_t tokens = 0;  // the receivers' prompt
  uint64_t sender_tokens = 0;
  uint32_t max_receivers = 1;
  uint32_t causes = 0;
  bool skewed = false;
  bool revoked = false;
  bool leapt = false;  // a clock has, on a daemon with a side of it
  bool unknown_group = false;
  std::optional<std::string> aux;
  Duration lease{}, wait{}, deadline{};
  std::vector<Side*> sides;  // the sender's, by rank in the dp group
  std::vector<ReceiverGroup> receivers;
  const Transfer* parent = nullptr;  // whose prompt begins alike, for `shared` tokens
  uint64_t shared = 0;

  // The transfer that had this token first.
  uint64_t text_of(uint64_t token) const;
};

// A transfer that the enemy has a side of, by what it knows: for each honest sender's rank, or of
// an honest receiver (`sender` is null).
struct EnemyTask {
  engine::TransferKey key;
  std::shared_ptr<const SimLayout> sender;
  uint64_t tokens = 0;
};

// Digest of both card sets: equal on both sides as long as both instances live on.
Digest16 cards_of(const Incarnation& sender, const Incarnation& receiver);

class Workload {
 public:
  explicit Workload(World& world);

  void plan();                  // everything that will be asked, as happenings of the world
  bool finished() const;        // nothing is open and nothing more will be asked
  void check_finished() const;  // throws Violation naming what is open
  void final_checks() const;    // of all transfers against each other
  std::string open_things() const;
  void count(Totals& totals) const;

  // What daemons tell.
  void on_reply(uint32_t node, const engine::Reply& reply);
  void on_publish(uint32_t node, const engine::Publish& publish);
  void on_free_slot(uint32_t node, const engine::FreeSlot& free);
  void on_done_word(uint32_t node, const engine::SetDoneWord& set);
  void on_quiet(uint32_t node, const engine::LayoutQuiet& quiet);

  // What nodes ask.
  Side* side_of(WorkerId worker, uint64_t handle) const;
  Side* side_by_uid(uint64_t uid) const;
  bool holds(const engine::WatchCondition& watch) const;
  bool attached(WorkerId worker) const { return workers_by_id_.contains(worker); }
  engine::Resolved resolve(const engine::ReceiveOp& receive, bool declines,
                           std::set<uint32_t>& nodes) const;
  engine::PullResolved resolve_pull(const engine::MsgPull& pull,
                                    const engine::LayoutHandle& layout) const;
  engine::PullResolved resolve_enemy_pull(const engine::MsgPull& pull,
                                          const engine::LayoutHandle& layout) const;
  void before_gather(const SimPlan& plan, uint64_t offset, uint64_t bytes) const;
  void before_scatter(const SimPlan& plan, uint64_t offset, uint64_t bytes) const;

  // What the enemy knows.
  const Instance& enemy_instance() const { return *enemy_; }
  const std::vector<EnemyTask>& enemy_tasks() const { return enemy_tasks_; }
  std::optional<EnemyTask> enemy_task(const std::string& id) const;
  bool with_enemy(const std::string& id) const;
  // Bytes and digest of the stream that the offer makes of that pull; no offer: of all it needs.
  std::pair<uint64_t, uint64_t> enemy_stream(const engine::MsgPull& pull,
                                             const std::vector<engine::GroupRanges>& offer) const;

  // What goes wrong.
  void link_lost(uint32_t a, uint32_t b);
  void unreachable(const engine::TransferKey& key, uint32_t cause);
  void data_corrupted();
  void leapt(uint32_t node);
  void revoke_all(uint32_t node);
  void copy_failed(uint64_t side);
  void worker_dies();
  void unregister_something();
  void daemon_died(uint32_t node);
  void daemon_back(uint32_t node);
  void draining(uint32_t node);

 private:
  // instances.cc
  void make_instances();
  Instance& make_instance(std::vector<uint32_t> nodes, Rng& rng);
  void make_neighbours();
  void attach(Worker& worker);
  void revive(Instance& instance);
  void revive_soon(Instance& instance);
  void retire(Instance& instance, bool abruptly, Worker* victim);
  void lose_sides(Worker& worker, uint32_t cause);
  bool instance_stands(const Instance& instance) const;

  // hostile_calls.cc
  void plan_enemy();
  void begin_with_enemy(bool sends);
  engine::Resolved resolve_enemy(const engine::ReceiveOp& receive, bool declines,
                                 std::set<uint32_t>& nodes) const;

  // transfers.cc
  void begin_transfer(uint32_t tries_left);
  Transfer& new_transfer();
  void make_sender_sides(Transfer& transfer);
  void make_receiver_sides(Transfer& transfer, uint32_t place);
  void plan_sides(Transfer& transfer);
  bool choose_pair(Instance*& sender, Instance*& receiver);
  void choose_neighbours(Instance*& sender, Instance*& receiver) const;
  void choose_habits(Transfer& transfer, Instance& receiver);
  bool take_blocks(Side& side, uint64_t tokens);
  void give_blocks(Side& side, bool poison);
  Side& make_side(Transfer& transfer, engine::Role role, Worker& worker);
  void plan_slices(Side& side, const std::vector<Slice>& slices);
  std::vector<Slice> make_slices(const Transfer& transfer);
  void plan_sender(Side& side);
  void plan_receiver(Side& side);
  void plan_ends(Transfer& transfer);

  // calls.cc
  bool can_call(const Side& side) const;
  void call_open(Side& side);
  void call_next_send(Side& side);
  void plan_needs(Side& side);
  void check_needs(const Side& side, const engine::Reply& reply);
  bool send_without_copy(Side& side, PendingOp::Kind kind, const engine::Reply& reply);
  void call_receive(Side& side);
  void call_claim(Side& side, Duration ttl);
  void call_decline(Side& side);
  void plan_reservation(Side& side);
  void call_cancel(Side& side);
  void call_revoke(Side& side, uint64_t from_token);
  void call_close(Side& side);
  void repeat(Side& side, engine::Event event);
  void make_ready(Side& side, Slice slice);
  void fill(Side& side, const Slice& slice);
  void revoked(Side& side, const std::vector<uint32_t>& dropped);
  engine::OpRef op(Side& side, PendingOp::Kind kind);
  engine::TransferKey key_of(const Side& side) const;
  std::vector<engine::GroupBlocks> blocks_of(const Side& side, Range tokens) const;
  void settle(Side& side);
  void tell_words(const Worker& worker);
  void later(Side& side, Duration delay, std::function<void(Side&)> what);
  Worker* worker_of(uint32_t node, WorkerId id) const;
  void blame(Transfer& transfer, uint32_t cause);

  // reuse.cc
  void draw_prompt(Transfer& transfer);
  void plan_lookup(Side& side);
  void take_published(Side& side);
  std::vector<engine::PromptHashes> hashes_of(const Side& side) const;
  bool keep(Side& side);
  void withdraw_later(Side& side, Duration delay);
  void call_withdraw(Side& side);
  void committed(Side& side, bool ok);
  void withdrawn(Side& side);
  void before_reuse(const SimPlan& plan, uint64_t offset, uint64_t bytes) const;
  bool was_sent(uint64_t text, uint32_t version, uint32_t layer, uint64_t unit,
                uint64_t token) const;

  // checks.cc
  void check_record(Side& side, const engine::TransferRecord& record) const;
  void check_reason(const Side& side) const;
  void check_dropped(const Side& side, const Side& sender, const std::set<uint32_t>& used) const;
  void check_pages(const Side& side) const;
  void count_receivers(const Transfer& transfer, Totals& totals) const;
  void check_agreement(const Transfer& transfer) const;
  void check_side_at_end(const Side& side) const;
  const Side* sender_of_cell(const Transfer& transfer, const Side& receiver, uint64_t unit) const;
  bool has_leg(const Side& sender, const Side& receiver) const;
  bool leg_is_empty(const Side& sender, const Side& receiver) const;

  World& world_;
  Rng rng_;
  Shape shape_;
  std::vector<std::unique_ptr<Instance>> instances_;
  std::unique_ptr<Instance> enemy_;  // none of instances_; null without a hostile peer
  std::vector<EnemyTask> enemy_tasks_;
  std::size_t apart_ = 0;  // instances below may be drawn for transfers between nodes
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<std::unique_ptr<Transfer>> transfers_;
  std::vector<std::unique_ptr<Side>> sides_;  // uid is index + 1
  std::map<WorkerId, Worker*> workers_by_id_;
  uint64_t next_worker_ = 1;
  uint64_t next_incarnation_ = 1;
  uint32_t to_begin_ = 0;
  uint64_t claims_again_ = 0;
  uint64_t commits_ = 0;
  uint64_t packed_refused_ = 0;
  uint64_t needs_told_ = 0;
  uint32_t planned_ = 0;  // happenings of this class that have not come yet
};

std::string label(const Side& side);

}  // namespace kvferry::sim
