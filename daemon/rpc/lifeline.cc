#include "daemon/rpc/lifeline.h"

#include <algorithm>
#include <utility>

#include "daemon/base/crypto.h"
#include "daemon/rpc/lifeline_loop.h"

namespace kvferry::rpc {

bool valid_name(std::string_view name) {
  const auto alphanumeric = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
  };
  if (name.empty() || name.size() > 63 || !alphanumeric(name.front())) return false;
  return std::all_of(name.begin(), name.end(), [&](char c) {
    return alphanumeric(c) || std::string_view("._:+-").find(c) != std::string_view::npos;
  });
}

tl::unexpected<Error> socket_limit(const std::string& what, uint64_t most, const std::string& key,
                                   std::string field) {
  return fail(Code::kResourceExhausted, "SOCKET_LIMIT",
              "all workers of the socket may have " + std::to_string(most) + " " + what +
                  " together (limits." + key + ")",
              std::move(field));
}

std::string_view name_of(GoneReason reason) {
  switch (reason) {
    case GoneReason::kClosed:
      return "CLOSED";
    case GoneReason::kProcessExited:
      return "PROCESS_EXITED";
    case GoneReason::kProtocol:
      return "PROTOCOL";
    case GoneReason::kEvicted:
      return "EVICTED";
    case GoneReason::kStopped:
      return "STOPPED";
  }
  return "CLOSED";
}

Session::Session(Facts facts, Token token, std::unique_ptr<ControlPage> page,
                 std::shared_ptr<SocketUse> socket_use)
    : facts_(std::move(facts)),
      token_(token),
      page_(std::move(page)),
      socket_use_(std::move(socket_use)) {}

Result<PoolDescriptors> Session::take_pool(std::string_view name) {
  MutexLock lock(mutex_);
  const auto it = waiting_.find(name);
  if (it == waiting_.end())
    return fail(Code::kNotFound, "POOL_NOT_SENT",
                "no descriptor has been sent over the lifeline under this name", "name");
  PoolDescriptors out = std::move(it->second);
  waiting_.erase(it);
  waiting_parts_ -= out.parts.size();
  claimed_ += out.parts.size();
  return out;
}

void Session::release_descriptors(std::size_t count) {
  MutexLock lock(mutex_);
  const std::size_t closed = std::min(count, claimed_);
  claimed_ -= closed;
  socket_use_->descriptors.fetch_sub(static_cast<uint32_t>(closed), std::memory_order_relaxed);
}

uint32_t Session::descriptors() const {
  MutexLock lock(mutex_);
  return static_cast<uint32_t>(claimed_ + waiting_parts_);
}

Status Session::add_pool_part(const std::string& name, lifeline::PoolKind kind, uint32_t part,
                              PoolDescriptors::Part descriptor) {
  PoolDescriptors replaced;  // closed after the lock is given back
  MutexLock lock(mutex_);
  const auto old = waiting_.find(name);
  const std::size_t waits = old == waiting_.end() ? 0 : old->second.parts.size();
  if (part != 0) {
    if (kind != lifeline::PoolKind::kCudaVmmFd || part >= lifeline::kMaxPoolParts)
      return fail(Code::kInvalidArgument, "POOL_PART_INVALID",
                  "only CUDA VMM memory comes in parts, in " +
                      std::to_string(lifeline::kMaxPoolParts) + " at most");
    if (part != waits || old->second.kind != kind)
      return fail(Code::kInvalidArgument, "POOL_PART_INVALID",
                  "part " + std::to_string(part) + " follows the one before it, of the same kind");
  }
  const std::size_t goes = part == 0 ? waits : 0;
  if (claimed_ + waiting_parts_ - goes >= facts_.worker_limits.descriptors)
    return fail(Code::kResourceExhausted, "DESCRIPTOR_LIMIT",
                "a worker may hold " + std::to_string(facts_.worker_limits.descriptors) +
                    " descriptors (worker_limits.max_descriptors)");
  if (socket_use_->descriptors.load(std::memory_order_relaxed) - goes >= facts_.limits.descriptors)
    return socket_limit("descriptors", facts_.limits.descriptors, "max_descriptors");
  PoolDescriptors& pool = waiting_[name];
  if (part == 0) {
    waiting_parts_ -= goes;
    socket_use_->descriptors.fetch_sub(static_cast<uint32_t>(goes), std::memory_order_relaxed);
    replaced = std::exchange(pool, PoolDescriptors{kind, {}});
  }
  pool.parts.push_back(std::move(descriptor));
  ++waiting_parts_;
  socket_use_->descriptors.fetch_add(1, std::memory_order_relaxed);
  return {};
}

