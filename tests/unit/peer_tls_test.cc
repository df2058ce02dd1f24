// Link managers over gRPC with mutual TLS, on loopback: what gets through, what does not, and what
// both sides then say.
#include <arpa/inet.h>
#include <grpcpp/grpcpp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "daemon/base/unique_fd.h"
#include "daemon/rpc/peer_client.h"
#include "daemon/rpc/peer_service.h"
#include "tests/unit/link_support.h"
#include "tests/unit/test_certificates.h"

using namespace kvferry;
using namespace kvferry::testing;

namespace {

const ops::PeerMode kMtls = ops::PeerMode::kMtls;
const std::string kA = "spiffe://t/a";
const std::string kB = "spiffe://t/b";
const std::string kC = "spiffe://t/c";

rpc::TlsMaterial material(const KeyPair& pair, const std::string& roots) {
  return {pair.certificate, pair.key, roots};
}

// A daemon with its listener; `port` is chosen by the system.
struct Node {
  Node(std::string id, std::shared_ptr<rpc::PeerTls> tls_in, std::vector<ops::PeerConfig> peers,
       bool listens_plainly = false)
      : tls(std::move(tls_in)), dialer(rpc::grpc_peer_dialer(tls)) {
    auto started = rpc::PeerServer::start({"127.0.0.1:0", listens_plainly ? nullptr : tls}, late);
    REQUIRE(started);
    server = std::move(*started);
    daemon.emplace(std::move(id), server->port(), *dialer, std::move(peers), "", "1.13.1", 1, tls);
    late.to = daemon->manager.get();
  }
  ~Node() {
    daemon->manager->stop();
    dialer->stop(monotonic_now());
    server->shutdown(monotonic_now());
  }
  uint16_t port() const { return server->port(); }
  std::string link_error(const std::string& id, const Node& node) {
    const Result<PeerRef> ref = daemon->link(id, node.port());
    return ref ? "" : ref.error().to_string();
  }

  // The listener is there before the manager, as in the daemon.
  struct Late : rpc::PeerBackend {
    rpc::PeerBackend* to = nullptr;
    void challenge(const rpc::Caller& from,
                   std::function<void(Result<rpc::Random32>)> done) override {
      to->challenge(from, std::move(done));
    }
    void handshake(const rpc::Caller& from, rpc::SignedHello hello,
                   std::function<void(Result<rpc::SignedHello>)> done) override {
      to->handshake(from, std::move(hello), std::move(done));
    }
    void call(const rpc::Caller& from, rpc::LinkMethod method, rpc::LinkCall call,
              std::function<void(Result<rpc::LinkReply>)> done) override {
      to->call(from, method, std::move(call), std::move(done));
    }
  };
  std::shared_ptr<rpc::PeerTls> tls;
  std::unique_ptr<rpc::PeerDialer> dialer;
  Late late;
  std::optional<Daemon> daemon;
  std::unique_ptr<rpc::PeerServer> server;
};

struct Authorities {
  TestAuthority one{"one"};
  TestAuthority two{"two"};
  std::shared_ptr<rpc::PeerTls> tls(const KeyPair& pair) const {
    return std::make_shared<rpc::PeerTls>(material(pair, one.certificate()));
  }
  std::shared_ptr<rpc::PeerTls> tls(const std::string& id) const { return tls(one.node(id)); }
};

bool begins_with(const std::string& text, const std::string& words) {
  INFO(text);
  CHECK(text.rfind(words, 0) == 0);
  return text.rfind(words, 0) == 0;
}

}  // namespace

TEST_CASE("two nodes link over mutual TLS, and call each other over it") {
  const Authorities by;
  Node a(kA, by.tls(kA), {allow(kB, kMtls)});
  Node b(kB, by.tls(kB), {allow(kA, kMtls)});
  const Result<PeerRef> ref = a.daemon->link(kB, b.port());
  INFO((ref ? "" : ref.error().to_string()));
  REQUIRE(ref);
  CHECK(ref->node == kB);
  const LinkId at_b = b.daemon->event<engine::LinkUp>()->link;
  CHECK(a.daemon->arenas(ref->link));
  CHECK(b.daemon->arenas(at_b));
  // By address alone the certificate says who it is.
  a.daemon->manager->close_link({ref->link, Reason::kShutdown});
  REQUIRE(b.daemon->event<engine::LinkEnded>());
  CHECK(a.daemon->link("", b.port())->node == kB);
}

