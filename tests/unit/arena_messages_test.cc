// What two daemons say of lent arenas: round trips, limits, and what no daemon sends.
#include <catch2/catch.hpp>
#include <functional>

#include "daemon/rpc/peer_messages.h"
#include "kvferry/v1/peer.pb.h"

namespace kvferry::rpc {
namespace {

ArenasOffer an_offer() {
  ArenasOffer offer;
  offer.host.bytes.fill(1);
  offer.socket_path = "/run/kvferry/arenas.sock";
  offer.token.bytes.fill(2);
  uint32_t next = 10;
  for (const LentKind kind :
       {LentKind::kHostMemfd, LentKind::kFabricVmm, LentKind::kDeviceVmm, LentKind::kCudaMalloc}) {
    OfferedArena& arena = offer.arenas.emplace_back();
    arena.number = next;
    arena.kind = kind;
    if (kind != LentKind::kHostMemfd) arena.device_uuid.fill(static_cast<uint8_t>(kind));
    for (int i = 0; i < 3; ++i) {
      arena.segments.push_back({next++, uint64_t{1} << 40, {}});
      if (!has_descriptors(kind)) arena.segments.back().handle.fill(static_cast<uint8_t>(next));
    }
  }
  return offer;
}

v1::ArenasResponse as_proto(const ArenasOffer& offer) {
  v1::ArenasResponse out;
  REQUIRE(out.ParseFromString(encode(offer)));
  return out;
}

}  // namespace

TEST_CASE("An offer of arenas is read as it was written") {
  const ArenasOffer offer = an_offer();
  const auto read = decode_arenas_offer(encode(offer));
  REQUIRE(read);
  CHECK(*read == offer);
  const auto nothing = decode_arenas_offer("");
  REQUIRE(nothing);
  CHECK(*nothing == ArenasOffer{});
  ArenasQuery query;
  CHECK(decode_arenas_query(encode(query))->host.is_zero());
  query.host.bytes.fill(9);
  CHECK(decode_arenas_query(encode(query))->host == query.host);
}

TEST_CASE("As much as may be offered can be") {
  ArenasOffer offer;
  for (uint32_t a = 0; a < kMaxLentArenas; ++a) {
    OfferedArena& arena = offer.arenas.emplace_back();
    arena.number = a;
    arena.kind = LentKind::kFabricVmm;
    for (uint32_t s = 0; s < kMaxLentSegments; ++s)
      arena.segments.push_back({a * 64 + s, UINT64_MAX / 64, {}});
  }
  const std::string bytes = encode(offer);
  CHECK(bytes.size() < 1U << 20);
  REQUIRE(decode_arenas_offer(bytes));
  CHECK(*decode_arenas_offer(bytes) == offer);
  // Numbers end where they end.
  offer.arenas.resize(1);
  for (uint32_t s = 0; s < kMaxLentSegments; ++s)
    offer.arenas[0].segments[s].number = UINT32_MAX - 63 + s;
  CHECK(decode_arenas_offer(encode(offer)));
}

TEST_CASE("An arena of a kind that is not known is passed over") {
  v1::ArenasResponse message = as_proto(an_offer());
  message.mutable_arenas(1)->set_kind(99);
  message.mutable_arenas(1)->clear_segments();
  const auto read = decode_arenas_offer(message.SerializeAsString());
  REQUIRE(read);
  REQUIRE(read->arenas.size() == 3);
  CHECK(read->arenas[1].kind == LentKind::kDeviceVmm);
}

TEST_CASE("What no daemon sends of its arenas is refused") {
  using Change = std::function<void(v1::ArenasResponse&)>;
  const auto arena = [](int index, std::function<void(v1::ArenasResponse::Arena&)> change) {
    return [=](v1::ArenasResponse& message) { change(*message.mutable_arenas(index)); };
  };
  const std::vector<std::pair<std::string, Change>> rows = {
      {"host of 15 bytes", [](auto& m) { m.mutable_host()->pop_back(); }},
      {"token of 15 bytes", [](auto& m) { m.mutable_token()->pop_back(); }},
      {"no token", [](auto& m) { m.clear_token(); }},
      {"token without a path", [](auto& m) { m.clear_socket_path(); }},
      {"relative path", [](auto& m) { m.set_socket_path("arenas.sock"); }},
      {"long path", [](auto& m) { m.set_socket_path("/" + std::string(107, 'x')); }},
      {"path with a zero", [](auto& m) { m.set_socket_path(std::string("/run\0/x", 7)); }},
      {"65 arenas",
       [](auto& m) {
         for (uint32_t i = 100; m.arenas_size() < 65; ++i) {
           *m.add_arenas() = m.arenas(0);
           m.mutable_arenas(m.arenas_size() - 1)->set_number(i);
         }
       }},
      {"the same arena twice",
       [](auto& m) { m.mutable_arenas(1)->set_number(m.arenas(0).number()); }},
      {"arenas out of order", [](auto& m) { m.mutable_arenas(1)->set_number(1); }},
      {"no segment", arena(0, [](auto& a) { a.clear_segments(); })},
      {"65 segments", arena(0,
                            [](auto& a) {
                              while (a.segments_size() < 65) {
                                auto& segment = *a.add_segments();
                                segment.set_number(a.segments(0).number() +
                                                   static_cast<uint32_t>(a.segments_size()) - 1);
                                segment.set_bytes(1);
                              }
                            })},
      {"a gap", arena(0, [](auto& a) { a.mutable_segments(2)->set_number(13); })},
      {"a segment twice", arena(0, [](auto& a) { a.mutable_segments(1)->set_number(10); })},
      {"numbers that overflow", arena(0,
                                      [](auto& a) {
                                        a.mutable_segments(0)->set_number(UINT32_MAX);
                                        a.mutable_segments(1)->set_number(0);
                                        a.mutable_segments(2)->set_number(1);
                                      })},
      {"no bytes", arena(0, [](auto& a) { a.mutable_segments(1)->set_bytes(0); })},
      {"bytes that overflow",
       arena(0, [](auto& a) { a.mutable_segments(1)->set_bytes(UINT64_MAX - 1); })},
      {"a device's host memory",
       arena(0, [](auto& a) { a.set_device_uuid(std::string(16, 'x')); })},
      {"a device without its name", arena(2, [](auto& a) { a.clear_device_uuid(); })},
      {"a short name", arena(2, [](auto& a) { a.set_device_uuid("x"); })},
      {"a handle of memory with descriptors",
       arena(2, [](auto& a) { a.mutable_segments(0)->set_handle(std::string(64, 'x')); })},
      {"no handle", arena(1, [](auto& a) { a.mutable_segments(0)->clear_handle(); })},
      {"a short handle",
       arena(3, [](auto& a) { a.mutable_segments(2)->set_handle(std::string(63, 'x')); })},
  };
  for (const auto& [name, change] : rows) {
    INFO(name);
    v1::ArenasResponse message = as_proto(an_offer());
    change(message);
    const auto read = decode_arenas_offer(message.SerializeAsString());
    REQUIRE_FALSE(read);
    CHECK(read.error().reason == "BAD_MESSAGE");
  }
  const std::string good = encode(an_offer());
  CHECK_FALSE(decode_arenas_offer(good.substr(0, good.size() - 1)));
  v1::ArenasRequest query;
  query.set_host("short");
  CHECK_FALSE(decode_arenas_query(query.SerializeAsString()));
  CHECK_FALSE(decode_arenas_query("\x07"));
}

}  // namespace kvferry::rpc
