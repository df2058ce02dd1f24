#include "client/cpp/src/attachment.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>

#include "client/cpp/src/fork_guard.h"

namespace kvferry::client {
namespace {

template <std::size_t N>
void put_text(char (&field)[N], std::string_view text) {
  const std::size_t n = std::min(text.size(), N - 1);
  std::memcpy(field, text.data(), n);
}

template <std::size_t N>
std::string get_text(const char (&field)[N]) {
  return std::string(field, ::strnlen(field, N));
}

Error unreachable(std::string_view call, int error) {
  return {Code::kUnavailable,
          "DAEMON_UNREACHABLE",
          std::string(call) + ": " + std::strerror(error),
          "socket",
          {}};
}

int milliseconds_until(Attachment::Deadline deadline) {
  const auto left = deadline - std::chrono::steady_clock::now();
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(left).count();
  return left.count() <= 0 ? 0 : static_cast<int>(std::min<int64_t>(ms + 1, 60000));
}

// False once the deadline has passed.
bool wait_readable(int fd, Attachment::Deadline deadline) {
  for (;;) {
    pollfd entry{fd, POLLIN, 0};
    const int timeout = milliseconds_until(deadline);
    if (::poll(&entry, 1, timeout) > 0) return true;
    if (timeout == 0) return false;
  }
}

bool send_message(int fd, const void* data, std::size_t bytes, std::span<const int> fds) {
  iovec part{const_cast<void*>(data), bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * lifeline::kMaxDescriptors)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
  }
  return ::sendmsg(fd, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

// One message of exactly the size of `out`; false if the daemon has closed or sent something else.
template <typename T>
bool receive_message(int fd, T& out, std::vector<UniqueFd>& fds) {
  iovec part{&out, sizeof out};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * lifeline::kMaxDescriptors)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t got = ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  // A daemon that turns us away closes without reading what we sent; the kernel tells that once,
  // before the answer that still lies here.
  if (got < 0 && errno == ECONNRESET)
    got = ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got <= 0) return false;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int value = -1;
      std::memcpy(&value, CMSG_DATA(header) + i * sizeof(int), sizeof value);
      fds.emplace_back(value);
    }
  }
  return got == static_cast<ssize_t>(sizeof out) &&
         (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0 &&
         out.header.magic == lifeline::kMagic;
}

uint32_t overflow_uid() {
  uint32_t uid = 65534;
  std::ifstream("/proc/sys/kernel/overflowuid") >> uid;
  return uid;
}

// Who listens must be who is expected, or else who the file says. Before anything is sent.
Status check_daemon(int fd, const AttachOptions& options) {
  ucred listener{};
  socklen_t size = sizeof listener;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &listener, &size) != 0)
    return unreachable("getsockopt(SO_PEERCRED)", errno);
  struct stat file {};
  if (::stat(options.socket.c_str(), &file) != 0)
    return unreachable("stat(" + options.socket + ")", errno);
  const std::string why =
      why_not_served(file.st_uid, listener.uid, overflow_uid(), options.daemon_uid);
  if (why.empty()) return {};
  return Error{Code::kPermissionDenied, "DAEMON_USER", options.socket + ": " + why, "socket", {}};
}

Error closed() {
  return {Code::kUnavailable, "DAEMON_UNREACHABLE", "the daemon closed the lifeline", {}, {}};
}

Error refused(const auto& reply, std::string field) {
  return {static_cast<Code>(reply.code),
          get_text(reply.reason),
          get_text(reply.message),
          std::move(field),
          {}};
}

}  // namespace

std::string why_not_served(uint32_t owner, uint32_t listener, uint32_t overflow,
                           std::optional<uint32_t> wanted) {
  const std::string served = "it is served by a process of uid " + std::to_string(listener);
  if (wanted) {
    if (listener == *wanted) return {};
    if (listener == overflow)
      return "the daemon's user is not mapped in this user namespace (it appears as " +
             std::to_string(overflow) + "), so that it cannot be told whether it is uid " +
             std::to_string(*wanted) + ", which is expected";
    return served + ", but the daemon that is expected is uid " + std::to_string(*wanted);
  }
  if (listener == owner || listener == overflow || owner == overflow) return {};
  return served + ", but the file's owner is uid " + std::to_string(owner);
}

GuardedFd::GuardedFd(UniqueFd fd) : fd_(std::move(fd)) {
  close_in_children(fd_.get());
}

