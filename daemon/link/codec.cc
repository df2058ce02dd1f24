#include "daemon/link/codec.h"

#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "daemon/base/reason.h"
#include "daemon/base/units.h"
#include "daemon/link/codec_io.h"

namespace kvferry::link {
namespace {

using namespace kvferry::engine;

// The fields of each message, in order. `Io` is a Writer (M const) or a Reader.

template <typename Io, typename Owner>
void counter_ref(Io& io, Owner& boot, auto& counter, const char* field) {
  io.bytes(boot.bytes, field);
  io.number(counter, field);
}
template <typename Io, typename P>
void pull_ref(Io& io, P& pull) {
  counter_ref(io, pull.receiver, pull.counter, "pull");
}
template <typename Io, typename S>
void send_ref(Io& io, S& send) {
  counter_ref(io, send.sender, send.counter, "send");
}

template <typename Io, typename S>
void instance_name(Io& io, S& name, const char* field) {
  io.text(name, 2 * kMaxNameBytes + 1, field);
  if (io.ok()) io.demand(valid_instance_name(name), field);
}

template <typename Io, typename T>
void transfer_name(Io& io, T& transfer) {
  instance_name(io, transfer.instance, "transfer.instance");
  io.bytes(transfer.incarnation.bytes, "transfer.incarnation");
  io.text(transfer.id, kMaxIdBytes, "transfer.id");
  if (io.ok()) io.demand(!transfer.id.empty(), "transfer.id");
  io.bytes(transfer.secret_tag.bytes, "transfer.secret_tag");
}

template <typename Io, typename R>
void rank_number(Io& io, R& rank, const char* field) {
  io.number(rank, field);
  if (io.ok()) io.demand(rank <= kMaxRank, field);
}

// Numbers of an enum that has all values from 0 to `last`.
template <typename Io, typename E>
void small_enum(Io& io, E& value, uint8_t last, const char* field) {
  uint8_t number = static_cast<uint8_t>(value);
  io.number(number, field);
  if (io.ok()) io.demand(number <= last, field);
  if constexpr (Io::kReads) {
    if (io.ok()) value = static_cast<E>(number);
  }
}

template <typename Io, typename R>
void reason_number(Io& io, R& reason) {
  uint16_t number = static_cast<uint16_t>(reason);
  io.number(number, "reason");
  if constexpr (Io::kReads) reason = reason_from_wire(number);
}

// Ascending and disjoint: the distance from the last one's end, then the length, which is not 0.
template <typename Io, typename V>
void range_list(Io& io, V& ranges, const char* field) {
  io.count(ranges, kMaxRanges, 2, field);
  uint64_t end = 0;
  for (auto& range : ranges) {
    if (!io.ok()) return;
    uint64_t gap = 0;
    uint64_t length = 0;
    if constexpr (!Io::kReads) {
      io.demand(range.begin >= end && range.end > range.begin, field);
      gap = range.begin - end;
      length = range.size();
    }
    io.varint(gap, field);
    io.varint(length, field);
    if constexpr (Io::kReads) {
      io.demand(io.ok() && length > 0 && checked_add(end, gap, range.begin) &&
                    checked_add(range.begin, length, range.end),
                field);
    }
    end = range.end;
  }
}

// Each group once, ascending.
template <typename Io, typename N>
void group_number(Io& io, N& group, uint32_t& next, const char* field) {
  uint8_t number = static_cast<uint8_t>(group);
  if constexpr (!Io::kReads) io.demand(group < kMaxGroups, field);
  io.number(number, field);
  if (io.ok()) io.demand(number < kMaxGroups && number >= next, field);
  if constexpr (Io::kReads) group = number;
  next = uint32_t{number} + 1;
}

// Of a region of `bytes`: whether it lies in the arena is for those who know the arena.
template <typename Io, typename P>
void region_place(Io& io, P& place, uint64_t bytes) {
  io.number(place.segment, "credits.segment");
  io.varint(place.offset, "credits.offset");
  uint64_t end = 0;
  io.demand(place.segment < kMaxSegments, "credits.segment");
  io.demand(checked_add(place.offset, bytes, end), "credits.offset");
}

template <typename Io, typename A>
void arena_number(Io& io, A& arena) {
  io.number(arena, "arena");
  io.demand(arena < kMaxArenas, "arena");
}

template <typename Io, typename V>
void credit_list(Io& io, V& credits) {
  io.count(credits, kMaxCredits, 2, "credits");
  for (auto& grant : credits) {
    io.varint(grant.credit.value, "credits");
    io.varint(grant.bytes, "credits");
    if (!io.ok()) return;
    if constexpr (Io::kReads) {
      if (io.mapped()) grant.place.emplace();
    }
    io.demand(grant.place.has_value() == io.mapped(), "credits.place");
    if (!io.ok()) return;
    if (grant.place) region_place(io, *grant.place, grant.bytes);
  }
}

template <typename Io, typename C>
void chunk_check(Io& io, C& check) {
  small_enum(io, check.kind, 2, "check.kind");
  io.bytes(check.value, "check.value");
  if (check.kind == engine::CheckKind::kGmac) io.varint(check.number, "check.number");
}

template <typename Io, typename O, typename Put>
void optional(Io& io, O& value, const char* field, Put put) {
  bool there = value.has_value();
  io.boolean(there, field);
  if constexpr (Io::kReads) {
    if (there && io.ok()) value.emplace();
  }
  if (io.ok() && there) put(*value);
}

// ---- messages ----

template <typename M, typename T>
concept Is = std::is_same_v<std::remove_const_t<M>, T>;

template <typename Io, Is<MsgHello> M>
void fields(Io& io, M& m) {
  io.boolean(m.answer, "answer");
}
template <typename Io, Is<MsgPing> M>
void fields(Io&, M&) {}
template <typename Io, Is<MsgLaneDown> M>
void fields(Io& io, M& m) {
  io.number(m.lane, "lane");
  io.number(m.epoch, "epoch");
}
template <typename Io, Is<MsgPull> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
  transfer_name(io, m.transfer);
  io.bytes(m.proof.bytes, "proof");
  rank_number(io, m.sender_rank, "sender_rank");
  rank_number(io, m.receiver_rank, "receiver_rank");
  instance_name(io, m.receiver_instance, "receiver_instance");
  io.bytes(m.receiver_incarnation.bytes, "receiver_incarnation");
  io.bytes(m.cards.bytes, "cards");
  io.count(m.needs, kMaxGroups, 4, "needs");
  uint32_t next = 0;
  for (auto& need : m.needs) {
    group_number(io, need.group, next, "needs.group");
    io.varint(need.begin, "needs.begin");
    io.varint(need.end, "needs.end");
    range_list(io, need.ranges, "needs.ranges");
    if (!io.ok()) return;
  }
  io.number(m.remaining_ms, "remaining_ms");
  credit_list(io, m.credits);
  io.number(m.oldest, "oldest");
  if (!io.mapped()) return;
  io.demand(m.credits.empty(), "credits");  // they come after the first SLICE
  if constexpr (Io::kReads) m.mapped.emplace();
  arena_number(io, *m.mapped);
}
template <typename Io, Is<MsgUpdate> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
  credit_list(io, m.credits);
  io.demand(!io.mapped() || !m.credits.empty(), "credits");
  io.count(m.acks, kMaxControlBytes / 2, 2, "acks");
  for (auto& ack : m.acks) {
    io.varint(ack.slice, "acks");
    io.varint(ack.chunk, "acks");
    if (!io.ok()) return;
  }
  io.number(m.oldest, "oldest");
}
template <typename Io, Is<MsgSlice> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
  send_ref(io, m.send);
  io.bytes(m.proof.bytes, "proof");
  io.number(m.ordinal, "ordinal");
  io.boolean(m.last, "last");
  io.count(m.ranges, kMaxGroups, 2, "ranges");
  uint32_t next = 0;
  for (auto& group : m.ranges) {
    group_number(io, group.group, next, "ranges.group");
    range_list(io, group.ranges, "ranges.ranges");
    if (!io.ok()) return;
  }
  optional(io, m.layers, "layers", [&](auto& layers) {
    io.varint(layers.begin, "layers");
    io.varint(layers.end, "layers");
    if (io.ok()) io.demand(layers.begin <= layers.end, "layers");
  });
  io.number(m.bytes, "bytes");
  io.number(m.digest, "digest");
  io.boolean(m.with_aux, "with_aux");
  optional(io, m.aux, "aux", [&](auto& aux) { io.text(aux, kMaxAuxBytes, "aux"); });
}
template <typename Io, Is<MsgOffer> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
  send_ref(io, m.send);
  io.number(m.slice, "slice");
  io.number(m.chunk, "chunk");
  io.number(m.credit.value, "credit");
  io.number(m.offer.value, "offer");
  io.number(m.bytes, "bytes");
  chunk_check(io, m.check);
}
template <typename Io, Is<MsgRefuse> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
  io.number(m.offer.value, "offer");
}
template <typename Io, Is<MsgEnd> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
  // The answer to a message about a pull that has been forgotten names no transfer.
  bool named = !m.transfer.instance.empty();
  io.boolean(named, "transfer");
  if (io.ok() && named) transfer_name(io, m.transfer);
  small_enum(io, m.outcome, 4, "outcome");
  reason_number(io, m.reason);
  optional(io, m.proof, "proof", [&](auto& proof) { io.bytes(proof.bytes, "proof"); });
  if constexpr (Io::kReads) m.mapped = io.mapped();
}
// CLAIM and DECLINE begin alike.
template <typename Io, typename M>
void approach(Io& io, M& m) {
  transfer_name(io, m.transfer);
  io.bytes(m.proof.bytes, "proof");
  instance_name(io, m.receiver_instance, "receiver_instance");
  io.bytes(m.receiver_incarnation.bytes, "receiver_incarnation");
  rank_number(io, m.sender_rank, "sender_rank");
  rank_number(io, m.receiver_rank, "receiver_rank");
}
template <typename Io, Is<MsgClaim> M>
void fields(Io& io, M& m) {
  approach(io, m);
  io.number(m.ttl_ms, "ttl_ms");
}
template <typename Io, Is<MsgDecline> M>
void fields(Io& io, M& m) {
  approach(io, m);
}
template <typename Io, Is<MsgDrop> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
  io.number(m.slice, "slice");
}