TEST_CASE("a certificate may lead to its root by others that it brings along") {
  const Authorities by;
  const TestAuthority between("between", by.one);
  const auto with_chain = [&](const std::string& id) {
    KeyPair pair = between.node(id);
    pair.certificate += between.certificate();
    return by.tls(pair);
  };
  Node a(kA, with_chain(kA), {allow(kB, kMtls)});
  Node b(kB, with_chain(kB), {allow(kA, kMtls)});
  CHECK(a.link_error(kB, b).empty());
  // Both keep enough of it to look at it again.
  a.daemon->manager->check_certificates();
  b.daemon->manager->check_certificates();
  CHECK(a.daemon->manager->has_link(kB));
  CHECK(b.daemon->manager->has_link(kA));
  // Without them it leads nowhere.
  Node c(kC, by.tls(between.node(kC)), {allow(kA, kMtls)});
  CHECK_FALSE(c.link_error(kA, a).empty());
}

TEST_CASE("DNS names are identities too") {
  const Authorities by;
  Node a("a.example", by.tls(by.one.issue({.dns = {"A.example"}})), {allow("b.example", kMtls)});
  Node b("b.example", by.tls(by.one.issue({.dns = {"b.example"}})), {allow("a.example", kMtls)});
  CHECK(a.link_error("b.example", b).empty());
}

TEST_CASE("another node's certificate is refused, whichever side shows it") {
  const Authorities by;
  Node a(kA, by.tls(kA), {allow(kB, kMtls), allow(kC, kMtls)});
  SECTION("the server's: nothing is sent to it") {
    Node b(kB, by.tls(kC), {allow(kA, kMtls)});
    const std::string why = a.link_error(kB, b);
    CHECK(begins_with(why, "PERMISSION_DENIED IDENTITY_MISMATCH"));
    CHECK(why.find(kC) != std::string::npos);
    CHECK_FALSE(b.daemon->event<engine::LinkUp>(Duration(0)));
  }
  SECTION("the client's") {
    Node b(kB, by.tls(kC), {allow(kA, kMtls)});
    CHECK(begins_with(b.link_error(kA, a), "PERMISSION_DENIED IDENTITY_MISMATCH"));
    CHECK_FALSE(a.daemon->event<engine::LinkUp>(Duration(0)));
  }
  SECTION("somebody's who is not on the list") {
    Node b(kB, by.tls(kB), {allow(kA, kMtls)});
    Node d("spiffe://t/d", by.tls("spiffe://t/d"), {allow(kA, kMtls)});
    CHECK(begins_with(d.link_error(kA, a), "PERMISSION_DENIED PEER_NOT_ALLOWED"));
    CHECK(begins_with(a.link_error("", d), "PERMISSION_DENIED IDENTITY_MISMATCH"));
  }
}

TEST_CASE("certificates that nobody whom we believe vouches for are refused on both sides") {
  const Authorities by;
  Node a(kA, by.tls(kA), {allow(kB, kMtls)});
  const auto try_with = [&](const KeyPair& pair) {
    Node b(kB, by.tls(pair), {allow(kA, kMtls)});
    // As a client: the TLS library ends the connection, and only the server knows why.
    const std::string as_client = b.link_error(kA, a);
    INFO(as_client);
    CHECK(as_client.rfind("UNAVAILABLE PEER_UNREACHABLE", 0) == 0);
    CHECK(as_client.find("does not take this node's certificate") != std::string::npos);
    CHECK_FALSE(a.daemon->event<engine::LinkUp>(Duration(0)));
    const std::string as_server = a.link_error(kB, b);
    INFO(as_server);
    CHECK(as_server.rfind("PERMISSION_DENIED PEER_CERTIFICATE", 0) == 0);
    CHECK(as_server.find("peer.ca_file or is out of date") != std::string::npos);
    CHECK_FALSE(b.daemon->event<engine::LinkUp>(Duration(0)));
  };
  SECTION("of another authority") {
    try_with(by.two.node(kB));
  }
  SECTION("expired") {
    try_with(by.one.issue({.uris = {kB}, .begins = -7200, .ends = -3600}));
  }
  SECTION("not yet valid") {
    try_with(by.one.issue({.uris = {kB}, .begins = 3600, .ends = 7200}));
  }
}

TEST_CASE("certificates without one identity are refused on both sides, with the reason") {
  const Authorities by;
  Node a(kA, by.tls(kA), {allow(kB, kMtls)});
  const auto try_with = [&](const TestAuthority::Names& names) {
    Node b(kB, by.tls(by.one.issue(names)), {allow(kA, kMtls)});
    CHECK(begins_with(b.link_error(kA, a), "PERMISSION_DENIED PEER_CERTIFICATE"));
    CHECK(begins_with(a.link_error(kB, b), "PERMISSION_DENIED PEER_CERTIFICATE"));
    CHECK_FALSE(a.daemon->event<engine::LinkUp>(Duration(0)));
    CHECK_FALSE(b.daemon->event<engine::LinkUp>(Duration(0)));
  };
  SECTION("two URI names") {
    try_with({.uris = {kB, kC}});
  }
  SECTION("two DNS names") {
    try_with({.dns = {"b.example", "c.example"}});
  }
  SECTION("a common name alone") {
    try_with({.common_name = kB});
  }
}

