// What a daemon and its rails process have open, to be compared with what they had before.
#pragma once

#include <cstddef>
#include <string>

#include "client/bench/daemons.h"

namespace kvferry::testing {

// Wholly free arenas and no transfers go without saying.
struct Level {
  std::size_t descriptors = 0;
  std::size_t mappings = 0;
  std::size_t rails_descriptors = 0;
  double workers = 0;
  double pool_bytes = 0;
  // Nothing here is more than it was in `before`.
  bool within(const Level& before) const;
  std::string text() const;
};

Level level_of(const bench::DaemonProcess& daemon);

}  // namespace kvferry::testing
