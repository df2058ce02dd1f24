#include "daemon/node/inbox.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace kvferry::node {

Inbox::Inbox(std::size_t per_source_limit)
    : limit_(per_source_limit), event_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (event_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

Inbox::~Inbox() {
  ::close(event_fd_);
}

bool Inbox::post(uint64_t source, Posted posted) {
  bool sleeps = false;
  {
    MutexLock lock(mutex_);
    if (closed_) return false;
    std::deque<Posted>& queue = queues_[source];
    if (source != kInternal && queue.size() >= limit_) return false;
    queue.push_back(std::move(posted));
    ++waiting_;
    sleeps = std::exchange(sleeps_, false);
  }
  if (sleeps) wake();
  return true;
}

void Inbox::wake() {
  const uint64_t one = 1;
  // The counter cannot overflow before it is read: EAGAIN would mean that it is readable anyway.
  [[maybe_unused]] const ssize_t written = ::write(event_fd_, &one, sizeof one);
}

bool Inbox::prepare_sleep() {
  MutexLock lock(mutex_);
  sleeps_ = waiting_ == 0;
  return sleeps_;
}

void Inbox::end_sleep(bool readable) {
  {
    MutexLock lock(mutex_);
    sleeps_ = false;
  }
  if (!readable) return;
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t taken = ::read(event_fd_, &count, sizeof count);
}

void Inbox::drain(std::size_t most, std::vector<Posted>& out) {
  MutexLock lock(mutex_);
  std::size_t taken = 0;
  while (taken < most && !queues_.empty()) {
    // The daemon's own first: what a worker does may depend on it, such as its attachment.
    auto it = queues_.find(kInternal);
    if (it == queues_.end()) it = queues_.upper_bound(last_served_);
    if (it == queues_.end()) it = queues_.begin();
    if (it->first != kInternal) last_served_ = it->first;
    out.push_back(std::move(it->second.front()));
    it->second.pop_front();
    if (it->second.empty()) queues_.erase(it);
    ++taken;
  }
  waiting_ -= taken;
}

std::size_t Inbox::waiting() const {
  MutexLock lock(mutex_);
  return waiting_;
}

void Inbox::close() {
  std::map<uint64_t, std::deque<Posted>> dropped;
  {
    MutexLock lock(mutex_);
    closed_ = true;
    dropped.swap(queues_);
    waiting_ = 0;
  }
}

}  // namespace kvferry::node
