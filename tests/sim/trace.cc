#include "tests/sim/trace.h"

#include <cinttypes>
#include <cstdio>
#include <sstream>

#include "tests/sim/rng.h"

namespace kvferry::sim {
namespace {

using namespace engine;

template <typename... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <typename... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

// Concatenates what stream output prints.
template <typename... Ts>
std::string text(const Ts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::string of(const LaneRef& lane) {
  return text(" link ", lane.link.value, " lane ", lane.lane, ".", lane.epoch);
}
std::string of(const PullId& pull) {
  return text(" pull ", static_cast<int>(pull.receiver.bytes[0]), "/", pull.counter);
}
std::string of(const OpRef& op) {
  return text(" worker ", op.worker.value, " op ", op.op_id);
}
std::string of(const memory::Region& region) {
  return text(" region ", region.segment, ":", region.offset, "+", region.bytes);
}
std::string of(const std::vector<GroupRanges>& offers) {
  std::string out;
  for (const auto& offer : offers)
    for (const Range& range : offer.ranges)
      out += text(" g", offer.group, "[", range.begin, ",", range.end, ")");
  return out;
}
std::string of(const MsgOffer& offer) {
  return text(of(offer.pull), " slice ", offer.slice, " chunk ", offer.chunk, " credit ",
              offer.credit.value, " offer ", offer.offer.value, " bytes ", offer.bytes);
}
std::string of(const std::vector<CreditGrant>& credits) {
  std::string out = " credits";
  for (const auto& credit : credits) out += text(" ", credit.credit.value);
  return out;
}

uint64_t ids_of(const Event& event) {
  return std::visit(
      Overloaded{
          [](const MessageIn& e) {
            return mix(e.sequence) ^ (e.message.index() << 8) ^ e.lane.epoch;
          },
          [](const OfferIn& e) { return mix(e.offer.offer.value) ^ e.offer.chunk; },
          [](const ReceiveEnded& e) { return mix(e.landing.value) + (e.ok ? 1 : 0); },
          [](const OfferSendEnded& e) { return mix(e.offer.value); },
          [](const CopyEnded& e) { return mix(e.copy.value) ^ static_cast<uint64_t>(e.outcome); },
          [](const Compiled& e) { return e.plan ? e.plan->digest : uint64_t{1}; },
          [](const auto&) { return uint64_t{0}; }},
      event);
}

uint64_t ids_of(const Command& command) {
  return std::visit(
      Overloaded{[](const SendMessage& c) {
                   return mix(c.sequence) ^ (c.message.index() << 8) ^ c.lane.epoch;
                 },
                 [](const SendOffer& c) { return mix(c.offer.offer.value) ^ c.region.offset; },
                 [](const AcceptOffer& c) { return mix(c.landing.value) ^ c.region.offset; },
                 [](const Gather& c) { return mix(c.offset) ^ c.region.offset; },
                 [](const Scatter& c) { return mix(c.offset) ^ c.region.offset; },
                 [](const ClearTail& c) { return mix(c.copy.value); },
                 [](const LocalCopy& c) { return mix(c.copy.value) ^ c.offset; },
                 [](const Publish& c) {
                   return mix(c.record.client_handle) ^
                          (static_cast<uint64_t>(c.record.state) << 8) ^
                          static_cast<uint64_t>(c.record.reason);
                 },
                 [](const auto&) { return uint64_t{0}; }},
      command);
}

}  // namespace

std::string describe(const ControlMessage& message) {
  return std::visit(
      Overloaded{
          [](const MsgHello& m) { return text("HELLO", m.answer ? " answer" : ""); },
          [](const MsgPing&) { return std::string("PING"); },
          [](const MsgLaneDown& m) { return text("LANEDOWN ", m.lane, ".", m.epoch); },
          [](const MsgPull& m) {
            return text("PULL", of(m.pull), " transfer ", m.transfer.id, " rank ", m.sender_rank,
                        "->", m.receiver_rank, m.mapped ? " mapped" : "", of(m.credits), " oldest ",
                        m.oldest);
          },
          [](const MsgUpdate& m) {
            std::string acks = " acks";
            for (const auto& ack : m.acks) acks += text(" ", ack.slice, ".", ack.chunk);
            return text("UPDATE", of(m.pull), of(m.credits), acks, " oldest ", m.oldest);
          },
          [](const MsgSlice& m) {
            return text("SLICE", of(m.pull), " send ", m.send.counter, " ordinal ", m.ordinal,
                        m.last ? " last" : "", of(m.ranges), " bytes ", m.bytes,
                        m.aux ? " aux" : "");
          },
          [](const MsgEnd& m) {
            return text("END", of(m.pull), " transfer ", m.transfer.id, " outcome ",
                        static_cast<int>(m.outcome), " ", name_of(m.reason));
          },
          [](const MsgClaim& m) {
            return text("CLAIM ", m.transfer.id, " rank ", m.sender_rank, "->", m.receiver_rank);
          },
          [](const MsgDecline& m) {
            return text("DECLINE ", m.transfer.id, " rank ", m.sender_rank, "->", m.receiver_rank);
          },
          [](const MsgDrop& m) { return text("DROP", of(m.pull), " slice ", m.slice); },
          [](const MsgMapped& m) { return text("MAPPED arena ", m.arena); },
          [](const MsgWritten& m) {
            return text("WRITTEN", of(m.pull), " slice ", m.slice, " chunk ", m.chunk, " credit ",
                        m.credit.value);
          },
          [](const MsgDrained& m) { return text("DRAINED", of(m.pull)); }},
      message);
}

std::string describe(const TransferRecord& r) {
  static constexpr const char* kStates[] = {"?",         "OPEN",   "ACTIVE",   "DELIVERED",
                                            "COMPLETED", "FAILED", "CANCELLED"};
  return text(r.role == Role::kSender ? "sender" : "receiver", " handle ", r.client_handle, " ",
              kStates[static_cast<size_t>(r.state)], " ", name_of(r.reason), " delivery ",
              static_cast<int>(r.delivery), r.released ? " RELEASED " : "",
              r.released ? name_of(r.released_reason) : "", r.memory_in_use ? " in-use" : "",
              r.receiver_ready ? " receiver-ready" : "", " slices ", r.slices, " bytes ",
              r.bytes_done, "/", r.bytes_total);
}

std::string describe(const Event& event) {
  return std::visit(
      Overloaded{
          [](const OpenSendOp& e) { return text("OpenSend", of(e.op), " ", e.key.id); },
          [](const SendOp& e) {
            return text("Send", of(e.op), " handle ", e.client_handle, " ", e.key.id, " index ",
                        e.send_index, of(e.offer), e.last ? " last" : "");
          },
          [](const ReceiveOp& e) {
            return text("Receive", of(e.op), " handle ", e.client_handle, " ", e.key.id);
          },
          [](const CancelOp& e) { return text("Cancel", of(e.op), " handle ", e.client_handle); },
          [](const CloseOp& e) { return text("Close", of(e.op), " handle ", e.client_handle); },
          [](const RevokeOp& e) {
            return text("Revoke", of(e.op), " handle ", e.client_handle, " from ", e.from_token);
          },
          [](const ReceiverNeedsOp& e) {
            return text("ReceiverNeeds", of(e.op), " handle ", e.client_handle);
          },
          [](const ClaimOp& e) { return text("Claim", of(e.op), " ", e.key.id); },
          [](const ReserveOp& e) {
            return text("Reserve", of(e.op), " ", e.key.id, " bytes ", e.bytes);
          },
          [](const DeclineOp& e) { return text("Decline", of(e.op), " ", e.key.id); },
          [](const CommitReuseOp& e) {
            return text("CommitReuse", of(e.op), " handle ", e.client_handle);
          },
          [](const LookupReuseOp& e) { return text("LookupReuse", of(e.op)); },
          [](const WithdrawReuseOp& e) { return text("WithdrawReuse", of(e.op)); },
          [](const WorkerAttached& e) { return text("WorkerAttached ", e.worker.value); },
          [](const WorkerGone& e) { return text("WorkerGone ", e.worker.value); },
          [](const UnregisterLayout& e) {
            return text("UnregisterLayout worker ", e.layout->worker.value);
          },
          [](const Resolved& e) {
            return text("Resolved ", e.resolve.value, " ", name_of(e.reason), " legs ",
                        e.legs.size());
          },
          [](const PullResolved& e) {
            return text("PullResolved ", e.resolve.value, " ", name_of(e.reason), " legs ",
                        e.legs.size());
          },
          [](const Compiled& e) {
            return text("Compiled ", e.compile.value, " ", name_of(e.reason), " bytes ",
                        e.plan ? e.plan->bytes : 0);
          },
          [](const CopyCompiled& e) {
            return text("CopyCompiled ", e.compile.value, " ", name_of(e.reason), " bytes ",
                        e.source ? e.source->bytes : 0);
          },
          [](const Packed& e) { return text("Packed ", e.copy.value, " ", name_of(e.reason)); },
          [](const CopyEnded& e) {
            return text("CopyEnded ", e.copy.value, " outcome ", static_cast<int>(e.outcome));
          },
          [](const ConditionMet& e) { return text("ConditionMet ", e.condition.value); },
          [](const ConditionFailed& e) { return text("ConditionFailed ", e.condition.value); },
          [](const LinkUp& e) {
            return text("LinkUp ", e.link.value, " ", e.node, e.initiator ? " initiator" : "",
                        " lanes ", e.lanes, " chunk ", e.chunk_bytes);
          },
          [](const LinkEnded& e) { return text("LinkEnded ", e.link.value); },
          [](const LaneConnected& e) { return text("LaneConnected", of(e.lane)); },
          [](const LaneFailed& e) { return text("LaneFailed", of(e.lane)); },
          [](const LaneReopened& e) { return text("LaneReopened", of(e.lane)); },
          [](const LaneReopenFailed& e) { return text("LaneReopenFailed", of(e.lane)); },
          [](const PeerLaneDown& e) { return text("PeerLaneDown", of(e.lane)); },
          [](const MessageIn& e) {
            return text("MessageIn", of(e.lane), " #", e.sequence, " ", describe(e.message));
          },
          [](const RefuseIn& e) {
            return text("RefuseIn", of(e.lane), of(e.message.pull), " offer ",
                        e.message.offer.value);
          },
          [](const OfferIn& e) {
            return text("OfferIn", of(e.lane), of(e.offer), " descriptor ", e.descriptor.value);
          },
          [](const ReceiveEnded& e) {
            return text("ReceiveEnded landing ", e.landing.value, e.ok ? " ok" : " error");
          },
          [](const OfferSendEnded& e) { return text("OfferSendEnded offer ", e.offer.value); },
          [](const ArenaMapped& e) {
            return text("ArenaMapped link ", e.link.value, " arena ", e.arena);
          },
          [](const ArenaLent& e) {
            return text("ArenaLent link ", e.link.value, " arena ", e.arena);
          },
          [](const PeerProcessGone& e) {
            return text("PeerProcessGone ", static_cast<int>(e.boot.bytes[0]), ".",
                        static_cast<int>(e.boot.bytes[1]));
          },
          [](const PeerUnmapped& e) { return text("PeerUnmapped link ", e.link.value); },
          [](const ReleaseQuarantine& e) { return text("ReleaseQuarantine ", e.node); },
          [](const RailsUp&) { return std::string("RailsUp"); },
          [](const RailsDied&) { return std::string("RailsDied"); },
          [](const Drain& e) { return text("Drain until ", e.limit.ns); }},
      event);
}

std::string describe(const Command& command) {
  return std::visit(
      Overloaded{
          [](const Reply& c) {
            return text("Reply", of(c.op), " ", name_of(c.error.code), " ", c.error.reason, " ",
                        c.error.message, c.existing ? " existing" : "", " slot ", c.slot,
                        " dropped ", c.dropped_sends.size());
          },
          [](const Publish& c) {
            return text("Publish worker ", c.worker.value, " slot ", c.slot, " ",
                        describe(c.record));
          },
          [](const SetDoneWord& c) {
            return text("SetDoneWord worker ", c.worker.value, " word ", c.word, " = ", c.value);
          },
          [](const FreeSlot& c) {
            return text("FreeSlot worker ", c.worker.value, " slot ", c.slot);
          },
          [](const LayoutQuiet& c) { return text("LayoutQuiet worker ", c.layout->worker.value); },
          [](const Resolve& c) {
            return text("Resolve ", c.resolve.value, " ", c.receive->key.id);
          },
          [](const ResolvePull& c) {
            return text("ResolvePull ", c.resolve.value, of(c.pull->pull));
          },
          [](const CancelResolve& c) { return text("CancelResolve ", c.resolve.value); },
          [](const Compile& c) {
            return text("Compile ", c.compile.value,
                        c.side == Role::kSender ? " sender" : " receiver", of(c.offer));
          },
          [](const Gather& c) {
            return text("Gather ", c.copy.value, " ", c.offset, "+", c.bytes, of(c.region),
                        c.mapped ? " of a peer" : "");
          },
          [](const Scatter& c) {
            return text("Scatter ", c.copy.value, " ", c.offset, "+", c.bytes, of(c.region));
          },
          [](const ClearTail& c) { return text("ClearTail ", c.copy.value); },
          [](const CompileCopy& c) { return text("CompileCopy ", c.compile.value); },
          [](const MakePacked& c) {
            return text("MakePacked ", c.copy.value, " handle ", c.send->client_handle, " send ",
                        c.send->send_index);
          },
          [](const LocalCopy& c) {
            return text("LocalCopy ", c.copy.value, " ", c.offset, "+", c.bytes);
          },
          [](const WatchCondition& c) { return text("WatchCondition ", c.condition.value); },
          [](const UnwatchCondition& c) { return text("UnwatchCondition ", c.condition.value); },
          [](const ConnectLane& c) { return text("ConnectLane", of(c.lane)); },
          [](const ReopenLane& c) { return text("ReopenLane", of(c.lane)); },
          [](const CloseLane& c) { return text("CloseLane", of(c.lane)); },
          [](const TellLaneDown& c) { return text("TellLaneDown", of(c.lane)); },
          [](const CloseLink& c) {
            return text("CloseLink ", c.link.value, " ", name_of(c.reason));
          },
          [](const SendMessage& c) {
            return text("SendMessage", of(c.lane), " #", c.sequence, " ", describe(c.message));
          },
          [](const SendRefuse& c) {
            return text("SendRefuse", of(c.lane), of(c.message.pull), " offer ",
                        c.message.offer.value);
          },
          [](const SendOffer& c) {
            return text("SendOffer", of(c.lane), of(c.offer), of(c.region));
          },
          [](const AcceptOffer& c) {
            return text("AcceptOffer", of(c.lane), " descriptor ", c.descriptor.value, " landing ",
                        c.landing.value, of(c.region), " bytes ", c.bytes);
          },
          [](const DropOffer& c) {
            return text("DropOffer", of(c.lane), " descriptor ", c.descriptor.value);
          },
          [](const QuarantineReleased& c) {
            return text("QuarantineReleased ", c.regions, " bytes ", c.bytes, " linked ", c.linked);
          },
          [](const TransferEnded& c) {
            return text("TransferEnded ", c.label, " state ", static_cast<int>(c.state), " ",
                        name_of(c.reason));
          },
          [](const Drained&) { return std::string("Drained"); }},
      command);
}

void Trace::fold(uint64_t value) {
  hash_ = mix(hash_ ^ mix(value));
}

void Trace::event(Time now, uint32_t node, const Event& event) {
  fold(static_cast<uint64_t>(now.ns));
  fold((uint64_t{node} << 16) | event.index());
  fold(ids_of(event));
  if (verbose_) print(now, static_cast<int>(node), "<- " + describe(event));
}

void Trace::command(Time now, uint32_t node, const Command& command) {
  fold((uint64_t{node} << 16) | 0x8000U | command.index());
  fold(ids_of(command));
  if (verbose_) print(now, static_cast<int>(node), "-> " + describe(command));
}

void Trace::note(Time now, const std::string& line) {
  fold(static_cast<uint64_t>(now.ns) + 1);
  if (verbose_) print(now, -1, "** " + line);
}

void Trace::print(Time now, int node, const std::string& line) const {
  std::printf("%12.6f ms %s%s %s\n", static_cast<double>(now.ns) / 1e6, node < 0 ? "" : "node",
              node < 0 ? "" : std::to_string(node).c_str(), line.c_str());
}

}  // namespace kvferry::sim
