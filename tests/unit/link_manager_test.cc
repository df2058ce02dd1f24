// Two link managers, joined by plain calls or by gRPC on loopback.
#include "daemon/node/link_manager.h"

#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <memory>
#include <set>

#include "daemon/base/unique_fd.h"
#include "daemon/link/envelope.h"
#include "daemon/node/handshake.h"
#include "kvferry/v1/peer.pb.h"
#include "tests/unit/link_support.h"

using namespace kvferry;
using namespace kvferry::node;
using namespace kvferry::testing;

TEST_CASE("a dial makes one link on both sides whose messages open at the other end") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b")}, {}, "1.13.1", 2);
  Daemon b("b", 2, dialer, {allow("a")}, {}, "1.13.0", 3);
  dialer.serve(1, a.manager.get());
  dialer.serve(2, b.manager.get());

  const Result<PeerRef> ref = a.link("b", 2);
  REQUIRE(ref);
  CHECK(ref->node == "b");
  CHECK(ref->boot == b.boot);
  const auto up_a = a.event<engine::LinkUp>();
  const auto up_b = b.event<engine::LinkUp>();
  REQUIRE(up_a);
  REQUIRE(up_b);
  CHECK(up_a->link == ref->link);
  CHECK(up_a->initiator);
  CHECK_FALSE(up_b->initiator);
  CHECK(up_b->boot == a.boot);
  CHECK(up_a->lanes == 3);
  CHECK(up_b->lanes == 3);

  link::LinkTable table_a;
  link::LinkTable table_b;
  table_a.add(up_a->link, *a.manager->keys(up_a->link));
  table_b.add(up_b->link, *b.manager->keys(up_b->link));
  std::vector<uint8_t> sealed;
  REQUIRE(table_a.seal({up_a->link, 1, 0}, 5, engine::ControlMessage(engine::MsgPing{}), sealed));
  CHECK(table_b.open(sealed, Time{}));

  // Lane 2 joins rail 0 of the two here with rail 2 of the three there.
  const Result<LanePath> path = a.manager->lane_path({up_a->link, 2, 0});
  REQUIRE(path);
  CHECK(path->rail == 0);
  CHECK(path->address == std::vector<uint8_t>{1, 2});

  // Asked again, there is nothing to do; nor from the other side.
  CHECK(a.link("b", 2)->link == ref->link);
  CHECK(b.link("a", 1)->link == up_b->link);
}

TEST_CASE("both may dial at once and still get one link") {
  for (int round = 0; round < 20; ++round) {
    PlainDialer dialer;
    Daemon a("a", 1, dialer, {allow("b")});
    Daemon b("b", 2, dialer, {allow("a")});
    dialer.serve(1, a.manager.get());
    dialer.serve(2, b.manager.get());
    Box<Result<PeerRef>> answers;
    a.manager->ensure_link({"b", "127.0.0.1:2"}, monotonic_now() + kPatience,
                           [&](Result<PeerRef> ref) { answers.put(std::move(ref)); });
    b.manager->ensure_link({"a", "127.0.0.1:1"}, monotonic_now() + kPatience,
                           [&](Result<PeerRef> ref) { answers.put(std::move(ref)); });
    for (int i = 0; i < 2; ++i) {
      const auto answer = answers.take();
      REQUIRE(answer);
      CHECK(reason(*answer).empty());
    }
    const auto up_a = a.event<engine::LinkUp>();
    const auto up_b = b.event<engine::LinkUp>();
    REQUIRE(up_a);
    REQUIRE(up_b);
    CHECK(a.manager->keys(up_a->link)->link_name == b.manager->keys(up_b->link)->link_name);
    CHECK(a.manager->links().size() == 1);
    CHECK(b.manager->links().size() == 1);
  }
}

