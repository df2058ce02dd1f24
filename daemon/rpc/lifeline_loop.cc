#include "daemon/rpc/lifeline_loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "daemon/base/crypto.h"
#include "daemon/base/seqpacket.h"

namespace kvferry::rpc {
namespace {

constexpr std::size_t kMaxFormerNames = 65536;
constexpr uid_t kNobody = 65534;  // what a uid outside our user namespace looks like
// Larger than any message, so that a longer one is seen as such.
constexpr std::size_t kReadBytes = 4096;
static_assert(lifeline::kMaxDescriptors <= kMaxMessageFds);

template <typename T>
bool parse(std::span<const std::byte> bytes, T& out) {
  if (bytes.size() != sizeof(T)) return false;
  std::memcpy(&out, bytes.data(), sizeof(T));
  return true;
}

template <std::size_t N>
std::string_view text_of(const char (&field)[N]) {
  return {field, ::strnlen(field, N)};
}

template <std::size_t N>
void put_text(char (&field)[N], std::string_view text) {
  const std::size_t n = std::min(text.size(), N - 1);
  std::memcpy(field, text.data(), n);
  std::memset(field + n, 0, N - n);
}

}  // namespace

Status Lifeline::Loop::start() {
  epoll_ = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
  wake_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  self_pidfd_ = open_process(::getpid());
  spare_ = spare_descriptor();
  if (!epoll_ || !wake_ || !self_pidfd_)
    return fail_errno("LIFELINE_FAILED", "epoll_create1, eventfd or pidfd_open", errno);
  if (!watch(wake_.get(), 0, kWake)) return fail_errno("LIFELINE_FAILED", "epoll_ctl", errno);
  listeners_.resize(owner_.config_.sockets.size());
  for (std::size_t i = 0; i < listeners_.size(); ++i) {
    const LifelineSocket& socket = socket_config(i);
    auto listener = listen_seqpacket(socket.path, socket.mode, "LIFELINE_FAILED");
    KVFERRY_RETURN_IF_ERROR(listener);
    listeners_[i].fd = std::move(*listener);
    if (!watch(listeners_[i].fd.get(), i, kListener))
      return fail_errno("LIFELINE_FAILED", "epoll_ctl", errno);
  }
  thread_ = std::thread([this] { run(); });
  return {};
}

bool Lifeline::Loop::watch(int fd, uint64_t key, Source source) {
  epoll_event event{};
  event.events = EPOLLIN | (source == kLifeline ? EPOLLRDHUP : 0U);
  event.data.u64 = (key << kSourceBits) | source;
  return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
}

void Lifeline::Loop::stop() {
  stopping_.store(true);
  if (thread_.joinable()) {
    wake();
    thread_.join();
  }
}

void Lifeline::Loop::wake() {
  const uint64_t one = 1;
  // Can only fail when the counter is full, and then the thread is awake.
  (void)!::write(wake_.get(), &one, sizeof one);
}

void Lifeline::Loop::run() {
  while (!stopping_.load()) {
    epoll_event events[64];
    const int count = ::epoll_wait(epoll_.get(), events, 64, next_timeout_ms(monotonic_now()));
    for (int i = 0; i < count; ++i) {
      const uint64_t tag = events[i].data.u64;
      handle(tag >> kSourceBits, static_cast<Source>(tag & ((1U << kSourceBits) - 1)));
    }
    end_evicted();
    expire_unattached(monotonic_now());
  }
  while (!connections_.empty()) end(connections_.begin()->first, GoneReason::kStopped);
  for (std::size_t i = 0; i < listeners_.size(); ++i) {
    listeners_[i].fd.reset();
    ::unlink(socket_config(i).path.c_str());
  }
}

void Lifeline::Loop::handle(uint64_t key, Source source) {
  if (source == kWake) {
    uint64_t count = 0;
    (void)!::read(wake_.get(), &count, sizeof count);
    return;
  }
  if (source == kListener) {
    accept_some(static_cast<std::size_t>(key));
    return;
  }
  // An earlier event of the same round may have ended it.
  const auto it = connections_.find(key);
  if (it == connections_.end()) return;
  if (source == kLifeline) {
    read_some(key);
  } else if (source == kProcess) {
    end(key, GoneReason::kProcessExited);
  } else if (it->second.session) {
    const std::shared_ptr<Session> session = it->second.session;
    // A worker that has closed its end rings for ever: its doorbell is no longer looked at.
    if (hung_up(session->page().doorbell_fd())) {
      ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, session->page().doorbell_fd(), nullptr);
      return;
    }
    session->page().drain_doorbell();
    events_.on_doorbell(session);
  }
}

