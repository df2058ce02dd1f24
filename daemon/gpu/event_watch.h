// Events of other processes that say when pages may be touched. They are only ever asked whether
// they have been reached: no stream waits for one, as its owner may never come to it.
//
// Owned and called by the queue's thread with the device's context current.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/gpu/device.h"

namespace kvferry::gpu {

using EventHandle = std::array<uint8_t, 64>;  // cudaIpcEventHandle_t
enum class EventState : uint8_t {
  kReached,
  kUnusable,  // it could not be opened, or the device is down
};
using EventTold = std::function<void(EventState)>;

class EventWatch {
 public:
  explicit EventWatch(const Device& device) : device_(device) {}
  // Closes the events; nobody is told.
  ~EventWatch();
  EventWatch(const EventWatch&) = delete;
  EventWatch& operator=(const EventWatch&) = delete;

  void add(uint64_t key, const EventHandle& handle, EventTold told);
  // Unknown keys are no error: the event may have been told of already.
  void remove(uint64_t key);
  // Asks some of the events; true if any was reached.
  bool poll();
  // Tells all that are left.
  void give_up();
  std::size_t count() const { return watchers_.size(); }

 private:
  struct Watcher {
    EventHandle handle;
    EventTold told;
  };
  struct Open {
    cuda::CUevent event = nullptr;
    std::vector<uint64_t> keys;
  };
  void tell(uint64_t key, EventState state);
  void close(Open& open);

  const Device& device_;
  std::map<uint64_t, Watcher> watchers_;
  std::map<EventHandle, Open> open_;  // each handle once: CUDA refuses a second time
  EventHandle next_{};                // where the next round begins
};

}  // namespace kvferry::gpu