TEST_CASE("strangers, other UCX releases and other secrets are refused before there is a link") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b"), allow("d")});
  dialer.serve(1, a.manager.get());
  SECTION("a node that we do not allow is not dialled") {
    Daemon c("c", 3, dialer, {allow("a")});
    dialer.serve(3, c.manager.get());
    CHECK(reason(a.link("c", 3)) == "PEER_NOT_ALLOWED");
    CHECK_FALSE(c.event<engine::LinkUp>(Duration(0)));
  }
  SECTION("a node that does not allow us") {
    Daemon b("b", 2, dialer, {});
    dialer.serve(2, b.manager.get());
    CHECK(reason(a.link("b", 2)) == "PEER_NOT_ALLOWED");
    CHECK(a.manager->handshakes_failed() == 1);
    CHECK(b.manager->handshakes_failed() == 1);
  }
  SECTION("another node at the address") {
    Daemon d("d", 2, dialer, {allow("a")});
    dialer.serve(2, d.manager.get());
    CHECK(reason(a.link("b", 2)) == "IDENTITY_MISMATCH");
    // The end of a link that d made meanwhile is taken back, so that a later dial is answered.
    const auto ended = d.event<engine::LinkEnded>();
    CHECK(ended);
    CHECK(reason(a.link("", 2)).empty());
  }
  SECTION("another UCX") {
    Daemon b("b", 2, dialer, {allow("a")}, {}, "1.22.0");
    dialer.serve(2, b.manager.get());
    const Result<PeerRef> ref = a.link("b", 2);
    CHECK(reason(ref) == "UCX_MISMATCH");
    CHECK(ref.error().message.find("1.22.0") != std::string::npos);
  }
  SECTION("a cluster secret on one side only") {
    Daemon b("b", 2, dialer, {allow("a")}, "a secret of the cluster");
    dialer.serve(2, b.manager.get());
    CHECK(reason(a.link("b", 2)) == "PEER_NOT_ALLOWED");
    CHECK(reason(b.link("a", 1)) == "PEER_NOT_ALLOWED");
  }
  SECTION("rails that are not up") {
    Daemon b("b", 2, dialer, {allow("a")});
    dialer.serve(2, b.manager.get());
    b.manager->set_rails({}, {});
    CHECK(reason(a.link("b", 2)) == "RAILS_DOWN");
    CHECK(a.manager->handshakes_failed() + b.manager->handshakes_failed() == 0);
  }
  SECTION("nobody there, with back-off") {
    CHECK(reason(a.link("b", 9)) == "PEER_UNREACHABLE");
    CHECK(reason(a.link("b", 9)) == "PEER_UNREACHABLE");
    CHECK(a.manager->links().at(0).last_error.find("PEER_UNREACHABLE") != std::string::npos);
  }
  CHECK_FALSE(a.event<engine::LinkEnded>(Duration(0)));
}

TEST_CASE("a handshake that was listened to cannot be played again") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b")}, "secret of the cluster");
  rpc::PeerHello hello;
  hello.node = "b";
  hello.boot.bytes.fill(1);
  hello.address = "127.0.0.1:2";
  hello.ucx_version = "1.13.1";
  hello.chunk_bytes = 4096;
  hello.max_credits = 1;
  hello.checks = {0};
  hello.rails = {{"tcp", "lo", {1}}};
  Box<Result<rpc::Random32>> challenge;
  a.manager->challenge({"127.0.0.1", 5}, [&](Result<rpc::Random32> c) { challenge.put(c); });
  hello.challenge = **challenge.take();
  const std::string secret = "secret of the cluster";
  rpc::SignedHello request{rpc::encode_hello(hello), {}};
  request.tag = request_tag(handshake_key({secret.begin(), secret.end()}), request.bytes);
  Box<Result<rpc::SignedHello>> answers;
  auto put = [&](Result<rpc::SignedHello> answer) { answers.put(std::move(answer)); };
  a.manager->handshake({"127.0.0.1", 5}, request, put);
  CHECK(*answers.take());
  a.manager->handshake({"127.0.0.1", 5}, request, put);
  const auto again = answers.take();
  REQUIRE(again);
  REQUIRE_FALSE(*again);
  CHECK(again->error().reason == "CHALLENGE_UNKNOWN");
  request.tag[0] ^= 1;
  a.manager->handshake({"127.0.0.1", 5}, request, put);
  CHECK(answers.take()->error().reason == "PEER_NOT_ALLOWED");
}

