// Mutual TLS between daemons, apart from gRPC: what this node shows and believes, as it is now, and
// what a peer has shown.
#pragma once

#include <memory>
#include <string>

#include "daemon/base/certificate.h"
#include "daemon/base/mutex.h"
#include "daemon/base/result.h"

namespace kvferry::rpc {

// All in PEM.
struct TlsMaterial {
  std::string certificate;  // the node's, and what leads to a root
  std::string key;          // a secret
  std::string roots;        // whom it believes
};

struct PeerCertificate {
  std::string identity;
  std::string certificate;  // PEM
  std::string between;      // PEM: what it showed on the way to a root
};

// Of a certificate that a peer has shown, with what came along. FAILED: PERMISSION_DENIED
// PEER_CERTIFICATE.
Result<PeerCertificate> peer_certificate(std::string certificate, std::string between);

// Any thread; nothing blocks.
class PeerTls {
 public:
  explicit PeerTls(TlsMaterial material);
  // For connections from now on.
  void replace(TlsMaterial material);
  // Never null; another object after each replace().
  std::shared_ptr<const TlsMaterial> material() const;
  // Whether what is believed now vouches for a certificate that was shown earlier, by a peer that
  // was at that end of the connection. `at_any_time`: even if it has expired meanwhile.
  // PERMISSION_DENIED PEER_CERTIFICATE.
  Status check(const PeerCertificate& peer, CertificateUse use, bool at_any_time) const;

 private:
  mutable Mutex mutex_;
  std::shared_ptr<const TlsMaterial> material_ KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::rpc
