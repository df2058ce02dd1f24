// What peers say by gRPC: hellos, cards, queries, offers of arenas. The first byte chooses the
// message; cards of a whole instance are joined, checked and matched with each other.
#include "daemon/mapping/legs.h"
#include "daemon/node/cards.h"
#include "daemon/node/handshake.h"
#include "daemon/rpc/peer_messages.h"
#include "daemon/rpc/quiet_parser.h"
#include "tests/fuzz/input.h"

namespace {

using namespace kvferry;

// What was read is written to bytes that read and write as themselves.
template <typename T>
void check_stable(const Result<T>& read, Result<T> (*decode)(std::string_view)) {
  if (!read) {
    FUZZ_CHECK(!read.error().reason.empty(), "what is wrong has a reason");
    return;
  }
  const std::string bytes = rpc::encode(*read);
  const Result<T> again = decode(bytes);
  FUZZ_CHECK(again.has_value(), "what was read can be written and read");
  FUZZ_CHECK(rpc::encode(*again) == bytes, "and is the same");
}

void hello(std::string_view bytes) {
  const auto read = rpc::decode_hello(bytes);
  if (!read) return;
  const std::string written = rpc::encode_hello(*read);
  const auto again = rpc::decode_hello(written);
  FUZZ_CHECK(again && *again == *read, "a hello that is written reads as the same");
  rpc::PeerHello mine;
  mine.node = "node1";
  mine.ucx_version = "1.13.1";
  mine.chunk_bytes = 1 << 20;
  mine.max_credits = 64;
  mine.checks = {0, 1};
  mine.rails.resize(2);
  const auto agreed = node::agree(mine, *read, 8);
  if (!agreed) return;
  FUZZ_CHECK(agreed->chunk_bytes > 0 && agreed->chunk_bytes <= mine.chunk_bytes &&
                 agreed->max_credits > 0 && agreed->max_credits <= mine.max_credits &&
                 agreed->lanes > 0 && agreed->lanes <= 8,
             "the smaller of both sides counts");
  (void)node::keys_of(mine, "request", *read, written, {}, true);
}

void card(std::string_view bytes) {
  const auto read = rpc::decode_card(bytes);
  if (!read) return;
  const auto written = rpc::encode_card(*read);
  if (!written) {
    FUZZ_CHECK(written.error().reason == "CARD_TOO_LARGE", "only its size can be in the way");
    return;
  }
  const auto again = rpc::decode_card(*written);
  FUZZ_CHECK(again && again->holding == read->holding && again->node == read->node &&
                 again->generation == read->generation,
             "a card that is written reads as the same");
}

void signed_card(std::string_view bytes) {
  const auto read = rpc::decode_signed_card(bytes);
  if (!read) return;
  const auto again = rpc::decode_signed_card(rpc::encode_signed_card(*read));
  FUZZ_CHECK(again && *again == *read, "a signed card that is written reads as the same");
  FUZZ_CHECK(!node::card_tag_right(*read, node::InstanceKey({1})) || !read->tag.empty(), "a tag");
}

// Cards one after the other, each with two bytes of length before it.
void card_set(fuzz::Input& in) {
  std::vector<rpc::SignedCard> cards;
  while (!in.empty() && cards.size() < 64) {
    const auto bytes = in.bytes(in.number<uint16_t>());
    cards.push_back({std::string(fuzz::text_of(bytes)), {}});
  }
  if (cards.empty()) return;
  const auto first = rpc::decode_card(cards.front().card);
  if (!first) return;
  const std::size_t count = cards.size();
  const auto set = node::make_card_set(first->instance, first->incarnation, std::move(cards));
  if (!set) return;
  const auto& instance = (*set)->instance;
  FUZZ_CHECK(instance->ranks.size() == count && (*set)->places.size() == count, "a card a rank");
  const auto table = mapping::LegTable::make(instance, instance);
  if (!table) return;
  for (const uint32_t dp : (*table)->sender_dp_groups())
    for (uint32_t rank = 0; rank < std::min<std::size_t>(count, 4); ++rank) {
      const auto legs = (*table)->legs_of_receiver(dp, rank);
      if (!legs) continue;
      for (const mapping::Leg& leg : *legs) {
        FUZZ_CHECK(leg.sender_rank < count && leg.receiver_rank == rank, "a leg joins two ranks");
        FUZZ_CHECK((*table)->ownership(leg.sender_rank, rank).has_value(), "and owns what it owns");
      }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  [[maybe_unused]] static const bool quiet = (kvferry::rpc::quiet_parser(), true);
  fuzz::Input in(data, size);
  const uint8_t kind = in.byte();
  if (kind == 0) {
    card_set(in);
    return 0;
  }
  const std::string_view bytes = fuzz::text_of(in.rest());
  switch (kind) {
    case 1:
      hello(bytes);
      break;
    case 2:
      card(bytes);
      break;
    case 3:
      signed_card(bytes);
      break;
    case 4:
      check_stable(rpc::decode_card_query(bytes), rpc::decode_card_query);
      break;
    case 5:
      check_stable(rpc::decode_card_page(bytes), rpc::decode_card_page);
      break;
    case 6:
      check_stable(rpc::decode_reopen_request(bytes), rpc::decode_reopen_request);
      break;
    case 7:
      check_stable(rpc::decode_reopen_reply(bytes), rpc::decode_reopen_reply);
      break;
    case 8:
      check_stable(rpc::decode_lane_down(bytes), rpc::decode_lane_down);
      break;
    case 9:
      check_stable(rpc::decode_close_link(bytes), rpc::decode_close_link);
      break;
    case 10:
      check_stable(rpc::decode_join_forward(bytes), rpc::decode_join_forward);
      break;
    case 11:
      check_stable(rpc::decode_arenas_query(bytes), rpc::decode_arenas_query);
      break;
    case 12:
      check_stable(rpc::decode_arenas_offer(bytes), rpc::decode_arenas_offer);
      break;
    case 13:
      check_stable(rpc::decode_trace_query(bytes), rpc::decode_trace_query);
      break;
    case 14:
      check_stable(rpc::decode_trace_reply(bytes), rpc::decode_trace_reply);
      break;
    default:
      break;
  }
  return 0;
}
