// A broken promise of the engine, or a mistake of the simulator. Ends the run.
#pragma once

#include <stdexcept>
#include <string>

namespace kvferry::sim {

struct Violation : std::runtime_error {
  Violation(std::string name_in, const std::string& detail)
      : std::runtime_error(detail), name(std::move(name_in)) {}
  std::string name;  // of the invariant
};

inline void require(bool holds, const char* name, const char* detail) {
  if (!holds) throw Violation(name, detail);
}

}  // namespace kvferry::sim
