// The other end of peer_service.h: calls to one daemon. Abstract, so that the node can be tested
// without sockets; the gRPC form is made by grpc_peer_dialer().
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::rpc {

// Any thread; nothing blocks. `done` is called exactly once, at the latest shortly after
// `deadline`, on a thread of the transport: it must not block either. Errors of the peer come as it
// sent them; UNAVAILABLE PEER_UNREACHABLE and DEADLINE_EXCEEDED PEER_TIMEOUT are the transport's
// own.
class PeerStub {
 public:
  virtual ~PeerStub() = default;
  virtual void challenge(Time deadline, std::function<void(Result<Random32>)> done) = 0;
  virtual void handshake(SignedHello hello, Time deadline,
                         std::function<void(Result<SignedHello>)> done) = 0;
  virtual void call(LinkMethod method, LinkCall call, Time deadline,
                    std::function<void(Result<LinkReply>)> done) = 0;
};

class PeerDialer {
 public:
  virtual ~PeerDialer() = default;
  // `host` is numeric. Connects lazily: no packet leaves before the first call.
  virtual std::shared_ptr<PeerStub> dial(const std::string& host, uint16_t port) = 0;
};

// Channels without TLS: for loopback, and for peers that prove the cluster secret.
std::unique_ptr<PeerDialer> grpc_peer_dialer();

}  // namespace kvferry::rpc
