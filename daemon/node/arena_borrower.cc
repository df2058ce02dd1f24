#include "daemon/node/arena_borrower.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/base/mutex.h"
#include "daemon/base/unique_fd.h"
#include "daemon/node/arena_import.h"
#include "daemon/node/task_pool.h"
#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

constexpr Duration kAskAgainFirst = std::chrono::milliseconds(20);
constexpr Duration kAskAgainMost = std::chrono::seconds(1);

// Errors that may pass: the peer that dialled does not know the link yet, is busy, or does not
// answer.
bool may_pass(const Error& error) {
  return (error.code == Code::kUnavailable && error.reason != "LINK_DOWN") ||
         error.code == Code::kDeadlineExceeded || error.code == Code::kResourceExhausted ||
         error.reason == "UNKNOWN_LINK";
}

}  // namespace

class ArenaBorrower::Impl : public std::enable_shared_from_this<ArenaBorrower::Impl> {
 public:
  Impl(ArenaBorrowerConfig config, ArenaCalls& calls, EventSink sink)
      : config_(std::move(config)),
        calls_(calls),
        sink_(std::move(sink)),
        stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        // Tasks are bounded by links and arenas; one that unmaps must find its place.
        pool_("kvf-borrow", 2, std::numeric_limits<std::size_t>::max()) {
    KVFERRY_CHECK(static_cast<bool>(stop_), "there is a descriptor for an eventfd at start");
  }

  void link_up(const PeerRef& peer, engine::CheckKind check) KVFERRY_EXCLUDES(mutex_);
  void link_gone(LinkId link) KVFERRY_EXCLUDES(mutex_);
  void distrust(LinkId link, uint32_t arena) KVFERRY_EXCLUDES(mutex_);
  void stop() KVFERRY_EXCLUDES(mutex_);
  std::shared_ptr<const Segments> segments(LinkId link, uint32_t arena) const
      KVFERRY_EXCLUDES(mutex_);
  Stats stats() const;

 private:
  struct Link {
    PeerRef peer;
    engine::CheckKind check = engine::CheckKind::kNone;
    Time ask_until;
    Duration ask_again = kAskAgainFirst;
    std::map<uint32_t, std::shared_ptr<const Segments>> arenas;
  };
  // An arena of one life of a peer.
  struct Distrusted {
    std::string node;
    BootId boot;
    uint32_t arena = 0;
    bool operator==(const Distrusted&) const = default;
  };
  struct Counters {
    std::atomic<uint64_t> failed_gather{0};
    std::atomic<uint64_t> mapped{0};
    std::atomic<uint64_t> failed_ask{0};
    std::atomic<uint64_t> failed_socket{0};
    std::atomic<uint64_t> failed_device{0};
    std::atomic<uint64_t> failed_import{0};
    std::atomic<uint64_t> skipped_check{0};
  };

  bool is_distrusted(const PeerRef& peer, uint32_t arena) const KVFERRY_REQUIRES(mutex_);
  void ask(LinkId link) KVFERRY_EXCLUDES(mutex_);
  void answered(LinkId link, Result<rpc::ArenasOffer> offer) KVFERRY_EXCLUDES(mutex_);
  void not_answered(LinkId link, const Error& error) KVFERRY_EXCLUDES(mutex_);
  void import(LinkId link, const rpc::ArenasOffer& offer) KVFERRY_EXCLUDES(mutex_);
  void import_arena(LinkId link, const PeerRef& peer, const rpc::OfferedArena& arena,
                    bool same_host, std::vector<UniqueFd> descriptors,
                    const std::shared_ptr<LenderSession>& session) KVFERRY_EXCLUDES(mutex_);
  // Counts it from now on, and has it unmapped by one of the threads when its last user has gone.
  std::shared_ptr<const BorrowedMemory> own(std::unique_ptr<BorrowedMemory> memory);

  const ArenaBorrowerConfig config_;
  ArenaCalls& calls_;
  const EventSink sink_;
  const UniqueFd stop_;
  const std::shared_ptr<BorrowedMemory::Gauges> gauges_ =
      std::make_shared<BorrowedMemory::Gauges>();
  Counters counters_;
  mutable Mutex mutex_;
  bool stopped_ KVFERRY_GUARDED_BY(mutex_) = false;
  std::map<LinkId, Link> links_ KVFERRY_GUARDED_BY(mutex_);
  std::deque<Distrusted> distrusted_ KVFERRY_GUARDED_BY(mutex_);  // the oldest first
  TaskPool pool_;
};

void ArenaBorrower::Impl::link_up(const PeerRef& peer, engine::CheckKind check) {
  MutexLock lock(mutex_);
  if (stopped_) return;
  Link& link = links_[peer.link];
  link.peer = peer;
  link.check = check;
  link.ask_until = monotonic_now() + config_.ask_limit;
  (void)pool_.post([self = shared_from_this(), id = peer.link] { self->ask(id); });
}

