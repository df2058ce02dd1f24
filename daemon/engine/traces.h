// Timelines of transfers, also of those that are gone: a bounded number, for a bounded time.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "daemon/engine/snapshot.h"
#include "daemon/engine/state.h"

namespace kvferry::engine {

inline constexpr std::size_t kMostKeptTraces = 1024;
inline constexpr Duration kTraceLife = std::chrono::minutes(10);

TransferView view_of(const Transfer& transfer, Role role, Time now);
TransferTrace trace_of(const Transfer& transfer, Role role, Time now);
// A leg of the transfer goes to that node. Beyond a bound of nodes the rest is not noted.
void note_node(Transfer& transfer, const Link& link);
bool wanted(const TraceQuery& query, const TransferTrace& trace);
bool wanted(const TraceQuery& query, const Transfer& transfer, Role role);

class Traces {
 public:
  // The transfer is forgotten from now on.
  void keep(TransferTrace trace, Time now);
  // The youngest first, as long as there is room in `out`.
  void find(const TraceQuery& query, Time now, std::vector<TransferTrace>& out) const;

 private:
  struct Kept {
    Time since;
    TransferTrace trace;
  };
  std::deque<Kept> kept_;  // the oldest first
};

}  // namespace kvferry::engine
