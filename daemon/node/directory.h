// Who is where: layouts of local ranks, cards of local and remote instances, tickets, which legs a
// transfer has, and the compilation of its slices. Answers the engine's Resolve, ResolvePull and
// Compile with events.
//
// Thread-safe; nothing blocks. Work runs on the two task pools given: `look_up` for cards and legs,
// `compile` for plans. Answers of one question are posted exactly once unless it was cancelled.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/engine/commands.h"
#include "daemon/engine/events.h"
#include "daemon/node/peer_links.h"
#include "daemon/node/registered_layout.h"
#include "daemon/node/task_pool.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

struct DirectoryConfig {
  std::string node;                        // own identity
  std::string advertise;                   // host:port that peers dial; goes into cards and tickets
  std::size_t max_remote_instances = 256;  // card sets kept; the one not used for longest goes
  std::size_t max_leg_tables = 256;
  std::size_t max_resolves = 65536;  // under way
  Duration fetch_timeout = std::chrono::seconds(3);
  Duration retry_first = std::chrono::milliseconds(20);
  Duration retry_most = std::chrono::seconds(1);
  Duration resolve_limit = std::chrono::minutes(15);   // past every wait timer of the engine
  Duration named_freshness = std::chrono::seconds(1);  // cards found by name are asked for again
};

struct Registration {
  std::string card;       // opaque bytes for JoinInstance
  bool complete = false;  // all ranks of the instance are known
};

struct JoinOutcome {
  bool existing = false;  // the same cards were joined before
  Incarnation incarnation;
  bool complete = false;
  std::vector<uint32_t> missing_ranks;
};

// Answer to a worker's Resolve call.
struct ProbeOutcome {
  bool reachable = false;
  bool compatible = false;  // meaningful only if a layout was given
  std::optional<Error> problem;
  std::string instance;
  Incarnation incarnation;
  uint32_t rank_count = 0;
  bool local = false;  // every rank is on this node
};

class Directory : public PeerQuestions {
 public:
  using EventSink = std::function<void(engine::Event)>;

  // All outlive it; the pools are stopped before it is destroyed.
  Directory(DirectoryConfig config, PeerLinks& links, TaskPool& look_up, TaskPool& compile,
            EventSink sink);
  ~Directory() override;

  // --- The registry of the worker service.

  // Makes the rank's card. A rank that is there already is replaced (its generation must be
  // higher). Errors: INSTANCE_FOREIGN (another instance key), RANK_COUNT_MISMATCH, RANK_IN_USE (not
  // a higher generation), CARD_TOO_LARGE, and those of mapping::validate_instance once all ranks
  // are there.
  Result<Registration> add_local(std::shared_ptr<const RegisteredLayout> layout);
  // The rank is gone: its instance is incomplete. Nothing if it was replaced meanwhile.
  void remove_local(const std::shared_ptr<const RegisteredLayout>& layout);

  // Cards of all ranks, as add_local() made them on their nodes. Asks every node named for its own
  // cards; `done` when all have answered or at the deadline, with what is missing; asking goes on
  // in the background. The same cards again, in any order, are `existing`; the nodes are asked
  // all the same, as one of them may have started anew. PERMISSION_DENIED INSTANCE_FOREIGN,
  // INVALID_ARGUMENT BAD_CARD, NOT_FOUND INSTANCE_UNKNOWN (no rank of it is here).
  void join(const std::string& instance, const std::vector<std::string>& cards,
            const std::optional<InstanceKey>& key, Time deadline,
            std::function<void(Result<JoinOutcome>)> done);

  // NOT_FOUND INSTANCE_UNKNOWN, FAILED_PRECONDITION INSTANCE_INCOMPLETE.
  Result<std::string> ticket(const std::string& instance) const;

  // `layout` may be null: reachability only. One attempt, without retries.
  void probe(const std::string& ticket, std::shared_ptr<const RegisteredLayout> layout,
             Time deadline, std::function<void(Result<ProbeOutcome>)> done);

  // --- The engine's commands. Each has one answer: returned, where that takes some tens of
  // microseconds from what is known here; else given to the sink.
  std::optional<engine::Resolved> resolve(const engine::Resolve& command);
  void cancel_resolve(const engine::CancelResolve& command);
  std::optional<engine::PullResolved> resolve_pull(const engine::ResolvePull& command);
  std::optional<engine::Compiled> compile(const engine::Compile& command);
  std::optional<engine::CopyCompiled> compile(const engine::CompileCopy& command);

  // --- PeerQuestions.
  Result<rpc::CardPage> answer_cards(const PeerRef& peer, const rpc::CardQuery& query) override;
  Status answer_join(const PeerRef& peer, const rpc::JoinForward& forward) override;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

// The digest that a PULL carries: of both instances' card sets.
Digest16 digest_of_pair(const Digest16& sender_set, const Digest16& receiver_set);

}  // namespace kvferry::node
