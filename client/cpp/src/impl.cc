#include "client/cpp/src/impl.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>

#include "daemon/base/huge_pages.h"

namespace kvferry::client {
namespace {

constexpr int kFirstBackoffMs = 50;
constexpr int kLastBackoffMs = 2000;

int milliseconds_until(Client::Deadline deadline) {
  const auto left = deadline - std::chrono::steady_clock::now();
  if (left.count() <= 0) return 0;
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(left).count();
  return static_cast<int>(std::min<int64_t>(ms + 1, 60000));
}

Error system_error(std::string reason, const char* call) {
  return {Code::kResourceExhausted,
          std::move(reason),
          std::string(call) + ": " + std::strerror(errno),
          {},
          {}};
}

// All of the pool's memory, now, and in huge pages where the kernel grants them: those come only by
// touching a mapping, so that goes first.
Status allocate_pool(int fd, void* data, uint64_t bytes) {
  populate_huge(data, bytes);
  int rc = 0;
  do {
    rc = ::fallocate(fd, 0, 0, static_cast<off_t>(bytes));
  } while (rc != 0 && errno == EINTR);
  if (rc != 0) return system_error("POOL_MEMORY", "fallocate");
  if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
    return system_error("POOL_MEMORY", "fcntl(F_ADD_SEALS)");
  return {};
}

void write_eventfd(int fd) {
  const uint64_t one = 1;
  (void)!::write(fd, &one, sizeof one);
}

}  // namespace

Client::Impl::Impl(AttachOptions options)
    : options_(std::move(options)),
      fork_at_(fork_generation()),
      transfers_(options_.queue_operations),
      submitter_(
          {options_.queue_operations, options_.queue_bytes},
          [this](const pb::Operation& operation, TransferHandle handle,
                 const pb::OperationResult& result) { on_result(operation, handle, result); }) {}

Client::Impl::~Impl() {
  if (watcher_.joinable()) {
    write_eventfd(stop_.get());
    watcher_.join();
  }
  submitter_.stop();
  MutexLock lock(mutex_);
  for (auto& [name, pool] : pools_)
    if (pool.data != nullptr) ::munmap(pool.data, pool.bytes);
}

Status Client::Impl::start() {
  wake_ = GuardedFd(UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)));
  stop_ = GuardedFd(UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)));
  events_ = GuardedFd(UniqueFd(::epoll_create1(EPOLL_CLOEXEC)));
  if (!wake_ || !stop_ || !events_) return system_error("DESCRIPTORS", "eventfd, epoll_create1");
  epoll_event event{};
  event.events = EPOLLIN;
  if (::epoll_ctl(events_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0)
    return system_error("DESCRIPTORS", "epoll_ctl");
  auto attachment = Attachment::connect(options_);
  if (!attachment) return attachment.error();
  use(std::make_shared<Connection>(std::move(*attachment)));
  watcher_ = std::thread([this] { watch(); });
  return {};
}

std::shared_ptr<Connection> Client::Impl::current() const {
  if (!usable()) return nullptr;
  MutexLock lock(mutex_);
  return connection_;
}

// ---- waking and waiting ------------------------------------------------------------------------

void Client::Impl::on_result(const pb::Operation& operation, TransferHandle handle,
                             const pb::OperationResult& result) {
  OperationAnswer answer;
  answer.claim = operation.has_claim();
  answer.decline = operation.has_decline();
  answer.accepted = result.outcome() == pb::OPERATION_OUTCOME_ACCEPTED ||
                    result.outcome() == pb::OPERATION_OUTCOME_EXISTING;
  if (!answer.accepted) answer.error = decode(result.error());
  if (transfers_.answer(handle, std::move(answer))) notify();
}

void Client::Impl::notify() {
  if (!woken_.exchange(true)) write_eventfd(wake_.get());
}

void Client::Impl::take_wake_ups() {
  if (woken_.exchange(false)) {
    uint64_t count = 0;
    (void)!::read(wake_.get(), &count, sizeof count);
  }
  if (const std::shared_ptr<Connection> connection = current())
    connection->attachment->drain_doorbell();
}

bool Client::Impl::block(Deadline deadline) {
  pollfd entry{events_.get(), POLLIN, 0};
  const int timeout = milliseconds_until(deadline);
  if (timeout == 0) return false;
  if (::poll(&entry, 1, timeout) > 0) take_wake_ups();
  return true;
}

