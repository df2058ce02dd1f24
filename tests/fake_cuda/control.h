// How a test steers the fake driver. The fake is a shared library that is loaded as the real one is
// (cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY)); this header finds its control symbols in it.
// README.md says what the fake promises. Everything here may be called from any thread, and
// concerns the calling process unless said otherwise.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/fake_cuda/counts.h"

namespace kvferry::fake_cuda {

struct Counts : kvferry_fake_cuda_counts {
  uint64_t total() const {
    return allocations + handles + reservations + mappings + ipc_opens + registrations + contexts +
           streams + events + modules;
  }
  std::string to_string() const;
};

// The control symbols of a fake library. The library stays loaded (like the real driver, it cannot
// be unloaded), so its state is one per process: reset() between tests.
class Control {
 public:
  // Throws std::runtime_error if the library is no fake driver.
  explicit Control(const std::string& library);

  // Forgets all of this process's state, frees its memory, undoes fail(), hold() and fault(), and
  // reads the environment again. No other thread may be in a call, and pointers to contexts,
  // streams and the like are invalid afterwards. cuInit has to be called again.
  void reset() const { reset_(); }
  Counts live() const;

  // The nth call from now on (1 is the next) of `function`, or of any if empty, answers `code` and
  // does nothing; just once. What gives something back (cuMemFree, cuStreamDestroy, ...) does that
  // all the same. A code that CUDA calls sticky ends the caller's current context instead, and
  // nothing is done.
  // "(device)" counts not calls but the work that streams do: copies, fills, launches.
  // nth 0 takes back what was set. At most one such failure is set at a time.
  void fail(const std::string& function, uint64_t nth, int code) const {
    fail_(function.empty() ? nullptr : function.c_str(), nth, code);
  }
  // Calls since the library was loaded or reset, failed ones included. Empty: all functions.
  uint64_t calls(const std::string& function = {}) const {
    return calls_(function.empty() ? nullptr : function.c_str());
  }

  // While held, no stream of this process does anything: what is submitted piles up. After
  // release() the order in which streams go on depends on the seed alone.
  void hold() const { hold_(1); }
  void release() const { hold_(0); }
  // Lets exactly `count` pieces of work run, while held, as long as there is some; says how many.
  uint64_t step(uint64_t count = 1) const { return step_(count); }

  // The device `ordinal` fails with this sticky error, at once, for contexts of this process. For
  // all processes of the machine: a file `fault.N` in its directory, with the code as text.
  void fault(int ordinal, int code) const { fault_(ordinal, code); }

  // Bytes allocated on a device of the machine by all processes together.
  uint64_t device_bytes(int ordinal) const { return device_bytes_(ordinal); }
  // Reads or writes device memory from the host, past all streams and checks of order: for setting
  // up and looking at what a test needs. False if some of it is not mapped in this process.
  bool peek(uint64_t address, void* to, uint64_t bytes) const {
    return peek_(address, to, bytes) == 0;
  }
  bool poke(uint64_t address, const void* from, uint64_t bytes) const {
    return poke_(address, from, bytes) == 0;
  }

 private:
  template <typename Fn>
  void find(Fn& fn, void* library, const char* name) {
    fn = reinterpret_cast<Fn>(::dlsym(library, name));
    if (fn == nullptr) throw std::runtime_error(std::string("no fake CUDA driver: no ") + name);
  }

  void (*reset_)() = nullptr;
  void (*live_)(kvferry_fake_cuda_counts*) = nullptr;
  void (*fail_)(const char*, uint64_t, int) = nullptr;
  uint64_t (*calls_)(const char*) = nullptr;
  void (*hold_)(int) = nullptr;
  uint64_t (*step_)(uint64_t) = nullptr;
  void (*fault_)(int, int) = nullptr;
  uint64_t (*device_bytes_)(int) = nullptr;
  int (*peek_)(uint64_t, void*, uint64_t) = nullptr;
  int (*poke_)(uint64_t, const void*, uint64_t) = nullptr;
};

// What the fake's environment variables say; README.md lists them. Environment of this process and
// of what it starts.
struct Setup {
  int devices = 1;
  int version = 13000;        // of CUDA
  uint64_t memory_mb = 1024;  // of each device
  uint64_t seed = 1;
  uint64_t delay_us = 100;             // longest delay of a piece of work
  std::string lacks = {};              // e.g. "fabric,peer"
  std::string visible = {};            // CUDA_VISIBLE_DEVICES, e.g. "1,0"; empty: all
  uint64_t fabric_granularity_kb = 0;  // 0: as of other VMM allocations
  bool host_visible = false;           // the host reads and writes device memory at its address
};

// A fake machine of a test: a new directory for its memory, in /dev/shm where there is one, and the
// environment that names it. Removed at the end. One at a time.
class Machine {
 public:
  explicit Machine(const std::string& library, const Setup& setup = {});
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  const Control& control() const { return control_; }
  const Control* operator->() const { return &control_; }
  const std::string& directory() const { return directory_; }
  // "NAME=value" for a process that shall share the machine.
  std::vector<std::string> environment() const;

