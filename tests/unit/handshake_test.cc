// What two hellos agree on, from either side.
#include "daemon/node/handshake.h"

#include <catch2/catch.hpp>

using namespace kvferry;
using namespace kvferry::node;

namespace {

rpc::PeerHello hello(uint32_t check, uint32_t min_check, std::vector<uint32_t> can = {0, 1, 2}) {
  rpc::PeerHello out;
  out.node = "a";
  out.ucx_version = "1.13.1";
  out.chunk_bytes = 4096;
  out.max_credits = 64;
  out.checks = std::move(can);
  out.check = check;
  out.min_check = min_check;
  out.rails.resize(1);
  return out;
}

constexpr uint32_t kNone = 0, kXxh3 = 1, kGmac = 2;

// What both sides say, which must be the same.
std::string agreed(const rpc::PeerHello& a, const rpc::PeerHello& b) {
  const Result<Agreed> one = agree(a, b, 8);
  const Result<Agreed> other = agree(b, a, 8);
  const auto text = [](const Result<Agreed>& of) {
    return of ? std::to_string(static_cast<uint32_t>(of->check)) : of.error().reason;
  };
  CHECK(text(one) == text(other));
  return text(one);
}

}  // namespace

TEST_CASE("the check of chunks is the stronger wish, and never less than either side demands") {
  CHECK(agreed(hello(kNone, kNone), hello(kNone, kNone)) == "0");
  CHECK(agreed(hello(kXxh3, kNone), hello(kNone, kNone)) == "1");
  CHECK(agreed(hello(kXxh3, kNone), hello(kGmac, kGmac)) == "2");
  // Who cannot do the stronger one gets the weaker, unless somebody demands more.
  CHECK(agreed(hello(kXxh3, kNone, {0, 1}), hello(kGmac, kXxh3)) == "1");
  CHECK(agreed(hello(kXxh3, kNone, {0, 1}), hello(kGmac, kGmac)) == "CHECK_TOO_WEAK");
  CHECK(agreed(hello(kNone, kNone, {0}), hello(kXxh3, kXxh3)) == "CHECK_TOO_WEAK");
  CHECK(agreed(hello(kNone, kNone, {}), hello(kNone, kNone)) == "CHECK_TOO_WEAK");
  // A peer that says that it wants less than it demands itself.
  CHECK(agreed(hello(kNone, kGmac), hello(kNone, kNone)) == "CHECK_TOO_WEAK");
  // A check of a later release, which this one does not know.
  CHECK(agreed(hello(99, kNone, {0, 2, 99}), hello(kGmac, kXxh3)) == "2");
  CHECK(agreed(hello(99, kNone, {0, 99}), hello(kGmac, kXxh3)) == "CHECK_TOO_WEAK");
}

TEST_CASE("of limits the smaller counts, and what does not go together is told by name") {
  rpc::PeerHello small = hello(kNone, kNone);
  small.chunk_bytes = 8192;
  small.max_credits = 3;
  small.rails.resize(2);
  const Result<Agreed> both = agree(small, hello(kNone, kNone), 8);
  REQUIRE(both);
  CHECK(both->chunk_bytes == 4096);
  CHECK(both->max_credits == 3);
  CHECK(both->lanes == 2);
  CHECK(agree(small, hello(kNone, kNone), 1)->lanes == 1);
  rpc::PeerHello later = hello(kNone, kNone);
  later.protocol_min = later.protocol_max = 99;
  CHECK(agree(later, small, 8).error().reason == "PROTOCOL_MISMATCH");
  CHECK(agree(small, later, 8).error().reason == "PROTOCOL_MISMATCH");
  for (const char* version : {"1.14.1", "2.13.1", "1", "", "x.y"}) {
    rpc::PeerHello other = hello(kNone, kNone);
    other.ucx_version = version;
    CHECK(agree(other, small, 8).error().reason == "UCX_MISMATCH");
  }
}
