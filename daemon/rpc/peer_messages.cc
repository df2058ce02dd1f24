#include "daemon/rpc/peer_messages.h"

#include <algorithm>
#include <optional>

#include "daemon/base/units.h"
#include "daemon/rpc/holding_proto.h"
#include "kvferry/v1/peer.pb.h"

namespace kvferry::rpc {
namespace {

constexpr std::size_t kMaxFeatures = 64;
constexpr std::size_t kMaxJoinNodes = 4096;
constexpr std::size_t kMaxWordBytes = 64;
constexpr std::size_t kMaxSocketPathBytes = 107;  // what an address of such a socket holds

tl::unexpected<Error> bad(std::string field) {
  return invalid(std::move(field), "BAD_MESSAGE", "a message that no daemon sends");
}

template <typename Message>
bool parse(std::string_view bytes, Message& out) {
  return bytes.size() <= std::size_t{64} << 20 &&
         out.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()));
}

template <std::size_t N>
std::string text_of(const std::array<uint8_t, N>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), N};
}

// Exactly N bytes; or none, which leaves zeros, where `may_be_empty`.
template <std::size_t N>
bool take(const std::string& from, std::array<uint8_t, N>& out, bool may_be_empty = false) {
  if (from.empty() && may_be_empty) return true;
  if (from.size() != N) return false;
  std::copy(from.begin(), from.end(), out.begin());
  return true;
}

void rail_to_proto(const PeerRail& rail, v1::PeerRail& out) {
  out.set_transport(rail.transport);
  out.set_device(rail.device);
  out.set_address(rail.address.data(), rail.address.size());
}

bool rail_from_proto(const v1::PeerRail& in, PeerRail& out) {
  if (in.transport().empty() || in.transport().size() > kMaxWordBytes ||
      in.device().size() > kMaxWordBytes || in.address().empty() ||
      in.address().size() > kMaxRailAddressBytes)
    return false;
  out.transport = in.transport();
  out.device = in.device();
  out.address.assign(in.address().begin(), in.address().end());
  return true;
}

void card_to_proto(const SignedCard& card, v1::SignedRankCard& out) {
  out.set_card(card.card);
  out.set_tag(card.tag);
}

Result<SignedCard> card_from_proto(const v1::SignedRankCard& in) {
  if (in.card().empty() || in.card().size() > kMaxCardBytes) return bad("card");
  if (!in.tag().empty() && in.tag().size() != 16) return bad("card.tag");
  return SignedCard{in.card(), in.tag()};
}

bool is_known(uint32_t kind) {
  return kind >= static_cast<uint32_t>(LentKind::kHostMemfd) &&
         kind <= static_cast<uint32_t>(LentKind::kCudaMalloc);
}

void arena_to_proto(const OfferedArena& arena, v1::ArenasResponse::Arena& out) {
  out.set_number(arena.number);
  out.set_kind(static_cast<uint32_t>(arena.kind));
  if (arena.kind != LentKind::kHostMemfd) out.set_device_uuid(text_of(arena.device_uuid));
  for (const OfferedArena::Segment& segment : arena.segments) {
    v1::ArenasResponse::Segment& to = *out.add_segments();
    to.set_number(segment.number);
    to.set_bytes(segment.bytes);
    if (!has_descriptors(arena.kind)) to.set_handle(text_of(segment.handle));
  }
}

// Limits and shape; nothing of kinds that are not known.
bool arena_from_proto(const v1::ArenasResponse::Arena& in, OfferedArena& out) {
  if (in.segments_size() == 0 || static_cast<std::size_t>(in.segments_size()) > kMaxLentSegments)
    return false;
  out.number = in.number();
  out.kind = static_cast<LentKind>(in.kind());
  if (out.kind == LentKind::kHostMemfd ? !in.device_uuid().empty()
                                       : !take(in.device_uuid(), out.device_uuid))
    return false;
  uint64_t sum = 0;
  for (const v1::ArenasResponse::Segment& from : in.segments()) {
    OfferedArena::Segment& segment = out.segments.emplace_back();
    segment.number = from.number();
    segment.bytes = from.bytes();
    const uint64_t wanted = uint64_t{out.segments.front().number} + out.segments.size() - 1;
    if (segment.number != wanted || segment.bytes == 0 || !checked_add(sum, segment.bytes, sum))
      return false;
    if (has_descriptors(out.kind) ? !from.handle().empty() : !take(from.handle(), segment.handle))
      return false;
  }
  return true;
}

}  // namespace