TEST_CASE("strangers at the door do not hide from the log that our own dials fail") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b")}, "secret of the cluster");
  Daemon b("b", 2, dialer, {}, "another secret");
  dialer.serve(2, b.manager.get());
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> log(std::tmpfile(), std::fclose);
  REQUIRE(log != nullptr);
  const UniqueFd before(::dup(STDERR_FILENO));
  REQUIRE(::dup2(::fileno(log.get()), STDERR_FILENO) >= 0);
  Box<Result<rpc::SignedHello>> answers;
  const int strangers = 20;  // more than are logged in a minute
  for (int i = 0; i < strangers; ++i)
    a.manager->handshake({"127.0.0.1", 5}, {"hello", {}},
                         [&](Result<rpc::SignedHello> answer) { answers.put(std::move(answer)); });
  int refused = 0;
  for (int i = 0; i < strangers; ++i) {
    const auto answer = answers.take();
    refused += answer && !*answer && answer->error().code == Code::kPermissionDenied ? 1 : 0;
  }
  const Result<PeerRef> ref = a.link("b", 2);
  REQUIRE(::dup2(before.get(), STDERR_FILENO) >= 0);
  CHECK(refused == strangers);
  CHECK(reason(ref) == "PEER_NOT_ALLOWED");
  std::rewind(log.get());
  std::string text(64 * 1024, ' ');
  text.resize(std::fread(text.data(), 1, text.size(), log.get()));
  INFO(text);
  const auto count = [&](const std::string& what) {
    int found = 0;
    for (std::size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += what.size())
      ++found;
    return found;
  };
  CHECK(count("peer refused") >= 8);
  CHECK(count("peer refused") < strangers);
  CHECK(count("peer not linked") == 1);
}

TEST_CASE("a daemon that comes back with a new boot id ends the old link") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b")});
  dialer.serve(1, a.manager.get());
  std::optional<engine::LinkUp> first;
  {
    Daemon b("b", 2, dialer, {allow("a")});
    dialer.serve(2, b.manager.get());
    REQUIRE(b.link("a", 1));
    first = a.event<engine::LinkUp>();
    REQUIRE(first);
    dialer.serve(2, nullptr);
  }
  Daemon b("b", 2, dialer, {allow("a")});
  dialer.serve(2, b.manager.get());
  REQUIRE(b.link("a", 1));
  const auto ended = a.event<engine::LinkEnded>();
  REQUIRE(ended);
  CHECK(ended->link == first->link);
  const auto second = a.event<engine::LinkUp>();
  REQUIRE(second);
  CHECK(second->boot == b.boot);
  CHECK_FALSE(a.manager->keys(first->link));
  CHECK(a.manager->keys(second->link));
}

TEST_CASE("who says another node's boot id keeps nobody from linking, and ends nobody's link") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b"), allow("liar")});
  Daemon b("b", 2, dialer, {allow("a")});
  Daemon liar("liar", 3, dialer, {allow("a")}, {}, "1.13.1", 1, nullptr, b.boot);
  dialer.serve(1, a.manager.get());
  dialer.serve(2, b.manager.get());
  dialer.serve(3, liar.manager.get());
  REQUIRE(liar.link("a", 1));
  const auto lied = a.event<engine::LinkUp>();
  REQUIRE(lied);
  SECTION("the other node comes") {
    CHECK(reason(b.link("a", 1)) == "");
  }
  SECTION("the other node is dialled") {
    CHECK(reason(a.link("b", 2)) == "");
  }
  SECTION("the other node comes back after the liar") {
    REQUIRE(a.link("b", 2));
    a.manager->close_link({a.event<engine::LinkUp>()->link, Reason::kPeerLost});
    REQUIRE(b.event<engine::LinkEnded>());
    CHECK(reason(b.link("a", 1)) == "");
  }
  const auto up = a.event<engine::LinkUp>();
  REQUIRE(up);
  CHECK(up->node == "b");
  CHECK(up->boot == lied->boot);
  // Each link is its own node's, with keys of its own.
  CHECK(a.manager->peer_of(up->link)->node == "b");
  CHECK(a.manager->peer_of(lied->link)->node == "liar");
  CHECK(a.manager->keys(up->link)->link_name != a.manager->keys(lied->link)->link_name);
  // What is said of the one is not said of the other.
  liar.manager->close_link({liar.event<engine::LinkUp>()->link, Reason::kPeerLost});
  const auto ended = a.event<engine::LinkEnded>();
  REQUIRE(ended);
  CHECK(ended->link == lied->link);
  CHECK(a.manager->keys(up->link));
}

