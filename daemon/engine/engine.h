// The engine: all transfers, legs, chunks, credits, regions, links and lanes of a daemon, as one
// deterministic state machine. (state, event, now) -> (state, commands). It does no I/O, reads no
// clock, draws no random number, takes no lock and starts no thread; the same code runs in the
// daemon and in the simulator.
//
// One thread owns an Engine. A caller feeds events, then calls flush() once for the batch, and
// carries out the commands in order:
//
//   for (event : batch) engine.handle(std::move(event), now, commands);
//   engine.advance(now, commands);   // timers that are due
//   engine.flush(now, commands);     // grants, UPDATEs and status records of the whole batch
//
// A broken invariant ends the process: going on could write where nothing may be written.
#pragma once

#include <memory>
#include <vector>

#include "daemon/base/units.h"
#include "daemon/engine/commands.h"
#include "daemon/engine/config.h"
#include "daemon/engine/events.h"
#include "daemon/engine/snapshot.h"

namespace kvferry::engine {

class Core;  // the state; daemon/engine/core.h

class Engine {
 public:
  explicit Engine(EngineConfig config);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // `now` never goes back from one call to the next.
  void handle(Event event, Time now, Commands& out);
  void advance(Time now, Commands& out);
  void flush(Time now, Commands& out);

  // When advance() has something to do next; Time::never() if nothing is timed.
  Time next_timer() const;

  EngineSnapshot snapshot(Time now) const;
  // Also of transfers that are gone, kMostKeptTraces of them for kTraceLife (traces.h).
  std::vector<TransferTrace> traces(const TraceQuery& query, Time now) const;
  const EngineStats& stats() const;

  // For tests: who may write that region of a mapped arena by itself now.
  Lent lent(const memory::Region& region) const;
  // ... and, as receiver, which credits are LIVE; as sender, whether it knows that one of a pull of
  // the link's peer, or has ended the pull.
  std::vector<LiveCredit> live_credits() const;
  bool knows(LinkId link, const PullId& pull, CreditId credit) const;

  // Verifies the invariants that connect its tables (regions, credits, chunks, legs); aborts with a
  // message at the first one that is broken. O(state); for tests and debug builds.
  void check_invariants() const;

 private:
  std::unique_ptr<Core> core_;
};

}  // namespace kvferry::engine