std::string_view name_of(LinkMethod method) {
  switch (method) {
    case LinkMethod::kGetCards:
      return "GetCards";
    case LinkMethod::kReopenLane:
      return "ReopenLane";
    case LinkMethod::kLaneDown:
      return "LaneDown";
    case LinkMethod::kCloseLink:
      return "CloseLink";
    case LinkMethod::kJoinForward:
      return "JoinForward";
    case LinkMethod::kGetArenas:
      return "GetArenas";
    case LinkMethod::kGetTrace:
      return "GetTrace";
  }
  return "Unknown";
}

std::string encode_hello(const PeerHello& hello) {
  v1::PeerHello out;
  out.set_protocol_min(hello.protocol_min);
  out.set_protocol_max(hello.protocol_max);
  for (const std::string& feature : hello.features) out.add_features(feature);
  out.set_node_id(hello.node);
  out.set_boot_id(text_of(hello.boot.bytes));
  out.set_address(hello.address);
  out.set_ucx_version(hello.ucx_version);
  out.set_random(text_of(hello.random));
  out.set_challenge(text_of(hello.challenge));
  out.set_chunk_bytes(hello.chunk_bytes);
  out.set_max_credits(hello.max_credits);
  for (uint32_t check : hello.checks) out.add_checks(check);
  out.set_check(hello.check);
  out.set_min_check(hello.min_check);
  for (const PeerRail& rail : hello.rails) rail_to_proto(rail, *out.add_rails());
  out.set_renew_ms(hello.renew_ms);
  if (hello.renews != LinkName{}) out.set_renews(text_of(hello.renews));
  return out.SerializeAsString();
}

Result<PeerHello> decode_hello(std::string_view bytes) {
  v1::PeerHello in;
  if (!parse(bytes, in)) return bad("hello");
  PeerHello out;
  out.protocol_min = in.protocol_min();
  out.protocol_max = in.protocol_max();
  if (out.protocol_min == 0 || out.protocol_min > out.protocol_max) return bad("hello.protocol");
  if (static_cast<std::size_t>(in.features_size()) > kMaxFeatures) return bad("hello.features");
  for (const std::string& feature : in.features()) {
    if (feature.size() > kMaxWordBytes) return bad("hello.features");
    out.features.push_back(feature);
  }
  out.node = in.node_id();
  if (out.node.empty() || out.node.size() > kMaxNodeBytes) return bad("hello.node_id");
  if (!take(in.boot_id(), out.boot.bytes) || out.boot.is_zero()) return bad("hello.boot_id");
  out.address = in.address();
  if (out.address.size() > kMaxAddressBytes) return bad("hello.address");
  out.ucx_version = in.ucx_version();
  if (out.ucx_version.size() > kMaxWordBytes) return bad("hello.ucx_version");
  if (!take(in.random(), out.random)) return bad("hello.random");
  if (!take(in.challenge(), out.challenge, true)) return bad("hello.challenge");
  out.chunk_bytes = in.chunk_bytes();
  if (out.chunk_bytes == 0 || out.chunk_bytes % 4096 != 0) return bad("hello.chunk_bytes");
  out.max_credits = in.max_credits();
  if (out.max_credits == 0) return bad("hello.max_credits");
  if (static_cast<std::size_t>(in.checks_size()) > kMaxFeatures) return bad("hello.checks");
  out.checks.assign(in.checks().begin(), in.checks().end());
  out.check = in.check();
  out.min_check = in.min_check();
  if (in.rails_size() == 0 || static_cast<uint32_t>(in.rails_size()) > kMaxPeerRails)
    return bad("hello.rails");
  for (const v1::PeerRail& rail : in.rails())
    if (!rail_from_proto(rail, out.rails.emplace_back())) return bad("hello.rails");
  out.renew_ms = in.renew_ms();
  if (!take(in.renews(), out.renews, true)) return bad("hello.renews");
  return out;
}

