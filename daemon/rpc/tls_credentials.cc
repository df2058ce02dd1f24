#include "daemon/rpc/tls_credentials.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_certificate_verifier.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <algorithm>
#include <utility>

namespace kvferry::rpc {
namespace {

using grpc::experimental::TlsCustomVerificationCheckRequest;

std::string text_of(grpc::string_ref text) {
  return {text.data(), text.size()};
}

// gRPC's C++ credentials for servers have no hook that is asked for certificates in each handshake;
// its C ones have. (The C++ ones that watch files take a key and a certificate that do not belong
// together, and then serve nobody.)
class TlsServerCredentials final : public grpc::ServerCredentials {
 public:
  explicit TlsServerCredentials(std::shared_ptr<const PeerTls> tls)
      : tls_(std::move(tls)),
        credentials_(grpc_ssl_server_credentials_create_with_options(
            grpc_ssl_server_credentials_create_options_using_config_fetcher(
                GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY, fetch, this))) {}
  ~TlsServerCredentials() override {
    grpc_server_credentials_release(credentials_);
    // The server's end has waited for handshakes; this orders what they wrote before it goes.
    MutexLock lock(mutex_);
    served_.reset();
  }
  TlsServerCredentials(const TlsServerCredentials&) = delete;
  TlsServerCredentials& operator=(const TlsServerCredentials&) = delete;

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  // gRPC asks on one thread at a time for a port, and keeps what it had if the new is no good.
  static grpc_ssl_certificate_config_reload_status fetch(void* self,
                                                         grpc_ssl_server_certificate_config** out) {
    auto& credentials = *static_cast<TlsServerCredentials*>(self);
    std::shared_ptr<const TlsMaterial> now = credentials.tls_->material();
    MutexLock lock(credentials.mutex_);
    if (now == credentials.served_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair{now->key.c_str(), now->certificate.c_str()};
    *out = grpc_ssl_server_certificate_config_create(now->roots.c_str(), &pair, 1);
    credentials.served_ = std::move(now);
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  const std::shared_ptr<const PeerTls> tls_;
  Mutex mutex_;
  std::shared_ptr<const TlsMaterial> served_ KVFERRY_GUARDED_BY(mutex_);
  grpc_server_credentials* const credentials_;
};

// Asked by gRPC when the chain is already verified.
class Verifier final : public grpc::experimental::ExternalCertificateVerifier {
 public:
  explicit Verifier(std::shared_ptr<ServerIdentity> server) : server_(std::move(server)) {}

  bool Verify(TlsCustomVerificationCheckRequest* request, std::function<void(grpc::Status)>,
              grpc::Status* status) override {
    const Status taken =
        server_->take(text_of(request->peer_cert()), text_of(request->peer_cert_full_chain()));
    if (!taken) *status = {grpc::StatusCode::PERMISSION_DENIED, taken.error().message};
    return true;
  }
  void Cancel(TlsCustomVerificationCheckRequest*) override {}

 private:
  const std::shared_ptr<ServerIdentity> server_;
};

std::string property(const grpc::AuthContext& context, const char* name) {
  const std::vector<grpc::string_ref> values = context.FindPropertyValues(name);
  return values.size() == 1 ? text_of(values.front()) : std::string();
}

}  // namespace

std::shared_ptr<grpc::ServerCredentials> tls_server_credentials(
    std::shared_ptr<const PeerTls> tls) {
  return std::make_shared<TlsServerCredentials>(std::move(tls));
}

Result<PeerCertificate> shown_certificate(const grpc::AuthContext& context) {
  return peer_certificate(property(context, GRPC_X509_PEM_CERT_PROPERTY_NAME),
                          property(context, GRPC_X509_PEM_CERT_CHAIN_PROPERTY_NAME));
}

Status ServerIdentity::take(std::string certificate, std::string between) {
  Result<PeerCertificate> read = peer_certificate(std::move(certificate), std::move(between));
  MutexLock lock(mutex_);
  refused_.reset();
  if (!read) {
    refused_ = read.error();
    return tl::unexpected<Error>(*refused_);
  }
  if (std::find(identities_.begin(), identities_.end(), read->identity) == identities_.end()) {
    refused_ = Error{
        Code::kPermissionDenied,
        "IDENTITY_MISMATCH",
        "the peer's certificate is " + read->identity + "'s, who " +
            (identities_.size() == 1 ? "is not " + identities_.front() + ", the node that was meant"
                                     : "is not allowed by [peers] there"),
        {}};
    return tl::unexpected<Error>(*refused_);
  }
  identities_ = {read->identity};
  shown_ = std::move(*read);
  return {};
}

std::optional<PeerCertificate> ServerIdentity::shown() const {
  MutexLock lock(mutex_);
  return shown_;
}

std::optional<Error> ServerIdentity::refused() const {
  MutexLock lock(mutex_);
  return refused_;
}

std::shared_ptr<grpc::ChannelCredentials> tls_channel_credentials(
    const TlsMaterial& material, std::shared_ptr<ServerIdentity> server) {
  grpc::experimental::TlsChannelCredentialsOptions options;
  options.set_certificate_provider(
      std::make_shared<grpc::experimental::StaticDataCertificateProvider>(
          material.roots, std::vector<grpc::experimental::IdentityKeyCertPair>{
                              {material.key, material.certificate}}));
  options.watch_root_certs();
  options.watch_identity_key_cert_pairs();
  // Identities, not the names of hosts, are compared: by our verifier.
  options.set_check_call_host(false);
  options.set_certificate_verifier(
      grpc::experimental::ExternalCertificateVerifier::Create<Verifier>(std::move(server)));
  return grpc::experimental::TlsCredentials(options);
}

}  // namespace kvferry::rpc
