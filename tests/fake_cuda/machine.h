// The machine with its GPUs, as all processes share it: a directory with one file for each
// allocation of device memory. Whoever holds an allocation holds a shared flock on its file, as
// does each exported descriptor, so the kernel itself keeps count of the users, also of those that
// were killed; a file without a lock is memory that nobody has, and is removed by whoever looks
// next.
//
// Files:
//   mem.KIND.DEVICE.ID.BYTES.TYPES.RDMA
//                                    KIND: l cuMemAlloc; f the same, given back by its owner while
//                                    others have it open; v VMM. TYPES: its shareable handle types.
//                                    RDMA: 1 if it was asked for as gpuDirectRDMACapable
//   proc.IDENTITY                    locked exclusively by a living process
//   event.ID.IDENTITY                an interprocess event of that process
//   fault.DEVICE                     written by tests: the device is broken, with that error
//
// Functions may be called from any thread.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tl/expected.hpp>
#include <vector>

#include "kernels/cuda/abi.h"
#include "tests/fake_cuda/config.h"

namespace kvferry::fake_cuda {

template <typename T>
using Answer = tl::expected<T, cuda::CUresult>;

class Machine;

enum class MemoryKind : char { kLegacy = 'l', kLegacyFreed = 'f', kVmm = 'v' };

struct AllocationInfo {
  MemoryKind kind = MemoryKind::kLegacy;
  int device = 0;  // of the machine
  uint64_t id = 0;
  uint64_t bytes = 0;  // as asked for
  unsigned int handle_types = 0;
  unsigned int rdma = 0;  // gpuDirectRDMACapable
};

// A file descriptor that closes, and that a forked child closes too: it would count as a user.
class OwnedFd {
 public:
  explicit OwnedFd(int fd = -1);
  ~OwnedFd();
  OwnedFd(OwnedFd&& other) noexcept;
  OwnedFd& operator=(OwnedFd&& other) noexcept;
  int get() const { return fd_; }
  // For the child handler of fork.
  static void close_all_in_child();

 private:
  int fd_ = -1;
  pid_t process_ = 0;  // in a child the number may be something else's
};

// An allocation that this process has.
class Allocation {
 public:
  Allocation(std::shared_ptr<Machine> machine, AllocationInfo info, OwnedFd fd);
  ~Allocation();
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  const AllocationInfo& info() const { return info_; }
  int fd() const { return fd_.get(); }
  // To be handed to another process. -1 if there are no more descriptors.
  int exported_fd() const;

 private:
  const std::shared_ptr<Machine> machine_;
  const AllocationInfo info_;
  OwnedFd fd_;
};

// How far an event has got: recorded counts the calls of cuEventRecord, completed is the latest of
// them that the device has come to. In shared memory for interprocess events.
struct EventCounter {
  std::atomic<uint64_t> recorded{0};
  std::atomic<uint64_t> completed{0};
};

class Machine : public std::enable_shared_from_this<Machine> {
 public:
  static std::shared_ptr<Machine> open(const Config& config);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  const Config& config() const { return config_; }
  // Of this process.
  uint64_t identity() const { return identity_; }
  bool alive(uint64_t identity) const;

  // With an id of its own. OUT_OF_MEMORY where the device has not so much left.
  Answer<std::shared_ptr<Allocation>> allocate(AllocationInfo info);
  // INVALID_HANDLE if it does not exist any more.
  Answer<std::shared_ptr<Allocation>> find(uint64_t id, MemoryKind kind);
  // By a descriptor that some process exported; it stays the caller's.
  Answer<std::shared_ptr<Allocation>> adopt(int fd);
  // The owner has freed it: no handle finds it any more.
  void disown(const Allocation& allocation);
  // Of all processes together.
  uint64_t used_bytes(int device);
  // Removes what nobody has.
  void reap();

  Answer<std::shared_ptr<EventCounter>> create_event(uint64_t& id);
  Answer<std::shared_ptr<EventCounter>> open_event(uint64_t id, uint64_t identity);
  void remove_event(uint64_t id);

  // What a test has written for this device, or CUDA_SUCCESS.
  cuda::CUresult fault(int device) const;

 private:
  struct File {
    std::string name;
    AllocationInfo info;
  };
  class Lock;

  explicit Machine(const Config& config);
  std::string path(const std::string& name) const { return config_.directory + "/" + name; }
  std::vector<File> allocations() const;
  void reap_locked();
  Answer<std::shared_ptr<Allocation>> hold(const File& file);
  uint64_t used_bytes_locked(int device) const;
  std::shared_ptr<EventCounter> map_event(const OwnedFd& fd) const;

  const Config config_;
  const uint64_t identity_;
  const pid_t process_id_;
  std::mutex mutex_;
  OwnedFd lock_;
  OwnedFd process_;
};

uint64_t random_id();

}  // namespace kvferry::fake_cuda
