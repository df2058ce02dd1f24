// Links whose keys are renewed by another handshake of the same two daemons, and links that are not
// renewed in time. How messages go from old keys to new ones is keys_test's.
#include <unistd.h>

#include "daemon/node/handshake.h"
#include "tests/unit/link_support.h"
#include "tests/unit/test_certificates.h"

using namespace kvferry;
using namespace kvferry::testing;

namespace {

constexpr Duration kInterval = std::chrono::hours(1);
constexpr Duration kSlack = kInterval / 4;

// Node a at port 1 has dialled node b at port 2.
struct Linked {
  PlainDialer net;
  std::unique_ptr<Daemon> a;
  std::unique_ptr<Daemon> b;
  LinkId at_a;
  LinkId at_b;
  Time start;

  explicit Linked(Duration a_wants = kInterval, Duration b_wants = kInterval) {
    a = std::make_unique<Daemon>("a", 1, net, std::vector{allow("b")}, "", "1.13.1", 1, nullptr,
                                 std::nullopt, a_wants);
    b = std::make_unique<Daemon>("b", 2, net, std::vector{allow("a")}, "", "1.13.1", 1, nullptr,
                                 std::nullopt, b_wants);
    net.serve(1, a->manager.get());
    net.serve(2, b->manager.get());
    REQUIRE(a->link("b", 2));
    start = monotonic_now();
    at_a = a->event<engine::LinkUp>()->link;
    at_b = b->event<engine::LinkUp>()->link;
    see();
  }
  // The first message under the keys that a has now has come, and the first answer to it.
  void see() {
    b->manager->keys_seen(at_b, a->manager->keys(at_a)->out.selector, start);
    a->manager->keys_seen(at_a, b->manager->keys(at_b)->out.selector, start);
  }
  void turn(Time now) const {
    a->manager->renew_links(now);
    b->manager->renew_links(now);
  }
  uint32_t renewal(bool of_a) const {
    return of_a ? a->manager->keys(at_a)->renewal : b->manager->keys(at_b)->renewal;
  }
};

}  // namespace

TEST_CASE("a link that is old gets new keys, and its calls go on") {
  Linked s;
  s.turn(s.start + (kInterval - std::chrono::minutes(1)));
  CHECK_FALSE(s.b->renewed.take([](const auto&) { return true; }, Duration(0)));
  s.turn(s.start + kInterval);
  const auto answered = s.b->renewed.take();
  const auto dialled = s.a->renewed.take();
  REQUIRE(answered);
  REQUIRE(dialled);
  CHECK(answered->link == s.at_b);
  CHECK(dialled->link == s.at_a);
  // Who answers cannot know whether the answer arrives.
  CHECK_FALSE(answered->seal_now);
  CHECK(dialled->seal_now);
  CHECK(answered->keys.in.control == dialled->keys.out.control);
  CHECK(answered->keys.renewal == 1);
  CHECK(s.renewal(true) == 1);
  CHECK(s.renewal(false) == 0);
  // Calls, before b knows that a has the keys and afterwards.
  CHECK(s.a->arenas(s.at_a));
  CHECK(s.b->arenas(s.at_b));
  s.see();
  CHECK(s.renewal(false) == 1);
  CHECK(s.a->arenas(s.at_a));
  CHECK(s.b->arenas(s.at_b));
  CHECK(s.a->manager->links_renewed() == 1);
  CHECK(s.b->manager->links_renewed() == 1);
  CHECK(s.a->manager->links().size() == 1);
  CHECK_FALSE(s.a->event<engine::LinkEnded>(Duration(0)));
  CHECK_FALSE(s.b->event<engine::LinkUp>(Duration(0)));

  // Which makes it young again.
  s.turn(monotonic_now() + (kInterval - std::chrono::minutes(1)));
  CHECK_FALSE(s.b->renewed.take([](const auto&) { return true; }, Duration(0)));
  s.turn(monotonic_now() + kInterval);
  CHECK(s.a->renewed.take());
  CHECK(s.renewal(true) == 2);
}

TEST_CASE("nothing but keys that the peer uses is renewed, and the smaller interval counts") {
  const Duration short_one = std::chrono::minutes(2);
  Linked s(kInterval, short_one);
  s.turn(s.start + short_one);
  CHECK(s.a->renewed.take());
  CHECK(s.b->renewed.take());
  // No message has come under these, so there is no handshake beyond them.
  s.turn(s.start + short_one + std::chrono::seconds(20));
  CHECK_FALSE(s.a->renewed.take([](const auto&) { return true; }, Duration(0)));
  CHECK(s.renewal(true) == 1);
}

