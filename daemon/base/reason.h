// Why a transfer, leg or link ended. One list for the wire (as a number), the status table, logs
// and metrics, so that the same word means the same everywhere. Numbers are never reused.
#pragma once

#include <cstdint>
#include <string_view>

namespace kvferry {

enum class Reason : uint16_t {
  kNone = 0,
  kCancelled = 1,        // the caller cancelled
  kDeadline = 2,         // a wait or transfer timer ran out
  kExpired = 3,          // the lease ended and nobody came
  kDeclined = 4,         // the receiver said that it will not come
  kReleased = 5,         // another data-parallel group has the transfer; no failure
  kRefused = 6,          // no receiver place left, the lease is over or the source is released
  kPermission = 7,       // the proof of the transfer's secret is wrong
  kNoSend = 8,           // the sender never opened the transfer
  kStaleCards = 9,       // the two sides know different rank cards
  kIncompatible = 10,    // the two instances' layouts or model fingerprints do not fit
  kNotOffered = 11,      // the last slice is in and needed cells are missing
  kLayoutMismatch = 12,  // the two sides compiled different streams
  kProtocol = 13,        // a message that breaks the protocol
  kDataLoss = 14,        // a chunk's check is wrong
  kNotReady = 15,        // a ready condition did not hold in time, or never can
  kGatherFailed = 16,
  kScatterFailed = 17,
  kPeerLost = 18,      // the peer daemon died or is silent
  kWorkerLost = 19,    // the worker died or closed its lifeline
  kUnregistered = 20,  // the layout or its pools were taken back
  kDaemonRestarted = 21,
  kShutdown = 22,  // the daemon drains
  kArenaExhausted = 23,
  kAuxMissing = 24,
  kTooFragmented = 25,  // beyond the limits of a layout, slice or digest
  kPeerNotAllowed = 26,
  kPeerUnreachable = 27,
  kUcxMismatch = 28,  // the peer's UCX release is another one
  kInternal = 29,
};

inline constexpr uint16_t kReasonCount = 30;

// The stable upper-snake name; "UNKNOWN" for a number that is not in the list.
std::string_view name_of(Reason reason);
// A number from the wire; unknown ones become kProtocol.
Reason reason_from_wire(uint16_t number);

}  // namespace kvferry
