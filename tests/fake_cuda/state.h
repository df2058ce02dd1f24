// What the fake driver knows in one process: contexts, handles, streams, and what tests have asked
// for. One of it, made at the first call and never destroyed, as calls may come at any time up to
// the process's end.
//
// Two locks, taken in this order: State::mutex guards all fields; State::map_mutex is held
// exclusively to change the address space or who may touch it, and shared while a stream's work
// runs, which does not hold the first one. So memory cannot go under work that has begun, only
// before it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/abi.h"
#include "tests/fake_cuda/address_space.h"
#include "tests/fake_cuda/machine.h"

namespace kvferry::fake_cuda {

struct Context {
  cuda::CUcontext handle = nullptr;
  int device = 0;        // of the machine
  uint64_t retains = 0;  // 0: destroyed
  cuda::CUresult sticky = cuda::CUDA_SUCCESS;
  std::set<int> peers;  // devices whose memory this context's work may touch
};

struct Stream;

// A piece of a stream's work.
struct Work {
  // Whether it may begin: called with State::mutex held, must not block. Empty: at once.
  std::function<bool()> ready;
  // Does it, and says how that ended. Without State::mutex, with map_mutex held shared.
  std::function<cuda::CUresult(const DeviceView&)> run;
  bool on_device = false;  // counted by fail("(device)")
  // Streams' work that comes before, beside the own stream's: what the default stream waits for.
  std::vector<std::pair<std::shared_ptr<Stream>, uint64_t>> after;
};

struct Stream {
  cuda::CUstream handle = nullptr;
  std::shared_ptr<Context> context;
  bool blocking = true;  // waits for the default stream, and it for this one
  std::deque<Work> work;
  uint64_t submitted = 0;
  uint64_t done = 0;
};

struct Event {
  std::shared_ptr<Context> context;
  unsigned int flags = 0;
  bool opened = false;
  uint64_t id = 0;  // of interprocess events
  std::shared_ptr<EventCounter> counter;
};

struct Module {
  std::shared_ptr<Context> context;
};

struct Function {
  cuda::CUmodule module = nullptr;
  std::string name;
};

// A value of CUmemGenericAllocationHandle.
struct MemoryHandle {
  std::shared_ptr<Allocation> allocation;
  uint64_t references = 1;
};

struct State {
  std::mutex mutex;
  std::shared_mutex map_mutex;
  std::condition_variable work_came;
  std::condition_variable work_done;

  bool initialised = false;
  bool forked = false;  // a child that has not begun anew: nothing works
  uint64_t epoch = 1;   // counts resets
  std::shared_ptr<Machine> machine;
  AddressSpace space;
  std::map<uint64_t, uint64_t> reservations;

  std::map<int, std::shared_ptr<Context>> primaries;  // by device of the machine
  std::map<cuda::CUstream, std::shared_ptr<Stream>> streams;
  std::map<cuda::CUcontext, std::shared_ptr<Stream>> default_streams;
  std::map<cuda::CUevent, Event> events;
  std::map<cuda::CUmodule, Module> modules;
  std::map<cuda::CUfunction, Function> functions;
  std::map<cuda::CUmemGenericAllocationHandle, MemoryHandle> handles;

  // The thread that does all streams' work, and what steers it; see scheduler.cc.
  bool thread_started = false;
  bool busy = false;  // with a piece of work
  bool held = false;
  uint64_t steps = 0;                              // still allowed while held
  uint64_t stepped = 0;                            // done of them
  std::vector<std::shared_ptr<Stream>> scheduled;  // that have work, destroyed ones too
  std::mt19937_64 random;

  std::map<std::string, uint64_t> calls;
  std::string fail_function;  // empty: any
  uint64_t fail_in = 0;       // calls until the failure; 0: none
  cuda::CUresult fail_code = cuda::CUDA_SUCCESS;

  const Config& config() const { return machine->config(); }

  // A handle that no other thing has had, and that is no valid pointer.
  template <typename Handle>
  Handle new_handle() {
    const uint64_t value = 0xfa5e'0000'0000'0000 + 16 * ++handle_count;
    if constexpr (std::is_integral_v<Handle>) {
      return value;
    } else {
      return reinterpret_cast<Handle>(value);
    }
  }
  uint64_t handle_count = 0;

  // The device of the machine behind an ordinal of this process; -1 if there is none.
  int machine_device(int ordinal) const;
  // The reverse; -1 if this process does not see it.
  int ordinal_of(int device) const;

  std::shared_ptr<Context> context_of(cuda::CUcontext handle) const;
  // Counts a call of `function`; what it has to fail with, if that is due.
  cuda::CUresult count(const std::string& function);
  // The error that this context has for good, also one that a test has set for its device.
  cuda::CUresult sticky_error(Context& context) const;
  // Destroys the context with everything in it, as the driver does.
  void destroy(std::unique_lock<std::mutex>& lock, std::shared_ptr<Context> context);
  // Ends one range of cuMemAlloc, IPC or host memory. Changes the address space.
  void remove_range(uint64_t base);

  // ---- scheduler.cc ----
  void submit(const std::shared_ptr<Stream>& stream, Work work);
  // The stream for a handle, in the current context; null if it is none of this context's.
  std::shared_ptr<Stream> stream_of(const std::shared_ptr<Context>& context, cuda::CUstream handle);
  // Waits until what has been submitted so far to the streams is done; the sticky error otherwise.
  cuda::CUresult wait_for(std::unique_lock<std::mutex>& lock, const std::shared_ptr<Context>& why,
                          const std::vector<std::shared_ptr<Stream>>& all);
  std::vector<std::shared_ptr<Stream>> streams_of(const Context& context) const;
  // Forgets the work of a context that is gone or broken, and waits for what runs.
  void drop_work(std::unique_lock<std::mutex>& lock, const Context& context);
};

// Makes it at the first call.
State& state();

// The contexts that this thread has pushed, the current one last.
std::vector<cuda::CUcontext>& context_stack();

// Errors after which a context is of no use.
bool is_sticky(cuda::CUresult code);

// Forgets everything and reads the environment again.
void reset();

}  // namespace kvferry::fake_cuda
