// What the rails process gets over its channel, mapped. Made once, before any thread.
#pragma once

#include <string_view>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/rails/records.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::rails {

struct ProcessSetup {
  Setup setup;
  SharedLayout layout;
  Mapping shared;
  std::vector<UniqueFd> doorbells;  // one per rail
  std::vector<Mapping> segments;
};

// Receives and maps the set-up, waiting at most `limit` for it. Fails with SETUP_INVALID for
// anything but exactly the message and descriptors of records.h.
Result<ProcessSetup> receive_setup(int channel, Duration limit);

// Last words: to the main process, and to standard error for the journal.
void say(int channel, std::string_view text);

}  // namespace kvferry::rails
