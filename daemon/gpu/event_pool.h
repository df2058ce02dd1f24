// Events of one device, made once and used again. Owned by the queue's thread, with the device's
// context current; an Event goes back from any thread.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/gpu/device.h"

namespace kvferry::gpu {

class EventPool;

// One event out of the pool; goes back when the object goes.
class Event {
 public:
  Event() = default;
  ~Event() { reset(); }
  Event(Event&& other) noexcept
      : home_(std::move(other.home_)), event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    if (this != &other) {
      reset();
      home_ = std::move(other.home_);
      event_ = std::exchange(other.event_, nullptr);
    }
    return *this;
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  explicit operator bool() const { return event_ != nullptr; }
  cuda::CUevent get() const { return event_; }
  void reset() {
    if (event_ == nullptr) return;
    {
      MutexLock lock(home_->mutex);
      home_->free.push_back(event_);
    }
    event_ = nullptr;
    home_.reset();
  }

 private:
  friend class EventPool;
  struct Home {
    Mutex mutex;
    std::vector<cuda::CUevent> free KVFERRY_GUARDED_BY(mutex);
  };
  Event(std::shared_ptr<Home> home, cuda::CUevent event) : home_(std::move(home)), event_(event) {}
  std::shared_ptr<Home> home_;
  cuda::CUevent event_ = nullptr;
};

class EventPool {
 public:
  explicit EventPool(const Device& device) : device_(device) {}
  // Destroys those that have come back; none may come later but such as are given up with the
  // process.
  ~EventPool() {
    std::vector<cuda::CUevent> events;
    {
      MutexLock lock(home_->mutex);
      events.swap(home_->free);
    }
    for (cuda::CUevent event : events)
      (void)device_.check(device_.api().cuEventDestroy(event), "cuEventDestroy");
  }
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  // Without timing, which is cheaper to record.
  Result<Event> take() {
    {
      MutexLock lock(home_->mutex);
      if (!home_->free.empty()) {
        cuda::CUevent event = home_->free.back();
        home_->free.pop_back();
        return Event(home_, event);
      }
    }
    cuda::CUevent event = nullptr;
    KVFERRY_RETURN_IF_ERROR(device_.check(
        device_.api().cuEventCreate(&event, cuda::CU_EVENT_DISABLE_TIMING), "cuEventCreate"));
    return Event(home_, event);
  }

 private:
  const Device& device_;
  const std::shared_ptr<Event::Home> home_ = std::make_shared<Event::Home>();
};

}  // namespace kvferry::gpu
