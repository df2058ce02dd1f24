#include "daemon/rails/ucx_environment.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string_view>

namespace kvferry::rails {
namespace {

// What a promise of the daemon rests on. A trailing '*' stands for any rest.
constexpr std::array kDenied = std::to_array<std::string_view>({
    "PROTO_*",        // evidence that a request ended exists in protocol v1 only
    "HANDLE_ERRORS",  // signal handlers
    "ERROR_*",        //
    "DEBUG_*",        //
    "ASYNC_*",        //
    "VFS_*",          // a socket of UCX's own
    "MEM_*",          // memory hooks
    "MEMTYPE_CACHE",  // works by the hooks
    "RNDV_SCHEME",    // copies to and from devices are over when their request is
    "RNDV_SHM_PPLN_ENABLE",
    "MODULE*",         // loads code
    "CONFIG_*",        //
    "LOG_*",           // writes files
    "STATS_*",         //
    "PROFILE_*",       //
    "MEMTRACK_*",      //
    "TLS",             // one transport per rail, chosen by the rail
    "NET_DEVICES",     //
    "SHM_DEVICES",     //
    "ACC_DEVICES",     //
    "SELF_DEVICES",    //
    "TCP_PORT_RANGE",  // rails.port_range
    "TCP_PUT_ENABLE",  // a socket may go on receiving after its endpoint is gone
    "TCP_CM_*",        //
    "TCP_BRIDGE_*",    //
    "TCP_PREFER_*",    // reads a file for each connection
    "POSIX_ERROR_HANDLING",
    "POSIX_DIR",
    "POSIX_SEG_SIZE",  // UCX 1.13 keeps a segment's length in 16 bits and aborts at 64 KiB
    "SYSV_*",
    "KEEPALIVE_INTERVAL",  // how a peer's death is noticed over shared memory
    "CMA_*",               // the peer's process would do the writing
    "KNEM_*",
    "XPMEM_*",
    "CUDA_*",
    "SOCKADDR_*",
    "WARN_UNUSED_ENV_VARS",
});

bool is_denied(std::string_view name) {
  return std::any_of(kDenied.begin(), kDenied.end(), [name](std::string_view rule) {
    if (rule.ends_with('*')) return name.starts_with(rule.substr(0, rule.size() - 1));
    return name == rule;
  });
}

std::string_view bare(std::string_view name) {
  constexpr std::string_view kPrefix = "UCX_";
  return name.starts_with(kPrefix) ? name.substr(kPrefix.size()) : name;
}

// What the CUDA driver reads that decides which devices there are, or who speaks to them.
constexpr const char* kDriverVariables[] = {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",
                                            "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"};

}  // namespace

Status check_ucx_overrides(const std::map<std::string, std::string>& overrides) {
  for (const auto& [name, value] : overrides) {
    const std::string_view key = bare(name);
    const bool good_name =
        !key.empty() && key.size() <= 63 && std::all_of(key.begin(), key.end(), [](char c) {
          return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
        });
    if (!good_name)
      return invalid("ucx." + name.substr(0, 64), "UCX_OVERRIDE_INVALID",
                     "a name has upper-case letters, digits and '_'");
    const bool good_value =
        value.size() <= 255 &&
        std::all_of(value.begin(), value.end(), [](char c) { return c >= ' ' && c <= '~'; });
    if (!good_value)
      return invalid("ucx." + name, "UCX_OVERRIDE_INVALID", "a value is short printable text");
    if (is_denied(key))
      return invalid("ucx." + name, "UCX_OVERRIDE_DENIED", "set by the daemon itself");
  }
  return {};
}

Result<std::vector<std::string>> make_rails_environment(const UcxSettings& settings) {
  KVFERRY_RETURN_IF_ERROR(check_ucx_overrides(settings.overrides));
  const bool any_port = settings.port_first == 0 && settings.port_last == 0;
  if (!any_port && (settings.port_first == 0 || settings.port_last < settings.port_first))
    return invalid("rails.port_range", "PORT_RANGE_INVALID",
                   std::to_string(settings.port_first) + "-" + std::to_string(settings.port_last));
  std::map<std::string, std::string> names = {
      {"PROTO_ENABLE", "n"},
      {"HANDLE_ERRORS", "none"},
      {"DEBUG_SIGNO", "0"},
      {"VFS_ENABLE", "n"},
      {"MEM_MMAP_HOOK_MODE", "none"},
      {"MEM_CUDA_HOOK_MODE", "none"},
      {"MEMTYPE_CACHE", "n"},
      {"TCP_CM_REUSEADDR", "y"},
      {"TCP_PUT_ENABLE", "n"},
      {"TCP_PREFER_DEFAULT", "n"},
      {"TCP_TX_SEG_SIZE", std::to_string(settings.tcp_segment_bytes)},
      {"TCP_RX_SEG_SIZE", std::to_string(settings.tcp_segment_bytes)},
      {"POSIX_ERROR_HANDLING", "y"},
      {"KEEPALIVE_INTERVAL", "1s"},
      {"WARN_UNUSED_ENV_VARS", "n"},
  };
  if (!any_port)
    names["TCP_PORT_RANGE"] =
        std::to_string(settings.port_first) + "-" + std::to_string(settings.port_last);
  for (const auto& [name, value] : settings.overrides) names[std::string(bare(name))] = value;
  std::vector<std::string> lines;
  lines.reserve(names.size());
  for (const auto& [name, value] : names) lines.push_back("UCX_" + name + "=" + value);
  return lines;
}

std::vector<std::string> inherited_driver_environment() {
  std::vector<std::string> lines;
  for (const char* const name : kDriverVariables)
    if (const char* const value = std::getenv(name); value != nullptr)
      lines.push_back(std::string(name) + "=" + value);
  return lines;
}

}  // namespace kvferry::rails
