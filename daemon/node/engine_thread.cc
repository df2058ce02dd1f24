#include "daemon/node/engine_thread.h"

#include <poll.h>
#include <sys/prctl.h>

#include <algorithm>
#include <future>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/node/directory.h"
#include "daemon/node/link_manager.h"
#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

constexpr std::size_t kBatch = 512;
// How long a message waits for its link to be known: a handshake's answer is on the way.
constexpr Duration kEarlyLife = std::chrono::seconds(2);
constexpr Duration kLongestSleep = std::chrono::milliseconds(100);
constexpr Duration kConditionPoll = std::chrono::microseconds(50);
constexpr Duration kLastWords = std::chrono::milliseconds(250);  // for messages at the end
constexpr Duration kRefresh = std::chrono::milliseconds(100);

}  // namespace

EngineThread::EngineThread(Parts parts)
    : parts_(std::move(parts)),
      copier_({parts_.arenas, parts_.copies, parts_.queues, parts_.packer}),
      inbox_(parts_.inbox_limit),
      engine_(parts_.engine) {
  MutexLock lock(view_mutex_);
  view_.settings = std::move(parts_.rails_settings);
}

EngineThread::~EngineThread() {
  stop();
}

Status EngineThread::start() {
  KVFERRY_CHECK(!thread_.joinable(), "the engine thread starts once");
  // The rails process dies with the thread that starts it, so the loop's thread does that.
  thread_ = std::thread([this] { run(); });
  return {};
}

void EngineThread::stop() {
  if (!thread_.joinable()) return;
  stop_.store(true, std::memory_order_release);
  inbox_.wake();
  thread_.join();
  answer_all_waiting();
}

void EngineThread::answer_all_waiting() {
  batch_.clear();
  while (inbox_.waiting() > 0) inbox_.drain(kBatch, batch_);
  inbox_.close();
  engine::Reply stopped;
  stopped.error = Error{Code::kUnavailable, "SHUTDOWN", "the daemon stops", {}};
  for (const Posted& posted : batch_)
    if (posted.reply) posted.reply(stopped);
  for (const auto& [op_id, reply] : std::exchange(replies_, {})) reply(stopped);
  for (const auto& [call, done] : std::exchange(releases_, {})) done({});
  // Nothing copies any more once the copy threads have ended, which the owner sees to.
  for (const auto& [layout, waiting] : std::exchange(quiet_, {}))
    for (const auto& quiet : waiting) quiet();
  batch_.clear();
  sessions_.clear();
}

// ---- other threads -----------------------------------------------------------------------------

void EngineThread::call(WorkerId worker, engine::Event op, ReplyFn reply) {
  ReplyFn refused = reply;
  if (inbox_.post(worker.value, Posted{std::move(op), std::move(reply), {}})) return;
  engine::Reply answer;
  answer.op.worker = worker;
  answer.error = Error{
      Code::kResourceExhausted, "TOO_MANY_CALLS", "the worker has too many calls waiting", {}};
  refused(answer);
}

void EngineThread::post(engine::Event event) {
  (void)inbox_.post(Inbox::kInternal, Posted{std::move(event), {}, {}});
}

void EngineThread::ask(QuestionFn question) {
  (void)inbox_.post(Inbox::kInternal, Posted{engine::RailsUp{}, {}, std::move(question)});
}

void EngineThread::attach(std::shared_ptr<rpc::Session> session) {
  ask([this, session = std::move(session)](const engine::Engine&, Time) {
    const rpc::Session::Facts& facts = session->facts();
    sessions_[facts.id] = session;
    if (draining_) session->page().set_draining(true);
    follow_up_.push_back(engine::WorkerAttached{
        facts.id,
        facts.tenant,
        session->page().config().slots,
        static_cast<uint32_t>(facts.socket),
        {facts.limits.transfers, facts.limits.claims, facts.limits.reservations}});
  });
}

