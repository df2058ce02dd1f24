// What this build is. Fixed at compile time; any thread.
#pragma once

#include <string_view>

namespace kvferry::ops {

std::string_view version();  // "0.1.0"
std::string_view commit();   // "4e38eb5", or "unknown" outside a checkout

}  // namespace kvferry::ops
