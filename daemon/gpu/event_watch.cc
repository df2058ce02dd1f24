#include "daemon/gpu/event_watch.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvferry::gpu {
namespace {

constexpr std::size_t kAskedAtATime = 64;

}  // namespace

EventWatch::~EventWatch() {
  for (auto& [handle, open] : open_) close(open);
}

void EventWatch::close(Open& open) {
  (void)device_.check(device_.api().cuEventDestroy(open.event), "cuEventDestroy");
}

void EventWatch::add(uint64_t key, const EventHandle& handle, EventTold told) {
  auto found = open_.find(handle);
  if (found == open_.end()) {
    cuda::CUipcEventHandle value;
    static_assert(sizeof(value) == sizeof(handle));
    std::memcpy(&value, handle.data(), sizeof(value));
    Open open;
    const cuda::CUresult opened = device_.api().cuIpcOpenEventHandle(&open.event, value);
    if (!device_.check(opened, "cuIpcOpenEventHandle")) {
      told(EventState::kUnusable);
      return;
    }
    found = open_.emplace(handle, std::move(open)).first;
  }
  found->second.keys.push_back(key);
  watchers_.insert_or_assign(key, Watcher{handle, std::move(told)});
}

void EventWatch::remove(uint64_t key) {
  const auto watcher = watchers_.find(key);
  if (watcher == watchers_.end()) return;
  const auto open = open_.find(watcher->second.handle);
  watchers_.erase(watcher);
  std::erase(open->second.keys, key);
  if (!open->second.keys.empty()) return;
  // Closed at once: a later event of its owner may go by the same handle.
  close(open->second);
  open_.erase(open);
}

void EventWatch::tell(uint64_t key, EventState state) {
  const auto watcher = watchers_.find(key);
  if (watcher == watchers_.end()) return;
  const EventTold told = std::move(watcher->second.told);
  watchers_.erase(watcher);
  told(state);
}

bool EventWatch::poll() {
  bool moved = false;
  auto it = open_.lower_bound(next_);
  const std::size_t ask = std::min(open_.size(), kAskedAtATime);
  for (std::size_t i = 0; i < ask && !open_.empty(); ++i) {
    if (it == open_.end()) it = open_.begin();
    const cuda::CUresult state = device_.api().cuEventQuery(it->second.event);
    if (state == cuda::CUDA_ERROR_NOT_READY) {
      ++it;
      continue;
    }
    const bool reached = device_.check(state, "cuEventQuery").has_value();
    Open open = std::move(it->second);
    it = open_.erase(it);
    close(open);
    for (const uint64_t key : open.keys)
      tell(key, reached ? EventState::kReached : EventState::kUnusable);
    moved = true;
  }
  next_ = it == open_.end() ? EventHandle{} : it->first;
  return moved;
}

void EventWatch::give_up() {
  for (auto& [handle, open] : open_) close(open);
  open_.clear();
  while (!watchers_.empty()) tell(watchers_.begin()->first, EventState::kUnusable);
}

}  // namespace kvferry::gpu
