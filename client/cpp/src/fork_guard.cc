#include "client/cpp/src/fork_guard.h"

#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>

namespace kvferry::client {
namespace {

// Plain atomics: the child's handler may do only what is safe in a signal handler.
std::array<std::atomic<int>, 4096> registered_fds;  // descriptor + 1; 0: free
std::atomic<uint64_t> generation{1};

void in_child() {
  generation.fetch_add(1, std::memory_order_relaxed);
  for (auto& entry : registered_fds) {
    const int fd = entry.exchange(0, std::memory_order_relaxed) - 1;
    if (fd >= 0) ::close(fd);
  }
}

void install() {
  static const int installed = ::pthread_atfork(nullptr, nullptr, in_child);
  static_cast<void>(installed);
}

}  // namespace

void close_in_children(int fd) {
  if (fd < 0) return;
  install();
  for (auto& entry : registered_fds) {
    int expected = 0;
    if (entry.compare_exchange_strong(expected, fd + 1)) return;
  }
}

void keep_no_more(int fd) {
  if (fd < 0) return;
  for (auto& entry : registered_fds) {
    int expected = fd + 1;
    if (entry.compare_exchange_strong(expected, 0)) return;
  }
}

uint64_t fork_generation() {
  return generation.load(std::memory_order_relaxed);
}

}  // namespace kvferry::client
