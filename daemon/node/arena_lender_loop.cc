#include "daemon/node/arena_lender_loop.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "daemon/base/seqpacket.h"

namespace kvferry::node {
namespace {

template <typename T>
bool parse(std::span<const std::byte> bytes, wire::Type type, T& out) {
  if (bytes.size() != sizeof(T)) return false;
  std::memcpy(&out, bytes.data(), sizeof(T));
  return out.magic == wire::kMagic && out.type == type;
}

}  // namespace

Status ArenaLender::Loop::start() {
  wake_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_) return fail_errno("LENDER_FAILED", "eventfd", errno);
  spare_ = spare_descriptor();
  auto listener =
      listen_seqpacket(owner_.config_.socket_path, owner_.config_.socket_mode, "LENDER_FAILED");
  KVFERRY_RETURN_IF_ERROR(listener);
  listener_ = std::move(*listener);
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "kvf-lend");
  return {};
}

void ArenaLender::Loop::stop() {
  stopping_.store(true);
  if (!thread_.joinable()) return;
  wake();
  thread_.join();
}

void ArenaLender::Loop::wake() {
  const uint64_t one = 1;
  // Can only fail when the counter is full, and then the thread is awake.
  (void)!::write(wake_.get(), &one, sizeof one);
}

void ArenaLender::Loop::run() {
  while (!stopping_.load()) {
    std::vector<pollfd> polled{{wake_.get(), POLLIN, 0}, {listener_.get(), POLLIN, 0}};
    std::vector<uint64_t> keys;
    std::vector<Life> lives;
    for (const auto& [key, connection] : connections_) {
      keys.push_back(key);
      polled.push_back({connection.fd.get(), POLLIN | POLLRDHUP, 0});
    }
    for (const auto& [life, process] : processes_) {
      lives.push_back(life);
      polled.push_back({process.pidfd.get(), POLLIN, 0});
    }
    if (::poll(polled.data(), polled.size(), next_timeout_ms(monotonic_now())) < 0) continue;
    if (polled[0].revents != 0) {
      uint64_t count = 0;
      (void)!::read(wake_.get(), &count, sizeof count);
    }
    for (std::size_t i = 0; i < keys.size(); ++i)
      if (polled[2 + i].revents != 0) read_one(keys[i]);
    for (std::size_t i = 0; i < lives.size(); ++i)
      if ((polled[2 + keys.size() + i].revents & POLLIN) != 0) process_gone(lives[i]);
    if (polled[1].revents != 0) accept_some();
    settle_unmapped();
    expire(monotonic_now());
    publish();
  }
  listener_.reset();
  ::unlink(owner_.config_.socket_path.c_str());
  connections_.clear();
  processes_.clear();
  publish();
}

int ArenaLender::Loop::next_timeout_ms(Time now) const {
  Time next = now + std::chrono::minutes(1);
  for (const auto& [key, connection] : connections_)
    if (!connection.peer) next = std::min(next, connection.show_by);
  // Rounded up, so that the thread does not wake a moment too early again and again.
  return next <= now ? 0 : static_cast<int>((next - now).count() / 1000000 + 1);
}

