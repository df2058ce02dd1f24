// What happened in a run: folded into a hash (equal seeds must give equal hashes) and, when asked,
// printed line by line.
#pragma once

#include <cstdint>
#include <string>

#include "daemon/engine/commands.h"
#include "daemon/engine/events.h"

namespace kvferry::sim {

class Trace {
 public:
  explicit Trace(bool verbose) : verbose_(verbose) {}

  void event(Time now, uint32_t node, const engine::Event& event);
  void command(Time now, uint32_t node, const engine::Command& command);
  // Something of the world: a fault, a death.
  void note(Time now, const std::string& text);
  void fold(uint64_t value);

  bool verbose() const { return verbose_; }
  uint64_t hash() const { return hash_; }

 private:
  void print(Time now, int node, const std::string& text) const;
  uint64_t hash_ = 0;
  bool verbose_;
};

std::string describe(const engine::ControlMessage& message);
std::string describe(const engine::Event& event);
std::string describe(const engine::Command& command);
std::string describe(const engine::TransferRecord& record);

}  // namespace kvferry::sim
