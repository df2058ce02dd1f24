// Sets of processors, and threads bound to them. Any thread.
#pragma once

#include <pthread.h>

#include <bitset>
#include <string>

namespace kvferry {

// Processors by the kernel's numbers; those from 1024 on, which the C library's sets do not have
// either, are left out.
using CpuSet = std::bitset<1024>;

// "0-3,8"; empty for none.
std::string to_string(const CpuSet& cpus);

// Lets the thread, and threads that it starts from then on, run on these only. Returns 0, or an
// errno: EINVAL where its cgroup leaves none of them; the thread then runs as before.
int bind_thread(pthread_t thread, const CpuSet& cpus);
// "pthread_setaffinity_np: Invalid argument"
std::string binding_error(int errno_value);

}  // namespace kvferry