Result<std::string> encode_card(const RankCard& card) {
  v1::RankCard out;
  out.set_node_id(card.node);
  out.set_address(card.address);
  out.set_instance(card.instance);
  out.set_incarnation(text_of(card.incarnation.bytes));
  out.set_generation(card.generation);
  holding_to_proto(card.holding, *out.mutable_holding());
  std::string bytes = out.SerializeAsString();
  if (bytes.size() > kMaxCardBytes)
    return fail(Code::kResourceExhausted, "CARD_TOO_LARGE",
                "the rank's card is longer than 64 KiB: its planes follow no pattern", "layout");
  return bytes;
}

Result<RankCard> decode_card(std::string_view bytes) {
  v1::RankCard in;
  if (bytes.size() > kMaxCardBytes || !parse(bytes, in)) return bad("card");
  RankCard out;
  out.node = in.node_id();
  if (out.node.empty() || out.node.size() > kMaxNodeBytes) return bad("card.node_id");
  out.address = in.address();
  if (out.address.size() > kMaxAddressBytes) return bad("card.address");
  out.instance = in.instance();
  if (out.instance.empty() || out.instance.size() > kMaxNodeBytes) return bad("card.instance");
  if (!take(in.incarnation(), out.incarnation.bytes) || out.incarnation.is_zero())
    return bad("card.incarnation");
  out.generation = in.generation();
  Result<mapping::Holding> holding = holding_from_proto(in.holding());
  if (!holding) return tl::unexpected<Error>(std::move(holding).error());
  out.holding = std::move(*holding);
  return out;
}

std::string encode_signed_card(const SignedCard& card) {
  v1::SignedRankCard out;
  card_to_proto(card, out);
  return out.SerializeAsString();
}

Result<SignedCard> decode_signed_card(std::string_view bytes) {
  v1::SignedRankCard in;
  if (bytes.size() > kMaxCardBytes + 256 || !parse(bytes, in)) return bad("card");
  return card_from_proto(in);
}

std::string encode(const CardQuery& query) {
  v1::CardsRequest out;
  out.set_instance(query.instance);
  if (!query.incarnation.is_zero()) out.set_incarnation(text_of(query.incarnation.bytes));
  out.set_first_rank(query.first_rank);
  out.set_own_only(query.own_only);
  return out.SerializeAsString();
}

Result<CardQuery> decode_card_query(std::string_view bytes) {
  v1::CardsRequest in;
  CardQuery out;
  if (!parse(bytes, in) || in.instance().size() > kMaxNodeBytes ||
      !take(in.incarnation(), out.incarnation.bytes, true))
    return bad("cards");
  out.instance = in.instance();
  out.first_rank = in.first_rank();
  out.own_only = in.own_only();
  return out;
}

std::string encode(const CardPage& page) {
  v1::CardsResponse out;
  out.set_incarnation(text_of(page.incarnation.bytes));
  out.set_rank_count(page.rank_count);
  if (!page.set.is_zero()) out.set_set_digest(text_of(page.set.bytes));
  for (const SignedCard& card : page.cards) card_to_proto(card, *out.add_cards());
  out.set_next_rank(page.more ? page.next_rank : 0);
  return out.SerializeAsString();
}

Result<CardPage> decode_card_page(std::string_view bytes) {
  v1::CardsResponse in;
  CardPage out;
  if (!parse(bytes, in) || !take(in.incarnation(), out.incarnation.bytes) ||
      !take(in.set_digest(), out.set.bytes, true))
    return bad("cards");
  out.rank_count = in.rank_count();
  for (const v1::SignedRankCard& from : in.cards()) {
    Result<SignedCard> card = card_from_proto(from);
    if (!card) return tl::unexpected<Error>(std::move(card).error());
    out.cards.push_back(std::move(*card));
  }
  out.next_rank = in.next_rank();
  out.more = in.next_rank() != 0;
  return out;
}

std::string encode(const ReopenLaneRequest& request) {
  v1::ReopenLaneRequest out;
  out.set_lane(request.lane);
  out.set_epoch(request.epoch);
  out.set_ucx_version(request.ucx_version);
  rail_to_proto(request.rail, *out.mutable_rail());
  return out.SerializeAsString();
}

