// What every life of the rails process is given: configuration and segments, checked, and turned
// into the set-up that it reads.
#pragma once

#include <span>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/rails/rails_client.h"
#include "daemon/rails/rails_process.h"

namespace kvferry::rails {

struct RailsPlan {
  RailsProcess::Plan process;
  std::vector<UniqueFd> segment_fds;  // duplicates, which the plan's point to
};

// Fails as RailsClient::make says.
Result<RailsPlan> plan_rails(const RailsConfig& config, std::span<const Segment> segments);

}  // namespace kvferry::rails