Status Session::begin_call() {
  // Counted first: who is too many takes his back.
  if (calls_.fetch_add(1, std::memory_order_relaxed) >= facts_.worker_limits.calls) {
    calls_.fetch_sub(1, std::memory_order_relaxed);
    return fail(Code::kResourceExhausted, "TOO_MANY_CALLS",
                "a worker may have " + std::to_string(facts_.worker_limits.calls) +
                    " calls without an answer (worker_limits.max_calls)");
  }
  if (socket_use_->calls.fetch_add(1, std::memory_order_relaxed) >= facts_.limits.calls) {
    end_call();
    return socket_limit("calls without an answer", facts_.limits.calls, "max_calls");
  }
  return {};
}

void Session::end_call() {
  calls_.fetch_sub(1, std::memory_order_relaxed);
  socket_use_->calls.fetch_sub(1, std::memory_order_relaxed);
}

void Session::end() {
  alive_.store(false, std::memory_order_release);
  page_->worker_gone();
  std::map<std::string, PoolDescriptors, std::less<>> closing;
  MutexLock lock(mutex_);
  closing.swap(waiting_);
  socket_use_->descriptors.fetch_sub(static_cast<uint32_t>(waiting_parts_ + claimed_),
                                     std::memory_order_relaxed);
  waiting_parts_ = claimed_ = 0;
}

Lifeline::Lifeline(LifelineConfig config) : config_(std::move(config)) {}

Result<std::unique_ptr<Lifeline>> Lifeline::start(LifelineConfig config, LifelineEvents& events) {
  for (std::size_t i = 0; i < config.sockets.size(); ++i) {
    const LifelineSocket& socket = config.sockets[i];
    const std::string field = "sockets[" + std::to_string(i) + "]";
    if (socket.path.empty() || socket.path.size() > 107)
      return invalid(field + ".path", "LIFELINE_CONFIG", "a socket's path has 1 to 107 bytes");
    if (socket.grpc_path.size() > 107)
      return invalid(field + ".grpc_path", "LIFELINE_CONFIG", "a socket's path has 1 to 107 bytes");
    if (!valid_name(socket.tenant))
      return invalid(field + ".tenant", "LIFELINE_CONFIG", "not a valid name");
  }
  std::unique_ptr<Lifeline> lifeline(new Lifeline(std::move(config)));
  lifeline->loop_ = std::make_unique<Loop>(*lifeline, events);
  KVFERRY_RETURN_IF_ERROR(lifeline->loop_->start());
  return lifeline;
}

Lifeline::~Lifeline() {
  stop();
}

void Lifeline::stop() {
  if (loop_) loop_->stop();
}

std::shared_ptr<Session> Lifeline::find(std::span<const uint8_t> token) const {
  std::shared_ptr<Session> found;
  MutexLock lock(mutex_);
  // Every token is compared, so the time tells neither whether nor where one matched.
  for (const auto& [id, session] : sessions_)
    if (equal_constant_time(session->token_.span(), token)) found = session;
  return found;
}

std::shared_ptr<Session> Lifeline::find(WorkerId id) const {
  MutexLock lock(mutex_);
  const auto it = sessions_.find(id.value);
  return it == sessions_.end() ? nullptr : it->second;
}

std::vector<std::shared_ptr<Session>> Lifeline::sessions() const {
  std::vector<std::shared_ptr<Session>> out;
  MutexLock lock(mutex_);
  for (const auto& [id, session] : sessions_) out.push_back(session);
  return out;
}

void Lifeline::close_session(WorkerId id) {
  {
    MutexLock lock(mutex_);
    if (!sessions_.contains(id.value)) return;
    evicted_.push_back(id);
  }
  loop_->wake();
}

void Lifeline::add(const std::shared_ptr<Session>& session) {
  MutexLock lock(mutex_);
  sessions_[session->id().value] = session;
}

void Lifeline::remove(const Session& session) {
  std::shared_ptr<Session> last;  // destroyed after the lock
  MutexLock lock(mutex_);
  const auto it = sessions_.find(session.id().value);
  if (it == sessions_.end()) return;
  last = std::move(it->second);
  sessions_.erase(it);
}

}  // namespace kvferry::rpc
