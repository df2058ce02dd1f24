#include "daemon/engine/engine.h"

#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {
namespace {

// The core sees the time and the commands of the call under way.
void enter(Core& core, Time now, Commands& out) {
  KVFERRY_CHECK(now >= core.now, "time never goes back");
  core.now = now;
  core.out = &out;
}

}  // namespace

Engine::Engine(EngineConfig config) : core_(std::make_unique<Core>(std::move(config))) {}
Engine::~Engine() = default;

void Engine::handle(Event event, Time now, Commands& out) {
  enter(*core_, now, out);
  core_->handle(std::move(event));
}

void Engine::advance(Time now, Commands& out) {
  enter(*core_, now, out);
  core_->advance();
}

void Engine::flush(Time now, Commands& out) {
  enter(*core_, now, out);
  core_->flush();
}

Time Engine::next_timer() const {
  return core_->timers.next();
}

EngineSnapshot Engine::snapshot(Time now) const {
  return core_->snapshot(now);
}

std::vector<TransferTrace> Engine::traces(const TraceQuery& query, Time now) const {
  return core_->find_traces(query, now);
}

const EngineStats& Engine::stats() const {
  return core_->stats;
}

Lent Engine::lent(const memory::Region& region) const {
  return core_->receiver.lent(region);
}

std::vector<LiveCredit> Engine::live_credits() const {
  return core_->live_credits();
}

bool Engine::knows(LinkId link, const PullId& pull, CreditId credit) const {
  return core_->knows(link, pull, credit);
}

void Engine::check_invariants() const {
  core_->check_invariants();
}

}  // namespace kvferry::engine
