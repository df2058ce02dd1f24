// What all runs of a process have seen together: a simulator that never meets a case proves nothing
// about it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "daemon/base/reason.h"
#include "daemon/engine/snapshot.h"

namespace kvferry::sim {

struct Totals {
  uint64_t completed = 0;
  uint64_t delivered = 0;
  uint64_t resent_slices = 0;
  std::map<std::string, uint64_t> reasons;  // of ends that are no success
  engine::EngineStats engine{};

  void add(const engine::EngineStats& stats);
  void add(const Totals& run);
  void print() const;
  // The name of something that never happened; empty if all did.
  std::string missing() const;
};

}  // namespace kvferry::sim