TEST_CASE("a client without a certificate gets no answer") {
  const Authorities by;
  Node a(kA, by.tls(kA), {allow(kB, kMtls)});
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = by.one.certificate();
  grpc::ChannelArguments arguments;
  const auto channel = grpc::CreateCustomChannel("ipv4:127.0.0.1:" + std::to_string(a.port()),
                                                 grpc::SslCredentials(options), arguments);
  CHECK_FALSE(
      channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::milliseconds(500)));
}

TEST_CASE("a slow handshake has as long as its caller gives it") {
  const Authorities by;
  Node a(kA, by.tls(kA), {});  // a server, which outlives the calls
  // The kernel takes connections, and nobody ever answers.
  const UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* const name = reinterpret_cast<sockaddr*>(&address);
  REQUIRE(::bind(listener.get(), name, size) == 0);
  REQUIRE(::listen(listener.get(), 8) == 0);
  REQUIRE(::getsockname(listener.get(), name, &size) == 0);
  const auto dialer = rpc::grpc_peer_dialer(by.tls(kA));
  const auto stub = dialer->dial({"127.0.0.1", ntohs(address.sin_port), {kB}});
  Box<Result<rpc::Random32>> answers;
  stub->challenge(monotonic_now() + std::chrono::milliseconds(600),
                  [&](Result<rpc::Random32> given) { answers.put(std::move(given)); });
  const auto answer = answers.take();
  REQUIRE(answer);
  REQUIRE_FALSE(*answer);
  CHECK(answer->error().reason == "PEER_TIMEOUT");
  // Calls that hang end with the dialer.
  stub->challenge(monotonic_now() + std::chrono::hours(1),
                  [&](Result<rpc::Random32> given) { answers.put(std::move(given)); });
  dialer->stop(monotonic_now());
  CHECK(answers.take()->error().code == Code::kUnavailable);
}

TEST_CASE("a peer of the other mode is refused, and no other mode is tried") {
  const Authorities by;
  SECTION("plain at a listener with TLS") {
    Node a(kA, by.tls(kA), {allow(kB, kMtls)});
    Node b(kB, nullptr, {allow(kA)}, true);
    const std::string why = b.link_error(kA, a);
    INFO(why);
    CHECK(why.rfind("UNAVAILABLE PEER_UNREACHABLE", 0) == 0);
    CHECK(why.find("perhaps the peer's peer.mode is mtls") != std::string::npos);
    CHECK_FALSE(a.daemon->event<engine::LinkUp>(Duration(0)));
  }
  SECTION("TLS at a plain listener") {
    Node a(kA, by.tls(kA), {allow(kB, kMtls)}, true);
    Node b(kB, by.tls(kB), {allow(kA, kMtls)});
    CHECK(begins_with(b.link_error(kA, a), "FAILED_PRECONDITION PEER_MODE"));
    CHECK_FALSE(a.daemon->event<engine::LinkUp>(Duration(0)));
  }
}

TEST_CASE("new certificates are in force for connections from then on") {
  const Authorities by;
  Node a(kA, by.tls(kA), {allow(kB, kMtls)});
  Node b(kB, by.tls(kB), {allow(kA, kMtls)});
  const Result<PeerRef> ref = a.daemon->link(kB, b.port());
  REQUIRE(ref);
  const auto replace = [](Node& node, const KeyPair& pair, const std::string& roots) {
    node.tls->replace(material(pair, roots));
    node.daemon->manager->check_certificates();
  };
  // Another authority is introduced, as operators do it: believed first, used next, then alone.
  const std::string both = by.one.certificate() + by.two.certificate();
  replace(a, by.one.node(kA), both);
  replace(b, by.one.node(kB), both);
  CHECK(a.daemon->arenas(ref->link));
  replace(a, by.two.node(kA), both);
  replace(b, by.two.node(kB), both);
  CHECK(a.daemon->arenas(ref->link));
  CHECK(a.daemon->manager->has_link(kB));
  // The link's handshake was made with what nobody believes now.
  replace(a, by.two.node(kA), by.two.certificate());
  replace(b, by.two.node(kB), by.two.certificate());
  CHECK(a.daemon->event<engine::LinkEnded>());
  CHECK(b.daemon->event<engine::LinkEnded>());
  CHECK(a.link_error(kB, b).empty());
}
