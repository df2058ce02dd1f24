// The environment of the rails process: everything UCX reads comes from here, nothing is inherited.
// UCX takes most of it when its libraries are loaded, so it has to stand before exec. The CUDA
// driver's few variables are the exception. Any thread.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "daemon/base/result.h"

namespace kvferry::rails {

struct UcxSettings {
  uint16_t port_first = 0;  // 0: any port
  uint16_t port_last = 0;
  uint64_t tcp_segment_bytes = 256 * 1024;
  // The operator's overrides, names with or without "UCX_".
  std::map<std::string, std::string> overrides;
};

// UCX_OVERRIDE_DENIED (field "ucx.NAME") for a key that carries a promise of this daemon: protocol,
// error handling, signals, memory hooks, transports, devices, ports, other processes' memory.
// UCX_OVERRIDE_INVALID for a name or value that no environment can carry.
Status check_ucx_overrides(const std::map<std::string, std::string>& overrides);

// "NAME=value" lines, complete. Fails as check_ucx_overrides does, and with PORT_RANGE_INVALID.
Result<std::vector<std::string>> make_rails_environment(const UcxSettings& settings);

// "NAME=value" lines of our own environment that say which GPUs the CUDA driver shows and whether
// through MPS: the rails have to see the daemon's devices. For a process that loads the driver.
std::vector<std::string> inherited_driver_environment();

}  // namespace kvferry::rails