template <typename Io, Is<MsgMapped> M>
void fields(Io& io, M& m) {
  arena_number(io, m.arena);
}
template <typename Io, Is<MsgWritten> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
  io.number(m.slice, "slice");
  io.number(m.chunk, "chunk");
  io.number(m.credit.value, "credit");
  chunk_check(io, m.check);
}
template <typename Io, Is<MsgDrained> M>
void fields(Io& io, M& m) {
  pull_ref(io, m.pull);
}

bool too_long(std::size_t size, bool has_aux) {
  return size > (has_aux ? kMaxBodyBytes : kMaxControlBytes);
}
template <typename M>
bool has_aux(const M& message) {
  if constexpr (std::is_same_v<M, MsgSlice>) return message.aux.has_value();
  return false;
}

// Whether the message says what only a mapped pull's does.
template <typename M>
bool is_mapped(const M& message) {
  if constexpr (std::is_same_v<M, MsgPull>)
    return message.mapped.has_value();
  else if constexpr (std::is_same_v<M, MsgUpdate>)
    return !message.credits.empty() && message.credits.front().place.has_value();
  else if constexpr (std::is_same_v<M, MsgEnd>)
    return message.mapped;
  else
    return false;
}

template <typename M>
Status encode_one(const M& message, std::vector<uint8_t>& out) {
  const std::size_t start = out.size();
  Writer writer(out, is_mapped(message));
  fields(writer, message);
  if (!writer.ok()) return invalid(writer.fault(), "BAD_MESSAGE", "the message breaks a limit");
  if (too_long(out.size() - start, has_aux(message)))
    return fail(Code::kResourceExhausted, "MESSAGE_TOO_LONG", "the message is longer than 64 KiB");
  return {};
}

