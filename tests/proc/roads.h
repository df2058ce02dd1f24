// Two network namespaces joined by Ethernet devices of a chosen speed that can be cut, can lose
// frames and can take their time. What goes by a road goes through the test's process: a tap device
// on each side, a thread for each direction.
// Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN), /dev/net/tun, nsenter and unshare.
#pragma once

#include <atomic>
#include <chrono>
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
  std::string inside(int side) const { return in_network(side) + " sh -c '" + kOwnSys + "'"; }
  // The same as words of a command line, the first of them a path.
  std::vector<std::string> inside_words(int side) const;
  // The side's namespace.
  int network(int side) const { return namespaces_[side].get(); }
  static std::string address(std::size_t road, int side) {
    return "10.77." + std::to_string(road) + "." + std::to_string(side + 1);
  }

  // What befalls frames from now on; what passes one way is that side's to send. Any thread.
  // Nothing passes, and nobody is told; or everything passes again.
  void cut(std::size_t road) { cut(road, 0), cut(road, 1); }
  void cut(std::size_t road, int from) { roads_[road]->cut[from] = true; }
  void mend(std::size_t road) { roads_[road]->cut[0] = roads_[road]->cut[1] = false; }
  // So many frames of a thousand are lost, each way.
  void lose(std::size_t road, uint32_t per_mille) { roads_[road]->lost_per_mille = per_mille; }
  // Each frame takes so long, each way.
  void delay(std::size_t road, std::chrono::milliseconds time) { roads_[road]->delay = time; }

  // Both directions together.
  uint64_t carried_bytes(std::size_t road) const { return roads_[road]->carried; }
  uint64_t lost_frames(std::size_t road) const { return roads_[road]->lost; }

 private:
  static constexpr const char* kOwnSys = "mount -t sysfs none /sys && exec \"$0\" \"$@\"";

  struct Road {
    uint64_t speed = 0;
    UniqueFd taps[kSides];
    std::atomic<bool> cut[kSides]{};  // by the side that sends
    std::atomic<uint32_t> lost_per_mille{0};
    std::atomic<std::chrono::milliseconds> delay{std::chrono::milliseconds(0)};
    std::atomic<uint64_t> carried{0};
    std::atomic<uint64_t> lost{0};
  };
  std::string in_network(int side) const;
  // Waits for a frame at that tap (none: -1), at most so long; whether the thread is to end.
  bool stops_while_waiting(int tap, std::chrono::nanoseconds limit) const;
  void carry(Road& road, int from);

  UniqueFd namespaces_[kSides];
  UniqueFd stop_;  // readable when the threads are to end
  std::vector<std::unique_ptr<Road>> roads_;
  std::vector<std::thread> threads_;
};

}  // namespace kvferry::testing
