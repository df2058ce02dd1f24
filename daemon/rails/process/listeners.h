// The TCP listeners of this process, which UCX opens by itself: who may reach them is checked by
// looking at them, not at the settings.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/rails/records.h"

namespace kvferry::rails {

struct Listener {
  int fd = -1;
  uint16_t port = 0;
  std::string address;  // numeric
  bool any_address = false;
};

std::vector<Listener> tcp_listeners();

// Whether it still does.
bool listens(const Listener& listener);

// Of those in `now`, the ones whose descriptor is not in `before`.
std::vector<Listener> added_listeners(const std::vector<Listener>& before,
                                      const std::vector<Listener>& now);

// SELFTEST_FAILED unless there is a listener, every port is in the set-up's range and every address
// is one of the rail's device.
Status check_listeners(const std::vector<Listener>& listeners, const Setup& setup,
                       const SetupRail& rail);

}  // namespace kvferry::rails
