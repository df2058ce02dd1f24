// Two daemons, an honest pair of workers that hands over and verifies all the time, and the books
// of what the daemons hold: what hostile processes must leave as it is.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/proc/fault_scene.h"
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {

// Hands over on a thread of its own, one after another, with every byte of both pools verified
// after each. A hand-off that ends otherwise, or not within kPatience, is kept as a fault.
class HonestPair {
 public:
  // What a hand-off may end with, beside all being well.
  enum class Tolerate : uint8_t { kNothing, kFailures };

  HonestPair(std::unique_ptr<Party> sender, std::unique_ptr<Party> receiver,
             Tolerate tolerate = Tolerate::kNothing);
  ~HonestPair();
  HonestPair(const HonestPair&) = delete;
  HonestPair& operator=(const HonestPair&) = delete;

  // Waits until so many more have gone well; the test fails with the fault, or if they do not.
  void require_more(uint64_t count = 2);
  uint64_t done() const { return done_.load(); }
  uint64_t failed() const { return failed_.load(); }

 private:
  void run();
  std::string hand_over();
  std::string end(Party& party, const std::string& id, client::TransferState wanted, bool& failed);

  const std::unique_ptr<Party> sender_;
  const std::unique_ptr<Party> receiver_;
  const Tolerate tolerate_;
  std::string ticket_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> done_{0};
  std::atomic<uint64_t> failed_{0};
  std::mutex mutex_;
  std::string fault_;  // the first one; ends the thread
  std::thread thread_;
};

class HostileScene {
 public:
  struct Options {
    std::vector<std::string> settings = {};
    std::string toml = {};  // for both: further sockets and peers; NAME stands for the daemon's
    HonestPair::Tolerate tolerate = HonestPair::Tolerate::kNothing;
  };
  explicit HostileScene(const Options& options);
  ~HostileScene();
  HostileScene(const HostileScene&) = delete;
  HostileScene& operator=(const HostileScene&) = delete;

  bench::DaemonProcess& daemon(int side) { return *daemons_[side]; }  // 0 sender, 1 receiver
  // A file in the daemons' directory.
  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  HonestPair& honest() { return *honest_; }
  // One rank of an instance of its own, on the first socket or another one.
  std::unique_ptr<Party> attach(const std::string& instance, int side, bool sends,
                                const std::string& socket = {});

  // Both daemons are the processes that they were, and hold what they held when the scene began.
  void require_nothing_left();
  std::string log_tail() const;

 private:
  std::string directory_;
  std::unique_ptr<bench::DaemonProcess> daemons_[2];
  std::unique_ptr<HonestPair> honest_;
  Level before_[2];
  uint64_t private_before_[2] = {};
};

// A request of 1 MiB in 32 blocks: short, so that many are handed over.
bench::Shape brief_shape();

}  // namespace kvferry::testing