TEST_CASE("lanes are reopened by the side that dialled, lost lanes and links are told") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b")});
  Daemon b("b", 2, dialer, {allow("a")});
  dialer.serve(1, a.manager.get());
  dialer.serve(2, b.manager.get());
  REQUIRE(a.link("b", 2));
  const LinkId link_a = a.event<engine::LinkUp>()->link;
  const LinkId link_b = b.event<engine::LinkUp>()->link;

  b.manager->tell_lane_down({{link_b, 0, 0}});
  const auto down = a.event<engine::PeerLaneDown>();
  REQUIRE(down);
  CHECK(down->lane == engine::LaneRef{link_a, 0, 0});

  b.set_rails(1, "1.13.1", 42);  // restarted: other addresses
  a.manager->reopen_lane({{link_a, 0, 1}});
  const auto reopened_a = a.event<engine::LaneReopened>();
  const auto reopened_b = b.event<engine::LaneReopened>();
  REQUIRE(reopened_a);
  REQUIRE(reopened_b);
  CHECK(reopened_b->lane == engine::LaneRef{link_b, 0, 1});
  CHECK(a.manager->lane_path({link_a, 0, 1})->address == std::vector<uint8_t>{42, 0});

  a.manager->reopen_lane({{link_a, 0, 1}});  // the same epoch again
  CHECK(a.event<engine::LaneReopenFailed>());
  b.manager->reopen_lane({{link_b, 0, 2}});  // not the side that dialled
  CHECK(b.event<engine::LaneReopenFailed>());
  b.manager->set_rails({}, {});
  a.manager->reopen_lane({{link_a, 0, 3}});
  CHECK(a.event<engine::LaneReopenFailed>());
  CHECK(b.manager->lane_path({link_b, 0, 1}).error().reason == "RAILS_DOWN");
  b.set_rails(1);

  a.manager->close_link({link_a, Reason::kShutdown});
  const auto ended = b.event<engine::LinkEnded>();
  REQUIRE(ended);
  CHECK(ended->link == link_b);
  CHECK(ended->reason == Reason::kShutdown);
  CHECK_FALSE(a.manager->peer_of(link_a));
  CHECK(a.link("b", 2));  // and again
}

TEST_CASE("the link to ourselves is always there, and nobody is told") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {});
  const Result<PeerRef> ref = a.link("a", 1);
  REQUIRE(ref);
  CHECK(ref->link == kLoopedLink);
  CHECK(ref->node == "a");
  CHECK(a.manager->peer_of(kLoopedLink)->boot == ref->boot);
  CHECK(a.manager->links().empty());
  CHECK_FALSE(a.event<engine::LinkUp>(Duration(0)));
  a.manager->set_peers({});
  CHECK(a.link("a", 1));
}

TEST_CASE("peers taken off the list lose their link") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b")});
  Daemon b("b", 2, dialer, {allow("a")});
  dialer.serve(2, b.manager.get());
  REQUIRE(a.link("b", 2));
  a.manager->set_peers({allow("b")});
  CHECK_FALSE(a.event<engine::LinkEnded>(Duration(0)));
  a.manager->set_peers({});
  CHECK(a.event<engine::LinkEnded>());
  CHECK(reason(a.link("b", 2)) == "PEER_NOT_ALLOWED");
}

TEST_CASE("a peer speaks for the tenants that its entry names, and for no other") {
  PlainDialer dialer;
  ops::PeerConfig b = allow("b");
  b.tenants = {"default", "blue"};
  Daemon a("a", 1, dialer, {b, allow("c")});
  CHECK(a.manager->may_speak_for("b", "default"));
  CHECK(a.manager->may_speak_for("b", "blue"));
  CHECK_FALSE(a.manager->may_speak_for("b", "green"));
  CHECK_FALSE(a.manager->may_speak_for("c", "blue"));
  CHECK_FALSE(a.manager->may_speak_for("stranger", "default"));
  CHECK(a.manager->may_speak_for("a", "green"));
  a.manager->set_peers({allow("b")});
  CHECK_FALSE(a.manager->may_speak_for("b", "blue"));
}

