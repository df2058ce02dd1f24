// The insides of the directory, shared by the files that implement it: what is registered here
// (directory.cc), cards of other nodes and legs (directory_resolve.cc), instances that span nodes
// (directory_join.cc).
#pragma once

#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/mapping/legs.h"
#include "daemon/node/cards.h"
#include "daemon/node/compile_slice.h"
#include "daemon/node/directory.h"
#include "daemon/node/tickets.h"

namespace kvferry::node {

using CardSetPtr = std::shared_ptr<const CardSet>;
using LegTablePtr = std::shared_ptr<const mapping::LegTable>;

// For card sets whose digest is known.
constexpr Duration kHoweverOld = std::chrono::hours(24 * 365);

struct Directory::Impl : std::enable_shared_from_this<Directory::Impl> {
  // An instance of which at least one rank is here.
  struct Join;
  struct Local {
    std::string name;
    Incarnation incarnation;
    uint32_t rank_count = 0;
    std::optional<InstanceKey> key;
    std::map<uint32_t, std::shared_ptr<const RegisteredLayout>> ranks;
    std::map<uint32_t, rpc::SignedCard> own;
    std::map<uint32_t, rpc::SignedCard> joined;  // confirmed by the nodes that made them
    CardSetPtr set;                              // null while a rank is missing
    std::shared_ptr<Join> join;
    std::optional<Digest16> asked;  // the cards of the last JoinInstance here
  };
  using LocalKey = std::pair<std::string, Incarnation>;

  // Collecting the cards of an instance from the nodes that have its ranks.
  struct Join {
    struct Node {
      std::string address;
      bool forward = false;    // still to be told that there is something to collect
      bool confirmed = false;  // has answered with its cards in this round
    };
    std::map<std::string, Node> nodes;
    uint64_t round = 0;  // answers of an older one do not count
    Time limit;
    Duration backoff{};
    struct Waiter {
      uint64_t id = 0;
      std::function<void(Result<JoinOutcome>)> done;
    };
    std::vector<Waiter> waiters;
  };

  // Cards of an instance as one node told them. The node is part of the key: what one says of an
  // instance is never taken for what another one would.
  struct RemoteKey {
    std::string node;
    std::string instance;
    Incarnation incarnation;  // zero: the one in force
    auto operator<=>(const RemoteKey&) const = default;
  };
  struct Remote {
    CardSetPtr set;
    Time fetched;
    Time used;
  };
  using SetDone = std::function<void(Result<CardSetPtr>)>;
  struct Fetch {
    rpc::CardQuery query;
    Time deadline;
    std::vector<rpc::SignedCard> cards;
    std::optional<rpc::CardPage> first;
    std::vector<SetDone> waiters;
  };

  // One pair of instances. Made once, by whoever asks first; the others wait for that.
  struct TableSlot {
    Mutex mutex;
    std::optional<Result<LegTablePtr>> table KVFERRY_GUARDED_BY(mutex);
    // Guarded by Impl::mutex.
    Time used;
    LegTablePtr ready;  // null until it has been made, or where it cannot be
  };

  struct Pending {
    engine::Resolve command;
    Time limit;
    Duration backoff{};
    bool fresh = false;  // cards held here may be the stale ones
  };
  using PendingPtr = std::shared_ptr<Pending>;

  Impl(DirectoryConfig config_in, PeerLinks& links_in, TaskPool& look_up_in, TaskPool& compile_in,
       EventSink sink_in)
      : config(std::move(config_in)),
        links(links_in),
        look_up(look_up_in),
        compile_pool(compile_in),
        sink(std::move(sink_in)) {}

  const DirectoryConfig config;
  PeerLinks& links;
  TaskPool& look_up;
  TaskPool& compile_pool;
  const EventSink sink;

  mutable Mutex mutex;
  bool stopped KVFERRY_GUARDED_BY(mutex) = false;
  std::map<LocalKey, Local> locals KVFERRY_GUARDED_BY(mutex);
  std::map<std::string, Incarnation> in_force KVFERRY_GUARDED_BY(mutex);
  std::map<RemoteKey, Remote> remotes KVFERRY_GUARDED_BY(mutex);
  std::map<std::pair<LinkId, RemoteKey>, std::shared_ptr<Fetch>> fetches KVFERRY_GUARDED_BY(mutex);
  std::map<std::pair<Digest16, Digest16>, std::shared_ptr<TableSlot>> tables
      KVFERRY_GUARDED_BY(mutex);
  std::map<ResolveId, PendingPtr> pending KVFERRY_GUARDED_BY(mutex);
  // Receives that have been resolved: whoever asks again has been told that the cards were stale.
  std::map<const engine::ReceiveOp*, std::weak_ptr<const engine::ReceiveOp>> resolved
      KVFERRY_GUARDED_BY(mutex);
  std::size_t prune_resolved_at KVFERRY_GUARDED_BY(mutex) = 1024;
  uint64_t next_waiter KVFERRY_GUARDED_BY(mutex) = 1;

  // Runs `task` on the look-up pool at that time, unless the directory is stopping.
  bool later(Time when, std::function<void()> task) KVFERRY_EXCLUDES(mutex);
  bool soon(std::function<void()> task) { return later(Time{}, std::move(task)); }

  // --- directory.cc
  // False: too many wait already, or the directory is stopping.
  template <typename Command>
  bool compile_later(const Command& command) KVFERRY_EXCLUDES(mutex);
  Local* find_local(const std::string& instance, const Incarnation& incarnation)
      KVFERRY_REQUIRES(mutex);
  // Sets `set` if all ranks are known; an error if they do not make an instance.
  static Status complete(Local& local);
  std::vector<uint32_t> missing_ranks(const Local& local) const;