void Lifeline::Loop::accept_some(std::size_t socket) {
  for (int i = 0; i < 16; ++i) {
    UniqueFd fd = accept_connection(listeners_[socket].fd.get(), spare_);
    if (!fd) return;
    admit(socket, std::move(fd));
  }
}

void Lifeline::Loop::admit(std::size_t socket, UniqueFd fd) {
  Connection connection;
  connection.socket = socket;
  socklen_t length = sizeof connection.credentials;
  connection.fd = std::move(fd);
  if (::getsockopt(connection.fd.get(), SOL_SOCKET, SO_PEERCRED, &connection.credentials,
                   &length) != 0)
    return;
  const LifelineSocket& config = socket_config(socket);
  const auto refuse = [&](Error error) {
    send_refusal(connection, error);
    events_.on_refused(socket, error);
  };
  const uid_t uid = connection.credentials.uid;
  if (!config.uids.empty() && (uid == kNobody || std::find(config.uids.begin(), config.uids.end(),
                                                           uid) == config.uids.end()))
    return refuse({Code::kPermissionDenied,
                   "UID_NOT_ALLOWED",
                   "uid " + std::to_string(uid) + " may not attach to this socket",
                   {}});
  if (listeners_[socket].unattached.size() >= owner_.config_.max_unattached) make_room(socket);
  connection.pidfd = peer_process(connection.fd.get(), connection.credentials.pid);
  connection.attach_by = monotonic_now() + owner_.config_.attach_timeout;
  const uint64_t key = next_key_++;
  if (!watch(connection.fd.get(), key, kLifeline) ||
      (connection.pidfd && !watch(connection.pidfd.get(), key, kProcess)))
    return;
  listeners_[socket].unattached.insert(key);
  connections_.emplace(key, std::move(connection));
  // Who comes to attach has mostly said so already, and then never waits behind who does not.
  read_some(key);
}

void Lifeline::Loop::make_room(std::size_t socket) {
  std::map<pid_t, uint32_t> waiting;
  const std::set<uint64_t>& unattached = listeners_[socket].unattached;
  for (const uint64_t key : unattached) ++waiting[connections_.at(key).credentials.pid];
  const auto most = std::max_element(waiting.begin(), waiting.end(),
                                     [](auto& a, auto& b) { return a.second < b.second; });
  if (most == waiting.end()) return;
  for (const uint64_t key : unattached) {
    const Connection& oldest = connections_.at(key);
    if (oldest.credentials.pid != most->first) continue;
    const Error error{Code::kResourceExhausted,
                      "TOO_MANY_CONNECTIONS",
                      "of the " + std::to_string(owner_.config_.max_unattached) +
                          " connections that may wait to be attached this process has most",
                      {}};
    send_refusal(oldest, error);
    events_.on_refused(socket, error);
    end(key, GoneReason::kProtocol);
    return;
  }
}

