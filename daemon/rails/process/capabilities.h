// What the UCX that this process runs with can do: `kvferry-rails --capabilities`, and the check
// before device memory is registered. Not before the self-test's peers are forked.
#pragma once

#include <string>

#include "daemon/base/result.h"

namespace kvferry::rails {

// "1.22.0", of the library that is loaded.
std::string ucx_version();

// Whether UCX takes device memory as we would register it. FAILED_PRECONDITION UCX_WITHOUT_CUDA
// with what is missing and what helps, or UCX_FAILED.
Status check_device_memory();

// One JSON object, as rails_capabilities.h reads it. `cuda_driver`: its library; empty: the default
// name. Fails with UCX_FAILED.
Result<std::string> capabilities_json(const std::string& cuda_driver);

}  // namespace kvferry::rails