 private:
  std::string directory_;
  std::vector<std::pair<std::string, std::string>> variables_;
  Control control_;
};

// ---- Definitions --------------------------------------------------------------------------------

inline std::string Counts::to_string() const {
  std::string text;
  const auto add = [&](const char* name, uint64_t count) {
    if (count != 0) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + name;
  };
  add("allocations", allocations);
  add("handles", handles);
  add("reservations", reservations);
  add("mappings", mappings);
  add("IPC opens", ipc_opens);
  add("host registrations", registrations);
  add("contexts", contexts);
  add("streams", streams);
  add("events", events);
  add("modules", modules);
  return text.empty() ? "nothing" : text;
}

inline Control::Control(const std::string& library) {
  void* handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(::dlerror());
  find(reset_, handle, "kvferry_fake_cuda_reset");
  find(live_, handle, "kvferry_fake_cuda_live");
  find(fail_, handle, "kvferry_fake_cuda_fail");
  find(calls_, handle, "kvferry_fake_cuda_calls");
  find(hold_, handle, "kvferry_fake_cuda_hold");
  find(step_, handle, "kvferry_fake_cuda_step");
  find(fault_, handle, "kvferry_fake_cuda_fault");
  find(device_bytes_, handle, "kvferry_fake_cuda_device_bytes");
  find(peek_, handle, "kvferry_fake_cuda_peek");
  find(poke_, handle, "kvferry_fake_cuda_poke");
}

inline Counts Control::live() const {
  Counts counts{};
  live_(&counts);
  return counts;
}

inline Machine::Machine(const std::string& library, const Setup& setup) : control_(library) {
  std::string pattern = (std::filesystem::exists("/dev/shm") ? "/dev/shm" : std::string("/tmp")) +
                        "/kvferry-gpu-XXXXXX";
  if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp " + pattern);
  directory_ = pattern;
  variables_ = {{"KVFERRY_FAKE_CUDA_DIR", directory_},
                {"KVFERRY_FAKE_CUDA_DEVICES", std::to_string(setup.devices)},
                {"KVFERRY_FAKE_CUDA_VERSION", std::to_string(setup.version)},
                {"KVFERRY_FAKE_CUDA_MEMORY_MB", std::to_string(setup.memory_mb)},
                {"KVFERRY_FAKE_CUDA_SEED", std::to_string(setup.seed)},
                {"KVFERRY_FAKE_CUDA_DELAY_US", std::to_string(setup.delay_us)},
                {"KVFERRY_FAKE_CUDA_LACKS", setup.lacks}};
  if (!setup.visible.empty()) variables_.emplace_back("CUDA_VISIBLE_DEVICES", setup.visible);
  if (setup.fabric_granularity_kb != 0)
    variables_.emplace_back("KVFERRY_FAKE_CUDA_FABRIC_GRANULARITY_KB",
                            std::to_string(setup.fabric_granularity_kb));
  if (setup.host_visible) variables_.emplace_back("KVFERRY_FAKE_CUDA_HOST_VISIBLE", "1");
  for (const auto& [name, value] : variables_) ::setenv(name.c_str(), value.c_str(), 1);
  if (setup.visible.empty()) ::unsetenv("CUDA_VISIBLE_DEVICES");
  control_.reset();
}

inline Machine::~Machine() {
  control_.reset();
  for (const auto& variable : variables_) ::unsetenv(variable.first.c_str());
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

inline std::vector<std::string> Machine::environment() const {
  std::vector<std::string> all;
  for (const auto& [name, value] : variables_) all.push_back(name + "=" + value);
  return all;
}

}  // namespace kvferry::fake_cuda
