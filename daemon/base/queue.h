// A bounded first-in-first-out queue from many producers to one consumer. All functions may be
// called from any thread; it is meant for one consumer, since drain() hands out whole batches.
//
// The consumer may block in drain_until(), or sleep elsewhere (on an event descriptor) and be woken
// through `wake`, which runs on the producer's thread, without a lock, after the queue has gone
// from empty to non-empty and on close(). A wake-up may come for items that were drained meanwhile;
// one is never missed if the consumer drains after each wake-up until it gets nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/units.h"

namespace kvferry {

enum class PushResult : uint8_t { kPushed, kFull, kClosed };

template <typename T>
class BoundedQueue {
 public:
  // `capacity` items at least 1. `wake` may be empty; it must not block and must outlive the queue.
  explicit BoundedQueue(std::size_t capacity, std::function<void()> wake = {})
      : capacity_(capacity == 0 ? 1 : capacity), wake_(std::move(wake)) {}
  BoundedQueue(const BoundedQueue&) = delete;
  BoundedQueue& operator=(const BoundedQueue&) = delete;

  // Never blocks (beyond the lock). `item` is moved from only on kPushed, so that the caller may
  // try again or answer for it.
  [[nodiscard]] PushResult try_push(T&& item) {
    bool was_empty = false;
    {
      MutexLock lock(mutex_);
      if (closed_) return PushResult::kClosed;
      if (items_.size() >= capacity_) return PushResult::kFull;
      was_empty = items_.empty();
      items_.push_back(std::move(item));
    }
    if (was_empty) announce();
    return PushResult::kPushed;
  }

  // Blocks while the queue is full, at most until `deadline` (monotonic); kFull then.
  [[nodiscard]] PushResult push_until(T&& item, Time deadline) {
    bool was_empty = false;
    {
      MutexLock lock(mutex_);
      while (!closed_ && items_.size() >= capacity_) {
        if (!not_full_.wait_until(mutex_, deadline) && !closed_ && items_.size() >= capacity_)
          return PushResult::kFull;
      }
      if (closed_) return PushResult::kClosed;
      was_empty = items_.empty();
      items_.push_back(std::move(item));
    }
    if (was_empty) announce();
    return PushResult::kPushed;
  }

  // Moves up to `limit` items to the end of `out`, oldest first; returns their number. Never
  // blocks. Works on a closed queue too, which gives out what was pushed before.
  std::size_t drain(std::vector<T>& out,
                    std::size_t limit = std::numeric_limits<std::size_t>::max()) {
    std::size_t count = 0;
    {
      MutexLock lock(mutex_);
      count = take(out, limit);
    }
    if (count != 0) not_full_.notify_all();
    return count;
  }

  // As drain(), but blocks while the queue is empty and open, at most until `deadline` (monotonic).
  std::size_t drain_until(std::vector<T>& out, Time deadline,
                          std::size_t limit = std::numeric_limits<std::size_t>::max()) {
    std::size_t count = 0;
    {
      MutexLock lock(mutex_);
      while (items_.empty() && !closed_) {
        if (!not_empty_.wait_until(mutex_, deadline)) break;
      }
      count = take(out, limit);
    }
    if (count != 0) not_full_.notify_all();
    return count;
  }

  // Pushes fail from now on and every waiter returns; items inside stay drainable. Idempotent.
  void close() {
    {
      MutexLock lock(mutex_);
      if (closed_) return;
      closed_ = true;
    }
    not_full_.notify_all();
    announce();
  }

  bool closed() const {
    MutexLock lock(mutex_);
    return closed_;
  }
  std::size_t size() const {
    MutexLock lock(mutex_);
    return items_.size();
  }
  std::size_t capacity() const { return capacity_; }

 private:
  std::size_t take(std::vector<T>& out, std::size_t limit) KVFERRY_REQUIRES(mutex_) {
    const std::size_t count = items_.size() < limit ? items_.size() : limit;
    const auto end = items_.begin() + static_cast<std::ptrdiff_t>(count);
    out.insert(out.end(), std::make_move_iterator(items_.begin()), std::make_move_iterator(end));
    items_.erase(items_.begin(), end);
    return count;
  }

  void announce() {
    not_empty_.notify_all();
    if (wake_) wake_();
  }

  const std::size_t capacity_;
  const std::function<void()> wake_;
  mutable Mutex mutex_;
  CondVar not_full_;
  CondVar not_empty_;
  std::deque<T> items_ KVFERRY_GUARDED_BY(mutex_);
  bool closed_ KVFERRY_GUARDED_BY(mutex_) = false;
};

}  // namespace kvferry
