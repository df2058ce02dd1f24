#include "daemon/rpc/peer_tls.h"

#include <utility>

namespace kvferry::rpc {

Result<PeerCertificate> peer_certificate(std::string certificate, std::string between) {
  Result<Certificate> read = read_certificate(certificate);
  if (!read)
    return fail(Code::kPermissionDenied, "PEER_CERTIFICATE",
                "the certificate is not taken: " + read.error().message);
  return PeerCertificate{std::move(read->identity), std::move(certificate), std::move(between)};
}

PeerTls::PeerTls(TlsMaterial material)
    : material_(std::make_shared<const TlsMaterial>(std::move(material))) {}

void PeerTls::replace(TlsMaterial material) {
  auto fresh = std::make_shared<const TlsMaterial>(std::move(material));
  MutexLock lock(mutex_);
  material_ = std::move(fresh);
}

std::shared_ptr<const TlsMaterial> PeerTls::material() const {
  MutexLock lock(mutex_);
  return material_;
}

Status PeerTls::check(const PeerCertificate& peer, CertificateUse use, bool at_any_time) const {
  const Status vouched =
      verify_certificate(peer.certificate, peer.between, material()->roots, use, at_any_time);
  if (vouched) return {};
  return fail(Code::kPermissionDenied, "PEER_CERTIFICATE",
              "the certificate is not taken: " + vouched.error().message);
}

}  // namespace kvferry::rpc