TEST_CASE("who watches is told of each link once, from its beginning to its end") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b")});
  dialer.serve(1, a.manager.get());
  auto b = std::make_unique<Daemon>("b", 2, dialer, std::vector{allow("a")});
  dialer.serve(2, b->manager.get());
  REQUIRE(a.link("b", 2));
  CHECK(a.watch.notes() == std::vector<std::string>{"+b1"});
  CHECK(b->watch.notes() == std::vector<std::string>{"+a1"});
  REQUIRE(a.link("b", 2));
  // By the engine's own word, and by the peer's.
  a.manager->close_link({LinkId{1}, Reason::kShutdown});
  REQUIRE(b->event<engine::LinkEnded>());
  a.manager->close_link({LinkId{1}, Reason::kShutdown});
  REQUIRE(a.link("b", 2));
  CHECK(a.watch.notes() == std::vector<std::string>{"+b1", "-1", "+b2"});
  CHECK(b->watch.notes() == std::vector<std::string>{"+a1", "-1", "+a2"});
  // By a new life of the peer.
  b = std::make_unique<Daemon>("b", 2, dialer, std::vector{allow("a")});
  dialer.serve(2, b->manager.get());
  REQUIRE(b->link("a", 1));
  CHECK(a.watch.notes() == std::vector<std::string>{"+b1", "-1", "+b2", "-2", "+b3"});
  // By a list without it.
  a.manager->set_peers({});
  CHECK(a.watch.notes().back() == "-3");
  CHECK(a.watch.notes().size() == 6);
}

TEST_CASE("what a daemon lends is told to its peer, and its secrets to nobody on the way") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("b")}, "secret of the cluster");
  Daemon b("b", 2, dialer, {allow("a")}, "secret of the cluster");
  dialer.serve(1, a.manager.get());
  dialer.serve(2, b.manager.get());
  REQUIRE(a.link("b", 2));
  const LinkId link = a.event<engine::LinkUp>()->link;
  const PeerRef at_b = *b.manager->peer_of(b.event<engine::LinkUp>()->link);
  // Nobody lends.
  const auto nothing = a.arenas(link);
  REQUIRE(nothing);
  CHECK(nothing->arenas.empty());
  CHECK(nothing->socket_path.empty());

  b.manager->set_arena_offers(&b.offers);
  Box<rpc::LinkCall> requests;
  Box<std::string> bodies;
  dialer.tap(rpc::LinkMethod::kGetArenas, {[&](rpc::LinkCall& call) { requests.put(call); },
                                           [&](Result<rpc::LinkReply>& reply) {
                                             if (reply) bodies.put(reply->body);
                                           }});
  rpc::ArenasQuery query;
  query.host.bytes.fill(1);
  rpc::ArenasOffer expected = b.offers.offer(at_b, query);
  const auto first = a.arenas(link);
  REQUIRE(first);
  // What the lender shows at its socket is known to both sides, is the link's own, and is not sent.
  expected.proof = b.offers.proof();
  CHECK_FALSE(expected.proof.is_zero());
  CHECK(expected.proof == welcome_proof(a.manager->keys(link)->in.call));
  CHECK(expected.proof != welcome_proof(a.manager->keys(link)->out.call));
  CHECK(*first == expected);
  const std::string body = *bodies.take();
  CHECK(body.find(std::string(expected.proof.bytes.begin(), expected.proof.bytes.end())) ==
        std::string::npos);
  // In the open it would be all runs of one byte.
  for (const uint8_t byte : {uint8_t{0x77}, uint8_t{0x55}})
    CHECK(body.find(text_of(5, byte)) == std::string::npos);
  CHECK(rpc::encode(expected).find(text_of(16, 0x77)) != std::string::npos);
  CHECK(rpc::encode(expected).find(text_of(64, 0x55)) != std::string::npos);
  CHECK(body.find("/run/a.sock") != std::string::npos);
  // All segments' handles are the same here; no two may look so.
  const auto sealed = rpc::decode_arenas_offer(body);
  REQUIRE(sealed);
  std::set<std::array<uint8_t, 64>> different;
  for (const rpc::OfferedArena& arena : sealed->arenas)
    for (const auto& segment : arena.segments) different.insert(segment.handle);
  CHECK(different.size() == 2 * rpc::kMaxLentSegments);

  // Each call has a seal of its own; the same call again, as somebody on the way might make it, has
  // the same answer under the same seal.
  REQUIRE(a.arenas(link));
  const std::string second = *bodies.take();
  CHECK(second.size() == body.size());
  CHECK(second != body);
  Box<Result<rpc::LinkReply>> replies;
  b.manager->call({"127.0.0.1", 9}, rpc::LinkMethod::kGetArenas, *requests.take(),
                  [&](Result<rpc::LinkReply> reply) { replies.put(std::move(reply)); });
  const auto again = replies.take();
  REQUIRE(again);
  REQUIRE(*again);
  CHECK((*again)->body == body);

  SECTION("an answer that was touched is none") {
    const int where = GENERATE(0, 1);
    dialer.tap(rpc::LinkMethod::kGetArenas, {{}, [&](Result<rpc::LinkReply>& reply) {
                                               REQUIRE(reply);
                                               if (where == 0)
                                                 reply->tag[0] ^= 1;
                                               else
                                                 reply->body.back() ^= 1;
                                             }});
    const auto bad = a.arenas(link);
    REQUIRE_FALSE(bad);
    CHECK(bad.error().reason == "BAD_TAG");
  }
  SECTION("a question that was touched is not answered") {
    dialer.tap(rpc::LinkMethod::kGetArenas,
               {[&](rpc::LinkCall& call) { call.body.back() ^= 1; }, {}});
    const auto bad = a.arenas(link);
    REQUIRE_FALSE(bad);
    CHECK(bad.error().reason == "UNKNOWN_LINK");
  }
  SECTION("nor one after the link's end") {
    a.manager->close_link({link, Reason::kShutdown});
    CHECK(a.arenas(link).error().reason == "LINK_DOWN");
  }
  SECTION("an older release does not know the question") {
    dialer.tap(rpc::LinkMethod::kGetArenas, {{}, [](Result<rpc::LinkReply>& reply) {
                                               reply = fail(Code::kUnimplemented,
                                                            "PEER_UNREACHABLE", "no such method");
                                             }});
    CHECK(a.arenas(link).error().code == Code::kUnimplemented);
  }
}