Result<ReopenLaneRequest> decode_reopen_request(std::string_view bytes) {
  v1::ReopenLaneRequest in;
  ReopenLaneRequest out;
  if (!parse(bytes, in) || in.ucx_version().size() > kMaxWordBytes ||
      !rail_from_proto(in.rail(), out.rail))
    return bad("lane");
  out.lane = in.lane();
  out.epoch = in.epoch();
  out.ucx_version = in.ucx_version();
  return out;
}

std::string encode(const ReopenLaneReply& reply) {
  v1::ReopenLaneResponse out;
  rail_to_proto(reply.rail, *out.mutable_rail());
  return out.SerializeAsString();
}

Result<ReopenLaneReply> decode_reopen_reply(std::string_view bytes) {
  v1::ReopenLaneResponse in;
  ReopenLaneReply out;
  if (!parse(bytes, in) || !rail_from_proto(in.rail(), out.rail)) return bad("lane");
  return out;
}

std::string encode(const LaneDownNotice& notice) {
  v1::LaneDownRequest out;
  out.set_lane(notice.lane);
  out.set_epoch(notice.epoch);
  return out.SerializeAsString();
}

Result<LaneDownNotice> decode_lane_down(std::string_view bytes) {
  v1::LaneDownRequest in;
  if (!parse(bytes, in)) return bad("lane");
  return LaneDownNotice{in.lane(), in.epoch()};
}

std::string encode(const CloseLinkNotice& notice) {
  v1::CloseLinkRequest out;
  out.set_reason(static_cast<uint32_t>(notice.reason));
  return out.SerializeAsString();
}

Result<CloseLinkNotice> decode_close_link(std::string_view bytes) {
  v1::CloseLinkRequest in;
  if (!parse(bytes, in)) return bad("reason");
  return CloseLinkNotice{in.reason() < kReasonCount
                             ? reason_from_wire(static_cast<uint16_t>(in.reason()))
                             : Reason::kProtocol};
}

std::string encode(const JoinForward& forward) {
  v1::JoinForwardRequest out;
  out.set_instance(forward.instance);
  out.set_incarnation(text_of(forward.incarnation.bytes));
  for (const NodeAddress& node : forward.nodes) {
    v1::JoinForwardRequest::Node& to = *out.add_nodes();
    to.set_node_id(node.node);
    to.set_address(node.address);
  }
  return out.SerializeAsString();
}

Result<JoinForward> decode_join_forward(std::string_view bytes) {
  v1::JoinForwardRequest in;
  JoinForward out;
  if (!parse(bytes, in) || in.instance().size() > kMaxNodeBytes ||
      !take(in.incarnation(), out.incarnation.bytes) ||
      static_cast<std::size_t>(in.nodes_size()) > kMaxJoinNodes)
    return bad("join");
  out.instance = in.instance();
  for (const v1::JoinForwardRequest::Node& node : in.nodes()) {
    if (node.node_id().empty() || node.node_id().size() > kMaxNodeBytes ||
        node.address().size() > kMaxAddressBytes)
      return bad("join.nodes");
    out.nodes.push_back({node.node_id(), node.address()});
  }
  return out;
}

std::string encode(const ArenasQuery& query) {
  v1::ArenasRequest out;
  if (!query.host.is_zero()) out.set_host(text_of(query.host.bytes));
  return out.SerializeAsString();
}

Result<ArenasQuery> decode_arenas_query(std::string_view bytes) {
  v1::ArenasRequest in;
  ArenasQuery out;
  if (!parse(bytes, in) || !take(in.host(), out.host.bytes, true)) return bad("arenas.host");
  return out;
}

std::string encode(const ArenasOffer& offer) {
  v1::ArenasResponse out;
  if (!offer.host.is_zero()) out.set_host(text_of(offer.host.bytes));
  if (!offer.socket_path.empty()) {
    out.set_socket_path(offer.socket_path);
    out.set_token(text_of(offer.token.bytes));
  }
  for (const OfferedArena& arena : offer.arenas) arena_to_proto(arena, *out.add_arenas());
  return out.SerializeAsString();
}