  // --- directory_resolve.cc
  // The set of an instance that is here; UNAVAILABLE INSTANCE_INCOMPLETE, NOT_FOUND.
  Result<CardSetPtr> local_set(const std::string& instance, const Incarnation& incarnation)
      KVFERRY_EXCLUDES(mutex);
  // The set that a ticket leads to. `fresh`: ask even if it is known.
  void find_set(const Ticket& ticket, bool fresh, SetDone done) KVFERRY_EXCLUDES(mutex);
  void find_remote(const PeerTarget& target, const Ticket& ticket, bool fresh, SetDone done)
      KVFERRY_EXCLUDES(mutex);
  void fetch_set(const PeerRef& peer, const std::string& instance, const Incarnation& incarnation,
                 SetDone done) KVFERRY_EXCLUDES(mutex);
  void fetch_page(const std::pair<LinkId, RemoteKey>& key, const std::shared_ptr<Fetch>& fetch)
      KVFERRY_EXCLUDES(mutex);
  void take_page(const std::pair<LinkId, RemoteKey>& key, const std::shared_ptr<Fetch>& fetch,
                 Result<rpc::CardPage> page) KVFERRY_EXCLUDES(mutex);
  void end_fetch(const std::pair<LinkId, RemoteKey>& key, const std::shared_ptr<Fetch>& fetch,
                 Result<CardSetPtr> set) KVFERRY_EXCLUDES(mutex);
  CardSetPtr known_remote(const RemoteKey& key, Duration max_age) KVFERRY_EXCLUDES(mutex);
  Result<LegTablePtr> table_of(const CardSetPtr& sender, const CardSetPtr& receiver)
      KVFERRY_EXCLUDES(mutex);
  // Calls `done` when there is a link to every node, or with the first error.
  void link_all(std::set<rpc::NodeAddress> nodes, std::function<void(Status)> done)
      KVFERRY_EXCLUDES(mutex);
  Status check_tenants(const CardSet& set);

  bool alive(ResolveId id) KVFERRY_EXCLUDES(mutex);
  void resolve_step(const PendingPtr& task) KVFERRY_EXCLUDES(mutex);
  void resolve_legs(const PendingPtr& task, const CardSetPtr& sender, const CardSetPtr& receiver)
      KVFERRY_EXCLUDES(mutex);
  // A controller's: every rank of the sender is a leg of it, without a table.
  void resolve_ranks(const PendingPtr& task, const CardSetPtr& sender) KVFERRY_EXCLUDES(mutex);
  void resolve_failed(const PendingPtr& task, Error error) KVFERRY_EXCLUDES(mutex);
  void answer(const PendingPtr& task, engine::Resolved answer) KVFERRY_EXCLUDES(mutex);

  void pull_step(const engine::ResolvePull& command) KVFERRY_EXCLUDES(mutex);
  void pull_with(const engine::ResolvePull& command, const CardSetPtr& sender,
                 const CardSetPtr& receiver, const PeerRef& peer) KVFERRY_EXCLUDES(mutex);
  // For the tenants that it names.
  bool may_pull(const PeerRef& peer, const engine::MsgPull& pull) const;
  // Whether the pull is one that this link's peer may make for these cards.
  Status check_pull(const engine::ResolvePull& command, const CardSetPtr& sender,
                    const CardSetPtr& receiver, const PeerRef& peer) const;
  Result<engine::PullResolved> pull_answer(const engine::ResolvePull& command,
                                           const LegTablePtr& table);
  void pull_failed(const engine::ResolvePull& command, const Error& error);

  // --- directory_at_once.cc: on the engine's thread, from what is known. Nothing: it takes a look
  // at another node, or more time than that thread has. What fails is nothing, too: why is found
  // out where there is time.
  std::optional<engine::Resolved> resolved_at_once(const engine::ReceiveOp& receive)
      KVFERRY_EXCLUDES(mutex);
  std::optional<engine::PullResolved> pull_at_once(const engine::ResolvePull& command)
      KVFERRY_EXCLUDES(mutex);
  // Null unless somebody has made it.
  LegTablePtr known_table(const CardSetPtr& sender, const CardSetPtr& receiver)
      KVFERRY_EXCLUDES(mutex);

  // --- directory_join.cc
  Status start_join(Local& local, const std::vector<rpc::NodeAddress>& nodes, bool forward)
      KVFERRY_REQUIRES(mutex);
  void join_step(const LocalKey& key, uint64_t round) KVFERRY_EXCLUDES(mutex);
  void ask_node(const LocalKey& key, uint64_t round, const std::string& node, Join::Node state)
      KVFERRY_EXCLUDES(mutex);
  void collect(const LocalKey& key, uint64_t round, const PeerRef& peer, uint32_t first_rank)
      KVFERRY_EXCLUDES(mutex);
  void take_own_cards(const LocalKey& key, uint64_t round, const PeerRef& peer,
                      Result<rpc::CardPage> page) KVFERRY_EXCLUDES(mutex);
  void take_waiters(Local& local, std::vector<Join::Waiter>& out) KVFERRY_REQUIRES(mutex);
  JoinOutcome outcome_of(const Local& local) const;
};

// The legs to one receiver rank of the sender's dp groups in question. Errors of LegTable.
Result<std::vector<engine::ReceiverLeg>> receiver_legs(const LegTablePtr& table,
                                                       const CardSet& sender,
                                                       const engine::ReceiveOp& receive);

}  // namespace kvferry::node