void Lifeline::Loop::read_some(uint64_t key) {
  std::byte buffer[kReadBytes];
  for (int i = 0; i < 16; ++i) {
    const auto it = connections_.find(key);
    if (it == connections_.end()) return;
    std::size_t bytes = 0;
    std::vector<UniqueFd> fds;
    switch (receive_message(it->second.fd.get(), buffer, bytes, fds, lifeline::kMaxDescriptors)) {
      case Received::kNothing:
        return;
      case Received::kClosed:
        return end(key, GoneReason::kClosed);
      case Received::kBroken:
        return end(key, GoneReason::kProtocol);
      case Received::kMessage:
        break;
    }
    if (!on_message(key, std::span(buffer).first(bytes), std::move(fds))) return;
  }
}

bool Lifeline::Loop::on_message(uint64_t key, std::span<const std::byte> bytes,
                                std::vector<UniqueFd> fds) {
  lifeline::Header header;
  if (bytes.size() >= sizeof header) std::memcpy(&header, bytes.data(), sizeof header);
  const bool attached = connections_.at(key).session != nullptr;
  if (bytes.size() >= sizeof header && header.magic == lifeline::kMagic) {
    lifeline::AttachRequest request;
    lifeline::PoolsMessage pools;
    if (header.type == lifeline::MessageType::kAttach && !attached && fds.empty() &&
        parse(bytes, request))
      return on_attach(key, request);
    if (header.type == lifeline::MessageType::kPools && attached && parse(bytes, pools))
      return on_pools(key, pools, std::move(fds));
  }
  end(key, GoneReason::kProtocol);
  return false;
}

bool Lifeline::Loop::on_attach(uint64_t key, const lifeline::AttachRequest& request) {
  Connection& connection = connections_.at(key);
  auto session = make_session(connection, request);
  if (!session) {
    send_refusal(connection, session.error());
    events_.on_refused(connection.socket, session.error());
    end(key, GoneReason::kProtocol);
    return false;
  }
  if (!watch((*session)->page().doorbell_fd(), key, kDoorbell)) {
    end(key, GoneReason::kProtocol);
    return false;
  }
  connection.session = *session;
  listeners_[connection.socket].unattached.erase(key);
  ++listeners_[connection.socket].attached;
  owner_.add(*session);
  events_.on_attached(*session);
  if (!send_reply(connection, **session)) {
    end(key, GoneReason::kClosed);
    return false;
  }
  return true;
}

Result<std::shared_ptr<Session>> Lifeline::Loop::make_session(
    Connection& connection, const lifeline::AttachRequest& request) {
  const LifelineSocket& config = socket_config(connection.socket);
  const std::string name(text_of(request.name));
  if (!valid_name(name)) return invalid("name", "NAME_INVALID", "not a valid worker name");
  if (request.role != lifeline::Role::kRank && request.role != lifeline::Role::kController)
    return invalid("role", "ROLE_INVALID", "a worker is a rank or a controller");
  if (request.protocol_min > request.protocol_max ||
      request.protocol_min > lifeline::kProtocolMax ||
      request.protocol_max < lifeline::kProtocolMin)
    return fail(Code::kFailedPrecondition, "PROTOCOL_MISMATCH",
                "this daemon speaks lifeline protocol " + std::to_string(lifeline::kProtocolMin) +
                    " to " + std::to_string(lifeline::kProtocolMax),
                "protocol_min");
  if (name_taken(config.tenant, name))
    return fail(Code::kAlreadyExists, "NAME_IN_USE", "a live worker has this name", "name");
  KVFERRY_RETURN_IF_ERROR(check_former_uid(config.tenant, name, connection.credentials.uid));
  if (listeners_[connection.socket].attached >= config.max_workers)
    return fail(Code::kResourceExhausted, "TOO_MANY_WORKERS",
                "this socket has as many workers as it may (limits.max_workers)");
  ControlPageConfig page_config = owner_.config_.page;
  page_config.slots = std::min(config.worker_limits.transfers, config.limits.transfers);
  auto page = ControlPage::create(page_config, owner_.config_.boot);
  if (!page) return tl::unexpected<Error>(std::move(page).error());
  Token token;
  random_bytes(token.bytes);
  Session::Facts facts;
  facts.id = WorkerId{next_key_++};
  facts.name = name;
  facts.tenant = config.tenant;
  facts.role = request.role;
  facts.protocol = std::min(request.protocol_max, lifeline::kProtocolMax);
  facts.uid = connection.credentials.uid;
  facts.gid = connection.credentials.gid;
  facts.pid = connection.credentials.pid;
  facts.socket = connection.socket;
  facts.worker_limits = config.worker_limits;
  facts.limits = config.limits;
  return std::make_shared<Session>(std::move(facts), token, std::move(*page),
                                   listeners_[connection.socket].use);
}

