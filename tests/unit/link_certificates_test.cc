// Link managers whose peers show certificates: who is linked, and for how long. What TLS itself
// refuses is peer_tls_test's.
#include "daemon/node/handshake.h"
#include "tests/unit/link_support.h"
#include "tests/unit/test_certificates.h"

using namespace kvferry;
using namespace kvferry::testing;

namespace {

const ops::PeerMode kMtls = ops::PeerMode::kMtls;
const ops::PeerMode kPlain = ops::PeerMode::kPlain;

// Two nodes of one authority, "spiffe://t/a" at port 1 and "spiffe://t/b" at port 2.
struct Scene {
  TestAuthority authority{"authority"};
  const std::string a_id = "spiffe://t/a";
  const std::string b_id = "spiffe://t/b";
  std::shared_ptr<rpc::PeerTls> tls = trust(authority);
  PlainDialer net;

  static std::shared_ptr<rpc::PeerTls> trust(const TestAuthority& whom) {
    return std::make_shared<rpc::PeerTls>(rpc::TlsMaterial{"", "", whom.certificate()});
  }
  rpc::PeerCertificate shown(const std::string& id) const {
    return *rpc::peer_certificate(authority.node(id).certificate, "");
  }
  std::unique_ptr<Daemon> daemon(const std::string& id, uint16_t port, rpc::PeerDialer& dialer,
                                 std::vector<ops::PeerConfig> peers, std::string secret = {}) {
    return std::make_unique<Daemon>(id, port, dialer, std::move(peers), std::move(secret), "1.13.1",
                                    1, tls);
  }
};

}  // namespace

TEST_CASE("nodes with certificates are linked, with or without a cluster secret") {
  Scene s;
  CertificateDialer from_a(s.net, s.shown(s.a_id));
  CertificateDialer from_b(s.net, s.shown(s.b_id));
  const auto a = s.daemon(s.a_id, 1, from_a, {allow(s.b_id, kMtls)}, "secret of one side only");
  const auto b = s.daemon(s.b_id, 2, from_b, {allow(s.a_id, kMtls)});
  s.net.serve(1, a->manager.get(), s.shown(s.a_id));
  s.net.serve(2, b->manager.get(), s.shown(s.b_id));
  SECTION("by name") {
    const Result<PeerRef> ref = a->link(s.b_id, 2);
    INFO((ref ? "" : ref.error().to_string()));
    REQUIRE(ref);
    CHECK(ref->node == s.b_id);
    const LinkId at_b = b->event<engine::LinkUp>()->link;
    // Both may ask over it.
    CHECK(a->arenas(ref->link));
    CHECK(b->arenas(at_b));
  }
  SECTION("by address alone") {
    const Result<PeerRef> ref = a->link("", 2);
    REQUIRE(ref);
    CHECK(ref->node == s.b_id);
  }
}

TEST_CASE("a hello says what the certificate says, or there is no link") {
  Scene s;
  CertificateDialer from_a(s.net, s.shown(s.a_id));
  const auto a = s.daemon(s.a_id, 1, from_a, {allow(s.b_id, kMtls), allow("spiffe://t/c", kMtls)});
  s.net.serve(1, a->manager.get(), s.shown(s.a_id));
  SECTION("the client pretends") {
    CertificateDialer as_c(s.net, s.shown("spiffe://t/c"));
    const auto b = s.daemon(s.b_id, 2, as_c, {allow(s.a_id, kMtls)});
    CHECK(reason(b->link(s.a_id, 1)) == "IDENTITY_MISMATCH");
  }
  SECTION("the server pretends") {
    CertificateDialer from_b(s.net, s.shown(s.b_id));
    const auto b = s.daemon(s.b_id, 2, from_b, {allow(s.a_id, kMtls)});
    s.net.serve(2, b->manager.get(), s.shown("spiffe://t/c"));
    CHECK(reason(a->link(s.b_id, 2)) == "IDENTITY_MISMATCH");
    // Its end of the link is taken back.
    CHECK(b->event<engine::LinkEnded>());
  }
  CHECK_FALSE(a->event<engine::LinkUp>(Duration(0)));
  CHECK(a->manager->links().size() <= 1);  // the failed dial
}

TEST_CASE("a certificate that is no good at the handshake makes no link") {
  Scene s;
  CertificateDialer from_a(s.net, s.shown(s.a_id));
  const auto a = s.daemon(s.a_id, 1, from_a, {allow(s.b_id, kMtls)});
  s.net.serve(1, a->manager.get(), s.shown(s.a_id));
  const auto dial_as = [&](const std::string& pem) {
    CertificateDialer dialer(s.net, rpc::peer_certificate(pem, ""));
    const auto b = s.daemon(s.b_id, 2, dialer, {allow(s.a_id, kMtls)});
    const Result<PeerRef> ref = b->link(s.a_id, 1);
    INFO((ref ? "" : ref.error().to_string()));
    return reason(ref);
  };
  // As after a reload of the roots, or on a connection that is older than the certificate's end.
  const TestAuthority other("other");
  CHECK(dial_as(other.node(s.b_id).certificate) == "PEER_CERTIFICATE");
  CHECK(dial_as(s.authority.issue({.uris = {s.b_id}, .begins = -60, .ends = -1}).certificate) ==
        "PEER_CERTIFICATE");
  CHECK(dial_as(s.authority.issue({.uris = {s.b_id, s.a_id}}).certificate) == "PEER_CERTIFICATE");
  CHECK(dial_as(s.authority.issue({.common_name = s.b_id}).certificate) == "PEER_CERTIFICATE");
  CHECK_FALSE(a->event<engine::LinkUp>(Duration(0)));
  CHECK(dial_as(s.authority.node(s.b_id).certificate).empty());
}

