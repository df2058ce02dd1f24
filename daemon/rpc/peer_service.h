// The listener for other daemons: gRPC over TCP. Threads of gRPC take a call, turn it into plain
// structs and hand it to a PeerBackend, which answers later from any thread. Nothing here decides
// anything; who may speak is the backend's affair.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/rpc/peer_messages.h"
#include "daemon/rpc/peer_tls.h"

namespace kvferry::rpc {

// Calls come on threads of gRPC and must not block; `done` is called exactly once, from any thread.
struct Caller {
  std::string host;  // numeric, without brackets
  uint16_t port = 0;
  // What it showed on this connection, verified when that was made, or what is wrong with it;
  // absent on a listener without TLS.
  std::optional<Result<PeerCertificate>> certificate = {};
};
class PeerBackend {
 public:
  virtual ~PeerBackend() = default;
  virtual void challenge(const Caller& from, std::function<void(Result<Random32>)> done) = 0;
  virtual void handshake(const Caller& from, SignedHello hello,
                         std::function<void(Result<SignedHello>)> done) = 0;
  virtual void call(const Caller& from, LinkMethod method, LinkCall call,
                    std::function<void(Result<LinkReply>)> done) = 0;
};

struct PeerServerConfig {
  std::string listen;                       // host:port; port 0: any free one
  std::shared_ptr<const PeerTls> tls = {};  // null: plain
  uint32_t max_pending = 256;  // calls at the backend at a time; more are RESOURCE_EXHAUSTED BUSY
  int max_streams = 8;         // calls of a connection at a time; its client keeps more back
  // A request, and one before there is a link: beyond, RESOURCE_EXHAUSTED.
  int max_message_bytes = 1 << 20;
  std::size_t max_hello_bytes = 64 << 10;
  // A call that the backend has not answered by then: DEADLINE_EXCEEDED, whatever its client says.
  Duration call_limit = std::chrono::seconds(60);
  // From a connection's beginning until TLS and HTTP/2 have shaken hands, and without a call.
  Duration connect_limit = std::chrono::seconds(10);
  Duration idle_limit = std::chrono::minutes(10);
  // Called with the code of each answer, on any thread; may be empty.
  std::function<void(Code)> on_answer = {};
};

class PeerServer {
 public:
  // Binds and serves. UNAVAILABLE LISTEN_FAILED. The backend must outlive the server.
  static Result<std::unique_ptr<PeerServer>> start(const PeerServerConfig& config,
                                                   PeerBackend& backend);
  ~PeerServer();  // as shutdown with a second
  PeerServer(const PeerServer&) = delete;
  PeerServer& operator=(const PeerServer&) = delete;

  uint16_t port() const;  // really bound
  // Takes no more calls, waits for those at the backend until the deadline, then cancels them.
  // After it returns no further call reaches the backend.
  void shutdown(Time deadline);

 private:
  class Impl;
  explicit PeerServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvferry::rpc