void ArenaLender::Loop::accept_some() {
  for (int i = 0; i < 16; ++i) {
    Connection connection;
    connection.fd = accept_connection(listener_.get(), spare_);
    if (!connection.fd) return;
    const uint64_t key = next_key_++;
    ucred credentials{};
    socklen_t length = sizeof credentials;
    const bool known =
        ::getsockopt(connection.fd.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0;
    if (known) {
      connection.pid = credentials.pid;
      connection.pidfd = peer_process(connection.fd.get(), credentials.pid);
    }
    connection.show_by = monotonic_now() + owner_.config_.token_timeout;
    const bool pidfd = static_cast<bool>(connection.pidfd);
    const auto unproven =
        std::count_if(connections_.begin(), connections_.end(),
                      [](const auto& entry) { return !entry.second.peer.has_value(); });
    const bool full = connections_.size() >= owner_.config_.max_connections ||
                      unproven >= static_cast<std::ptrdiff_t>(owner_.config_.max_unproven);
    connections_.emplace(key, std::move(connection));
    if (full)
      refuse(key, "too many connections");
    else if (!pidfd)
      // Nobody would see it end, and what it had been given would never be free again.
      refuse(key, "the kernel does not show the process");
  }
}

void ArenaLender::Loop::read_one(uint64_t key) {
  // An earlier event of the same round may have ended it.
  const auto it = connections_.find(key);
  if (it == connections_.end()) return;
  Connection& connection = it->second;
  std::byte buffer[wire::kReadBytes];
  std::size_t bytes = 0;
  std::vector<UniqueFd> fds;
  switch (receive_message(connection.fd.get(), buffer, bytes, fds)) {
    case Received::kNothing:
      return;
    case Received::kClosed:
      // No evidence: writes of a GPU may outlive it. The process is watched on.
      if (!connection.peer) return refuse(key, "closed before a token came");
      connections_.erase(it);
      return;
    case Received::kBroken:
      return refuse(key, "a message of no kind that is known");
    case Received::kMessage:
      break;
  }
  const auto message = std::span<const std::byte>(buffer).first(bytes);
  wire::Show show;
  wire::Unmapped unmapped;
  const char* reason = "a message of no kind that is known";
  if (fds.empty() && !connection.peer && parse(message, wire::Type::kShow, show))
    reason = on_show(connection, show);
  else if (fds.empty() && connection.peer && parse(message, wire::Type::kUnmapped, unmapped))
    return on_unmapped(key);
  if (reason != nullptr) refuse(key, reason);
}

ArenaLender::Loop::Process* ArenaLender::Loop::process_of(Connection& connection,
                                                          const Life& life) {
  struct stat file {};
  if (::fstat(connection.pidfd.get(), &file) != 0) return nullptr;
  const auto known = processes_.find(life);
  if (known != processes_.end()) {
    // Since Linux 6.9 the inode names the process. Before, it is the same for all, and the pid
    // does: it is not used again while the first process lives, whose end is looked at in each
    // round.
    const bool same = known->second.inode == file.st_ino && known->second.pid == connection.pid;
    return same ? &known->second : nullptr;
  }
  if (processes_.size() >= owner_.config_.max_processes) return nullptr;
  Process& process = processes_[life];
  process.pidfd = std::move(connection.pidfd);
  process.pid = connection.pid;
  process.inode = file.st_ino;
  MutexLock lock(owner_.mutex_);
  owner_.watched_.insert(life);
  return &process;
}

const char* ArenaLender::Loop::on_show(Connection& connection, const wire::Show& show) {
  Token token;
  std::memcpy(token.bytes.data(), show.token, sizeof show.token);
  PeerRef peer;
  rpc::WelcomeProof proof;
  if (!owner_.take_token(token, peer, proof)) return "not a token that is good now";
  Process* const process = process_of(connection, {peer.node, peer.boot});
  if (process == nullptr) return "another process of that daemon, or too many";
  if (process->links.size() >= owner_.config_.max_links_of_process)
    return "that process has not unmapped what it got over too many links";
  // Before the first descriptor leaves: from here on there is something to be evident.
  process->links[peer.link] = false;
  connection.pidfd.reset();
  connection.peer = peer;
  owner_.tell_lent(peer.link);
  if (!hand_out(connection.fd.get(), proof)) return "it does not take its descriptors";
  ops::log_info("arenas lent", {ops::field("node", peer.node), ops::field("link", peer.link.value),
                                ops::field("pid", process->pid)});
  MutexLock lock(owner_.mutex_);
  ++owner_.stats_.handed_out;
  return nullptr;
}

bool ArenaLender::Loop::hand_out(int fd, const rpc::WelcomeProof& proof) const {
  wire::Welcome welcome;
  std::memcpy(welcome.proof, proof.bytes.data(), sizeof welcome.proof);
  for (const LentArena& arena : owner_.arenas_)
    if (rpc::has_descriptors(arena.kind)) ++welcome.arenas;
  if (!send_message(fd, &welcome, sizeof welcome)) return false;
  for (const LentArena& arena : owner_.arenas_) {
    if (!rpc::has_descriptors(arena.kind)) continue;
    wire::Descriptors message;
    message.arena = arena.number;
    message.count = static_cast<uint32_t>(arena.segments.size());
    std::vector<int> fds;
    for (const LentArena::Segment& segment : arena.segments) fds.push_back(segment.fd);
    if (!send_message(fd, &message, sizeof message, fds)) return false;
  }
  return true;
}

void ArenaLender::Loop::on_unmapped(uint64_t key) {
  auto node = connections_.extract(key);
  const PeerRef& peer = *node.mapped().peer;
  if (const auto process = processes_.find({peer.node, peer.boot}); process != processes_.end())
    process->second.links.at(peer.link) = true;
}

void ArenaLender::Loop::refuse(uint64_t key, const char* reason) {
  const auto node = connections_.extract(key);
  if (refusals_.allow(monotonic_now()))
    ops::log_warning("connection for lent arenas ended",
                     {ops::field("reason", reason), ops::field("pid", node.mapped().pid),
                      ops::field("suppressed", refusals_.suppressed())});
  MutexLock lock(owner_.mutex_);
  ++owner_.stats_.refused;
}

void ArenaLender::Loop::expire(Time now) {
  std::vector<uint64_t> late;
  for (const auto& [key, connection] : connections_)
    if (!connection.peer && connection.show_by <= now) late.push_back(key);
  for (const uint64_t key : late) refuse(key, "no token came in time");
}

void ArenaLender::Loop::process_gone(const Life& life) {
  processes_.erase(life);
  std::erase_if(connections_, [&](const auto& entry) {
    return entry.second.peer && entry.second.peer->node == life.first &&
           entry.second.peer->boot == life.second;
  });
  {
    MutexLock lock(owner_.mutex_);
    ++owner_.stats_.processes_gone;
  }
  owner_.sink_(engine::PeerProcessGone{life.second, life.first});
}

void ArenaLender::Loop::settle_unmapped() {
  for (auto process = processes_.begin(); process != processes_.end();) {
    auto& links = process->second.links;
    for (auto link = links.begin(); link != links.end();) {
      if (!link->second || owner_.is_up(link->first)) {
        ++link;
        continue;
      }
      {
        MutexLock lock(owner_.mutex_);
        ++owner_.stats_.unmapped;
      }
      owner_.sink_(engine::PeerUnmapped{link->first});
      link = links.erase(link);
    }
    process = links.empty() ? processes_.erase(process) : std::next(process);
  }
}

void ArenaLender::Loop::publish() {
  const auto shown = std::count_if(connections_.begin(), connections_.end(),
                                   [](const auto& entry) { return entry.second.peer.has_value(); });
  MutexLock lock(owner_.mutex_);
  owner_.stats_.connections = static_cast<uint32_t>(shown);
  owner_.stats_.processes = static_cast<uint32_t>(processes_.size());
  std::erase_if(owner_.watched_, [&](const Life& life) { return !processes_.contains(life); });
}

}  // namespace kvferry::node