void ArenaBorrower::Impl::link_gone(LinkId id) {
  std::map<LinkId, Link>::node_type gone;
  MutexLock lock(mutex_);
  gone = links_.extract(id);
  // Its arenas are let go after the lock, which is a post to the pool at most.
}

bool ArenaBorrower::Impl::is_distrusted(const PeerRef& peer, uint32_t arena) const {
  const Distrusted wanted{peer.node, peer.boot, arena};
  return std::find(distrusted_.begin(), distrusted_.end(), wanted) != distrusted_.end();
}

void ArenaBorrower::Impl::distrust(LinkId id, uint32_t arena) {
  PeerRef peer;
  std::shared_ptr<const Segments> gone;  // let go after the lock
  {
    MutexLock lock(mutex_);
    const auto link = links_.find(id);
    if (link == links_.end()) return;
    const auto found = link->second.arenas.find(arena);
    if (found == link->second.arenas.end()) return;
    gone = std::move(found->second);
    link->second.arenas.erase(found);
    peer = link->second.peer;
    if (!is_distrusted(peer, arena)) distrusted_.push_back({peer.node, peer.boot, arena});
    if (distrusted_.size() > config_.max_distrusted) distrusted_.pop_front();
  }
  counters_.failed_gather.fetch_add(1);
  ops::log_warning("arena of a peer not borrowed any more",
                   {ops::field("node", peer.node), ops::field("arena", arena),
                    ops::field("reason", "a gather into it failed")});
}

std::shared_ptr<const Segments> ArenaBorrower::Impl::segments(LinkId id, uint32_t arena) const {
  MutexLock lock(mutex_);
  const auto link = links_.find(id);
  if (link == links_.end()) return nullptr;
  const auto found = link->second.arenas.find(arena);
  return found == link->second.arenas.end() ? nullptr : found->second;
}

void ArenaBorrower::Impl::stop() {
  std::map<LinkId, Link> links;
  {
    MutexLock lock(mutex_);
    stopped_ = true;
    links.swap(links_);
  }
  const uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof one);
  links.clear();
  // What waits to be unmapped goes with its task.
  pool_.stop();
}

// ---- asking ------------------------------------------------------------------------------------

void ArenaBorrower::Impl::ask(LinkId id) {
  {
    MutexLock lock(mutex_);
    if (!links_.contains(id)) return;
  }
  calls_.get_arenas(id, {config_.host}, monotonic_now() + config_.call_timeout,
                    [self = shared_from_this(), id](Result<rpc::ArenasOffer> offer) {
                      self->answered(id, std::move(offer));
                    });
}

// On a thread of the transport.
void ArenaBorrower::Impl::answered(LinkId id, Result<rpc::ArenasOffer> offer) {
  if (!offer) return not_answered(id, offer.error());
  auto kept = std::make_shared<rpc::ArenasOffer>(std::move(*offer));
  (void)pool_.post([self = shared_from_this(), id, kept] { self->import(id, *kept); });
}

void ArenaBorrower::Impl::not_answered(LinkId id, const Error& error) {
  PeerRef peer;
  {
    MutexLock lock(mutex_);
    const auto it = links_.find(id);
    if (it == links_.end()) return;
    Link& link = it->second;
    peer = link.peer;
    const Time again = monotonic_now() + link.ask_again;
    link.ask_again = std::min(2 * link.ask_again, kAskAgainMost);
    if (may_pass(error) && again < link.ask_until &&
        pool_.post_at(again, [self = shared_from_this(), id] { self->ask(id); }))
      return;
  }
  // An older release, which is no fault.
  const auto level =
      error.code == Code::kUnimplemented ? ops::LogLevel::kInfo : ops::LogLevel::kWarning;
  ops::log_line(level, "peer does not tell what it lends",
                {ops::field("node", peer.node), ops::field("error", error)});
  counters_.failed_ask.fetch_add(1);
}

// ---- importing ---------------------------------------------------------------------------------

void ArenaBorrower::Impl::import(LinkId id, const rpc::ArenasOffer& offer) {
  PeerRef peer;
  engine::CheckKind check{};
  {
    MutexLock lock(mutex_);
    const auto link = links_.find(id);
    if (link == links_.end()) return;
    peer = link->second.peer;
    check = link->second.check;
  }
  if (offer.arenas.empty())
    return ops::log_info("peer lends no arenas", {ops::field("node", peer.node)});
  const bool same_host = !config_.host.is_zero() && offer.host == config_.host;
  ArenaDescriptors descriptors;
  std::shared_ptr<LenderSession> session;
  if (same_host && offer.socket_path.empty()) {
    // Nor what needs no descriptor: the lender would not see this process end.
    ops::log_warning("arenas of a peer not mapped",
                     {ops::field("node", peer.node), ops::field("reason", "it has no socket")});
    counters_.failed_socket.fetch_add(1);
    return;
  }
  if (same_host) {
    auto opened = LenderSession::open(offer, monotonic_now() + config_.socket_timeout, stop_.get(),
                                      descriptors);
    if (!opened) {
      // As above.
      ops::log_warning("arenas of a peer not mapped",
                       {ops::field("node", peer.node), ops::field("error", opened.error())});
      counters_.failed_socket.fetch_add(1);
      return;
    }
    session = std::move(*opened);
  }
  std::string reason = "they are of another host";
  bool tried = false;
  for (const rpc::OfferedArena& arena : offer.arenas) {
    // A lender says these to askers on its host only.
    if (rpc::needs_same_host(arena.kind) && session == nullptr) continue;
    if (arena.kind != rpc::LentKind::kHostMemfd && check != engine::CheckKind::kNone) {
      counters_.skipped_check.fetch_add(1);
      reason = "the processor computes checks";
      continue;
    }
    tried = true;
    import_arena(id, peer, arena, same_host, std::move(descriptors[arena.number]), session);
  }
  if (!tried)
    ops::log_info("peer lends no arena that can be mapped here",
                  {ops::field("node", peer.node), ops::field("reason", reason)});
}

