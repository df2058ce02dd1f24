// Proof by effect, before the process says that it is ready, that UCX runs as the evidence rules
// need it: an endpoint in peer error mode can be made over the rail's transport, an offer arrives
// by rendezvous, and a receive posted for a peer that is then killed ends in bounded time (UCX's
// protocol v2 leaves it open for ever); listeners are in the port range and on the device; no
// signal handler of UCX stands.
//
// The peer is a forked child, so all peers are forked before this process has a thread or a UCX
// context.
#pragma once

#include <sys/types.h>

#include <vector>

#include "daemon/base/result.h"
#include "daemon/rails/records.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::rails {

class SelfTest {
 public:
  // Forks one peer per rail.
  explicit SelfTest(const Setup& setup);
  // Kills and reaps what is left of the peers.
  ~SelfTest();
  SelfTest(const SelfTest&) = delete;
  SelfTest& operator=(const SelfTest&) = delete;

  // SELFTEST_FAILED or UCX_FAILED, naming the rail. Takes a fraction of a second per rail; bounded.
  Status run();

 private:
  struct Peer {
    pid_t pid = -1;
    UniqueFd channel;
  };
  Status test_rail(const SetupRail& rail, Peer& peer);

  const Setup& setup_;
  std::vector<Peer> peers_;
};

}  // namespace kvferry::rails