TEST_CASE("a peer is asked for its side of a transfer over the link alone") {
  PlainDialer dialer;
  Daemon a("a", 1, dialer, {allow("bb")}, "secret of the cluster");
  Daemon b("bb", 2, dialer, {allow("a")}, "secret of the cluster");
  dialer.serve(1, a.manager.get());
  dialer.serve(2, b.manager.get());
  CHECK(a.trace("bb", "0badcafe").error().reason == "LINK_DOWN");
  REQUIRE(a.link("bb", 2));
  REQUIRE(b.event<engine::LinkUp>());

  CHECK(a.trace("bb", "0badcafe").error().code == Code::kUnimplemented);  // nobody answers yet
  TraceAnswerer answerer;
  b.manager->set_trace_answers(&answerer);
  const auto reply = a.trace("bb", "0badcafe");
  REQUIRE(reply);
  REQUIRE(reply->parts.size() == 1);
  // Who asks is who the link was made with.
  CHECK(reply->parts[0].rank == 1);
  CHECK(reply->parts[0].steps ==
        std::vector<rpc::TraceReplyStep>{{"asked", Duration(5), Duration(-3), 2}});
  CHECK(a.trace("bb", "1badcafe").error().reason == "TRACE_BUSY");
  CHECK(a.trace("bb", "0").error().reason == "BAD_MESSAGE");
  CHECK(a.trace("bb", "0BADCAFE").error().reason == "BAD_MESSAGE");
  CHECK(a.trace("nobody", "0badcafe").error().reason == "LINK_DOWN");
  b.manager->set_trace_answers(nullptr);
}

