// The other end of peer_service.h: calls to one daemon. Abstract, so that the node can be tested
// without sockets; the gRPC form is made by grpc_peer_dialer().
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/rpc/peer_messages.h"
#include "daemon/rpc/peer_tls.h"

namespace kvferry::rpc {

// Any thread; nothing blocks. `done` is called exactly once, at the latest shortly after
// `deadline`, on a thread of the transport: it must not block either. Errors of the peer come as it
// sent them. The transport's own are UNAVAILABLE PEER_UNREACHABLE, DEADLINE_EXCEEDED PEER_TIMEOUT
// and, of TLS, PERMISSION_DENIED PEER_CERTIFICATE or IDENTITY_MISMATCH, before anything is sent,
// and FAILED_PRECONDITION PEER_MODE from a peer without TLS.
class PeerStub {
 public:
  virtual ~PeerStub() = default;
  virtual void challenge(Time deadline, std::function<void(Result<Random32>)> done) = 0;
  virtual void handshake(SignedHello hello, Time deadline,
                         std::function<void(Result<SignedHello>)> done) = 0;
  virtual void call(LinkMethod method, LinkCall call, Time deadline,
                    std::function<void(Result<LinkReply>)> done) = 0;
  // What the peer showed when it was last connected to; absent without TLS.
  virtual std::optional<PeerCertificate> certificate() const = 0;
};

struct PeerEndpoint {
  std::string host;  // numeric
  uint16_t port = 0;
  // Whose certificate may answer, over mutual TLS; the first one that does is the only one from
  // then on. Empty: without TLS.
  std::vector<std::string> identities;
};

class PeerDialer {
 public:
  virtual ~PeerDialer() = default;
  // Connects lazily: no packet leaves before the first call.
  virtual std::shared_ptr<PeerStub> dial(const PeerEndpoint& endpoint) = 0;
  // Calls under way have until the deadline, are then cancelled, and have ended when it returns;
  // later ones end at once. Not from a callback. With gRPC before the process's servers are shut
  // down: 1.51 ends its threads for callbacks with the last server or channel, and a callback that
  // lets go of that one would have its thread wait for itself.
  virtual void stop(Time deadline) = 0;
};

// Over gRPC. `tls` is for endpoints with identities, of which there must be none without it; its
// stubs connect anew, with what it then has, when that has been replaced.
std::unique_ptr<PeerDialer> grpc_peer_dialer(std::shared_ptr<const PeerTls> tls = nullptr);

}  // namespace kvferry::rpc
