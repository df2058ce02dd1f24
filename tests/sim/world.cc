#include "tests/sim/world.h"

#include <algorithm>
#include <cstdio>

#include "tests/sim/hostile.h"
#include "tests/sim/network.h"
#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

// More than any run takes; one that takes more does not come to rest.
constexpr uint64_t kMostSteps = 3'000'000;
// By then everything has met its limits (limits of the workload, once waited for and once run) ...
constexpr Duration kRest = seconds(60);
// ... and after that what is held is given back.
constexpr Duration kTidy = seconds(3);
// How often an operator looks at what is lent.
constexpr Duration kLook = milliseconds(200);
// ... and how often credits are looked at, where nothing is on the way.
constexpr Duration kCreditLook = std::chrono::microseconds(200);

}  // namespace

World::World(Scenario scenario_in, Trace& trace_in)
    : scenario(std::move(scenario_in)), trace(trace_in), rng(mix(scenario.seed ^ 0x3012D)) {
  for (uint32_t n = 0; n < scenario.nodes; ++n) nodes.push_back(std::make_unique<Node>(*this, n));
  network = std::make_unique<Network>(*this);
  if (scenario.hostile.acts != 0) hostile = std::make_unique<Hostile>(*this);
  workload = std::make_unique<Workload>(*this);
}

World::~World() = default;

void World::after(Duration delay, std::function<void()> what) {
  queue_.push({now_ + delay, order_++, std::move(what)});
}

void World::after_on(uint32_t node, Duration delay, std::function<void()> what) {
  after(delay, [this, node, life = nodes[node]->life(), what = std::move(what)] {
    if (nodes[node]->alive() && nodes[node]->life() == life) what();
  });
}

bool World::step() {
  if (queue_.empty()) return false;
  // The queue owns the function until it is popped, and it may push.
  Happening next = std::move(const_cast<Happening&>(queue_.top()));
  queue_.pop();
  now_ = next.at;
  if (++steps > kMostSteps) throw Violation("rest", "the run does not come to rest");
  next.what();
  if (now_ >= next_credit_look_) {
    totals.credits_known += network->check_credits();
    next_credit_look_ = now_ + kCreditLook;
  }
  return true;
}

// Some moment at which things still go wrong.
Duration World::moment() {
  return Duration(
      static_cast<int64_t>(rng.below(static_cast<uint64_t>(scenario.faults.until.count()))));
}

