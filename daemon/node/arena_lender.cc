#include "daemon/node/arena_lender.h"

#include <fcntl.h>

#include <algorithm>
#include <set>
#include <utility>

#include "daemon/base/crypto.h"
#include "daemon/base/seqpacket.h"
#include "daemon/node/arena_lender_loop.h"

namespace kvferry::node {
namespace {

tl::unexpected<Error> bad_config(const std::string& field, const std::string& message) {
  return invalid(field, "LENDER_CONFIG", message);
}

Status check_arena(const LentArena& arena, const std::string& field) {
  if (arena.segments.empty() || arena.segments.size() > rpc::kMaxLentSegments)
    return bad_config(field + ".segments", "a lent arena has 1 to 64 segments");
  for (std::size_t i = 0; i < arena.segments.size(); ++i) {
    const LentArena::Segment& segment = arena.segments[i];
    if (segment.bytes == 0 || segment.number != arena.segments.front().number + i)
      return bad_config(field + ".segments", "segments have bytes and consecutive numbers");
    if (rpc::has_descriptors(arena.kind) && segment.fd < 0)
      return bad_config(field + ".segments", "a segment of this kind has a descriptor");
  }
  return {};
}

Status check(const ArenaLenderConfig& config, const std::vector<LentArena>& arenas) {
  if (!config.socket_path.empty() &&
      (config.socket_path.front() != '/' || config.socket_path.size() > kMaxSocketPathBytes))
    return bad_config("socket_path", "an absolute path of at most 107 bytes");
  if (arenas.size() > rpc::kMaxLentArenas)
    return bad_config("arenas", "at most 64 arenas can be lent");
  std::set<uint32_t> numbers;
  for (const LentArena& arena : arenas) {
    const std::string field = "arenas[" + std::to_string(numbers.size()) + "]";
    KVFERRY_RETURN_IF_ERROR(check_arena(arena, field));
    if (!numbers.insert(arena.number).second)
      return bad_config(field + ".number", "two arenas have this number");
  }
  return {};
}

}  // namespace

rpc::HostId this_host() {
  rpc::HostId host;
  char text[64] = {};
  const UniqueFd fd(::open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC));
  const ssize_t got = fd ? ::read(fd.get(), text, sizeof text) : -1;
  std::string hex(text, got > 0 ? static_cast<std::size_t>(got) : 0);
  std::erase_if(hex, [](char c) { return c == '-' || c == '\n'; });
  if (!from_hex(hex, host.bytes)) host = {};
  return host;
}

ArenaLender::ArenaLender(ArenaLenderConfig config, std::vector<LentArena> arenas, EventSink sink)
    : config_(std::move(config)), arenas_(std::move(arenas)), sink_(std::move(sink)) {}

Result<std::unique_ptr<ArenaLender>> ArenaLender::start(ArenaLenderConfig config,
                                                        std::vector<LentArena> arenas,
                                                        EventSink sink) {
  KVFERRY_RETURN_IF_ERROR(check(config, arenas));
  std::sort(arenas.begin(), arenas.end(),
            [](const LentArena& a, const LentArena& b) { return a.number < b.number; });
  std::unique_ptr<ArenaLender> lender(
      new ArenaLender(std::move(config), std::move(arenas), std::move(sink)));
  if (lender->config_.socket_path.empty()) return lender;
  lender->loop_ = std::make_unique<Loop>(*lender);
  KVFERRY_RETURN_IF_ERROR(lender->loop_->start());
  return lender;
}

ArenaLender::~ArenaLender() {
  stop();
}

void ArenaLender::stop() {
  if (loop_ != nullptr) loop_->stop();
}

rpc::ArenasOffer ArenaLender::offer(const PeerRef& peer, const rpc::ArenasQuery& query) {
  const bool same_host = !query.host.is_zero() && query.host == config_.host;
  rpc::ArenasOffer out;
  out.host = config_.host;
  // Without a socket there would be no evidence of the peer's end, which on this host there can be.
  if (same_host && loop_ == nullptr) return out;
  for (const LentArena& arena : arenas_) {
    if (rpc::needs_same_host(arena.kind) && !same_host) continue;
    rpc::OfferedArena& to = out.arenas.emplace_back();
    to.number = arena.number;
    to.kind = arena.kind;
    to.device_uuid = arena.device_uuid;
    for (const LentArena::Segment& segment : arena.segments)
      to.segments.push_back({segment.number, segment.bytes, segment.handle});
  }
  MutexLock lock(mutex_);
  const auto link = links_.find(peer.link);
  if (link == links_.end()) out.arenas.clear();
  if (out.arenas.empty()) return out;
  if (same_host) {
    // One for the link's life: an answer that is asked for again must be the same one.
    if (link->second.token.is_zero()) random_bytes(link->second.token.bytes);
    link->second.proof = query.proof;
    out.socket_path = config_.socket_path;
    out.token = link->second.token;
    // The engine hears of these arenas when the token is shown: before, the peer's end would not be
    // seen here.
    return out;
  }
  // With this answer the peer has all that it takes.
  for (const rpc::OfferedArena& arena : out.arenas) tell_lent(link->second, arena.number);
  return out;
}

void ArenaLender::tell_lent(Link& link, uint32_t arena) {
  if (link.lent.insert(arena).second) sink_(engine::ArenaLent{link.peer.link, arena});
}

void ArenaLender::tell_lent(LinkId id) {
  MutexLock lock(mutex_);
  // Under the lock: never after the link's end has been seen here.
  const auto link = links_.find(id);
  if (link == links_.end()) return;
  for (const LentArena& arena : arenas_) tell_lent(link->second, arena.number);
}

void ArenaLender::on_link_up(const PeerRef& peer, engine::CheckKind) {
  MutexLock lock(mutex_);
  links_[peer.link].peer = peer;
}

void ArenaLender::on_link_gone(LinkId link) {
  {
    MutexLock lock(mutex_);
    links_.erase(link);
  }
  if (loop_ != nullptr) loop_->wake();
}

bool ArenaLender::take_token(const Token& token, PeerRef& peer, rpc::WelcomeProof& proof) {
  MutexLock lock(mutex_);
  // Every token is compared, so the time tells neither whether nor where one matched.
  Link* found = nullptr;
  for (auto& [id, link] : links_)
    if (equal_constant_time(link.token.span(), token.span()) && !link.token.is_zero())
      found = &link;
  if (found == nullptr || found->used) return false;
  found->used = true;
  peer = found->peer;
  proof = found->proof;
  return true;
}

bool ArenaLender::is_up(LinkId link) const {
  MutexLock lock(mutex_);
  return links_.contains(link);
}

bool ArenaLender::watches(const std::string& node, const std::optional<BootId>& boot) const {
  MutexLock lock(mutex_);
  return std::any_of(watched_.begin(), watched_.end(), [&](const Life& life) {
    return (node.empty() || life.first == node) && (!boot || life.second == *boot);
  });
}

ArenaLender::Stats ArenaLender::stats() const {
  MutexLock lock(mutex_);
  return stats_;
}

}  // namespace kvferry::node
