// Two network namespaces joined by Ethernet devices of a chosen speed that can be cut. What goes by
// a road goes through the test's process: a tap device on each side, a thread for each direction.
// Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN), /dev/net/tun, nsenter and unshare.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/unique_fd.h"

namespace kvferry::testing {

class Roads {
 public:
  // Of one side's devices road0, road1, ..., with addresses 10.77.<road>.<side + 1>.
  static constexpr int kSides = 2;

  // Why there can be none here, or no program inside; empty if there can. Makes one to find out.
  static std::string why_not();
  // One road for each speed, in bytes a second. Fails the test where one cannot be made.
  explicit Roads(const std::vector<uint64_t>& speeds);
  ~Roads();
  Roads(const Roads&) = delete;
  Roads& operator=(const Roads&) = delete;

  // Words of a shell that run the program behind them in the side's namespace, as long as this
  // object lives. UCX looks for devices in /sys, which shows the namespace that it was mounted in.
  std::string inside(int side) const;
  // From now on nothing passes, and nobody is told; or everything passes again. Any thread.
  void cut(std::size_t road) { roads_[road]->cut = true; }
  void mend(std::size_t road) { roads_[road]->cut = false; }
  uint64_t carried_bytes(std::size_t road) const { return roads_[road]->carried; }

 private:
  struct Road {
    uint64_t speed = 0;
    UniqueFd taps[kSides];
    std::atomic<bool> cut{false};
    std::atomic<uint64_t> carried{0};
  };
  void carry(Road& road, int from);

  UniqueFd namespaces_[kSides];
  UniqueFd stop_;  // readable when the threads are to end
  std::vector<std::unique_ptr<Road>> roads_;
  std::vector<std::thread> threads_;
};

}  // namespace kvferry::testing