Result<ArenasOffer> decode_arenas_offer(std::string_view bytes) {
  v1::ArenasResponse in;
  ArenasOffer out;
  if (!parse(bytes, in) || !take(in.host(), out.host.bytes, true)) return bad("arenas.host");
  out.socket_path = in.socket_path();
  if (out.socket_path.size() > kMaxSocketPathBytes ||
      (!out.socket_path.empty() && out.socket_path.front() != '/') ||
      out.socket_path.find('\0') != std::string::npos)
    return bad("arenas.socket_path");
  if (out.socket_path.empty() ? !in.token().empty() : !take(in.token(), out.token.bytes))
    return bad("arenas.token");
  if (static_cast<std::size_t>(in.arenas_size()) > kMaxLentArenas) return bad("arenas");
  std::optional<uint32_t> last;
  for (const v1::ArenasResponse::Arena& from : in.arenas()) {
    if (last && from.number() <= *last) return bad("arenas.number");
    last = from.number();
    if (!is_known(from.kind())) continue;
    if (!arena_from_proto(from, out.arenas.emplace_back())) return bad("arenas.segments");
  }
  return out;
}

std::string encode(const TraceQuery& query) {
  v1::TraceQuery out;
  out.set_id_hash(query.hash);
  return out.SerializeAsString();
}

Result<TraceQuery> decode_trace_query(std::string_view bytes) {
  v1::TraceQuery in;
  if (!parse(bytes, in) || in.id_hash().size() != 8 ||
      in.id_hash().find_first_not_of("0123456789abcdef") != std::string::npos)
    return bad("trace.id_hash");
  return TraceQuery{in.id_hash()};
}

std::string encode(const TraceReply& reply) {
  v1::TraceReply out;
  for (const TraceReplyPart& part : reply.parts) {
    v1::TraceReply::Part& to = *out.add_parts();
    to.set_role(part.role);
    to.set_rank(part.rank);
    to.set_state(part.state);
    to.set_reason(static_cast<uint32_t>(part.reason));
    to.set_bytes_done(part.bytes_done);
    to.set_bytes_total(part.bytes_total);
    to.set_fragments(part.fragments);
    to.set_chunks(part.chunks);
    for (const TraceReplyStep& step : part.steps) {
      v1::TraceReply::Step& row = *to.add_steps();
      row.set_name(step.name);
      row.set_first_ago_ns(step.first_ago.count());
      row.set_last_ago_ns(step.last_ago.count());
      row.set_count(step.count);
    }
  }
  return out.SerializeAsString();
}

namespace {

// What is shown to operators as it is.
bool is_word(const std::string& text) {
  return !text.empty() && text.size() <= 32 && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
  });
}

}  // namespace

Result<TraceReply> decode_trace_reply(std::string_view bytes) {
  v1::TraceReply in;
  TraceReply out;
  if (!parse(bytes, in) || static_cast<std::size_t>(in.parts_size()) > kMaxTraceParts)
    return bad("trace.parts");
  for (const v1::TraceReply::Part& from : in.parts()) {
    if ((from.role() != "send" && from.role() != "receive") || !is_word(from.state()) ||
        static_cast<std::size_t>(from.steps_size()) > kMaxTraceSteps)
      return bad("trace.parts");
    TraceReplyPart& part = out.parts.emplace_back();
    part.role = from.role();
    part.rank = from.rank();
    part.state = from.state();
    // A later release may know more.
    part.reason =
        reason_from_wire(static_cast<uint16_t>(std::min<uint32_t>(from.reason(), kReasonCount)));
    part.bytes_done = from.bytes_done();
    part.bytes_total = from.bytes_total();
    part.fragments = from.fragments();
    part.chunks = from.chunks();
    for (const v1::TraceReply::Step& step : from.steps()) {
      // So that sums of a few such times are times.
      constexpr int64_t kDecade = int64_t{3660} * 86400 * 1'000'000'000;
      const auto is_near = [](int64_t ns) { return ns >= -kDecade && ns <= kDecade; };
      if (!is_word(step.name()) || !is_near(step.first_ago_ns()) || !is_near(step.last_ago_ns()))
        return bad("trace.steps");
      part.steps.push_back(
          {step.name(), Duration(step.first_ago_ns()), Duration(step.last_ago_ns()), step.count()});
    }
  }
  return out;
}

}  // namespace kvferry::rpc
