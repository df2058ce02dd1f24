// Hand-offs between real daemons over mutual TLS: with certificates as deploy/make-test-certs.sh
// makes them, with bad ones, and with new ones while transfers run.
#include <fcntl.h>

#include "tests/proc/mtls_scene.h"

namespace kvferry::testing {

TEST_CASE("two daemons with certificates hand over, and nothing secret is logged") {
  Scene s;
  s.certify("a b");
  for (const char* file : {"certs/a.key", "certs/b.key", "certs/ca.key"}) {
    struct stat info {};
    REQUIRE(::stat(s.path(file).c_str(), &info) == 0);
    CHECK((info.st_mode & 0777U) == 0600);
  }
  s.start("a", s.peer(Scene::id("b"), "b"), {"mtls", "certs", {"log.level=debug"}});
  s.start("b", s.peer(Scene::id("a"), "a"), {"mtls", "certs", {"log.level=debug"}});
  HandOff hand_off(s);
  hand_off.require_good();
  hand_off.require_good();
  const std::string peers = s.peers_of("b");
  INFO(peers);
  CHECK(peers.find(Scene::id("a")) != std::string::npos);
  CHECK(peers.find("linked") != std::string::npos);
  CHECK(s.validity("a") == s.validity_of_file("certs/a.pem"));
  const std::string status =
      output_of(KVFERRY_CTL " --socket " + s.daemons.at("a")->admin_socket() + " status");
  INFO(status);
  CHECK(status.find("\ncertificate") != std::string::npos);
  CHECK(metric(*s.daemons.at("a"), "kvferry_handshakes_failed_total") == 0);
  for (const std::string& name : {std::string("a"), std::string("b")}) {
    const std::string key = read_file(s.path("certs/" + name + ".key"));
    const std::string body = key.substr(key.find('\n') + 1, 40);
    REQUIRE(body.size() == 40);
    for (const char* of : {"a", "b"}) {
      CHECK(s.log(of).find(body) == std::string::npos);
      CHECK(s.log(of).find("PRIVATE KEY") == std::string::npos);
    }
  }
  // gRPC would take TLS 1.2; what two daemons speak is 1.3.
  const std::string told = output_of(
      "openssl s_client -connect 127.0.0.1:" + std::to_string(s.port("a")) + " -cert " +
      s.path("certs/b.pem") + " -key " + s.path("certs/b.key") + " -CAfile " +
      s.path("certs/ca.pem") + " -alpn h2 </dev/null 2>/dev/null | head -c 8192 | strings");
  CHECK(told.find("TLSv1.3") != std::string::npos);
  CHECK(told.find("Verify return code: 0 (ok)") != std::string::npos);
}

TEST_CASE("a daemon does not start with files that are no good, and says which") {
  Scene s;
  s.certify("a");
  const TestAuthority authority("authority");
  s.write("certs/ca.pem", authority.certificate());
  const auto refused_with = [&](const TestAuthority::Names& names) {
    s.write("a", authority.issue(names));
    return s.refusal("a", {});
  };
  const std::string a = Scene::id("a");
  const auto says = [](const std::string& text, const std::string& words) {
    INFO(text);
    CHECK(text.find(words) != std::string::npos);
  };
  says(refused_with({.uris = {a, Scene::id("b")}}), "peer.certificate_file: ");
  says(refused_with({.uris = {a, Scene::id("b")}}), "it has 2 URI names");
  says(refused_with({.uris = {a}, .begins = -7200, .ends = -60}), "has expired, on ");
  s.write("a", authority.node(a));
  s.write("certs/a.key", authority.node(a).key);
  says(s.refusal("a", {}), "peer.key_file: " + s.path("certs/a.key") + ": is not the certificate");
  s.write("a", authority.node(a));
  REQUIRE(::chmod(s.path("certs/a.key").c_str(), 0604) == 0);
  says(s.refusal("a", {}), "peer.key_file: " + s.path("certs/a.key") + ": may be read");
  s.write("a", authority.node(a));
  says(s.refusal("a", {"mtls", "certs", {"node.id=" + Scene::id("b")}}), "node.id: is ");
}

TEST_CASE("a node whose certificate another authority has signed is refused, and both say so") {
  Scene s;
  s.certify("a");
  s.certify("b", "others");
  s.start("a", s.peer(Scene::id("b"), "b"));
  SECTION("neither believes the other") {
    s.start("b", s.peer(Scene::id("a"), "a"), {"mtls", "others"});
    HandOff hand_off(s);
    CHECK(hand_off.try_it() == "FAILED PEER_NOT_ALLOWED");
    const std::string peers = s.peers_of("b");
    INFO(peers);
    CHECK(peers.find("PEER_CERTIFICATE") != std::string::npos);
    CHECK(metric(*s.daemons.at("b"), "kvferry_handshakes_failed_total") >= 1);
    CHECK(peers.find("peer.ca_file") != std::string::npos);
  }
  SECTION("b believes a, and a not b") {
    s.write("others/ca.pem",
            read_file(s.path("others/ca.pem")) + read_file(s.path("certs/ca.pem")));
    s.start("b", s.peer(Scene::id("a"), "a"), {"mtls", "others"});
    HandOff hand_off(s);
    CHECK(hand_off.try_it() == "FAILED DEADLINE");  // it might have passed
    const std::string peers = s.peers_of("b");
    INFO(peers);
    CHECK(peers.find("does not take this node's certificate") != std::string::npos);
    CHECK(s.log("a").find("certificate verify failed") != std::string::npos);
  }
  CHECK(s.links("a") == 0);
  CHECK(s.links("b") == 0);
}

TEST_CASE("another node at the address that a ticket names is not linked") {
  Scene s;
  s.certify("a b c");
  s.start_both();
  HandOff hand_off(s);  // with a's ticket
  s.parties.erase("a");
  s.daemons["a"].reset();
  // c has a good certificate, and a's address.
  s.ports["c"] = s.port("a");
  s.start("c", s.peer(Scene::id("b"), "b"));
  const TransferKey key = new_key("prefill");
  require_ok(hand_off.receiver.receive(key, hand_off.ticket, {}));
  CHECK(hand_off.receiver_end(key) == "FAILED PEER_NOT_ALLOWED");
  const std::string peers = s.peers_of("b");
  INFO(peers);
  CHECK(peers.find("IDENTITY_MISMATCH") != std::string::npos);
  CHECK(peers.find(Scene::id("c")) != std::string::npos);
  CHECK(s.links("c") == 0);
}

TEST_CASE("modes that differ make no link, in either direction") {
  Scene s;
  s.certify("a b");
  SECTION("a wants certificates, b comes without") {
    s.start("a", s.peer(Scene::id("b"), "b"));
    s.start("b", "[node]\nid = \"" + Scene::id("b") + "\"\n" + s.peer(Scene::id("a"), "a", "plain"),
            {"plain"});
    HandOff hand_off(s);
    CHECK(hand_off.try_it() == "FAILED DEADLINE");  // it might have passed
    const std::string peers = s.peers_of("b");
    INFO(peers);
    CHECK(peers.find("perhaps the peer's peer.mode is mtls") != std::string::npos);
  }
  SECTION("b wants certificates, a serves without") {
    s.start("a", "[node]\nid = \"" + Scene::id("a") + "\"\n" + s.peer(Scene::id("b"), "b", "plain"),
            {"plain"});
    s.start("b", s.peer(Scene::id("a"), "a"));
    HandOff hand_off(s);
    CHECK(hand_off.try_it() == "FAILED PEER_NOT_ALLOWED");
    const std::string peers = s.peers_of("b");
    INFO(peers);
    CHECK(peers.find("PEER_MODE") != std::string::npos);
  }
  CHECK(s.links("a") == 0);
  CHECK(s.links("b") == 0);
}

TEST_CASE("certificates are replaced while transfers run, and a whole authority by and by") {
  Scene s;
  s.certify("a b");
  s.certify("a b", "next");
  s.start_both();
  HandOff hand_off(s);
  // Both daemons have taken what was written since `before` lines said so.
  const auto reloaded = [&](std::size_t times) {
    INFO(s.logs());
    for (const char* name : {"a", "b"})
      REQUIRE(comes_true([&] { return s.count(name, "certificate loaded") >= times; }));
  };
  const auto served = [&] {
    const std::string in = s.path("certs/");
    return output_of("openssl s_client -connect 127.0.0.1:" + std::to_string(s.port("a")) +
                     " -cert " + in + "b.pem -key " + in +
                     "b.key -alpn h2 </dev/null 2>/dev/null"
                     " | openssl x509 -noout -serial");
  };
  const auto serial = [&](const std::string& file) {
    return output_of("openssl x509 -noout -serial -in " + s.path(file));
  };

  const TransferKey first = hand_off.half_way();
  CHECK(served() == serial("certs/a.pem"));
  const std::string before = serial("certs/a.pem");
  s.certify("a b");
  reloaded(1);
  CHECK(serial("certs/a.pem") != before);
  CHECK(comes_true([&] { return s.validity("a") == s.validity_of_file("certs/a.pem"); }));
  CHECK(served() == serial("certs/a.pem"));
  hand_off.finish(first);

  // The next authority: believed by all, then used by all, then the only one.
  const std::string old_root = read_file(s.path("certs/ca.pem"));
  const std::string next_root = read_file(s.path("next/ca.pem"));
  const TransferKey second = hand_off.half_way();
  s.write("certs/ca.pem", old_root + next_root);
  reloaded(2);
  for (const char* name : {"a", "b"}) {
    const std::string file = name;
    s.write(file, KeyPair{read_file(s.path("next/" + file + ".pem")),
                          read_file(s.path("next/" + file + ".key"))});
  }
  reloaded(3);
  hand_off.finish(second);
  for (const char* name : {"a", "b"}) CHECK(s.count(name, "link closed") == 0);
  // Nobody believes what the link was made with; a new one is made with the new certificates.
  s.write("certs/ca.pem", next_root);
  reloaded(4);
  for (const char* name : {"a", "b"}) CHECK(comes_true([&] { return s.links(name) == 0; }));
  CHECK(s.count("a", "link closed") + s.count("b", "link closed") >= 1);
  hand_off.require_good();
  CHECK(served() == serial("next/a.pem"));
}

TEST_CASE("new files that are no good are told of, and change nothing") {
  Scene s;
  s.certify("a b c");
  s.certify("b", "next");
  const std::string roots = read_file(s.path("certs/ca.pem"));
  s.start_both();
  HandOff hand_off(s);
  hand_off.require_good();
  const auto told = [&](const std::string& words) {
    const bool seen = comes_true([&] { return s.log("b").find(words) != std::string::npos; });
    if (!seen) FAIL(s.logs());
  };
  const KeyPair fresh{read_file(s.path("next/b.pem")), read_file(s.path("next/b.key"))};
  s.write("certs/b.key", "no key\n");
  told("peer.key_file: " + s.path("certs/b.key") + ": holds no private key");
  // Another node's is no better.
  s.write("b", KeyPair{read_file(s.path("certs/c.pem")), read_file(s.path("certs/c.key"))});
  told("until it is restarted");
  std::filesystem::remove(s.path("certs/ca.pem"));
  told("ca.pem: No such file");
  CHECK(s.count("b", "certificate loaded") == 0);
  CHECK(s.count("b", "link closed") == 0);
  hand_off.require_good();
  // What goes together again is taken.
  s.write("certs/ca.pem", roots + read_file(s.path("next/ca.pem")));
  s.write("b", fresh);
  told("certificate loaded");
  hand_off.require_good();
}

TEST_CASE(
    "a peer that a reload takes off the list loses its link, and has it again after the next") {
  Scene s;
  s.certify("a b");
  s.start_both();
  HandOff hand_off(s);
  hand_off.require_good();
  REQUIRE(s.links("a") == 1);
  const std::string with_b = read_file(s.daemons["a"]->config_file());
  const std::string without_b = with_b.substr(0, with_b.find("[[peers]]"));
  const auto reload = [&](const std::string& text, const std::string& words) {
    const std::size_t times = s.count("a", words);
    std::ofstream(s.daemons["a"]->config_file()) << text;
    ::kill(s.daemons["a"]->pid(), SIGHUP);
    const bool seen = comes_true([&] { return s.count("a", words) > times; });
    if (!seen) FAIL(s.logs());
  };
  // What is wrong changes nothing; what only a start takes over is named.
  reload(without_b + "[engine]\nlease = 3\n", "not reloaded");
  CHECK(s.links("a") == 1);
  reload(with_b + "[engine]\nleg_credits = 7\n", "keys=engine.leg_credits");
  CHECK(s.links("a") == 1);

  const TransferKey open = hand_off.half_way();
  reload(without_b, "reloaded peers=0");
  for (const char* name : {"a", "b"})
    CHECK(comes_true([&] { return s.links(name) == 0; }, seconds(10)));
  CHECK(s.log("a").find("link closed") != std::string::npos);
  CHECK(hand_off.receiver_end(open).substr(0, 6) == "FAILED");
  CHECK(hand_off.try_it() == "FAILED PEER_NOT_ALLOWED");
  reload(with_b, "reloaded peers=1");
  // b is told what it last heard until it dials again.
  CHECK(comes_true([&] { return hand_off.try_it() != "FAILED PEER_NOT_ALLOWED"; }));
  hand_off.require_good();
}

TEST_CASE("reloads whose files hang stop no handshake, and run one after the other") {
  Scene s;
  s.certify("a b");
  s.start_both();
  const std::string main = s.daemons["a"]->config_file();
  const pid_t pid = s.daemons["a"]->pid();
  const std::string text = read_file(main);
  // A FIFO that nobody fills is like a file system that hangs.
  REQUIRE(::rename(main.c_str(), (main + ".kept").c_str()) == 0);
  REQUIRE(::mkfifo(main.c_str(), 0600) == 0);
  const auto taken = [&] {  // whether the daemon has the signal, and may be sent another
    const std::string status = read_file("/proc/" + std::to_string(pid) + "/status");
    return status.find("ShdPnd:\t0000000000000000") != std::string::npos;
  };
  REQUIRE(::kill(pid, SIGHUP) == 0);
  int fifo = -1;
  REQUIRE(comes_true(
      [&] { return (fifo = ::open(main.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC)) >= 0; }));
  for (int more = 0; more < 2; ++more) {
    REQUIRE(::kill(pid, SIGHUP) == 0);
    REQUIRE(comes_true(taken));
  }
  HandOff hand_off(s);
  hand_off.require_good();
  CHECK(s.links("a") == 1);
  CHECK(s.count("a", "reloaded") == 0);

  REQUIRE(::rename((main + ".kept").c_str(), main.c_str()) == 0);
  CHECK(::write(fifo, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  ::close(fifo);
  CHECK(comes_true([&] { return s.count("a", "reloaded peers=1") == 3; }));
  hand_off.require_good();
}

}  // namespace kvferry::testing
