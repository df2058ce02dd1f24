// Proof by effect, before the process says that it is ready, that UCX runs as the evidence rules
// need it: an endpoint in peer error mode can be made over the rail's transport, an offer arrives
// by rendezvous, and a receive posted for a peer that is then killed ends in bounded time (UCX's
// protocol v2 leaves it open for ever); listeners are in the port range and on the device; no
// signal handler of UCX stands. With segments on devices a receive into memory of each device is
// put through the same, in a buffer of its own: the arenas may hold data when a rails process is
// started again.
//
// The peer is a forked child, so all peers are forked before this process has a thread, a UCX
// context or a CUDA one.
#pragma once

#include <sys/types.h>

#include <memory>
#include <span>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/gpu/device.h"
#include "daemon/rails/records.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::rails {

class SelfTest {
 public:
  // Forks one peer per trial: of each transport and device that a rail has, and with GPUs of each
  // of these and each GPU.
  explicit SelfTest(const Setup& setup);
  // Kills and reaps what is left of the peers.
  ~SelfTest();
  SelfTest(const SelfTest&) = delete;
  SelfTest& operator=(const SelfTest&) = delete;

  // SELFTEST_FAILED or UCX_FAILED, naming the rail; errors of gpu::Device::check. Takes a fraction
  // of a second per trial; bounded. `devices`: as many as the set-up names.
  Status run(std::span<const std::shared_ptr<const gpu::Device>> devices);

 private:
  static constexpr uint32_t kNoDevice = UINT32_MAX;
  struct Trial {
    uint32_t rail = 0;
    uint32_t device = kNoDevice;  // whose memory the receive is posted into; none: the host's
    pid_t peer = -1;
    UniqueFd channel;
  };
  void fork_peer(Trial& trial);
  Status run_trial(Trial& trial, const gpu::Device* device);

  const Setup& setup_;
  std::vector<Trial> trials_;
};

}  // namespace kvferry::rails