void ArenaBorrower::Impl::import_arena(LinkId id, const PeerRef& peer,
                                       const rpc::OfferedArena& arena, bool same_host,
                                       std::vector<UniqueFd> descriptors,
                                       const std::shared_ptr<LenderSession>& session) {
  {
    MutexLock lock(mutex_);
    if (!links_.contains(id) || is_distrusted(peer, arena.number)) return;
  }
  const auto kind = rpc::name_of(arena.kind);
  auto mapped = map_arena(arena, same_host, std::move(descriptors), config_.devices.get());
  if (!mapped) {
    const bool device = mapped.error().reason == "DEVICE_NOT_VISIBLE" ||
                        mapped.error().reason == "GPU_DOWN" ||
                        mapped.error().reason == "NO_PEER_ACCESS";
    ops::log_line(device ? ops::LogLevel::kInfo : ops::LogLevel::kWarning,
                  "arena of a peer not mapped",
                  {ops::field("node", peer.node), ops::field("arena", arena.number),
                   ops::field("kind", kind), ops::field("error", mapped.error())});
    (device ? counters_.failed_device : counters_.failed_import).fetch_add(1);
    return;
  }
  (*mapped)->session = session;
  const uint64_t bytes = (*mapped)->bytes;
  const auto segments = segments_of(arena, own(std::move(*mapped)));
  {
    MutexLock lock(mutex_);
    const auto link = links_.find(id);
    if (link == links_.end()) return;
    link->second.arenas[arena.number] = segments;
    counters_.mapped.fetch_add(1);
    // Under the lock: never after the link's end has been seen here.
    sink_(engine::ArenaMapped{id, arena.number});
  }
  ops::log_info("arena of a peer mapped",
                {ops::field("node", peer.node), ops::field("arena", arena.number),
                 ops::field("kind", kind), ops::field("bytes", bytes)});
}

std::shared_ptr<const BorrowedMemory> ArenaBorrower::Impl::own(
    std::unique_ptr<BorrowedMemory> memory) {
  memory->gauges = gauges_;
  gauges_->arenas.fetch_add(1);
  gauges_->bytes.fetch_add(memory->bytes);
  return {memory.release(), [self = shared_from_this()](BorrowedMemory* last) {
            // Whoever is last may be the engine, or hold a lock. Where the pool has stopped it goes
            // here and now.
            auto kept = std::shared_ptr<BorrowedMemory>(last);
            (void)self->pool_.post([kept = std::move(kept)] { /* goes with its task */ });
          }};
}

ArenaBorrower::Stats ArenaBorrower::Impl::stats() const {
  Stats out;
  out.arenas = gauges_->arenas.load();
  out.bytes = gauges_->bytes.load();
  out.stuck = gauges_->stuck.load();
  out.mapped = counters_.mapped.load();
  out.failed_ask = counters_.failed_ask.load();
  out.failed_socket = counters_.failed_socket.load();
  out.failed_device = counters_.failed_device.load();
  out.failed_import = counters_.failed_import.load();
  out.failed_gather = counters_.failed_gather.load();
  out.skipped_check = counters_.skipped_check.load();
  return out;
}

// ---- the public functions ----------------------------------------------------------------------

ArenaBorrower::ArenaBorrower(ArenaBorrowerConfig config, ArenaCalls& calls, EventSink sink)
    : impl_(std::make_shared<Impl>(std::move(config), calls, std::move(sink))) {}

ArenaBorrower::~ArenaBorrower() {
  stop();
}

void ArenaBorrower::stop() {
  impl_->stop();
}

void ArenaBorrower::on_link_up(const PeerRef& peer, engine::CheckKind check) {
  impl_->link_up(peer, check);
}

void ArenaBorrower::on_link_gone(LinkId link) {
  impl_->link_gone(link);
}

void ArenaBorrower::distrust(LinkId link, uint32_t arena) {
  impl_->distrust(link, arena);
}

std::shared_ptr<const Segments> ArenaBorrower::segments(LinkId link, uint32_t arena) const {
  return impl_->segments(link, arena);
}

ArenaBorrower::Stats ArenaBorrower::stats() const {
  return impl_->stats();
}

}  // namespace kvferry::node
