// What the UCX of the rails process can do, asked of `kvferry-rails --capabilities`: whoever asks
// links and loads no UCX. The answer is taken as hostile: bounded, printable, checked.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/units.h"

namespace kvferry::rails {

struct RailsCapabilities {
  std::string executable;     // that was asked
  std::string ucx_version;    // of the library that runs: "1.22.0"
  std::string ucx_built_for;  // of the headers it was compiled with
  // Memory that a context with cuda_copy takes: "host", and "cuda" where UCX has CUDA modules, they
  // load, and the driver has a device.
  std::vector<std::string> memory_types;
  // "tcp/eth0", "posix/memory", "cuda_copy/cuda": what UCX finds on this machine.
  std::vector<std::string> transports;
  // Why there is no "cuda" above, as far as the process knows; empty where there is.
  std::string cuda_missing;

  bool has_cuda() const;
};

// Where the rails process's executable is: `configured`, or if that is empty `kvferry-rails` beside
// the running executable, else ../libexec/kvferry/kvferry-rails. Fails with RAILS_NOT_FOUND.
Result<std::string> find_rails_executable(const std::string& configured);

// Runs the executable (found as above) in the environment that the rails get, and waits at most
// `timeout` for its end. `cuda_driver`: the driver's library, empty for the default name. Errors:
// RAILS_NOT_FOUND, RAILS_SPAWN_FAILED, CAPABILITIES_TIMEOUT, CAPABILITIES_INVALID (it failed, or
// what it said is no answer). Blocks; the calling thread must live until it returns.
// `more_environment`: "NAME=value" lines for tests.
Result<RailsCapabilities> query_capabilities(const std::string& executable,
                                             const std::string& cuda_driver, Duration timeout,
                                             const std::vector<std::string>& more_environment = {});

// The answer itself: "key=value" lines. CAPABILITIES_INVALID.
Result<RailsCapabilities> parse_capabilities(std::string_view text);

}  // namespace kvferry::rails