template <typename M>
Result<Message> decode_one(Bytes body, bool mapped = false) {
  M message;
  Reader reader(body, mapped);
  fields(reader, message);
  if (reader.ok()) reader.demand(reader.at_end(), "body");
  if (reader.ok()) reader.demand(!too_long(body.size(), has_aux(message)), "body");
  if (!reader.ok()) return invalid(reader.fault(), "BAD_MESSAGE", "a message that no daemon sends");
  if constexpr (std::is_constructible_v<ControlMessage, M>)
    return Message(ControlMessage(std::move(message)));
  else
    return Message(std::move(message));
}

bool valid_name(std::string_view name) {
  auto alphanumeric = [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
  };
  if (name.empty() || name.size() > kMaxNameBytes || !alphanumeric(name[0])) return false;
  for (char c : name)
    if (!alphanumeric(c) && std::string_view("._:+-").find(c) == std::string_view::npos)
      return false;
  return true;
}

// By index in the variant.
constexpr MessageType kControlTypes[] = {
    MessageType::kHello,   MessageType::kPing,  MessageType::kLaneDown, MessageType::kPull,
    MessageType::kUpdate,  MessageType::kSlice, MessageType::kEnd,      MessageType::kClaim,
    MessageType::kDecline, MessageType::kDrop,  MessageType::kMapped,   MessageType::kWritten,
    MessageType::kDrained};
static_assert(std::size(kControlTypes) == std::variant_size_v<ControlMessage>);
static_assert(std::is_same_v<std::variant_alternative_t<6, ControlMessage>, MsgEnd>);

}  // namespace

