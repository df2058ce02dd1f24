#include "daemon/base/reason.h"

#include <array>

namespace kvferry {
namespace {

constexpr std::array<std::string_view, kReasonCount> kNames = {
    "NONE",           "CANCELLED",        "DEADLINE",         "EXPIRED",         "DECLINED",
    "RELEASED",       "REFUSED",          "PERMISSION",       "NO_SEND",         "STALE_CARDS",
    "INCOMPATIBLE",   "NOT_OFFERED",      "LAYOUT_MISMATCH",  "PROTOCOL",        "DATA_LOSS",
    "NOT_READY",      "GATHER_FAILED",    "SCATTER_FAILED",   "PEER_LOST",       "WORKER_LOST",
    "UNREGISTERED",   "DAEMON_RESTARTED", "SHUTDOWN",         "ARENA_EXHAUSTED", "AUX_MISSING",
    "TOO_FRAGMENTED", "PEER_NOT_ALLOWED", "PEER_UNREACHABLE", "UCX_MISMATCH",    "INTERNAL"};

}  // namespace

std::string_view name_of(Reason reason) {
  const auto index = static_cast<uint16_t>(reason);
  return index < kNames.size() ? kNames[index] : "UNKNOWN";
}

Reason reason_from_wire(uint16_t number) {
  return number < kReasonCount ? static_cast<Reason>(number) : Reason::kProtocol;
}

}  // namespace kvferry
