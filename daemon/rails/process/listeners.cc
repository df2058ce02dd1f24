#include "daemon/rails/process/listeners.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>

namespace kvferry::rails {
namespace {

// Numeric form, port and whether it is the any-address; false for other families.
bool describe(const sockaddr* address, Listener& out) {
  char text[INET6_ADDRSTRLEN] = {};
  if (address->sa_family == AF_INET) {
    sockaddr_in v4;
    std::memcpy(&v4, address, sizeof v4);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
    out.port = ntohs(v4.sin_port);
    out.any_address = v4.sin_addr.s_addr == htonl(INADDR_ANY);
  } else if (address->sa_family == AF_INET6) {
    sockaddr_in6 v6;
    std::memcpy(&v6, address, sizeof v6);
    inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
    out.port = ntohs(v6.sin6_port);
    out.any_address = IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr);
  } else {
    return false;
  }
  out.address = text;
  return true;
}

std::vector<std::string> addresses_of(const std::string& device) {
  std::vector<std::string> addresses;
  ifaddrs* first = nullptr;
  if (getifaddrs(&first) != 0) return addresses;
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> owner(first, &freeifaddrs);
  for (const ifaddrs* at = first; at != nullptr; at = at->ifa_next) {
    Listener described;
    if (device == at->ifa_name && at->ifa_addr != nullptr && describe(at->ifa_addr, described))
      addresses.push_back(described.address);
  }
  return addresses;
}

tl::unexpected<Error> failed(std::string what) {
  return fail(Code::kFailedPrecondition, "SELFTEST_FAILED", std::move(what));
}

}  // namespace

bool listens(const Listener& listener) {
  int listening = 0;
  socklen_t bytes = sizeof listening;
  return getsockopt(listener.fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &bytes) == 0 &&
         listening != 0;
}

std::vector<Listener> tcp_listeners() {
  std::vector<Listener> listeners;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", error)) {
    Listener listener;
    listener.fd = std::atoi(entry.path().filename().c_str());
    if (!listens(listener)) continue;
    sockaddr_storage address = {};
    socklen_t bytes = sizeof address;
    auto* const generic = reinterpret_cast<sockaddr*>(&address);
    if (getsockname(listener.fd, generic, &bytes) == 0 && describe(generic, listener))
      listeners.push_back(listener);
  }
  return listeners;
}

std::vector<Listener> added_listeners(const std::vector<Listener>& before,
                                      const std::vector<Listener>& now) {
  std::vector<Listener> added;
  for (const Listener& listener : now)
    if (std::none_of(before.begin(), before.end(),
                     [&](const Listener& old) { return old.fd == listener.fd; }))
      added.push_back(listener);
  return added;
}

Status check_listeners(const std::vector<Listener>& listeners, const Setup& setup,
                       const SetupRail& rail) {
  if (listeners.empty()) return failed("UCX has no tcp listener");
  const std::string device = rail.device;
  const std::vector<std::string> allowed = addresses_of(device);
  for (const Listener& listener : listeners) {
    const std::string name = listener.address + " port " + std::to_string(listener.port);
    if (setup.port_first != 0 &&
        (listener.port < setup.port_first || listener.port > setup.port_last))
      return failed("listener " + name + " is outside the port range");
    if (device.empty()) continue;
    if (listener.any_address ||
        std::find(allowed.begin(), allowed.end(), listener.address) == allowed.end())
      return failed("listener " + name + " is not bound to " + device);
  }
  return {};
}

}  // namespace kvferry::rails
