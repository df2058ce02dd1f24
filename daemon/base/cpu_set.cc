#include "daemon/base/cpu_set.h"

#include <sched.h>

#include "daemon/base/result.h"

namespace kvferry {

std::string to_string(const CpuSet& cpus) {
  std::string out;
  for (std::size_t first = 0; first < cpus.size(); ++first) {
    if (!cpus.test(first)) continue;
    std::size_t last = first;
    while (last + 1 < cpus.size() && cpus.test(last + 1)) ++last;
    out += (out.empty() ? "" : ",") + std::to_string(first);
    if (last != first) out += "-" + std::to_string(last);
    first = last;
  }
  return out;
}

int bind_thread(pthread_t thread, const CpuSet& cpus) {
  static_assert(CPU_SETSIZE == CpuSet().size());
  cpu_set_t set;
  CPU_ZERO(&set);
  for (std::size_t cpu = 0; cpu < cpus.size(); ++cpu)
    if (cpus.test(cpu)) CPU_SET(cpu, &set);
  return ::pthread_setaffinity_np(thread, sizeof set, &set);
}

std::string binding_error(int errno_value) {
  return fail_errno({}, "pthread_setaffinity_np", errno_value).value().message;
}

}  // namespace kvferry