GuardedFd& GuardedFd::operator=(GuardedFd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::move(other.fd_);
  }
  return *this;
}

void GuardedFd::reset() {
  keep_no_more(fd_.get());
  fd_.reset();
}

WordsFile::WordsFile(std::span<std::byte> mapped, uint32_t timeline_words, uint32_t done_words)
    : bytes_(mapped),
      timeline_words_(timeline_words),
      done_words_(done_words),
      fork_generation_(fork_generation()) {}

WordsFile::~WordsFile() {
  if (fork_generation_ != fork_generation()) return;  // never mapped in a child
  ::munmap(bytes_.data(), bytes_.size());
}

uint64_t* WordsFile::timeline_word(uint32_t word) const {
  if (word >= timeline_words_) return nullptr;
  return reinterpret_cast<uint64_t*>(bytes_.data()) + word;
}

uint64_t* WordsFile::done_word(uint32_t word) const {
  if (word >= done_words_) return nullptr;
  return reinterpret_cast<uint64_t*>(bytes_.data()) + timeline_words_ + word;
}

void WordsFile::release_waiters() const {
  // The largest value that a stream's GEQ takes for later than any other: it compares the signed
  // difference.
  for (uint32_t word = 0; word < done_words_; ++word)
    control_page::store<uint64_t>(done_word(word), uint64_t{std::numeric_limits<int64_t>::max()});
}

Result<std::shared_ptr<Attachment>> Attachment::connect(const AttachOptions& options) {
  const Deadline deadline = std::chrono::steady_clock::now() + options.attach_timeout;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (options.socket.empty() || options.socket.size() >= sizeof address.sun_path)
    return Error{
        Code::kInvalidArgument, "SOCKET_PATH", "a socket's path has 1 to 107 bytes", "socket", {}};
  lifeline::AttachRequest request;
  if (options.name.empty() || options.name.size() >= sizeof request.name)
    return Error{
        Code::kInvalidArgument, "NAME_INVALID", "a name has 1 to 63 characters", "name", {}};
  put_text(address.sun_path, options.socket);
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd) return unreachable("socket", errno);
  // Bounds connect and send on a daemon that has stopped accepting.
  const auto limit = std::max<int64_t>(options.attach_timeout.count(), 1);
  const timeval timeout{limit / 1000, (limit % 1000) * 1000};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return unreachable("connect(" + options.socket + ")", errno);
  if (auto status = check_daemon(fd.get(), options); !status) return status.error();
  request.role =
      options.role == WorkerRole::kRank ? lifeline::Role::kRank : lifeline::Role::kController;
  put_text(request.name, options.name);
  // A daemon that turns us away may have answered and closed before this.
  const bool sent = send_message(fd.get(), &request, sizeof request, {});
  if (!wait_readable(fd.get(), deadline))
    return Error{Code::kDeadlineExceeded, "ATTACH_TIMEOUT", "the daemon did not answer", {}, {}};
  lifeline::AttachReply reply;
  std::vector<UniqueFd> fds;
  if (!receive_message(fd.get(), reply, fds) ||
      reply.header.type != lifeline::MessageType::kAttachReply)
    return closed();
  if (reply.code != 0) return refused(reply, {});
  if (!sent) return closed();
  std::shared_ptr<Attachment> out(new Attachment());
  out->lifeline_ = GuardedFd(std::move(fd));
  if (auto status = out->open(reply, std::move(fds)); !status) return status.error();
  return out;
}