void World::plan_network_faults() {
  const Faults& faults = scenario.faults;
  for (uint32_t i = 0; i < faults.lane_breaks; ++i)
    after(moment(), [this] { network->break_some_wire(rng); });
  for (uint32_t i = 0; i < faults.stalls; ++i)
    after(moment(), [this] {
      // Long enough to be silent for, where ends are part of the game.
      const uint64_t most = scenario.profile == Profile::kChaos ? 600000 : 150000;
      nodes[some_node()]->stall(rng.micros(1000, most));
    });
  Rng leaps(scenario.seed ^ 0x1EA9);
  for (uint32_t i = 0; i < faults.leaps; ++i) {
    const auto at =
        Duration(static_cast<int64_t>(leaps.below(static_cast<uint64_t>(faults.until.count()))));
    const auto node = static_cast<uint32_t>(leaps.below(nodes.size()));
    // Some by less than a peer may be silent for, some by more than anything may wait for.
    const uint64_t most = leaps.chance(400) ? 600'000 : 120'000'000;
    after(at, [this, node, by = leaps.micros(50'000, most)] { nodes[node]->leap(by); });
  }
  for (uint32_t i = 0; i < faults.partitions; ++i)
    after(moment(), [this] {
      const uint32_t a = some_node();
      const auto b = static_cast<uint32_t>((a + 1) % nodes.size());
      network->partition(a, b, rng.micros(10000, 900000));
    });
}

void World::plan_deaths() {
  const Faults& faults = scenario.faults;
  for (uint32_t i = 0; i < faults.rails_deaths; ++i)
    after(moment(), [this] { nodes[some_node()]->rails_die(rng.micros(1000, 150000)); });
  for (uint32_t i = 0; i < faults.worker_deaths; ++i)
    after(moment(), [this] { workload->worker_dies(); });
  for (uint32_t i = 0; i < faults.unregisters; ++i)
    after(moment(), [this] { workload->unregister_something(); });
  for (uint32_t i = 0; i < faults.daemon_deaths; ++i)
    after(moment(), [this] { nodes[some_node()]->die(); });
  for (uint32_t i = 0; i < faults.drains; ++i)
    after(moment(), [this] { nodes[some_node()]->drain(rng.micros(0, 500000)); });
}

void World::run() {
  for (auto& node : nodes) node->start();
  workload->plan();
  if (hostile) hostile->plan();
  plan_network_faults();
  plan_deaths();
  try {
    const Time rest{scenario.faults.until.count() + kRest.count()};
    Time next_look{};
    while (!workload->finished() && now_ < rest) {
      if (now_ >= next_look) {
        look_after_lent();
        next_look = now_ + kLook;
      }
      if (!step()) break;
    }
    workload->check_finished();
    finish();
  } catch (const Violation&) {
    if (trace.verbose()) print_state();
    throw;
  }
}

// What the daemons hold: printed where a run has failed.
void World::print_state() const {
  for (const auto& node : nodes) {
    if (!node->alive()) continue;
    const engine::EngineSnapshot snapshot = node->snapshot();
    for (std::size_t i = 0; i < snapshot.arenas.size(); ++i) {
      const engine::ArenaView& arena = snapshot.arenas[i];
      std::printf(
          "%s: arena %zu %llu free %llu granted %llu landing %llu landed %llu scattering %llu "
          "quarantined %llu staging %llu\n",
          node->name().c_str(), i, static_cast<unsigned long long>(arena.total_bytes),
          static_cast<unsigned long long>(arena.free_bytes),
          static_cast<unsigned long long>(arena.granted_bytes),
          static_cast<unsigned long long>(arena.landing_bytes),
          static_cast<unsigned long long>(arena.landed_bytes),
          static_cast<unsigned long long>(arena.scattering_bytes),
          static_cast<unsigned long long>(arena.quarantined_bytes),
          static_cast<unsigned long long>(arena.staging_bytes));
    }
    for (const auto& link : snapshot.links)
      std::printf("  link to %s legs in %u out %u parked %u\n", link.node.c_str(), link.legs_in,
                  link.legs_out, link.parked);
    for (const auto& transfer : snapshot.transfers)
      std::printf("  transfer %s rank %u %s state %d bytes %llu/%llu\n", transfer.id.c_str(),
                  transfer.rank, transfer.role == engine::Role::kSender ? "sender" : "receiver",
                  static_cast<int>(transfer.state),
                  static_cast<unsigned long long>(transfer.bytes_done),
                  static_cast<unsigned long long>(transfer.bytes_total));
  }
}

// An operator sees what is quarantined. Of a life that is over, on another host, he vouches for
// that; to one that lives he has the daemon linked again, so that it can say so itself.
void World::look_after_lent() {
  if (scenario.mapped == 0) return;
  for (const auto& node : nodes) {
    if (!node->alive()) continue;
    for (const engine::LentView& lent : node->snapshot().lent) {
      if (lent.linked) continue;
      if (hostile && lent.node == Hostile::kName) {
        if (hostile->gone() && !scenario.one_host(node->index(), hostile->index()))
          node->post(engine::ReleaseQuarantine{1, lent.node, lent.boot});
        continue;
      }
      const auto peer = std::find_if(nodes.begin(), nodes.end(),
                                     [&](const auto& of) { return of->name() == lent.node; });
      const uint32_t index = (*peer)->index();
      if ((*peer)->alive() && (*peer)->boot() == lent.boot) {
        ++totals.asked_again;
        if (!network->link_up(node->index(), index)) network->dial(node->index(), index);
      } else if (!scenario.one_host(node->index(), index)) {
        node->post(engine::ReleaseQuarantine{1, lent.node, lent.boot});
      }
    }
  }
}

// All has ended and is closed: what the daemons still hold must come back.
void World::finish() {
  const auto tidy = [this] {
    for (const auto& node : nodes) {
      if (!node->alive()) return false;
      const engine::EngineSnapshot snapshot = node->snapshot();
      if (snapshot.reservations != 0 || snapshot.reuse_pins != 0 || snapshot.packed_bytes != 0)
        return false;
      if (!snapshot.transfers.empty()) return false;
      for (const engine::ArenaView& arena : snapshot.arenas)
        if (arena.free_bytes != arena.total_bytes) return false;
      for (const auto& link : snapshot.links)
        if (link.legs_in + link.legs_out + link.parked != 0) return false;
      if (node->uses() != 0 || node->watches() != 0) return false;
    }
    return true;
  };
  // Parked pulls and quarantined regions may outlive their transfers until their own limits.
  const Time limit = now_ + kRest;
  Time next_look = now_;
  while (now_ < limit) {
    if (now_ >= next_look) {
      if (tidy()) break;
      look_after_lent();
      next_look = now_ + kLook;
      after(kLook, [] {});  // so that no step passes it by
    }
    if (!step()) break;
  }
  const Time quiet = now_ + kTidy;
  while (now_ < quiet && step()) {
  }
  for (const auto& node : nodes) {
    require(node->alive(), "leak", "a daemon is down at the end");
    const engine::EngineSnapshot snapshot = node->snapshot();
    const auto leak = [&](const std::string& what) {
      throw Violation("leak", node->name() + " still has " + what);
    };
    if (!snapshot.transfers.empty())
      leak(std::to_string(snapshot.transfers.size()) + " transfers, the first " +
           snapshot.transfers[0].id);
    for (const engine::ArenaView& arena : snapshot.arenas) {
      if (arena.free_bytes != arena.total_bytes)
        leak("arena bytes: granted " + std::to_string(arena.granted_bytes) + " landing " +
             std::to_string(arena.landing_bytes) + " landed " + std::to_string(arena.landed_bytes) +
             " scattering " + std::to_string(arena.scattering_bytes) + " quarantined " +
             std::to_string(arena.quarantined_bytes) + " staging " +
             std::to_string(arena.staging_bytes));
      if (arena.reserved_bytes != 0) leak("promises");
    }
    for (const auto& link : snapshot.links)
      if (link.legs_in + link.legs_out + link.parked != 0)
        leak("legs on a link: in " + std::to_string(link.legs_in) + " out " +
             std::to_string(link.legs_out) + " parked " + std::to_string(link.parked));
    if (snapshot.reservations != 0) leak("reservations");
    if (snapshot.packed_bytes != 0 || snapshot.packed_copies != 0) leak("packed copies");
    if (snapshot.reuse_entries != 0) leak("blocks that can be found");
    if (snapshot.reuse_pins != 0) leak("pins");
    if (node->uses() != 0) leak("copies or requests that use its arena");
    if (node->watches() != 0) leak("conditions that it watches");
    network->check_idle(node->index());
    if (hostile) hostile->check_idle(node->index());
    node->engine().check_invariants();
    for (const uint64_t count : node->engine().stats().dropped) trace.fold(count);
    trace.fold(node->engine().stats().bytes_received);
    totals.add(node->engine().stats());
  }
  workload->final_checks();
  workload->count(totals);
}

}  // namespace kvferry::sim
