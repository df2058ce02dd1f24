// What control.h finds in the library.
#include <cstring>

#include "tests/fake_cuda/counts.h"
#include "tests/fake_cuda/entry.h"

using kvferry::fake_cuda::RangeKind;
using kvferry::fake_cuda::State;
using kvferry::fake_cuda::state;

namespace {

// The bytes at a device address as the host finds them, whoever may touch them; null if some of
// them do not exist.
std::byte* find_bytes(State& all, uint64_t address, uint64_t bytes) {
  const auto* range = all.space.find(address);
  if (range == nullptr) return nullptr;
  std::byte* const host = range->host + (address - range->base);
  while (address + bytes > range->end()) {
    const auto* next = all.space.find(range->end());
    if (next == nullptr || next->host != range->host + range->bytes) return nullptr;
    range = next;
  }
  return host;
}

}  // namespace

KVFERRY_FAKE_CUDA_EXPORT void kvferry_fake_cuda_reset() {
  kvferry::fake_cuda::reset();
}

KVFERRY_FAKE_CUDA_EXPORT void kvferry_fake_cuda_live(kvferry_fake_cuda_counts* counts) {
  State& all = state();
  const std::lock_guard<std::mutex> lock(all.mutex);
  *counts = {};
  if (all.forked) return;
  for (const auto& [base, range] : all.space.ranges()) {
    switch (range.kind) {
      case RangeKind::kAllocation:
        ++counts->allocations;
        break;
      case RangeKind::kIpc:
        counts->ipc_opens += range.opens;
        break;
      case RangeKind::kMapped:
        ++counts->mappings;
        break;
      case RangeKind::kHost:
        ++counts->registrations;
        break;
    }
  }
  for (const auto& [value, handle] : all.handles) counts->handles += handle.references;
  for (const auto& [device, context] : all.primaries) counts->contexts += context->retains;
  counts->reservations = all.reservations.size();
  counts->streams = all.streams.size();
  counts->events = all.events.size();
  counts->modules = all.modules.size();
}

KVFERRY_FAKE_CUDA_EXPORT void kvferry_fake_cuda_fail(const char* function, uint64_t nth, int code) {
  State& all = state();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.fail_function = function != nullptr ? function : "";
  all.fail_in = nth;
  all.fail_code = static_cast<kvferry::cuda::CUresult>(code);
}

KVFERRY_FAKE_CUDA_EXPORT uint64_t kvferry_fake_cuda_calls(const char* function) {
  State& all = state();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.calls.find(function != nullptr ? function : "");
  return found == all.calls.end() ? 0 : found->second;
}

KVFERRY_FAKE_CUDA_EXPORT void kvferry_fake_cuda_hold(int held) {
  State& all = state();
  std::unique_lock<std::mutex> lock(all.mutex);
  all.held = held != 0;
  all.steps = 0;
  all.work_came.notify_all();
  while (all.held && all.busy) all.work_done.wait(lock);
}

KVFERRY_FAKE_CUDA_EXPORT uint64_t kvferry_fake_cuda_step(uint64_t count) {
  State& all = state();
  std::unique_lock<std::mutex> lock(all.mutex);
  if (!all.held || !all.thread_started) return 0;
  all.steps = count;
  all.stepped = 0;
  all.work_came.notify_all();
  while (all.held && (all.steps != 0 || all.busy)) all.work_done.wait(lock);
  return all.stepped;
}

KVFERRY_FAKE_CUDA_EXPORT void kvferry_fake_cuda_fault(int ordinal, int code) {
  State& all = state();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.primaries.find(all.machine_device(ordinal));
  if (found == all.primaries.end()) return;
  found->second->sticky = static_cast<kvferry::cuda::CUresult>(code);
  all.work_came.notify_all();
  all.work_done.notify_all();
}

KVFERRY_FAKE_CUDA_EXPORT uint64_t kvferry_fake_cuda_device_bytes(int ordinal) {
  State& all = state();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const int device = all.machine_device(ordinal);
  return device < 0 ? 0 : all.machine->used_bytes(device);
}

KVFERRY_FAKE_CUDA_EXPORT int kvferry_fake_cuda_peek(uint64_t address, void* to, uint64_t bytes) {
  State& all = state();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const std::byte* from = find_bytes(all, address, bytes);
  if (from == nullptr) return 1;
  std::memcpy(to, from, bytes);
  return 0;
}

KVFERRY_FAKE_CUDA_EXPORT int kvferry_fake_cuda_poke(uint64_t address, const void* from,
                                                    uint64_t bytes) {
  State& all = state();
  const std::lock_guard<std::mutex> lock(all.mutex);
  std::byte* to = find_bytes(all, address, bytes);
  if (to == nullptr) return 1;
  std::memcpy(to, from, bytes);
  return 0;
}