Status Attachment::open(const lifeline::AttachReply& reply, std::vector<UniqueFd> fds) {
  const auto malformed = [](const char* what) {
    return Error{
        Code::kInternal, "ATTACH_REPLY", std::string("the daemon's answer: ") + what, {}, {}};
  };
  if (fds.size() != lifeline::kAttachFds) return malformed("wrong number of descriptors");
  facts_ = reply;
  fork_generation_ = fork_generation();
  daemon_ = GuardedFd(std::move(fds[lifeline::kFdDaemonPid]));
  doorbell_ = GuardedFd(std::move(fds[lifeline::kFdDoorbell]));
  status_fd_ = GuardedFd(std::move(fds[lifeline::kFdStatus]));
  words_fd_ = GuardedFd(std::move(fds[lifeline::kFdWords]));
  void* status = ::mmap(nullptr, reply.status_bytes, PROT_READ, MAP_SHARED, status_fd_.get(), 0);
  if (status == MAP_FAILED) return malformed("the status file cannot be mapped");
  status_ = {static_cast<const std::byte*>(status), reply.status_bytes};
  void* words =
      ::mmap(nullptr, reply.words_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, words_fd_.get(), 0);
  if (words == MAP_FAILED) return malformed("the words file cannot be mapped");
  const std::span<std::byte> mapped(static_cast<std::byte*>(words), reply.words_bytes);
  // A child must not look at the page of its parent's attachment.
  ::madvise(status, reply.status_bytes, MADV_DONTFORK);
  ::madvise(words, reply.words_bytes, MADV_DONTFORK);
  const bool well_formed = reader_.open(status_);
  words_ = std::make_shared<WordsFile>(mapped, well_formed ? reader_.timeline_words() : 0,
                                       well_formed ? reader_.done_words() : 0);
  if (!well_formed) return malformed("the status file is not well formed");
  if ((uint64_t{reader_.timeline_words()} + reader_.done_words()) * 8 > mapped.size())
    return malformed("the words file is too short");
  return {};
}

Attachment::~Attachment() {
  if (fork_generation_ != 0 && fork_generation_ != fork_generation()) return;  // never mapped here
  if (!status_.empty()) ::munmap(const_cast<std::byte*>(status_.data()), status_.size());
}

std::string Attachment::token() const {
  return std::string(reinterpret_cast<const char*>(facts_.token), sizeof facts_.token);
}

std::string Attachment::grpc_path() const {
  return get_text(facts_.grpc_path);
}

Bytes16 Attachment::boot_id() const {
  Bytes16 out;
  std::memcpy(out.data(), facts_.boot_id, out.size());
  return out;
}

bool Attachment::daemon_exited() const {
  pollfd entry{daemon_.get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

void Attachment::ring() const {
  const char byte = 1;
  (void)::send(doorbell_.get(), &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void Attachment::drain_doorbell() const {
  char bytes[16];
  while (::recv(doorbell_.get(), bytes, sizeof bytes, MSG_DONTWAIT) > 0) {
  }
}

Status Attachment::send_pools(std::span<const PoolToSend> pools, Deadline deadline) {
  MutexLock lock(send_mutex_);
  while (!pools.empty()) {
    const std::size_t count = std::min(pools.size(), lifeline::kMaxDescriptors);
    if (auto status = send_some(pools.first(count), deadline); !status) return status;
    pools = pools.subspan(count);
  }
  return {};
}

Status Attachment::send_some(std::span<const PoolToSend> pools, Deadline deadline) {
  lifeline::PoolsMessage message;
  int fds[lifeline::kMaxDescriptors];
  message.count = static_cast<uint32_t>(pools.size());
  for (std::size_t i = 0; i < pools.size(); ++i) {
    if (pools[i].name.empty() || pools[i].name.size() >= lifeline::kNameBytes)
      return Error{Code::kInvalidArgument,
                   "NAME_INVALID",
                   "a name has 1 to 63 characters",
                   "pools[" + std::to_string(i) + "].name",
                   {}};
    put_text(message.pools[i].name, pools[i].name);
    message.pools[i].kind = pools[i].kind;
    message.pools[i].bytes = pools[i].bytes;
    message.pools[i].part = pools[i].part;
    fds[i] = pools[i].fd;
  }
  if (!send_message(lifeline_.get(), &message, sizeof message, std::span(fds, pools.size()))) {
    if (errno == EBADF)
      return Error{Code::kInvalidArgument, "POOL_DESCRIPTOR", "not an open descriptor", "fd", {}};
    return closed();
  }
  // An answer that comes after the deadline would be taken for the next question's: the socket is
  // shut down, which ends the attachment.
  if (!wait_readable(lifeline_.get(), deadline)) {
    ::shutdown(lifeline_.get(), SHUT_RDWR);
    return Error{Code::kDeadlineExceeded,
                 "LIFELINE_TIMEOUT",
                 "the daemon did not answer on the lifeline",
                 {},
                 {}};
  }
  lifeline::PoolsReply reply;
  std::vector<UniqueFd> none;
  if (!receive_message(lifeline_.get(), reply, none) ||
      reply.header.type != lifeline::MessageType::kPoolsReply)
    return closed();
  if (reply.code != 0) return refused(reply, "pools[" + std::to_string(reply.index) + "]");
  return {};
}

}  // namespace kvferry::client
