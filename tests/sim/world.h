// The simulated world: virtual time, a queue of what happens next, and the parts that make it
// happen. One thread. Everything that happens follows from the scenario.
#pragma once

#include <functional>
#include <memory>
#include <queue>
#include <string>
#include <vector>

#include "daemon/base/units.h"
#include "tests/sim/rng.h"
#include "tests/sim/scenario.h"
#include "tests/sim/totals.h"
#include "tests/sim/trace.h"
#include "tests/sim/violation.h"

namespace kvferry::sim {

class Node;
class Network;
class Hostile;
class Workload;

class World {
 public:
  World(Scenario scenario, Trace& trace);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // The whole run. Throws Violation.
  void run();

  Time now() const { return now_; }
  void after(Duration delay, std::function<void()> what);
  // ... unless that daemon has died by then.
  void after_on(uint32_t node, Duration delay, std::function<void()> what);
  void note(const std::string& text) { trace.note(now_, text); }

  // Whether things still go wrong.
  bool faulty() const { return now_.ns < scenario.faults.until.count(); }
  // True in `permille` of the calls as long as things go wrong.
  bool mishap(uint32_t permille) { return permille != 0 && faulty() && rng.chance(permille); }

  const Scenario scenario;
  Trace& trace;
  Rng rng;
  std::vector<std::unique_ptr<Node>> nodes;
  std::unique_ptr<Network> network;
  std::unique_ptr<Hostile> hostile;  // null in most runs
  std::unique_ptr<Workload> workload;
  uint64_t steps = 0;
  Totals totals;

 private:
  struct Happening {
    Time at;
    uint64_t order;
    std::function<void()> what;
    bool operator>(const Happening& other) const {
      return std::pair(at, order) > std::pair(other.at, other.order);
    }
  };
  bool step();
  void plan_network_faults();
  void plan_deaths();
  Duration moment();
  uint32_t some_node() { return static_cast<uint32_t>(rng.below(nodes.size())); }
  void finish();
  void look_after_lent();
  void print_state() const;

  Time now_{};
  Time next_credit_look_{};
  uint64_t order_ = 0;
  std::priority_queue<Happening, std::vector<Happening>, std::greater<>> queue_;
};

}  // namespace kvferry::sim