TEST_CASE("a handshake whose answer was lost is made again") {
  Linked s;
  // What a never gets: b's answer to a handshake of a's.
  rpc::PeerHello hello;
  hello.node = "a";
  hello.boot = s.a->boot;
  hello.address = "127.0.0.1:1";
  hello.ucx_version = "1.13.1";
  hello.chunk_bytes = 4096;
  hello.max_credits = 1;
  hello.checks = {0};
  hello.rails = {{"tcp", "lo", {1}}};
  hello.renews = s.a->manager->keys(s.at_a)->link_name;
  const auto shake = [&] {
    Box<Result<rpc::Random32>> challenge;
    s.b->manager->challenge({"127.0.0.1", 5}, [&](Result<rpc::Random32> c) { challenge.put(c); });
    hello.challenge = **challenge.take();
    rpc::SignedHello request{rpc::encode_hello(hello), {}};
    request.tag = request_tag(handshake_key({}), request.bytes);
    Box<Result<rpc::SignedHello>> answers;
    s.b->manager->handshake({"127.0.0.1", 5}, request, [&](Result<rpc::SignedHello> answer) {
      answers.put(std::move(answer));
    });
    const auto answer = answers.take();
    REQUIRE(answer);
    return *answer ? "" : answer->error().reason;
  };
  CHECK(shake().empty());
  const auto lost = s.b->renewed.take();
  REQUIRE(lost);
  s.turn(s.start + kInterval);
  const auto taken = s.b->renewed.take();
  REQUIRE(taken);
  CHECK(taken->keys.out.control != lost->keys.out.control);
  REQUIRE(s.a->renewed.take());
  s.see();
  CHECK(s.b->manager->keys(s.at_b)->link_name == s.a->manager->keys(s.at_a)->link_name);
  CHECK(s.b->arenas(s.at_b));

  // Of another life, or of keys that are not in use any more, nothing is renewed.
  CHECK(shake() == "UNKNOWN_LINK");
  hello.renews = s.a->manager->keys(s.at_a)->link_name;
  hello.boot.bytes.fill(7);
  CHECK(shake() == "UNKNOWN_LINK");
  CHECK(s.b->manager->links_renewed() == 1);

  // A peer that asks again and again is told so, until the next turn.
  hello.boot = s.a->boot;
  s.b->manager->renew_links(s.start);
  for (int i = 0; i < 4; ++i) CHECK(shake().empty());
  CHECK(shake() == "TOO_MANY_RENEWALS");
  s.b->manager->renew_links(s.start);
  CHECK(shake().empty());
}

TEST_CASE("a link that cannot be renewed is ended on both sides, each by its own clock") {
  Linked s;
  s.net.serve(2, nullptr);
  s.turn(s.start + kInterval);
  s.turn(s.start + (kInterval + kSlack - std::chrono::minutes(1)));
  CHECK_FALSE(s.a->event<engine::LinkEnded>(Duration(0)));
  CHECK_FALSE(s.b->event<engine::LinkEnded>(Duration(0)));
  SECTION("of the side that dialled") {
    s.a->manager->renew_links(monotonic_now() + kInterval + kSlack);
    CHECK(s.a->event<engine::LinkEnded>());
    CHECK_FALSE(s.b->event<engine::LinkEnded>(Duration(0)));
  }
  SECTION("of the side that answered") {
    s.b->manager->renew_links(monotonic_now() + kInterval + kSlack);
    CHECK(s.b->event<engine::LinkEnded>());
  }
}

TEST_CASE("a peer whose certificate has expired keeps its link for no longer than that") {
  const TestAuthority authority("authority");
  const std::string a_id = "spiffe://t/a";
  const std::string b_id = "spiffe://t/b";
  const auto tls =
      std::make_shared<rpc::PeerTls>(rpc::TlsMaterial{"", "", authority.certificate()});
  const auto shown = [&](const TestAuthority::Names& names) {
    return *rpc::peer_certificate(authority.issue(names).certificate, "");
  };
  PlainDialer net;
  // Good for a few seconds more.
  const rpc::PeerCertificate of_a = shown({.uris = {a_id}, .begins = -60, .ends = 4});
  CertificateDialer from_a(net, of_a);
  const ops::PeerMode mtls = ops::PeerMode::kMtls;
  Daemon a(a_id, 1, from_a, {allow(b_id, mtls)}, "", "1.13.1", 1, tls);
  Daemon b(b_id, 2, net, {allow(a_id, mtls)}, "", "1.13.1", 1, tls);
  net.serve(2, b.manager.get(), shown({.uris = {b_id}}));
  REQUIRE(a.link(b_id, 2));
  const Time start = monotonic_now();
  const LinkId at_a = a.event<engine::LinkUp>()->link;
  a.manager->keys_seen(at_a, a.manager->keys(at_a)->in.selector, start);
  REQUIRE(b.event<engine::LinkUp>());
  // Its end comes; the link is as it was.
  while (tls->check(of_a, CertificateUse::kClient, false) && monotonic_now() - start < kPatience)
    ::usleep(50'000);
  const uint64_t failed = b.manager->handshakes_failed();
  a.manager->renew_links(start + kInterval);
  while (b.manager->handshakes_failed() == failed && monotonic_now() - start < kPatience)
    ::usleep(1000);
  CHECK(b.manager->handshakes_failed() == failed + 1);
  CHECK_FALSE(a.renewed.take([](const auto&) { return true; }, Duration(0)));
  CHECK(b.manager->has_link(a_id));
  b.manager->renew_links(monotonic_now() + kInterval + kSlack);
  CHECK(b.event<engine::LinkEnded>());
}
