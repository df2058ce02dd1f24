// What the rails process gets over its channel: checked, and mapped as far as that needs no driver.
// Made once, before any thread.
#pragma once

#include <string_view>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/rails/records.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::rails {

// An arena segment in this process.
struct SegmentMemory {
  std::byte* base = nullptr;  // on a device: its address there, null until it is imported
  uint64_t bytes = 0;
  bool on_device = false;
};

struct ProcessSetup {
  Setup setup;
  SharedLayout layout;
  Mapping shared;
  std::vector<UniqueFd> doorbells;  // one per rail
  // Both in the set-up's order.
  std::vector<SegmentMemory> segments;
  std::vector<UniqueFd> device_fds;  // of segments that are imported by descriptor, else empty
  std::vector<Mapping> host_memory;  // that host segments lie in
};

// How many devices the set-up's segments lie on.
uint32_t device_count(const Setup& setup);

// Receives the set-up, waiting at most `limit` for it, and maps all but device memory. Fails with
// SETUP_INVALID for anything but exactly the message and descriptors of records.h.
Result<ProcessSetup> receive_setup(int channel, Duration limit);

// Last words: to the main process, and to standard error for the journal.
void say(int channel, std::string_view text);

}  // namespace kvferry::rails