std::size_t Client::Impl::poll(std::span<Event> events) {
  if (!usable()) return 0;
  // Somebody sleeps on the descriptor: it has to become unreadable before the page is looked at.
  if (event_fd_used_.load(std::memory_order_relaxed)) take_wake_ups();
  const std::size_t count = transfers_.take(events);
  // What did not fit must keep the descriptor readable, and a slot that was being written must be
  // looked at again.
  if (count == events.size() && count > 0 && event_fd_used_.load(std::memory_order_relaxed))
    notify();
  else if (transfers_.unsettled())
    notify();
  return count;
}

std::size_t Client::Impl::wait_any(std::span<Event> events, Deadline deadline) {
  if (!usable() || events.empty()) return 0;
  for (;;) {
    if (const std::size_t count = poll(events); count > 0) return count;
    if (!block(deadline)) return poll(events);
  }
}

Result<TransferStatus> Client::Impl::wait(TransferHandle transfer, Deadline deadline) {
  if (!usable()) return not_attached();
  for (;;) {
    if (auto ended = transfers_.ended(transfer)) {
      // Events of others may have been seen on the way, and their wake-ups consumed.
      if (transfers_.pending()) notify();
      return *ended;
    }
    if (transfers_.unsettled()) notify();
    if (block(deadline)) continue;
    if (auto ended = transfers_.ended(transfer)) return *ended;
    notify();
    return Error{
        Code::kDeadlineExceeded, "WAIT_TIMEOUT", "the transfer has not ended in time", {}, {}};
  }
}

int Client::Impl::event_fd() {
  event_fd_used_.store(true);
  // Something may have been waiting from before the first call.
  notify();
  return events_.get();
}

Status Client::Impl::submit_known(TransferHandle handle, pb::Operation operation) {
  if (!usable()) return not_attached();
  if (auto begun = transfers_.begin(handle); !begun) return begun;
  Status queued = submitter_.enqueue(std::move(operation), handle);
  if (!queued) transfers_.undo(handle, false);
  return queued;
}

Status Client::Impl::submit_without_transfer(pb::Operation operation) {
  if (!usable()) return not_attached();
  return submitter_.enqueue(std::move(operation), 0);
}

Status Client::Impl::decline(const std::string& key, pb::Operation operation) {
  if (!usable()) return not_attached();
  return submitter_.enqueue(std::move(operation), transfers_.handle_of(key));
}

Result<std::string> Client::Impl::aux(TransferHandle transfer) {
  if (!usable()) return not_attached();
  auto local = transfers_.aux(transfer);
  if (!local) return local.error();
  if (*local) return std::move(**local);
  pb::GetAuxRequest request;
  request.set_client_handle(transfer);
  auto response = call(&pb::WorkerService::Stub::GetAux, request);
  if (!response) return response.error();
  return std::move(*response->mutable_aux());
}

// ---- pools and layouts -------------------------------------------------------------------------