void EngineThread::detach(WorkerId worker) {
  ask([this, worker](const engine::Engine&, Time) {
    follow_up_.push_back(engine::WorkerGone{worker});
    sessions_.erase(worker);
    forget_conditions(worker);
  });
}

void EngineThread::unregister(std::shared_ptr<const engine::LayoutHandle> layout, Reason reason,
                              std::function<void()> quiet) {
  ask([this, layout = std::move(layout), reason, quiet = std::move(quiet)](const engine::Engine&,
                                                                           Time) {
    quiet_[layout].push_back(quiet);
    follow_up_.push_back(engine::UnregisterLayout{layout, reason});
  });
}

void EngineThread::release_quarantine(std::string node, std::optional<BootId> boot,
                                      std::function<void(const engine::QuarantineReleased&)> done) {
  ask([this, node = std::move(node), boot, done = std::move(done)](const engine::Engine&, Time) {
    const uint64_t call = next_op_id_++;
    releases_.emplace(call, done);
    follow_up_.push_back(engine::ReleaseQuarantine{call, node, boot});
  });
}

void EngineThread::export_now(Duration patience) {
  auto exported = std::make_shared<std::promise<void>>();
  std::future<void> done = exported->get_future();
  ask([this, exported](const engine::Engine&, Time now) {
    next_refresh_ = {};
    refresh_views(now);
    exported->set_value();
  });
  // A scrape of an engine that does not turn shows the last numbers; the watchdog tells of it.
  (void)done.wait_for(patience);
}

EngineThread::RailsView EngineThread::rails_view() const {
  MutexLock lock(view_mutex_);
  return view_;
}

// ---- the loop ----------------------------------------------------------------------------------

void EngineThread::run() {
  // Short sleeps (for timeline words) shall be as short as asked: by default the kernel may add 50
  // us.
  (void)prctl(PR_SET_TIMERSLACK, 1000UL);
  if (Status started = parts_.rails->start(monotonic_now()); !started) {
    ops::log_error("rails not started", {ops::field("error", started.error())});
    MutexLock lock(view_mutex_);
    view_.last_exit = started.error().to_string();
  }
  while (!stop_.load(std::memory_order_acquire)) {
    if (parts_.ticker != nullptr) parts_.ticker->tick(monotonic_now());
    batch_.clear();
    inbox_.drain(kBatch, batch_);
    const Time now = monotonic_now();
    for (Posted& posted : batch_) take(std::move(posted), now);
    take_renewed_keys();
    parts_.rails->poll(monotonic_now(), *this, kBatch);
    send_backlog();
    poll_conditions();
    parts_.metrics->engine_events.add(batch_.size());

    engine_.advance(monotonic_now(), commands_);
    do {
      std::vector<engine::Event> events = std::exchange(follow_up_, {});
      for (engine::Event& event : events) handle(std::move(event));
      engine_.flush(monotonic_now(), commands_);
      execute_all();
    } while (!follow_up_.empty());
    for (const LinkId link : std::exchange(ended_links_, {})) links_.remove(link);
    tell_replies();

    refresh_views(monotonic_now());
    wait();
  }
  let_messages_go();
  parts_.rails->stop();
}

void EngineThread::let_messages_go() {
  const Time until = monotonic_now() + kLastWords;
  while (controls_under_way_ > 0 && monotonic_now() < until) {
    parts_.rails->poll(monotonic_now(), *this, kBatch);
    send_backlog();
    follow_up_.clear();  // the engine takes nothing more
    if (controls_under_way_ == 0 || !parts_.rails->prepare_wait()) continue;
    std::vector<pollfd> fds = parts_.rails->pollfds();
    (void)::poll(fds.data(), fds.size(), 10);
  }
}

