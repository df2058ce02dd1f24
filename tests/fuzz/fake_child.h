// The rails process as a fuzz target plays it, within its own process. One at a time.
#pragma once

#include <optional>

#include "daemon/base/unique_fd.h"
#include "daemon/rails/child_process.h"
#include "daemon/rails/records.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::fuzz {

struct FakeChild {
  rails::Setup setup;
  std::optional<rails::SharedLayout> layout;
  rails::Mapping memory;  // this side's mapping of the rings and slots
  UniqueFd channel;       // for last words
  bool killed = false;    // by the main process
  bool exited = false;    // set by the target
};

// Fresh with every ChildProcess::spawn.
FakeChild& fake_child();

}  // namespace kvferry::fuzz
