// Whom [peers] lets this daemon dial, and whom it lets in: decided before a packet leaves.
#include "daemon/node/peer_rules.h"

#include <catch2/catch.hpp>

#include "daemon/ops/address_rule.h"

using namespace kvferry;
using namespace kvferry::node;

namespace {

const ops::PeerMode kMtls = ops::PeerMode::kMtls;
const ops::PeerMode kPlain = ops::PeerMode::kPlain;

ops::PeerConfig peer(const std::string& identity, const std::string& address, ops::PeerMode mode) {
  ops::PeerConfig out;
  out.identity = identity;
  out.mode = mode;
  out.addresses.push_back(*ops::parse_address_rule(address));
  return out;
}

std::string reason_of(const Result<Route>& route) {
  return route ? "" : route.error().reason;
}
std::string reason_of(const Status& status) {
  return status ? "" : status.error().reason;
}

const std::vector<ops::PeerConfig> kPeers{
    peer("b", "10.0.0.0/8:7400", kMtls), peer("c", "127.0.0.1", kPlain),
    peer("d", "10.1.0.0/16", kPlain), peer("e", "localhost:9", kPlain)};

}  // namespace

TEST_CASE("a node is dialled only where its entry says, whatever a ticket says") {
  const Result<Route> route = choose_route(kPeers, "b", "10.0.0.7:7400", false);
  REQUIRE(route);
  CHECK(route->endpoint.host == "10.0.0.7");
  CHECK(route->endpoint.port == 7400);
  CHECK(route->mode == kMtls);
  CHECK(route->identities == std::vector<std::string>{"b"});
  CHECK(reason_of(choose_route(kPeers, "b", "10.0.0.7:7401", false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(choose_route(kPeers, "b", "192.0.2.1:7400", false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(choose_route(kPeers, "stranger", "10.0.0.7:7400", false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(choose_route({}, "b", "10.0.0.7:7400", false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(choose_route(kPeers, "b", "10.0.0.7", false)) == "BAD_ADDRESS");
}

TEST_CASE("a name counts by the address that it leads to, and that address is dialled") {
  const Result<Route> route = choose_route(kPeers, "c", "localhost:5", false);
  REQUIRE(route);
  CHECK(route->endpoint.host == "127.0.0.1");
  // Whoever answers for names cannot lead to where the entry does not.
  CHECK(reason_of(choose_route(kPeers, "b", "localhost:7400", false)) == "PEER_NOT_ALLOWED");
  // An entry's own name is looked up too, and its port counts.
  CHECK(choose_route(kPeers, "e", "127.0.0.1:9", false));
  CHECK(reason_of(choose_route(kPeers, "e", "127.0.0.1:10", false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(choose_route(kPeers, "e", "127.0.0.2:9", false)) == "PEER_NOT_ALLOWED");
}

TEST_CASE("without a node's name whoever is allowed at the address may answer, and nobody else") {
  const Result<Route> route = choose_route(kPeers, "", "10.0.0.7:7400", false);
  REQUIRE(route);
  CHECK(route->identities == std::vector<std::string>{"b"});
  CHECK(reason_of(choose_route(kPeers, "", "192.0.2.1:7400", false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(choose_route({}, "", "127.0.0.1:7400", false)) == "PEER_NOT_ALLOWED");
}

TEST_CASE("plain is for loopback or under the cluster secret, in both directions") {
  CHECK(choose_route(kPeers, "c", "127.0.0.1:5", false));
  CHECK(reason_of(choose_route(kPeers, "d", "10.1.0.1:5", false)) == "PEER_NOT_ALLOWED");
  CHECK(choose_route(kPeers, "d", "10.1.0.1:5", true));
  CHECK(reason_of(check_inbound(kPeers, "c", "127.0.0.1", kPlain, false)) == "");
  CHECK(reason_of(check_inbound(kPeers, "d", "10.1.0.1", kPlain, false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(check_inbound(kPeers, "d", "10.1.0.1", kPlain, true)) == "");
}

TEST_CASE("who comes is listed, at its address, from any port, and in its mode") {
  CHECK(reason_of(check_inbound(kPeers, "b", "10.9.9.9", kMtls, false)) == "");
  CHECK(reason_of(check_inbound(kPeers, "b", "192.0.2.1", kMtls, false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(check_inbound(kPeers, "stranger", "10.9.9.9", kMtls, false)) ==
        "PEER_NOT_ALLOWED");
  CHECK(reason_of(check_inbound({}, "b", "10.9.9.9", kMtls, false)) == "PEER_NOT_ALLOWED");
  CHECK(reason_of(check_inbound(kPeers, "b", "10.9.9.9", kPlain, true)) == "PEER_MODE");
  CHECK(reason_of(check_inbound(kPeers, "c", "127.0.0.1", kMtls, false)) == "PEER_MODE");
}