bool Lifeline::Loop::name_taken(const std::string& tenant, const std::string& name) {
  uint64_t holder = 0;
  for (const auto& [key, connection] : connections_)
    if (connection.session && connection.session->facts().tenant == tenant &&
        connection.session->facts().name == name)
      holder = key;
  if (holder == 0) return false;
  // A worker that was restarted may be back before its old self's end has been looked at.
  const Connection& connection = connections_.at(holder);
  if (connection.pidfd && readable_now(connection.pidfd.get())) {
    end(holder, GoneReason::kProcessExited);
    return false;
  }
  if (hung_up(connection.fd.get())) {
    end(holder, GoneReason::kClosed);
    return false;
  }
  return true;
}

Status Lifeline::Loop::check_former_uid(const std::string& tenant, const std::string& name,
                                        uid_t uid) const {
  const auto it = former_.find({tenant, name});
  if (it == former_.end() || it->second == uid) return {};
  return fail(Code::kPermissionDenied, "NAME_OF_ANOTHER_USER",
              "a worker of another user had this name", "name");
}

void Lifeline::Loop::remember_name(const Session& session) {
  std::pair<std::string, std::string> key{session.facts().tenant, session.facts().name};
  const auto [it, inserted] = former_.insert_or_assign(key, session.facts().uid);
  if (!inserted) return;
  if (former_order_.size() < kMaxFormerNames) {
    former_order_.push_back(std::move(key));
    return;
  }
  former_.erase(former_order_[former_next_]);
  former_order_[former_next_] = std::move(key);
  former_next_ = (former_next_ + 1) % kMaxFormerNames;
}

bool Lifeline::Loop::on_pools(uint64_t key, const lifeline::PoolsMessage& message,
                              std::vector<UniqueFd> fds) {
  Connection& connection = connections_.at(key);
  Session& session = *connection.session;
  if (message.count == 0 || message.count > lifeline::kMaxDescriptors ||
      message.count != fds.size()) {
    end(key, GoneReason::kProtocol);
    return false;
  }
  lifeline::PoolsReply reply;
  const auto refuse = [&](uint32_t index, const Error& error) {
    reply.code = static_cast<uint32_t>(error.code);
    reply.index = index;
    put_text(reply.reason, error.reason);
    put_text(reply.message, error.message);
  };
  for (uint32_t i = 0; i < message.count && reply.code == 0; ++i) {
    const lifeline::PoolEntry& entry = message.pools[i];
    const std::string name(text_of(entry.name));
    if (session.facts().role != lifeline::Role::kRank)
      refuse(i, {Code::kPermissionDenied, "ROLE_WITHOUT_POOLS", "a controller has no pools", {}});
    else if (!valid_name(name))
      refuse(i, {Code::kInvalidArgument, "NAME_INVALID", "not a valid pool name", {}});
    else if (entry.kind != lifeline::PoolKind::kHostShm &&
             entry.kind != lifeline::PoolKind::kCudaVmmFd)
      refuse(i, {Code::kInvalidArgument, "POOL_KIND_INVALID", "not a kind of descriptor", {}});
    else if (auto added = session.add_pool_part(name, entry.kind, entry.part,
                                                {entry.bytes, std::move(fds[i])});
             !added)
      refuse(i, added.error());
  }
  if (send_message(connection.fd.get(), &reply, sizeof reply)) return true;
  end(key, GoneReason::kProtocol);
  return false;
}

