// The messages between daemons as bytes. Little-endian, without padding, no length that is not
// checked against what is left and against the limits below before anything is allocated. Decoding
// accepts any input; what it accepts can be encoded again and then decodes to the same message.
// Pure functions; any thread.
//
// Only the body is made here; envelope.h puts version, lane, number and tag around it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <variant>
#include <vector>

#include "daemon/base/crypto.h"
#include "daemon/base/result.h"
#include "daemon/engine/messages.h"

namespace kvferry::link {

// The number on the wire. Never reused. A message of a mapped pull that says more than others has a
// number of its own, which goes to no peer that has not mapped an arena or had one mapped.
enum class MessageType : uint8_t {
  kHello = 1,
  kPing = 2,
  kLaneDown = 3,
  kPull = 4,
  kUpdate = 5,
  kSlice = 6,
  kOffer = 7,
  kRefuse = 8,
  kWritten = 9,
  kEnd = 10,
  kDrained = 11,
  kClaim = 12,
  kDecline = 13,
  kDrop = 14,
  kMapped = 15,
  kPullMapped = 16,
  kUpdateMapped = 17,
  kEndMapped = 18,
};
std::string_view name_of(MessageType type);

// A body has at most 64 KiB; one with an aux may have 4 KiB beside it. A sealed message then always
// fits the 68 KiB that a rail carries.
inline constexpr std::size_t kMaxControlBytes = 64 * 1024;
inline constexpr std::size_t kMaxAuxBytes = 64 * 1024;
inline constexpr std::size_t kMaxBodyBytes = kMaxAuxBytes + 4000;

inline constexpr uint32_t kMaxCredits = 64;   // in a PULL or UPDATE
inline constexpr uint32_t kMaxGroups = 64;    // of a layout, so also in a message
inline constexpr uint32_t kMaxRanges = 4096;  // of a group in a message
inline constexpr uint32_t kMaxRank = 4095;
inline constexpr std::size_t kMaxIdBytes = 64;    // of a transfer's id
inline constexpr std::size_t kMaxNameBytes = 63;  // tenant, instance

using Message = std::variant<engine::ControlMessage, engine::MsgOffer, engine::MsgRefuse>;

MessageType type_of(const engine::ControlMessage& message);
MessageType type_of(const Message& message);

// "tenant/name", both [A-Za-z0-9][A-Za-z0-9._:+-]{0,62}.
bool valid_instance_name(std::string_view name);

// Appends the body to `out`. INVALID_ARGUMENT naming the field for a message that no peer would
// decode (a limit, a range out of order, a bad name): a fault of the caller. `out` then holds a
// part of it and must not be sent.
Status encode_body(const engine::ControlMessage& message, std::vector<uint8_t>& out);
Status encode_body(const engine::MsgOffer& message, std::vector<uint8_t>& out);
Status encode_body(const engine::MsgRefuse& message, std::vector<uint8_t>& out);
Status encode_body(const Message& message, std::vector<uint8_t>& out);

// The whole of `body` is one message of this type, else INVALID_ARGUMENT BAD_MESSAGE naming the
// field. `type` is taken as it came, so any number is safe.
Result<Message> decode_body(uint8_t type, Bytes body);

// For fuzzers: a first byte of type, the rest a body; what decodes must encode and decode to
// itself, else it aborts. Always returns 0.
int fuzz_decode(const uint8_t* data, std::size_t size);

}  // namespace kvferry::link
