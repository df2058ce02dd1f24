// The thread that owns the engine and carries out its commands: it drains the inbox and the rails'
// rings, feeds the engine, and turns commands into rails records, copies, compilations, status
// slots and replies. Nothing else touches the engine, the rails client or the keys of links.
//
// It never blocks but in ppoll(), whose wait is bounded by the engine's next timer and 100 ms.
#pragma once

#include <poll.h>

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/copy/copy_pool.h"
#include "daemon/engine/engine.h"
#include "daemon/gpu/queues.h"
#include "daemon/link/envelope.h"
#include "daemon/node/copier.h"
#include "daemon/node/inbox.h"
#include "daemon/node/rails_backlog.h"
#include "daemon/ops/metrics.h"
#include "daemon/ops/watchdog.h"
#include "daemon/rails/rails_client.h"
#include "daemon/rpc/lifeline.h"

namespace kvferry::node {

class Directory;
class LinkManager;
class TaskPool;

class EngineThread final : private rails::RailsEvents {
 public:
  struct Parts {
    engine::EngineConfig engine;
    const Segments* arenas = nullptr;  // outlives the thread, as do all below
    std::unique_ptr<rails::RailsClient> rails;
    copy::CopyPool* copies = nullptr;
    gpu::Queues* queues = nullptr;  // null: no GPU
    TaskPool* packer = nullptr;     // takes memory for packed copies, and whatever else takes time
    Directory* directory = nullptr;
    LinkManager* links = nullptr;
    // What is mapped of a peer's arena; null where nothing is. Cheap; called for each chunk. Empty:
    // nothing is ever.
    std::function<std::shared_ptr<const Segments>(const engine::PeerArena&)> peer_arena;
    // A gather into it failed: it is not to be found any more. Any thread.
    std::function<void(const engine::PeerArena&)> distrust;
    ops::Metrics* metrics = nullptr;
    ops::Ticker* ticker = nullptr;                                    // may be null
    std::function<void()> on_drained;                                 // called on the engine thread
    std::size_t inbox_limit = 8192;                                   // entries of one source
    std::vector<std::pair<std::string, std::string>> rails_settings;  // for operators
  };

  explicit EngineThread(Parts parts);
  ~EngineThread() override;
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;

  // Starts the rails process and the thread.
  Status start();
  // Ends the thread and the rails process. Idempotent; waits for at most one loop and a second.
  void stop();

  // --- any thread -------------------------------------------------------------------------------

  // A worker's call. `reply` is called once on the engine thread, at once (on this one) with
  // RESOURCE_EXHAUSTED if the worker has too much waiting.
  void call(WorkerId worker, engine::Event op, ReplyFn reply);
  // An answer of another part of the daemon, or news of links. Never refused.
  void post(engine::Event event);
  // Of a link that is up: what comes under them is opened from now on. Takes the place of keys of
  // the same link that were given and not taken yet.
  void renew_keys(LinkId link, const link::LinkKeys& keys, bool seal_now);
  // The session's control page shows its transfers from now on.
  void attach(std::shared_ptr<rpc::Session> session);
  // Its transfers end; the page is forgotten.
  void detach(WorkerId worker);
  // Runs `question` on the engine thread.
  void ask(QuestionFn question);
  // Called on the engine thread when no transfer uses the layout any more.
  void unregister(std::shared_ptr<const engine::LayoutHandle> layout, Reason reason,
                  std::function<void()> quiet);

  // The engine's event of that name. `done` is called on the engine thread; with zeros when it
  // stops.
  void release_quarantine(std::string node, std::optional<BootId> boot,
                          std::function<void(const engine::QuarantineReleased&)> done);

  struct RailsView {
    bool ready = false;
    rails::RailsReady info;
    std::vector<rails::RailStats> stats;
    std::vector<uint64_t> send_rates;  // by rail, of its fastest lane; 0: not known
    uint64_t restarts = 0;
    int pid = -1;
    std::string last_exit;
    int last_status = 0;  // exit status of the last end; 78: configuration
    std::vector<std::pair<std::string, std::string>> settings;
  };
  // Brings the metrics up to this moment; waits at most `patience` for the engine's thread.
  void export_now(Duration patience);
  // A copy, at most 100 ms old.
  RailsView rails_view() const KVFERRY_EXCLUDES(view_mutex_);

 private:
  struct Lane {
    rails::LaneKey key;
    bool closing = false;
    Time closing_since{};
  };
  struct Condition {
    WorkerId worker;
    uint32_t word = 0;
    uint64_t value = 0;
  };
  using Waiting = RailsBacklog::Message;
  struct WatchedEvent {
    WorkerId worker;
    gpu::CopyQueue* queue = nullptr;
  };

  void run();
  // Gives the control messages that were sent last, the ends of transfers above all, a moment to
  // leave the rails process.
  void let_messages_go();
  void wait();
  void take(Posted posted, Time now);
  void handle(engine::Event event);
  void execute_all();
  void poll_conditions();
  void refresh_views(Time now);
  void export_stats();
  void export_gpus();
  std::vector<uint64_t> send_rates(const engine::EngineSnapshot& snapshot) const;
  // Last resort for memory that somebody may still write: ends the rails process if a lane that was
  // given up does not come to its end.
  void watch_closing_lanes(Time now);
  // What still waits is answered UNAVAILABLE, so that no caller is left without an answer.
  void answer_all_waiting();

  template <typename Answer>
  void answered(std::optional<Answer> answer);

  void tell_replies();