bool Lifeline::Loop::send_reply(Connection& connection, const Session& session) {
  const LifelineSocket& config = socket_config(connection.socket);
  ControlPage& page = session.page();
  lifeline::AttachReply reply;
  reply.protocol = session.facts().protocol;
  std::memcpy(reply.token, session.token_.bytes.data(), sizeof reply.token);
  std::memcpy(reply.boot_id, owner_.config_.boot.bytes.data(), sizeof reply.boot_id);
  reply.worker_id = session.id().value;
  reply.status_bytes = page.status_bytes();
  reply.words_bytes = page.words_bytes();
  const WorkerLimits& own = config.worker_limits;
  reply.max_pool_bytes = std::min(own.pool_bytes, config.limits.pool_bytes);
  reply.max_descriptors = std::min(own.descriptors, config.limits.descriptors);
  reply.max_transfers = page.config().slots;
  put_text(reply.grpc_path, config.grpc_path);
  ControlPage::WorkerEnds ends = page.take_worker_ends();
  int fds[lifeline::kAttachFds];
  fds[lifeline::kFdDaemonPid] = self_pidfd_.get();
  fds[lifeline::kFdDoorbell] = ends.doorbell.get();
  fds[lifeline::kFdStatus] = ends.status_fd;
  fds[lifeline::kFdWords] = ends.words_fd;
  return send_message(connection.fd.get(), &reply, sizeof reply, fds);
}

void Lifeline::Loop::send_refusal(const Connection& connection, const Error& error) {
  lifeline::AttachReply reply;
  reply.code = static_cast<uint32_t>(error.code);
  put_text(reply.reason, error.reason);
  put_text(reply.message, error.message);
  // Best effort: the connection is closed next.
  (void)send_message(connection.fd.get(), &reply, sizeof reply);
}

void Lifeline::Loop::end(uint64_t key, GoneReason reason) {
  auto node = connections_.extract(key);
  if (node.empty()) return;
  Connection& connection = node.mapped();
  Listener& listener = listeners_[connection.socket];
  if (!connection.session) {
    listener.unattached.erase(key);
    return;
  }
  --listener.attached;
  // The page lives as long as the session, so its doorbell is taken out of the loop by hand.
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, connection.session->page().doorbell_fd(), nullptr);
  connection.session->end();
  owner_.remove(*connection.session);
  remember_name(*connection.session);
  connection.fd.reset();
  events_.on_gone(connection.session, reason);
}

void Lifeline::Loop::expire_unattached(Time now) {
  for (auto it = connections_.begin(); it != connections_.end();) {
    const auto current = it++;
    if (current->second.session || current->second.attach_by > now) continue;
    const Error error{Code::kDeadlineExceeded, "ATTACH_TIMEOUT", "no attach message came", {}};
    send_refusal(current->second, error);
    events_.on_refused(current->second.socket, error);
    end(current->first, GoneReason::kProtocol);
  }
}

void Lifeline::Loop::end_evicted() {
  std::vector<WorkerId> evicted;
  {
    MutexLock lock(owner_.mutex_);
    evicted.swap(owner_.evicted_);
  }
  for (const WorkerId id : evicted) {
    for (const auto& [key, connection] : connections_) {
      if (!connection.session || connection.session->id() != id) continue;
      end(key, GoneReason::kEvicted);
      break;
    }
  }
}

int Lifeline::Loop::next_timeout_ms(Time now) const {
  Time next = Time::never();
  for (const auto& [key, connection] : connections_)
    if (!connection.session) next = std::min(next, connection.attach_by);
  if (next == Time::never()) return 60000;
  if (next <= now) return 0;
  // Rounded up, so that the thread does not wake a moment too early again and again.
  return static_cast<int>(std::min<int64_t>((next - now).count() / 1000000 + 1, 60000));
}

}  // namespace kvferry::rpc
