// Links between real daemons that shake hands every second or so: transfers go on, and a peer whose
// certificate has expired is shut out.
#include <ctime>

#include "tests/proc/mtls_scene.h"

namespace kvferry::testing {
namespace {

double renewals(const Scene& scene, const std::string& name) {
  return metric(*scene.daemons.at(name), "kvferry_links_renewed_total");
}

}  // namespace

TEST_CASE("transfers go on while the keys of their link are renewed again and again") {
  Scene s;
  s.certify("a b");
  const Scene::How often{"mtls", "certs", {"peer.renew_interval=1s", "checks.kind=gmac"}};
  s.start("a", s.peer(Scene::id("b"), "b"), often);
  // The smaller interval counts.
  s.start("b", s.peer(Scene::id("a"), "a"), {"mtls", "certs", {"checks.kind=gmac"}});
  HandOff hand_off(s);
  int done = 0;
  while (renewals(s, "a") < 3 || renewals(s, "b") < 3 || done < 10) {
    hand_off.require_good();
    ++done;
    REQUIRE(done < 2000);
  }
  // One that is open meanwhile, with chunks whose checks were made under older keys.
  const TransferKey open = hand_off.half_way();
  const double before = renewals(s, "a");
  CHECK(comes_true([&] { return renewals(s, "a") >= before + 2; }));
  hand_off.finish(open);
  INFO(s.logs());
  for (const char* name : {"a", "b"}) {
    const DaemonProcess& daemon = *s.daemons.at(name);
    CHECK(s.links(name) == 1);
    CHECK(metric(daemon, "kvferry_links_lost_total") == 0);
    CHECK(metric(daemon, "kvferry_lane_downs_total") == 0);
    CHECK(metric(daemon, "kvferry_handshakes_failed_total") == 0);
    CHECK(metric(daemon, "kvferry_messages_dropped_total", "cause=\"bad_tag\"") == 0);
    CHECK(metric(daemon, "kvferry_messages_dropped_total", "cause=\"unknown_link\"") == 0);
  }
}

TEST_CASE("a peer whose certificate has expired loses its link") {
  Scene s;
  s.certify("a b");  // for the folder
  const TestAuthority authority("authority");
  s.write("certs/ca.pem", authority.certificate());
  s.write("a", authority.node(Scene::id("a")));
  s.write("b", authority.node(Scene::id("b")));
  const Scene::How often{"mtls", "certs", {"peer.renew_interval=2s"}};
  s.start("a", s.peer(Scene::id("b"), "b"), often);
  s.start("b", s.peer(Scene::id("a"), "a"), often);
  HandOff hand_off(s);
  hand_off.require_good();
  INFO(s.logs());
  CHECK(comes_true([&] { return renewals(s, "a") > 0 && renewals(s, "b") > 0; }));
  s.write("b", authority.issue({.uris = {Scene::id("b")}, .ends = 5}));
  // Its five seconds, two and the ten for which a link may wait. Who ends it first tells the other.
  for (const char* name : {"a", "b"}) CHECK(comes_true([&] { return s.links(name) == 0; }));
  CHECK(s.count("b", "link not renewed") >= 1);
  CHECK(s.count("a", "was not renewed in time") + s.count("b", "was not renewed in time") >= 1);
  CHECK(hand_off.try_it() != "COMPLETED NONE");
}

}  // namespace kvferry::testing
