// Tells systemd how the daemon is: READY, STATUS, STOPPING, WATCHDOG. Every call does nothing when
// the daemon was not started by a service manager (NOTIFY_SOCKET unset). Any thread; never blocks
// (a datagram).
#pragma once

#include <optional>
#include <string_view>

#include "daemon/base/units.h"

namespace kvferry::ops {

class ServiceManager {
 public:
  // Reads the watchdog's settings from the environment once.
  ServiceManager();

  bool present() const { return present_; }
  // Serving now: after listeners, arenas and the first rails are up.
  void ready(std::string_view status);
  // One line for `systemctl status`.
  void status(std::string_view line);
  void stopping(std::string_view status);
  // A drain goes on for at most this much longer.
  void extend_timeout(Duration more);

  // How often to ping at most: half of what the unit asks for; nothing when it asks for none.
  std::optional<Duration> watchdog_interval() const { return watchdog_interval_; }
  // Only while every thread has ticked (Watchdog::stale() is empty).
  void watchdog_ping();

 private:
  bool present_ = false;
  std::optional<Duration> watchdog_interval_;
};

}  // namespace kvferry::ops
