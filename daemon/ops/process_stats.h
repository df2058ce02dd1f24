// What the kernel tells of this process, for the process_* metrics, and of the rails process. Any
// thread; reads /proc.
#pragma once

#include <cstdint>

namespace kvferry::ops {

// Zero where the kernel does not tell.
struct ProcessStats {
  double cpu_seconds = 0;
  double start_time_seconds = 0;  // since the epoch
  uint64_t resident_bytes = 0;
  uint64_t virtual_bytes = 0;
  uint64_t open_fds = 0;
  uint64_t max_fds = 0;
  uint64_t threads = 0;
};

ProcessStats read_process_stats();
// Of another process, without its descriptors; zeros once it is gone.
ProcessStats read_process_stats(int pid);

}  // namespace kvferry::ops
