// Mutual TLS as gRPC wants it, for peer_client.cc and peer_service.cc.
#pragma once

#include <grpcpp/security/auth_context.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/rpc/peer_tls.h"

namespace kvferry::rpc {

// Asks `tls` anew in each handshake. A client without a certificate that the roots vouch for gets
// no further. Must outlive the server.
std::shared_ptr<grpc::ServerCredentials> tls_server_credentials(std::shared_ptr<const PeerTls> tls);

// What the client of a call showed there. PERMISSION_DENIED PEER_CERTIFICATE.
Result<PeerCertificate> shown_certificate(const grpc::AuthContext& context);

// Who answers the connections of a channel: one of the identities, and from then on that one. Any
// thread.
class ServerIdentity {
 public:
  explicit ServerIdentity(std::vector<std::string> identities)
      : identities_(std::move(identities)) {}

  // Of a certificate that the roots have vouched for. PERMISSION_DENIED: PEER_CERTIFICATE,
  // IDENTITY_MISMATCH.
  Status take(std::string certificate, std::string between);
  std::optional<PeerCertificate> shown() const;
  // Why the last connection was not taken; nothing after one that was.
  std::optional<Error> refused() const;

 private:
  mutable Mutex mutex_;
  std::vector<std::string> identities_ KVFERRY_GUARDED_BY(mutex_);
  std::optional<PeerCertificate> shown_ KVFERRY_GUARDED_BY(mutex_);
  std::optional<Error> refused_ KVFERRY_GUARDED_BY(mutex_);
};

// For one channel; connections of it whose server `server` does not take are not made.
std::shared_ptr<grpc::ChannelCredentials> tls_channel_credentials(
    const TlsMaterial& material, std::shared_ptr<ServerIdentity> server);

}  // namespace kvferry::rpc