TEST_CASE("each peer comes in its own mode and in no other") {
  Scene s;
  CertificateDialer from_b(s.net, s.shown(s.b_id));
  const auto dial = [&](ops::PeerMode here, ops::PeerMode there) {
    const auto a = s.daemon(s.a_id, 1, s.net, {allow(s.b_id, here)});
    s.net.serve(1, a->manager.get(), s.shown(s.a_id));
    const auto b = s.daemon(s.b_id, 2, from_b, {allow(s.a_id, there)});
    const std::string why = reason(b->link(s.a_id, 1));
    CHECK(a->event<engine::LinkUp>(Duration(0)).has_value() == why.empty());
    s.net.serve(1, nullptr);
    return why;
  };
  CHECK(dial(kMtls, kMtls).empty());
  CHECK(dial(kPlain, kPlain).empty());
  CHECK(dial(kPlain, kMtls) == "PEER_MODE");
  CHECK(dial(kMtls, kPlain) == "PEER_MODE");
}

TEST_CASE("calls about a link count only from its own peer's certificate") {
  Scene s;
  CertificateDialer from_a(s.net, s.shown(s.a_id));
  const auto a = s.daemon(s.a_id, 1, from_a, {allow(s.b_id, kMtls)});
  const auto b = s.daemon(s.b_id, 2, s.net, {allow(s.a_id, kMtls)});
  s.net.serve(2, b->manager.get(), s.shown(s.b_id));
  REQUIRE(a->link(s.b_id, 2));
  const LinkId link = a->event<engine::LinkUp>()->link;
  const link::LinkKeys keys = *a->manager->keys(link);
  Box<Result<rpc::LinkReply>> replies;
  const auto call_as = [&](std::optional<Result<rpc::PeerCertificate>> certificate) {
    rpc::LinkCall call;
    call.link = keys.link_name;
    call.number = 77;
    call.body = rpc::encode(rpc::ArenasQuery{});
    call.tag = call_tag(keys.out.call, rpc::LinkMethod::kGetArenas, call);
    b->manager->call({"127.0.0.1", 9, std::move(certificate)}, rpc::LinkMethod::kGetArenas, call,
                     [&](Result<rpc::LinkReply> reply) { replies.put(std::move(reply)); });
    const auto reply = replies.take();
    REQUIRE(reply);
    return *reply ? "" : reply->error().reason;
  };
  CHECK(call_as(Result<rpc::PeerCertificate>(s.shown(s.a_id))).empty());
  CHECK(call_as(Result<rpc::PeerCertificate>(s.shown("spiffe://t/c"))) == "UNKNOWN_LINK");
  CHECK(call_as(rpc::peer_certificate("", "")) == "UNKNOWN_LINK");
  CHECK(call_as({}) == "UNKNOWN_LINK");
}

TEST_CASE("a reload ends the links that do not match any more, and their peers learn it") {
  Scene s;
  CertificateDialer from_a(s.net, s.shown(s.a_id));
  CertificateDialer from_b(s.net, s.shown(s.b_id));
  const auto a = s.daemon(s.a_id, 1, from_a, {allow(s.b_id, kMtls)});
  s.tls = Scene::trust(s.authority);  // b's own
  const auto b = s.daemon(s.b_id, 2, from_b, {allow(s.a_id, kMtls)});
  s.net.serve(1, a->manager.get(), s.shown(s.a_id));
  s.net.serve(2, b->manager.get(), s.shown(s.b_id));
  REQUIRE(a->link(s.b_id, 2));
  const auto require_ended = [&] {
    const auto at_a = a->event<engine::LinkEnded>();
    const auto at_b = b->event<engine::LinkEnded>();
    REQUIRE(at_a);
    REQUIRE(at_b);
    CHECK(at_a->reason == Reason::kPeerNotAllowed);
    CHECK(at_b->reason == Reason::kPeerNotAllowed);
  };
  const TestAuthority other("other");
  SECTION("roots that still vouch change nothing") {
    s.tls->replace({"", "", other.certificate() + s.authority.certificate()});
    b->manager->check_certificates();
    CHECK_FALSE(b->event<engine::LinkEnded>(Duration(0)));
    CHECK(b->manager->has_link(s.a_id));
  }
  SECTION("roots that do not, of the side that answered") {
    s.tls->replace({"", "", other.certificate()});
    b->manager->check_certificates();
    require_ended();
    CHECK(reason(a->link(s.b_id, 2)) == "PEER_CERTIFICATE");
  }
  SECTION("a peer that is taken off the list") {
    b->manager->set_peers({});
    require_ended();
    CHECK(reason(a->link(s.b_id, 2)) == "PEER_NOT_ALLOWED");
  }
  SECTION("a peer whose mode is another") {
    a->manager->set_peers({allow(s.b_id, kPlain)});
    require_ended();
  }
}
