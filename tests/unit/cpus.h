// Which processors a thread may use.
#pragma once

#include <sched.h>

#include "daemon/base/cpu_set.h"

namespace kvferry {

// Of the thread with that id, 0: the calling one. Empty if that cannot be told. Any thread.
inline CpuSet usable_cpus(pid_t thread) {
  CpuSet out;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(thread, sizeof set, &set) != 0) return out;
  for (std::size_t cpu = 0; cpu < out.size(); ++cpu)
    if (CPU_ISSET(cpu, &set)) out.set(cpu);
  return out;
}

}  // namespace kvferry