std::string_view name_of(MessageType type) {
  switch (type) {
    case MessageType::kHello:
      return "HELLO";
    case MessageType::kPing:
      return "PING";
    case MessageType::kLaneDown:
      return "LANEDOWN";
    case MessageType::kPull:
      return "PULL";
    case MessageType::kUpdate:
      return "UPDATE";
    case MessageType::kSlice:
      return "SLICE";
    case MessageType::kOffer:
      return "OFFER";
    case MessageType::kRefuse:
      return "REFUSE";
    case MessageType::kWritten:
      return "WRITTEN";
    case MessageType::kEnd:
      return "END";
    case MessageType::kDrained:
      return "DRAINED";
    case MessageType::kClaim:
      return "CLAIM";
    case MessageType::kDecline:
      return "DECLINE";
    case MessageType::kDrop:
      return "DROP";
    case MessageType::kMapped:
      return "MAPPED";
    case MessageType::kPullMapped:
      return "PULL_MAPPED";
    case MessageType::kUpdateMapped:
      return "UPDATE_MAPPED";
    case MessageType::kEndMapped:
      return "END_MAPPED";
  }
  return "UNKNOWN";
}

MessageType type_of(const ControlMessage& message) {
  const MessageType plain = kControlTypes[message.index()];
  if (!std::visit([](const auto& m) { return is_mapped(m); }, message)) return plain;
  return plain == MessageType::kPull     ? MessageType::kPullMapped
         : plain == MessageType::kUpdate ? MessageType::kUpdateMapped
                                         : MessageType::kEndMapped;
}

MessageType type_of(const Message& message) {
  if (const auto* control = std::get_if<ControlMessage>(&message)) return type_of(*control);
  return std::holds_alternative<MsgOffer>(message) ? MessageType::kOffer : MessageType::kRefuse;
}

bool valid_instance_name(std::string_view name) {
  const std::size_t slash = name.find('/');
  return slash != std::string_view::npos && valid_name(name.substr(0, slash)) &&
         valid_name(name.substr(slash + 1));
}

Status encode_body(const ControlMessage& message, std::vector<uint8_t>& out) {
  return std::visit([&](const auto& m) { return encode_one(m, out); }, message);
}
Status encode_body(const MsgOffer& message, std::vector<uint8_t>& out) {
  return encode_one(message, out);
}
Status encode_body(const MsgRefuse& message, std::vector<uint8_t>& out) {
  return encode_one(message, out);
}
Status encode_body(const Message& message, std::vector<uint8_t>& out) {
  return std::visit([&](const auto& m) { return encode_body(m, out); }, message);
}

Result<Message> decode_body(uint8_t type, Bytes body) {
  if (body.size() > kMaxBodyBytes) return invalid("body", "BAD_MESSAGE", "the message is too long");
  switch (static_cast<MessageType>(type)) {
    case MessageType::kHello:
      return decode_one<MsgHello>(body);
    case MessageType::kPing:
      return decode_one<MsgPing>(body);
    case MessageType::kLaneDown:
      return decode_one<MsgLaneDown>(body);
    case MessageType::kPull:
      return decode_one<MsgPull>(body);
    case MessageType::kUpdate:
      return decode_one<MsgUpdate>(body);
    case MessageType::kSlice:
      return decode_one<MsgSlice>(body);
    case MessageType::kOffer:
      return decode_one<MsgOffer>(body);
    case MessageType::kRefuse:
      return decode_one<MsgRefuse>(body);
    case MessageType::kEnd:
      return decode_one<MsgEnd>(body);
    case MessageType::kClaim:
      return decode_one<MsgClaim>(body);
    case MessageType::kDecline:
      return decode_one<MsgDecline>(body);
    case MessageType::kDrop:
      return decode_one<MsgDrop>(body);
    case MessageType::kMapped:
      return decode_one<MsgMapped>(body);
    case MessageType::kWritten:
      return decode_one<MsgWritten>(body);
    case MessageType::kDrained:
      return decode_one<MsgDrained>(body);
    case MessageType::kPullMapped:
      return decode_one<MsgPull>(body, true);
    case MessageType::kUpdateMapped:
      return decode_one<MsgUpdate>(body, true);
    case MessageType::kEndMapped:
      return decode_one<MsgEnd>(body, true);
  }
  return invalid("type", "BAD_MESSAGE", "no message has this type");
}

int fuzz_decode(const uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const Result<Message> first = decode_body(data[0], Bytes(data + 1, size - 1));
  if (!first) return 0;
  std::vector<uint8_t> body;
  const bool encoded = encode_body(*first, body).has_value();
  if (encoded) {
    const Result<Message> second = decode_body(data[0], body);
    if (second && *second == *first && type_of(*first) == static_cast<MessageType>(data[0]))
      return 0;
  }
  std::fprintf(stderr, "kvferry: a decoded message does not encode to itself\n");
  std::abort();
}

}  // namespace kvferry::link