void EngineThread::wait() {
  if (stop_.load(std::memory_order_acquire) ||
      !parts_.rails->prepare_wait(backlog_.empty() ? rails::Wake::kWork : rails::Wake::kAny))
    return;
  if (!inbox_.prepare_sleep()) {
    parts_.rails->waited({});
    return;
  }
  Time until = std::min(engine_.next_timer(), parts_.rails->next_wakeup());
  const Time now = monotonic_now();
  Duration sleep = until <= now ? Duration{} : std::min(until - now, kLongestSleep);
  if (!conditions_.empty()) sleep = std::min(sleep, kConditionPoll);
  if (const uint64_t generation = parts_.rails->generation(); generation != polled_generation_) {
    polled_generation_ = generation;
    polled_ = parts_.rails->pollfds();
    polled_.push_back({inbox_.fd(), POLLIN, 0});
  }
  timespec timeout{};
  timeout.tv_sec = static_cast<time_t>(sleep.count() / 1'000'000'000);
  timeout.tv_nsec = static_cast<long>(sleep.count() % 1'000'000'000);
  // An error here is EINTR, as if the time were over; the loop looks again anyway.
  if (ppoll(polled_.data(), polled_.size(), &timeout, nullptr) < 0)
    for (pollfd& entry : polled_) entry.revents = 0;
  inbox_.end_sleep(polled_.back().revents != 0);
  parts_.rails->waited(std::span(polled_).first(polled_.size() - 1));
}

void EngineThread::take(Posted posted, Time now) {
  if (posted.question) {
    posted.question(engine_, now);
    return;
  }
  if (posted.reply) {
    const uint64_t op_id = next_op_id_++;
    std::visit(
        [&](auto& event) {
          if constexpr (requires { event.op.op_id; }) event.op.op_id = op_id;
        },
        posted.event);
    replies_.emplace(op_id, std::move(posted.reply));
  }
  // Questions of this batch may have put events before this one.
  follow_up_.push_back(std::move(posted.event));
}

void EngineThread::handle(engine::Event event) {
  if (const auto* met = std::get_if<engine::ConditionMet>(&event)) events_.erase(met->condition);
  if (const auto* never = std::get_if<engine::ConditionFailed>(&event))
    events_.erase(never->condition);
  if (const auto* up = std::get_if<engine::LinkUp>(&event)) {
    // Its keys come first: the engine's first message needs them. A link that has ended meanwhile
    // has none, and its LinkEnded is on the way; the engine never hears of it.
    const std::optional<link::LinkKeys> keys = parts_.links->keys(up->link);
    if (!keys || links_.contains(up->link)) return;
    links_.add(up->link, *keys);
  }
  if (std::holds_alternative<engine::Drain>(event)) {
    draining_ = true;
    for (auto& [worker, session] : sessions_) session->page().set_draining(true);
  }
  if (const auto* ended = std::get_if<engine::LinkEnded>(&event))
    ended_links_.push_back(ended->link);
  const bool link_up = std::holds_alternative<engine::LinkUp>(event);
  engine_.handle(std::move(event), monotonic_now(), commands_);
  if (link_up && !early_.empty()) take_early();
}

void EngineThread::execute_all() {
  engine::Commands commands = std::exchange(commands_, {});
  for (engine::Command& command : commands)
    std::visit([this](auto& one) { execute(one); }, command);
  parts_.rails->ring();
  commands.clear();
  if (commands_.empty()) commands_ = std::move(commands);  // keep the capacity
}

void EngineThread::poll_conditions() {
  for (auto it = conditions_.begin(); it != conditions_.end();) {
    const auto session = sessions_.find(it->second.worker);
    const std::optional<uint64_t> value =
        session == sessions_.end() ? std::nullopt
                                   : session->second->page().load_timeline(it->second.word);
    if (value && *value >= it->second.value) {
      follow_up_.push_back(engine::ConditionMet{it->first});
      it = conditions_.erase(it);
    } else {
      ++it;
    }
  }
}

// ---- workers -----------------------------------------------------------------------------------

void EngineThread::execute(engine::Reply& command) {
  const auto it = replies_.find(command.op.op_id);
  if (it == replies_.end()) return;
  answers_.emplace_back(std::move(it->second), std::move(command));
  replies_.erase(it);
}

// Last in a round: each may write to a socket, and transfers shall not wait for that.
void EngineThread::tell_replies() {
  for (const auto& [reply, answer] : answers_) reply(answer);
  answers_.clear();
}

void EngineThread::execute(engine::Publish& command) {
  const engine::TransferRecord& from = command.record;
  const bool sender = from.role == engine::Role::kSender;
  if (shown_.insert({command.worker, command.slot}).second) {
    parts_.metrics->transfer_opened(sender ? ops::TransferRole::kSend
                                           : ops::TransferRole::kReceive);
  }
  const auto session = sessions_.find(command.worker);
  if (session == sessions_.end()) return;
  control_page::Record record;
  record.client_handle = from.client_handle;
  record.state = static_cast<uint8_t>(from.state);
  record.role = sender ? 1 : 2;
  record.delivery = static_cast<uint8_t>(static_cast<uint8_t>(from.delivery) + 1);
  record.reason = static_cast<uint16_t>(from.reason);
  record.released_reason = static_cast<uint16_t>(from.released_reason);
  record.slices = from.slices;
  record.bytes_done = from.bytes_done;
  record.bytes_total = from.bytes_total;
  if (from.released)
    record.flags |= sender ? control_page::kSourceReleased : control_page::kDestReleased;
  if (from.state == engine::TransferState::kCompleted) record.flags |= control_page::kCompleted;
  if (from.receiver_ready) record.flags |= control_page::kReceiverReady;
  if (from.memory_in_use) record.flags |= control_page::kMemoryInUse;
  session->second->page().publish(command.slot, record, from.aux);
}

void EngineThread::execute(engine::SetDoneWord& command) {
  const auto session = sessions_.find(command.worker);
  if (session == sessions_.end()) return;
  // Whether the page has such a word was checked when the worker named it.
  (void)session->second->page().store_done(command.word, command.value);
}

void EngineThread::execute(engine::FreeSlot& command) {
  shown_.erase({command.worker, command.slot});
  const auto session = sessions_.find(command.worker);
  if (session != sessions_.end()) session->second->page().free_slot(command.slot);
}

void EngineThread::execute(engine::LayoutQuiet& command) {
  const auto it = quiet_.find(command.layout);
  if (it == quiet_.end()) return;
  std::vector<std::function<void()>> waiting = std::move(it->second);
  quiet_.erase(it);
  for (auto& quiet : waiting) quiet();
}

// ---- directory and copies ----------------------------------------------------------------------

// An answer that is there at once is taken in the same round, unless something waits in the inbox:
// it may be the LinkUp of a link that the answer counts on.
template <typename Answer>
void EngineThread::answered(std::optional<Answer> answer) {
  if (!answer) return;
  if (inbox_.waiting() == 0)
    follow_up_.push_back(std::move(*answer));
  else
    post(std::move(*answer));
}

void EngineThread::execute(engine::Resolve& command) {
  answered(parts_.directory->resolve(command));
}
void EngineThread::execute(engine::ResolvePull& command) {
  answered(parts_.directory->resolve_pull(command));
}
void EngineThread::execute(engine::CancelResolve& command) {
  parts_.directory->cancel_resolve(command);
}
void EngineThread::execute(engine::Compile& command) {
  answered(parts_.directory->compile(command));
}

void EngineThread::execute(engine::CompileCopy& command) {
  answered(parts_.directory->compile(command));
}

void EngineThread::execute(engine::QuarantineReleased& command) {
  if (auto asked = releases_.extract(command.call)) asked.mapped()(command);
}

void EngineThread::execute(engine::TransferEnded& command) {
  using engine::TransferState;
  const bool done =
      command.state == TransferState::kDelivered || command.state == TransferState::kCompleted;
  const auto outcome = done ? ops::TransferOutcome::kDone
                       : command.state == TransferState::kCancelled
                           ? ops::TransferOutcome::kCancelled
                           : ops::TransferOutcome::kFailed;
  const auto role = command.role == engine::Role::kSender ? ops::TransferRole::kSend
                                                          : ops::TransferRole::kReceive;
  parts_.metrics->transfer_ended(role, outcome, command.reason, command.total, command.bytes);
  parts_.metrics->stage(ops::Stage::kWait, command.wait);
  if (command.chunks > 0) {
    const auto chunks = static_cast<int64_t>(command.chunks);
    if (role == ops::TransferRole::kSend)
      parts_.metrics->stage(ops::Stage::kGather, command.gather / chunks);
    else
      parts_.metrics->stage(ops::Stage::kScatter, command.scatter / chunks);
    parts_.metrics->stage(ops::Stage::kWire, command.wire / chunks);
  }
  if (outcome == ops::TransferOutcome::kFailed) {
    ops::log_warning("transfer failed", {ops::field("transfer", command.label),
                                         ops::field("reason", name_of(command.reason))});
  }
}

void EngineThread::execute(engine::Drained&) {
  if (parts_.on_drained) parts_.on_drained();
}

// ---- views -------------------------------------------------------------------------------------

void EngineThread::refresh_views(Time now) {
  if (now < next_refresh_) return;
  next_refresh_ = now + kRefresh;
  for (auto& [worker, session] : sessions_) session->page().tick(now);
  watch_closing_lanes(now);
  drop_early(Time{now.ns - Duration(kEarlyLife).count()});
  RailsView view;
  view.ready = parts_.rails->phase() == rails::RailsClient::Phase::kReady;
  view.restarts = parts_.rails->restarts();
  view.pid = parts_.rails->pid();
  for (uint32_t rail = 0; rail < parts_.rails->rail_count(); ++rail) {
    view.stats.push_back(parts_.rails->stats(rail));
    if (rail >= parts_.metrics->rail_count()) continue;
    ops::RailMetrics& metrics = parts_.metrics->rail(rail);
    metrics.up.set(view.ready ? 1 : 0);
    metrics.sent_bytes.store(view.stats.back().bytes_sent);
    metrics.received_bytes.store(view.stats.back().bytes_received);
    metrics.errors.store(view.stats.back().refused + view.stats.back().dropped);
  }
  parts_.metrics->rails_process_up.set(view.ready ? 1 : 0);
  parts_.metrics->set_rails_pid(view.pid);
  parts_.metrics->rails_process_restarts.store(view.restarts);
  parts_.metrics->engine_queue.set(static_cast<int64_t>(inbox_.waiting()));

  const engine::EngineSnapshot snapshot = engine_.snapshot(now);
  // A worker that is gone frees no slots; its last transfer has ended when the engine shows none.
  std::erase_if(shown_, [&](const auto& slot) {
    return !sessions_.contains(slot.first) &&
           std::none_of(snapshot.transfers.begin(), snapshot.transfers.end(),
                        [&](const auto& transfer) { return transfer.worker == slot.first; });
  });
  using ops::RegionState;
  for (std::size_t i = 0; i < snapshot.arenas.size(); ++i) {
    const engine::ArenaView& seen = snapshot.arenas[i];
    ops::ArenaMetrics& arena = parts_.metrics->arena(i);
    arena.of(RegionState::kFree).set_bytes(seen.free_bytes);
    arena.of(RegionState::kGranted).set_bytes(seen.granted_bytes);
    arena.of(RegionState::kLanding).set_bytes(seen.landing_bytes);
    arena.of(RegionState::kLanded).set_bytes(seen.landed_bytes);
    arena.of(RegionState::kScattering).set_bytes(seen.scattering_bytes);
    arena.of(RegionState::kQuarantined).set_bytes(seen.quarantined_bytes);
    arena.of(RegionState::kStaging).set_bytes(seen.staging_bytes);
    arena.reserved.set_bytes(seen.reserved_bytes);
  }
  parts_.metrics->links.set(static_cast<int64_t>(snapshot.links.size()));
  int64_t up = 0;
  int64_t down = 0;
  for (const engine::LinkView& link : snapshot.links)
    for (const engine::LaneView& lane : link.lanes) ++(lane.up ? up : down);
  parts_.metrics->of(ops::LaneState::kUp).set(up);
  parts_.metrics->of(ops::LaneState::kDown).set(down);
  parts_.metrics->packed_bytes.set_bytes(snapshot.packed_bytes);
  parts_.metrics->packed_copies.set(snapshot.packed_copies);
  parts_.metrics->reuse_entries.set(static_cast<int64_t>(snapshot.reuse_entries));
  parts_.metrics->reuse_pins.set(static_cast<int64_t>(snapshot.reuse_pins));
  parts_.metrics->draining.set(snapshot.draining ? 1 : 0);

  view.send_rates = send_rates(snapshot);
  for (std::size_t i = 0; i < view.send_rates.size() && i < parts_.metrics->rail_count(); ++i)
    parts_.metrics->rail(i).send_rate.set_bytes(view.send_rates[i]);

  export_stats();
  export_gpus();
  MutexLock lock(view_mutex_);
  view.info = std::move(view_.info);
  view.last_exit = std::move(view_.last_exit);
  view.last_status = view_.last_status;
  view.settings = std::move(view_.settings);
  view_ = std::move(view);
}

// Of each rail the speed of its fastest lane: lanes to several peers share a rail, and the fastest
// one is the least held up by others.
std::vector<uint64_t> EngineThread::send_rates(const engine::EngineSnapshot& snapshot) const {
  std::vector<uint64_t> rates(parts_.rails->rail_count());
  for (const engine::LinkView& link : snapshot.links) {
    for (const engine::LaneView& lane : link.lanes) {
      uint64_t& rate = rates[rail_of(lane.lane, rates.size())];
      rate = std::max(rate, lane.rate);
    }
  }
  return rates;
}

void EngineThread::export_gpus() {
  if (parts_.queues == nullptr) return;
  const auto& devices = parts_.queues->devices().all();
  for (std::size_t i = 0; i < devices.size() && i < parts_.metrics->gpu_count(); ++i) {
    ops::GpuMetrics& metrics = parts_.metrics->gpu(i);
    metrics.up.set(devices[i]->down() ? 0 : 1);
    const gpu::CopyQueue* const queue = parts_.queues->of(*devices[i]);
    if (queue == nullptr) continue;
    const gpu::CopyQueue::Stats& stats = queue->stats();
    for (std::size_t kind = 0; kind < ops::kGpuCopyKinds; ++kind) {
      metrics.copies[kind].store(stats.jobs[kind].load(std::memory_order_relaxed));
      metrics.bytes[kind].store(stats.bytes[kind].load(std::memory_order_relaxed));
    }
    metrics.failed.store(stats.failed.load(std::memory_order_relaxed));
    metrics.refused.store(stats.refused.load(std::memory_order_relaxed));
    metrics.plan_bytes.store(stats.upload_bytes.load(std::memory_order_relaxed));
    metrics.outstanding.set_bytes(stats.outstanding.load(std::memory_order_relaxed));
  }
}

// The engine counts, the metrics show its totals.
void EngineThread::export_stats() {
  const engine::EngineStats& stats = engine_.stats();
  ops::Metrics& metrics = *parts_.metrics;
  metrics.of(ops::ByteDirection::kSent).store(stats.bytes_sent);
  metrics.of(ops::ByteDirection::kReceived).store(stats.bytes_received);
  metrics.of(ops::ChunkEvent::kGathered).store(stats.chunks_gathered);
  metrics.of(ops::ChunkEvent::kShared).store(stats.chunks_shared);
  metrics.of(ops::ChunkEvent::kOffered).store(stats.offers_sent);
  metrics.of(ops::ChunkEvent::kAccepted).store(stats.offers_accepted);
  metrics.of(ops::ChunkEvent::kRefused).store(stats.offers_refused);
  metrics.of(ops::ChunkEvent::kAcked).store(stats.chunks_acked);
  metrics.of(ops::ChunkEvent::kRequeued).store(stats.chunks_requeued);
  metrics.of(ops::ChunkEvent::kDropped).store(stats.offers_dropped);
  metrics.of(ops::ChunkEvent::kLanded).store(stats.chunks_landed);
  metrics.of(ops::ChunkEvent::kScattered).store(stats.chunks_scattered);
  metrics.of(ops::ChunkEvent::kCorrupt).store(stats.chunks_corrupt);
  metrics.of(ops::ChunkEvent::kWritten).store(stats.chunks_written);
  metrics.of(ops::ChunkEvent::kMapped).store(stats.chunks_mapped);
  metrics.of(ops::Evidence::kDrained).store(stats.regions_drained);
  metrics.of(ops::Evidence::kProcess).store(stats.regions_proven);
  metrics.of(ops::Evidence::kOperator).store(stats.regions_released);
  metrics.of(ops::CreditEvent::kGranted).store(stats.credits_granted);
  metrics.of(ops::CreditEvent::kSpent).store(stats.credits_ended - stats.credits_withdrawn);
  metrics.of(ops::CreditEvent::kWithdrawn).store(stats.credits_withdrawn);
  metrics.credits_live.set_bytes(stats.credits_granted - stats.credits_ended);
  metrics.fragments(ops::TransferRole::kSend).store(stats.fragments_sent);
  metrics.fragments(ops::TransferRole::kReceive).store(stats.fragments_received);
  metrics.leases_expired.store(stats.leases_expired);
  metrics.of(ops::Fallback::kMappedArena).store(stats.mapped_unused);
  const copy::Stats& copies = parts_.copies->stats();
  metrics.copies_outstanding.set_bytes(copies.outstanding.load(std::memory_order_relaxed));
  metrics.copy_busy_ns.store(copies.busy_ns.load(std::memory_order_relaxed));
  metrics.control_resyncs.store(stats.resyncs);
  metrics.lane_downs.store(stats.lane_downs);
  metrics.links_lost.store(stats.links_lost);
  metrics.quarantines.store(stats.quarantines);
  metrics.of(ops::ByteDirection::kLocal).store(stats.reuse_bytes + stats.bytes_local);
  metrics.packed_made.store(stats.packed_made);
  metrics.packed_refused.store(stats.packed_refused);
  metrics.reuse_commits.store(stats.reuse_commits);
  metrics.reuse_blocks.store(stats.reuse_blocks);
  metrics.reuse_lookups.store(stats.reuse_lookups);
  metrics.reuse_lookup_hits.store(stats.reuse_lookup_hits);
  metrics.reuse_withdrawn.store(stats.reuse_withdrawn);
  metrics.reuse_evicted.store(stats.reuse_evicted);
  using engine::DropCause;
  const auto dropped = [&](DropCause cause) {
    return stats.dropped[static_cast<std::size_t>(cause)];
  };
  metrics.of(ops::DropCause::kOldEpoch).store(dropped(DropCause::kOldEpoch));
  metrics.of(ops::DropCause::kUnknownLink).store(dropped(DropCause::kUnknownLink) + unknown_links_);
  metrics.of(ops::DropCause::kUnknownPull).store(dropped(DropCause::kUnknownPull));
  metrics.of(ops::DropCause::kDuplicate).store(dropped(DropCause::kDuplicate));
  metrics.of(ops::DropCause::kProtocol).store(dropped(DropCause::kProtocol));
  metrics.of(ops::DropCause::kProof).store(dropped(DropCause::kProof));
  metrics.of(ops::DropCause::kLimit).store(dropped(DropCause::kLimit));
  metrics.of(ops::DropCause::kLate).store(dropped(DropCause::kLate));
}

}  // namespace kvferry::node
