#include "tests/fake_cuda/state.h"

#include <pthread.h>

#include <cstdlib>
#include <filesystem>
#include <new>

namespace kvferry::fake_cuda {

using namespace cuda;

namespace {

State* created = nullptr;

// fork leaves the child with one thread and a driver that does not work there. The locks are taken
// so that the child's copies are whole, and it can begin anew with reset().
void before_fork() {
  created->mutex.lock();
  created->map_mutex.lock();
}

void after_fork_in_parent() {
  created->map_mutex.unlock();
  created->mutex.unlock();
}

void after_fork_in_child() {
  created->forked = true;
  created->thread_started = false;
  created->busy = false;
  OwnedFd::close_all_in_child();
  // They remember threads that do not exist here; nobody else has them.
  new (&created->work_came) std::condition_variable;
  new (&created->work_done) std::condition_variable;
  new (&created->map_mutex) std::shared_mutex;
  new (&created->mutex) std::mutex;
}

void configure(State& all) {
  all.machine = Machine::open(Config::from_environment());
  const Config& config = all.config();
  all.space.set_host_visible(config.host_visible);
  all.random.seed(config.seed);
  all.fail_function = config.fail_function;
  all.fail_in = config.fail_nth;
  all.fail_code = static_cast<CUresult>(config.fail_code);
}

State* create() {
  created = new State;
  configure(*created);
  ::pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  // A directory of this process's own does not stay behind.
  std::atexit([] {
    const Config& config = created->config();
    std::error_code ignored;
    if (!created->forked && config.temporary) {
      std::filesystem::remove_all(config.directory, ignored);
    }
  });
  return created;
}

}  // namespace

State& state() {
  static State* const all = create();
  return *all;
}

std::vector<CUcontext>& context_stack() {
  struct Stack {
    uint64_t epoch = 0;
    std::vector<CUcontext> contexts;
  };
  thread_local Stack stack;
  if (stack.epoch != state().epoch) stack = {state().epoch, {}};
  return stack.contexts;
}

bool is_sticky(CUresult code) {
  switch (code) {
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_CONTAINED:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_MPS_CLIENT_TERMINATED:
      return true;
    default:
      return false;
  }
}

int State::machine_device(int ordinal) const {
  const auto& visible = config().visible;
  const auto index = static_cast<std::size_t>(ordinal);
  return ordinal >= 0 && index < visible.size() ? visible[index] : -1;
}

int State::ordinal_of(int device) const {
  const auto& visible = config().visible;
  for (std::size_t i = 0; i < visible.size(); ++i) {
    if (visible[i] == device) return static_cast<int>(i);
  }
  return -1;
}

std::shared_ptr<Context> State::context_of(CUcontext handle) const {
  for (const auto& [device, context] : primaries) {
    if (context->handle == handle) return context;
  }
  return nullptr;
}

CUresult State::count(const std::string& function) {
  ++calls[function];
  if (function != "(device)") ++calls[""];
  if (fail_in == 0) return CUDA_SUCCESS;
  const bool any = fail_function.empty() && function != "(device)";
  if (!any && fail_function != function) return CUDA_SUCCESS;
  return --fail_in == 0 ? fail_code : CUDA_SUCCESS;
}

CUresult State::sticky_error(Context& context) const {
  if (context.sticky == CUDA_SUCCESS) context.sticky = machine->fault(context.device);
  return context.sticky;
}

void State::remove_range(uint64_t base) {
  const auto found = space.ranges().find(base);
  if (found == space.ranges().end()) return;
  const Range range = std::move(found->second);
  space.remove(base);
  if (range.kind != RangeKind::kHost) space.unmap_bytes(base, range.bytes);
  space.give_back(base);
  if (range.kind == RangeKind::kAllocation) machine->disown(*range.allocation);
}

void State::destroy(std::unique_lock<std::mutex>& lock, std::shared_ptr<Context> context) {
  context->retains = 0;
  primaries.erase(context->device);
  drop_work(lock, *context);
  const auto its_own = [&](const auto& entry) { return entry.second.context == context; };
  std::erase_if(events, [&](const auto& entry) {
    if (!its_own(entry)) return false;
    const Event& event = entry.second;
    if (event.id != 0 && !event.opened) machine->remove_event(event.id);
    return true;
  });
  std::erase_if(functions, [&](const auto& entry) {
    const auto found = modules.find(entry.second.module);
    return found == modules.end() || its_own(*found);
  });
  std::erase_if(modules, its_own);
  std::erase_if(streams, [&](const auto& entry) { return entry.second->context == context; });
  default_streams.erase(context->handle);
  const std::unique_lock<std::shared_mutex> changing(map_mutex);
  std::vector<uint64_t> bases;
  for (const auto& [base, range] : space.ranges()) {
    if (range.context == context->handle) bases.push_back(base);
  }
  for (const uint64_t base : bases) remove_range(base);
}

void reset() {
  State& all = state();
  std::unique_lock<std::mutex> lock(all.mutex);
  if (!all.forked) {
    while (!all.primaries.empty()) all.destroy(lock, all.primaries.begin()->second);
  }
  {
    const std::unique_lock<std::shared_mutex> changing(all.map_mutex);
    // What is left is VMM memory, in a forked child everything of its parent's.
    for (const auto& [base, range] : all.space.ranges()) {
      if (range.kind != RangeKind::kHost) all.space.unmap_bytes(base, range.bytes);
      if (range.kind != RangeKind::kMapped) all.space.give_back(base);
    }
    all.space.ranges().clear();
    for (const auto& [base, bytes] : all.reservations) all.space.give_back(base);
  }
  all.reservations.clear();
  all.primaries.clear();
  all.scheduled.clear();
  all.streams.clear();
  all.default_streams.clear();
  all.events.clear();
  all.modules.clear();
  all.functions.clear();
  all.handles.clear();
  all.calls.clear();
  all.held = false;
  all.steps = 0;
  all.initialised = false;
  all.forked = false;
  ++all.epoch;
  configure(all);
}

}  // namespace kvferry::fake_cuda