Result<PoolMemory> Client::Impl::alloc_pool(std::string_view name, uint64_t bytes) {
  if (bytes == 0 || bytes > (uint64_t{1} << 46))
    return Error{Code::kInvalidArgument, "SIZE_INVALID", "a pool has 1 to 2^46 bytes", "bytes", {}};
  UniqueFd fd(::memfd_create("kvferry-pool", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return system_error("POOL_MEMORY", "memfd_create");
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0)
    return system_error("POOL_MEMORY", "ftruncate");
  void* data = map_aligned(fd.get(), bytes, PROT_READ | PROT_WRITE);
  if (data == MAP_FAILED) return system_error("POOL_MEMORY", "mmap");
  if (auto status = allocate_pool(fd.get(), data, bytes); !status) {
    ::munmap(data, bytes);
    return status.error();
  }
  const PoolFile file{std::string(name), fd.get(), bytes};
  if (auto status = register_pools({&file, 1}); !status) {
    ::munmap(data, bytes);
    return status.error();
  }
  MutexLock lock(mutex_);
  const auto it = pools_.find(name);
  if (it == pools_.end() || it->second.data != nullptr) {
    ::munmap(data, bytes);
    return Error{Code::kAlreadyExists, "POOL_EXISTS", "a pool of this name exists", "name", {}};
  }
  it->second.data = static_cast<std::byte*>(data);
  return PoolMemory{it->second.data, bytes, it->second.fd.get()};
}

Status Client::Impl::send_pools(const Connection& connection, std::span<const PoolFile> pools) {
  const Deadline deadline = std::chrono::steady_clock::now() + options_.call_timeout;
  std::vector<PoolToSend> to_send;
  pb::RegisterPoolsRequest request;
  for (const PoolFile& pool : pools) {
    to_send.push_back({pool.name, lifeline::PoolKind::kHostShm, pool.bytes, pool.fd});
    pb::PoolSpec* spec = request.add_pools();
    spec->set_name(pool.name);
    spec->set_kind(pb::POOL_KIND_HOST_SHM);
    spec->set_bytes(pool.bytes);
  }
  if (auto sent = connection.attachment->send_pools(to_send, deadline); !sent) return sent;
  auto response =
      connection.call(&pb::WorkerService::Stub::RegisterPools, request, options_.call_timeout);
  if (!response) return response.error();
  return {};
}

Status Client::Impl::register_pools(std::span<const PoolFile> pools) {
  const std::shared_ptr<Connection> connection = current();
  if (!connection) return not_attached();
  std::vector<GuardedFd> kept;
  for (const PoolFile& pool : pools) {
    {
      MutexLock lock(mutex_);
      if (pools_.contains(pool.name))
        return Error{
            Code::kAlreadyExists, "POOL_EXISTS", "a pool of this name exists", "pools.name", {}};
    }
    kept.emplace_back(UniqueFd(::fcntl(pool.fd, F_DUPFD_CLOEXEC, 3)));
    if (!kept.back())
      return Error{Code::kInvalidArgument, "POOL_DESCRIPTOR", "not an open descriptor", "fd", {}};
  }
  if (auto status = send_pools(*connection, pools); !status) return status;
  MutexLock lock(mutex_);
  for (std::size_t i = 0; i < pools.size(); ++i)
    pools_.try_emplace(pools[i].name,
                       Pool{std::move(kept[i]), pools[i].bytes, nullptr, {}, nullptr, false});
  return {};
}

Status Client::Impl::unregister_pools(std::span<const std::string> names) {
  pb::UnregisterRequest request;
  for (const std::string& name : names) request.mutable_pools()->add_names(name);
  auto response = call(&pb::WorkerService::Stub::Unregister, request);
  if (!response) return response.error();
  std::vector<Pool> gone;  // memory of a GPU is freed after the lock
  MutexLock lock(mutex_);
  for (const std::string& name : names) {
    const auto it = pools_.find(name);
    if (it == pools_.end()) continue;
    if (it->second.data != nullptr) ::munmap(it->second.data, it->second.bytes);
    gone.push_back(std::move(it->second));
    pools_.erase(it);
    // The daemon takes the layouts that use a pool back with it.
    std::erase_if(layouts_, [&](const auto& entry) {
      const auto& used = entry.second.layout().pools();
      return std::any_of(used.begin(), used.end(),
                         [&](const pb::PoolSpan& pool) { return pool.name() == name; });
    });
  }
  return {};
}

Result<RegisteredLayout> Client::Impl::register_layout(const LayoutRegistration& registration) {
  pb::RegisterLayoutRequest request = encode(registration);
  auto response = call(&pb::WorkerService::Stub::RegisterLayout, request);
  if (!response) return response.error();
  RegisteredLayout out;
  out.card = response->card();
  out.generation = response->generation();
  out.incarnation = decode16(response->incarnation());
  out.complete = response->complete();
  out.existing = response->existing();
  MutexLock lock(mutex_);
  const LayoutKey key{registration.instance, registration.layout.rank};
  layouts_[key] = std::move(request);
  layouts_left_out_.erase(key);
  return out;
}

Status Client::Impl::unregister_layout(const LayoutRef& layout) {
  pb::UnregisterRequest request;
  encode(layout, request.mutable_layout());
  auto response = call(&pb::WorkerService::Stub::Unregister, request);
  if (!response) return response.error();
  MutexLock lock(mutex_);
  layouts_.erase({layout.instance, layout.rank});
  return {};
}

// ---- words -------------------------------------------------------------------------------------

Result<uint32_t> Client::Impl::alloc_word(bool timeline) {
  const std::shared_ptr<Connection> connection = current();
  if (!connection) return not_attached();
  const control_page::StatusReader& page = connection->attachment->page();
  MutexLock lock(mutex_);
  std::vector<bool>& used = timeline ? timeline_used_ : done_used_;
  used.resize(timeline ? page.timeline_words() : page.done_words());
  const auto it = std::find(used.begin(), used.end(), false);
  if (it == used.end())
    return Error{Code::kResourceExhausted, "NO_WORD", "all words are in use", {}, {}};
  *it = true;
  const auto word = static_cast<uint32_t>(it - used.begin());
  if (timeline) {
    if (timeline_values_.size() <= word) timeline_values_.resize(word + 1);
    timeline_values_[word] = 0;
  }
  uint64_t* at = timeline ? connection->attachment->timeline_word(word)
                          : connection->attachment->done_word(word);
  if (at != nullptr) control_page::store<uint64_t>(at, 0);
  return word;
}

void Client::Impl::free_word(bool timeline, uint32_t word) {
  MutexLock lock(mutex_);
  std::vector<bool>& used = timeline ? timeline_used_ : done_used_;
  if (word < used.size()) used[word] = false;
}

Status Client::Impl::signal(uint32_t word, uint64_t value) {
  const std::shared_ptr<Connection> connection = current();
  if (!connection) return not_attached();
  uint64_t* at = connection->attachment->timeline_word(word);
  if (at == nullptr)
    return Error{Code::kInvalidArgument, "WORD_OUT_OF_RANGE", "no such timeline word", "word", {}};
  {
    MutexLock lock(mutex_);
    if (timeline_values_.size() <= word) timeline_values_.resize(word + 1);
    timeline_values_[word] = value;
  }
  control_page::store<uint64_t>(at, value);
  connection->attachment->ring();
  return {};
}

uint64_t* Client::Impl::word_address(uint32_t word) {
  const std::shared_ptr<Connection> connection = current();
  return connection ? connection->attachment->timeline_word(word) : nullptr;
}

uint64_t Client::Impl::done_value(uint32_t word) {
  const std::shared_ptr<Connection> connection = current();
  const uint64_t* at = connection ? connection->attachment->done_word(word) : nullptr;
  return at == nullptr ? 0 : control_page::load<uint64_t>(at);
}

Bytes16 Client::Impl::boot_id() const {
  MutexLock lock(mutex_);
  return boot_id_;
}

ClientStats Client::Impl::stats() const {
  const Transfers::Counts counts = transfers_.counts();
  ClientStats out;
  out.operations_sent = submitter_.sent();
  out.operations_accepted = counts.accepted;
  out.operations_rejected = counts.rejected;
  out.operations_queued = submitter_.unanswered();
  out.events = counts.events;
  out.ring_overflows = counts.overflows;
  out.reconnects = reconnects_.load();
  out.open_transfers = counts.open;
  return out;
}

// ---- the watcher -------------------------------------------------------------------------------

void Client::Impl::use(std::shared_ptr<Connection> connection) {
  const std::shared_ptr<Attachment>& attachment = connection->attachment;
  epoll_event event{};
  event.events = EPOLLIN;
  // Without it waits still end at their deadline; the descriptor was just received, so this works.
  ::epoll_ctl(events_.get(), EPOLL_CTL_ADD, attachment->doorbell_fd(), &event);
  transfers_.attach(attachment);
  {
    MutexLock lock(mutex_);
    boot_id_ = attachment->boot_id();
    // Conditions of new transfers go on counting where the words stood, whoever set them: this
    // client, or a stream of a GPU.
    const std::size_t words = std::max(timeline_used_.size(), timeline_values_.size());
    for (uint32_t word = 0; word < words; ++word) {
      const uint64_t* before = last_words_ ? last_words_->timeline_word(word) : nullptr;
      uint64_t value = word < timeline_values_.size() ? timeline_values_[word] : 0;
      if (before != nullptr && word < timeline_used_.size() && timeline_used_[word])
        value = std::max(value, control_page::load<uint64_t>(before));
      if (uint64_t* at = attachment->timeline_word(word)) control_page::store<uint64_t>(at, value);
    }
    last_words_.reset();
    connection_ = connection;
  }
  submitter_.set_connection(std::move(connection));
}

void Client::Impl::on_lost(const std::shared_ptr<Connection>& connection) {
  {
    MutexLock lock(mutex_);
    connection_.reset();
    last_words_ = connection->attachment->words();
  }
  submitter_.set_connection(nullptr);
  ::epoll_ctl(events_.get(), EPOLL_CTL_DEL, connection->attachment->doorbell_fd(), nullptr);
  transfers_.lose();
  transfers_.announce(EventKind::kDaemonRestarted);
  ghosts_.push_back(connection);
  notify();
}

void Client::Impl::watch_once(const std::shared_ptr<Connection>& connection, int timeout_ms,
                              bool& lost) {
  std::vector<pollfd> entries;
  entries.push_back({stop_.get(), POLLIN, 0});
  for (const auto& ghost : ghosts_)
    entries.push_back({ghost->attachment->daemon_pidfd(), POLLIN, 0});
  const std::size_t living = entries.size();
  if (connection) {
    // Answers on the lifeline are for others to read: only its end is of interest.
    entries.push_back({connection->attachment->lifeline_fd(), POLLRDHUP, 0});
    entries.push_back({connection->attachment->daemon_pidfd(), POLLIN, 0});
  }
  if (::poll(entries.data(), entries.size(), timeout_ms) <= 0) return;
  for (std::size_t i = entries.size(); i-- > living;) lost = lost || entries[i].revents != 0;
  std::vector<std::shared_ptr<Connection>> left;
  for (std::size_t i = 0; i < ghosts_.size(); ++i) {
    if (entries[i + 1].revents == 0) {
      left.push_back(ghosts_[i]);
      continue;
    }
    ghosts_[i]->attachment->words()->release_waiters();
    transfers_.exited(ghosts_[i]->attachment.get());
    notify();
  }
  ghosts_.swap(left);
}

std::shared_ptr<Connection> Client::Impl::reattach(std::optional<Error>& problem) {
  auto attachment = Attachment::connect(options_);
  if (!attachment) {
    const Code code = attachment.error().code;
    if (code != Code::kUnavailable && code != Code::kDeadlineExceeded) problem = attachment.error();
    return nullptr;
  }
  auto connection = std::make_shared<Connection>(std::move(*attachment));
  if (auto registered = register_again(*connection, problem); !registered) {
    // A daemon that goes away meanwhile is tried again; one that refuses is reported.
    if (registered.error().code == Code::kUnavailable) {
      problem.reset();
      return nullptr;
    }
    problem = registered.error();
  }
  return connection;
}

Status Client::Impl::register_again(const Connection& connection, std::optional<Error>& problem) {
  std::vector<UniqueFd> held;
  std::vector<PoolFile> pools;
  std::optional<int> words_device;
  {
    MutexLock lock(mutex_);
    for (const auto& [name, pool] : pools_) {
      if (pool.device) continue;
      held.emplace_back(::fcntl(pool.fd.get(), F_DUPFD_CLOEXEC, 3));
      pools.push_back({name, held.back().get(), pool.bytes});
    }
    words_device = words_device_;
  }
  std::span<const PoolFile> rest(pools);
  while (!rest.empty()) {
    const std::size_t count = std::min(rest.size(), lifeline::kMaxDescriptors);
    if (auto status = send_pools(connection, rest.first(count)); !status) return status;
    rest = rest.subspan(count);
  }
  if (auto status = register_devices_again(connection, problem); !status) return status;
  if (words_device)
    if (auto status = register_words(connection.attachment, *words_device); !status && !problem)
      problem = status.error();
  return register_layouts_again(connection, problem);
}

void Client::Impl::watch() {
  std::shared_ptr<Connection> connection = current();
  int backoff_ms = kFirstBackoffMs;
  std::string told;  // why attaching again was refused last
  const auto stopping = [this] {
    pollfd entry{stop_.get(), POLLIN, 0};
    return ::poll(&entry, 1, 0) > 0;
  };
  while (!stopping()) {
    bool lost = false;
    const bool searching = !connection && options_.reconnect;
    watch_once(connection, searching ? backoff_ms : -1, lost);
    if (stopping()) return;
    if (connection && lost) {
      on_lost(connection);
      connection.reset();
      backoff_ms = kFirstBackoffMs;
      told.clear();
    } else if (searching) {
      std::optional<Error> problem;
      connection = reattach(problem);
      backoff_ms = std::min(backoff_ms * 2, kLastBackoffMs);
      if (!connection) {
        // It is tried on; a refusal that stays the same is told once.
        if (problem && problem->reason != told) {
          told = problem->reason;
          transfers_.announce(EventKind::kRejected, std::move(problem));
          notify();
        }
        continue;
      }
      reconnects_.fetch_add(1);
      use(connection);
      transfers_.announce(EventKind::kReattached, std::move(problem));
      notify();
    }
  }
}

}  // namespace kvferry::client
