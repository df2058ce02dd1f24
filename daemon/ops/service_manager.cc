#include "daemon/ops/service_manager.h"

#include <systemd/sd-daemon.h>

#include <cstdlib>
#include <string>

namespace kvferry::ops {
namespace {

// What did not arrive cannot be helped: the service manager's own timeouts answer it.
void notify(const std::string& state) {
  sd_notify(0, state.c_str());
}

// A line break would begin another assignment.
std::string one_line(std::string_view text) {
  std::string out(text.substr(0, 512));
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20) c = ' ';
  return out;
}

}  // namespace

ServiceManager::ServiceManager() : present_(std::getenv("NOTIFY_SOCKET") != nullptr) {
  uint64_t interval_us = 0;
  if (present_ && sd_watchdog_enabled(0, &interval_us) > 0 && interval_us > 1)
    watchdog_interval_ = std::chrono::microseconds(interval_us / 2);
}

void ServiceManager::ready(std::string_view status) {
  notify("READY=1\nSTATUS=" + one_line(status));
}

void ServiceManager::status(std::string_view line) {
  notify("STATUS=" + one_line(line));
}

void ServiceManager::stopping(std::string_view status) {
  notify("STOPPING=1\nSTATUS=" + one_line(status));
}

void ServiceManager::extend_timeout(Duration more) {
  const auto us = std::chrono::duration_cast<std::chrono::microseconds>(more).count();
  notify("EXTEND_TIMEOUT_USEC=" + std::to_string(us));
}

void ServiceManager::watchdog_ping() {
  if (watchdog_interval_) notify("WATCHDOG=1");
}

}  // namespace kvferry::ops