  // One for each command.
  void execute(engine::Reply& command);
  void execute(engine::Publish& command);
  void execute(engine::SetDoneWord& command);
  void execute(engine::FreeSlot& command);
  void execute(engine::LayoutQuiet& command);
  void execute(engine::Resolve& command);
  void execute(engine::ResolvePull& command);
  void execute(engine::CancelResolve& command);
  void execute(engine::Compile& command);
  void execute(engine::CompileCopy& command);
  void execute(engine::LocalCopy& command);
  void execute(engine::MakePacked& command);
  void execute(engine::Gather& command);
  void execute(engine::Scatter& command);
  void execute(engine::ClearTail& command);
  void execute(engine::WatchCondition& command);
  void execute(engine::UnwatchCondition& command);
  void execute(engine::ConnectLane& command);
  void execute(engine::ReopenLane& command);
  void execute(engine::CloseLane& command);
  void execute(engine::TellLaneDown& command);
  void execute(engine::CloseLink& command);
  void execute(engine::SendMessage& command);
  void execute(engine::SendRefuse& command);
  void execute(engine::SendOffer& command);
  void execute(engine::AcceptOffer& command);
  void execute(engine::DropOffer& command);
  void execute(engine::QuarantineReleased& command);
  void execute(engine::TransferEnded& command);
  void execute(engine::Drained& command);

  // Any thread.
  void submit(CopyId id, Copy copy);
  void copy_refused(const Error& error);
  void distrust(const engine::PeerArena& arena);
  void forget_conditions(WorkerId worker);
  std::optional<link::ChunkCheck> checker_of(LinkId link, bool sent, engine::CheckKind kind,
                                             uint64_t number);
  void copy_ended(CopyId copy, engine::CopyOutcome outcome, engine::Check check = {});
  void send_sealed(const engine::LaneRef& lane);
  // The link manager is told when the first message under a link's keys has come.
  Result<link::Opened> open(std::span<const uint8_t> message, Time now);
  void take_message(std::span<const uint8_t> message, Time since);
  void keep_early(std::span<const uint8_t> message, Time since);
  void drop_early(Time until);  // those that came until then
  void take_early();            // a link is known now
  // To the rails, or to the backlog.
  void send(Waiting message);
  // False: the rails have no room now. Else it is sent, or the lane has failed.
  bool hand_over(const Waiting& message);
  bool hand_over(const engine::AcceptOffer& command);
  void send_backlog();
  void lane_failed(const engine::LaneRef& lane);
  Lane* find_lane(const engine::LaneRef& lane);
  const engine::LaneRef* find_ref(rails::LaneKey key) const;
  void forget_lane(rails::LaneKey key);
  // Returns false if the lane is already gone.
  bool begin_closing(Lane& lane);

  // rails::RailsEvents
  void on_ready(const rails::RailsReady& ready) override;
  void on_connected(rails::LaneKey lane) override;
  void on_connect_failed(rails::LaneKey lane, int status) override;
  void on_lane_error(rails::LaneKey lane, int status) override;
  void on_closed(rails::LaneKey lane) override;
  void on_control(uint32_t rail, std::span<const uint8_t> message) override;
  void on_offer(const rails::OfferIn& offer) override;
  void on_send_ended(rails::SendToken token, bool ok) override;
  void on_receive_ended(LandingId landing, bool ok, uint64_t bytes) override;
  void on_died(const rails::RailsExit& exit) override;

  Parts parts_;
  Copier copier_;
  Inbox inbox_;
  engine::Engine engine_;
  engine::Commands commands_;
  std::vector<Posted> batch_;
  std::vector<pollfd> polled_;  // of the rails, then of the inbox
  uint64_t polled_generation_ = UINT64_MAX;
  std::vector<engine::Event> follow_up_;  // events born of executing commands
  link::LinkTable links_;
  std::vector<uint8_t> sealed_;
  std::map<engine::LaneRef, Lane> lanes_;
  std::unordered_map<uint64_t, engine::LaneRef> refs_;  // by lane key
  uint64_t next_lane_key_ = 1;
  uint64_t next_control_token_ = 1;
  uint64_t controls_under_way_ = 0;  // sends that have not ended
  struct Early {
    Time since;
    std::vector<uint8_t> message;
  };
  struct RenewedKeys {
    link::LinkKeys keys;
    bool seal_now = false;
  };
  bool take_renewed_keys();  // false: there were none
  Mutex renewed_mutex_;
  std::unordered_map<LinkId, RenewedKeys, IdHash> renewed_ KVFERRY_GUARDED_BY(renewed_mutex_);
  std::vector<LinkId> ended_links_;  // their keys go when all that was said is sealed
  std::deque<Early> early_;          // messages of links that are not known yet, the oldest first
  // Of messages that wait for room in the rails, 64 MiB of all lanes together.
  RailsBacklog backlog_{64U << 20};
  bool draining_ = false;
  std::unordered_map<uint64_t, ReplyFn> replies_;           // by op id
  std::vector<std::pair<ReplyFn, engine::Reply>> answers_;  // of this round
  uint64_t next_op_id_ = 1;                                 // ... and of what operators ask
  std::map<uint64_t, std::function<void(const engine::QuarantineReleased&)>> releases_;
  std::unordered_map<WorkerId, std::shared_ptr<rpc::Session>, IdHash> sessions_;
  std::map<ConditionId, Condition> conditions_;  // words of workers
  std::map<ConditionId, WatchedEvent> events_;   // CUDA events, which the queues look at
  std::atomic<int64_t> last_refusal_ns_{0};
  std::map<std::shared_ptr<const engine::LayoutHandle>, std::vector<std::function<void()>>> quiet_;
  std::set<std::pair<WorkerId, uint32_t>> shown_;  // slots that hold a transfer
  uint64_t unknown_links_ = 0;
  Time next_refresh_{};

  std::atomic<bool> stop_{false};
  std::thread thread_;
  mutable Mutex view_mutex_;
  RailsView view_ KVFERRY_GUARDED_BY(view_mutex_);
};

}  // namespace kvferry::node