TEST_CASE("a trace is read as it was written, and nothing but a trace is") {
  rpc::TraceReply reply;
  reply.parts = {{"send", 1, "ACTIVE", Reason::kPeerLost, 2, 3, 4, 5, {{"asked", {}, {}, 1}}}};
  const auto again = rpc::decode_trace_reply(rpc::encode(reply));
  REQUIRE(again);
  CHECK(again->parts == reply.parts);
  const auto bad = [](rpc::TraceReply wrong, auto change) {
    change(wrong);
    return !rpc::decode_trace_reply(rpc::encode(wrong));
  };
  using R = rpc::TraceReply;
  CHECK(bad(reply, [](R& r) { r.parts[0].role = "sends"; }));
  CHECK(bad(reply, [](R& r) { r.parts[0].state = ""; }));
  CHECK(bad(reply, [](R& r) { r.parts[0].state = "\x1b[2J"; }));
  CHECK(bad(reply, [](R& r) { r.parts[0].steps[0].name = "a b"; }));
  CHECK(bad(reply, [](R& r) { r.parts[0].steps[0].first_ago = Duration::max(); }));
  CHECK(bad(reply, [](R& r) { r.parts[0].steps[0].last_ago = Duration::min(); }));
  CHECK(bad(reply, [](R& r) { r.parts[0].steps.resize(65, r.parts[0].steps[0]); }));
  CHECK(bad(reply, [](R& r) { r.parts.resize(257, r.parts[0]); }));
  CHECK_FALSE(rpc::decode_trace_reply("\xff"));
}

TEST_CASE("a trace of a later release is read, with reasons and steps that are news") {
  rpc::TraceReply reply;
  reply.parts = {{"send", 1, "PAUSED", static_cast<Reason>(kReasonCount), 2, 3, 4, 5, {}}};
  reply.parts[0].steps = {{"folded", {}, {}, 1}, {"asked", {}, {}, 1}};
  const auto read = rpc::decode_trace_reply(rpc::encode(reply));
  REQUIRE(read);
  CHECK(read->parts[0].reason == Reason::kProtocol);
  CHECK(read->parts[0].state == "PAUSED");
  CHECK(read->parts[0].steps == reply.parts[0].steps);

  // Not one of those that are known after a cut to sixteen bits.
  v1::TraceReply wide;
  wide.add_parts()->set_role("send");
  wide.mutable_parts(0)->set_state("FAILED");
  wide.mutable_parts(0)->set_reason((1U << 16U) + 1);
  const auto cut = rpc::decode_trace_reply(wide.SerializeAsString());
  REQUIRE(cut);
  CHECK(cut->parts[0].reason == Reason::kProtocol);
}

TEST_CASE("all of it works over gRPC") {
  const std::unique_ptr<rpc::PeerDialer> dialer = rpc::grpc_peer_dialer();
  // The port is known only after listening, so b learns to be dialled by what it tells.
  Daemon b("b", 1, *dialer, {allow("a")}, "secret of the cluster");
  Result<std::unique_ptr<rpc::PeerServer>> server =
      rpc::PeerServer::start({"127.0.0.1:0"}, *b.manager);
  REQUIRE(server);
  const uint16_t port = (*server)->port();
  REQUIRE(port != 0);
  {
    Daemon a("a", 1, *dialer, {allow("b")}, "secret of the cluster");
    const Result<PeerRef> ref = a.link("b", port);
    INFO((ref ? "" : ref.error().to_string()));
    REQUIRE(ref);
    Box<Result<rpc::CardPage>> pages;
    auto ask = [&](const std::string& instance) {
      a.manager->get_cards(ref->link, {instance, {}, 0, false}, monotonic_now() + kPatience,
                           [&](Result<rpc::CardPage> page) { pages.put(std::move(page)); });
      return *pages.take();
    };
    const Result<rpc::CardPage> page = ask("default/x");
    REQUIRE(page);
    CHECK(page->cards.at(0).card == "card of a");
    // Errors keep their reason and field.
    const Result<rpc::CardPage> none = ask("default/y");
    REQUIRE_FALSE(none);
    CHECK(none.error().code == Code::kNotFound);
    CHECK(none.error().reason == "INSTANCE_UNKNOWN");
    CHECK(none.error().field == "instance");
    b.manager->set_arena_offers(&b.offers);
    const auto lent = a.arenas(ref->link);
    REQUIRE(lent);
    CHECK(lent->arenas.size() == 2);
    CHECK(lent->arenas[1].segments[63].handle[63] == 0x55);
    // Two daemons cannot share the port.
    CHECK_FALSE(rpc::PeerServer::start({"127.0.0.1:" + std::to_string(port)}, *b.manager));

    (*server)->shutdown(monotonic_now());
    CHECK(ask("default/x").error().code == Code::kUnavailable);
    dialer->stop(monotonic_now());
  }
}
