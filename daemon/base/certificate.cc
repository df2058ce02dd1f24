#include "daemon/base/certificate.h"

#include <openssl/asn1.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509_vfy.h>
#include <openssl/x509v3.h>

#include <array>
#include <ctime>
#include <memory>
#include <vector>

namespace kvferry {
namespace {

constexpr std::size_t kMaxIdentity = 253;

struct Free {
  void operator()(BIO* p) const { BIO_free(p); }
  void operator()(X509* p) const { X509_free(p); }
  void operator()(EVP_PKEY* p) const { EVP_PKEY_free(p); }
  void operator()(GENERAL_NAMES* p) const { GENERAL_NAMES_free(p); }
  void operator()(X509_STORE* p) const { X509_STORE_free(p); }
  void operator()(X509_STORE_CTX* p) const { X509_STORE_CTX_free(p); }
  void operator()(STACK_OF(X509) * p) const { sk_X509_pop_free(p, X509_free); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;

// Leaves the thread's queue of errors as it was: TLS connections on the same thread look at it.
class ErrorMark {
 public:
  ErrorMark() { ERR_set_mark(); }
  ~ErrorMark() { ERR_pop_to_mark(); }
  ErrorMark(const ErrorMark&) = delete;
  ErrorMark& operator=(const ErrorMark&) = delete;
};

tl::unexpected<Error> bad_certificate(std::string message) {
  return fail(Code::kInvalidArgument, "BAD_CERTIFICATE", std::move(message));
}
tl::unexpected<Error> bad_identity(std::string message) {
  return fail(Code::kInvalidArgument, "CERTIFICATE_IDENTITY", std::move(message));
}

// Never asks anybody.
int no_password(char*, int, int, void*) {
  return -1;
}

Owned<BIO> reader(std::string_view text) {
  return Owned<BIO>(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// All certificates of the text; an error for one that cannot be read.
Result<std::vector<Owned<X509>>> read_all(std::string_view pem) {
  std::vector<Owned<X509>> out;
  const Owned<BIO> in = reader(pem);
  while (X509* next = PEM_read_bio_X509(in.get(), nullptr, no_password, nullptr))
    out.emplace_back(next);
  // Only the end of the text ends it well.
  const auto last = ERR_peek_last_error();
  if (ERR_GET_LIB(last) != ERR_LIB_PEM || ERR_GET_REASON(last) != PEM_R_NO_START_LINE)
    return bad_certificate("holds a certificate that cannot be read");
  return out;
}

Result<Owned<X509>> read_first(std::string_view pem) {
  Result<std::vector<Owned<X509>>> all = read_all(pem);
  if (!all) return tl::unexpected<Error>(std::move(all).error());
  if (all->empty()) return bad_certificate("holds no certificate in PEM form");
  return std::move(all->front());
}

std::string text_of(const ASN1_IA5STRING* name) {
  return {reinterpret_cast<const char*>(ASN1_STRING_get0_data(name)),
          static_cast<std::size_t>(ASN1_STRING_length(name))};
}

// What the configuration takes for a node's id, so no zero bytes, wildcards or blanks either.
bool is_node_id(std::string_view text) {
  if (text.empty() || text.size() > kMaxIdentity) return false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (!plain && (i == 0 || std::string_view("._:+-/").find(c) == std::string_view::npos))
      return false;
  }
  return true;
}

Result<std::string> spiffe_identity(const std::string& uri) {
  constexpr std::string_view kScheme = "spiffe://";
  const std::string_view rest = std::string_view(uri).substr(std::min(uri.size(), kScheme.size()));
  const std::size_t slash = rest.find('/');
  if (uri.rfind(kScheme, 0) != 0 || slash == 0 || slash == std::string_view::npos ||
      slash + 1 == rest.size() || !is_node_id(uri))
    return bad_identity("its URI name is not spiffe://DOMAIN/PATH of letters, digits and ._:+-/");
  return uri;
}

Result<std::string> dns_identity(std::string name) {
  for (char& c : name)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  if (!is_node_id(name))
    return bad_identity("its DNS name is none of a node: letters, digits and ._:+-/");
  return name;
}

Result<std::string> identity_of(X509* certificate) {
  int found = 0;
  const Owned<GENERAL_NAMES> names(static_cast<GENERAL_NAMES*>(
      X509_get_ext_d2i(certificate, NID_subject_alt_name, &found, nullptr)));
  if (names == nullptr && found != -1)
    return bad_identity("its alternative names stand twice or cannot be read");
  std::vector<std::string> uris;
  std::vector<std::string> dns;
  for (int i = 0; names != nullptr && i < sk_GENERAL_NAME_num(names.get()); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names.get(), i);
    if (name->type == GEN_URI) uris.push_back(text_of(name->d.uniformResourceIdentifier));
    if (name->type == GEN_DNS) dns.push_back(text_of(name->d.dNSName));
  }
  if (uris.size() > 1)
    return bad_identity("it has " + std::to_string(uris.size()) +
                        " URI names (subjectAltName), so nobody can tell whose it is");
  if (uris.size() == 1) return spiffe_identity(uris.front());
  if (dns.size() > 1)
    return bad_identity("it has no URI name and " + std::to_string(dns.size()) +
                        " DNS names (subjectAltName), so nobody can tell whose it is");
  if (dns.size() == 1) return dns_identity(dns.front());
  return bad_identity(
      "it has neither a URI nor a DNS name (subjectAltName); its common name does not count");
}

int purpose_of(CertificateUse use) {
  return use == CertificateUse::kClient ? X509_PURPOSE_SSL_CLIENT : X509_PURPOSE_SSL_SERVER;
}

Result<int64_t> seconds_of(const ASN1_TIME* time) {
  tm parts{};
  if (time == nullptr || ASN1_TIME_to_tm(time, &parts) != 1)
    return bad_certificate("has a date that cannot be read");
  return static_cast<int64_t>(timegm(&parts));
}

}  // namespace

Result<Certificate> read_certificate(std::string_view pem) {
  const ErrorMark mark;
  Result<Owned<X509>> certificate = read_first(pem);
  if (!certificate) return tl::unexpected<Error>(std::move(certificate).error());
  if ((X509_get_extension_flags(certificate->get()) & EXFLAG_CA) != 0)
    return bad_certificate("is a certificate authority's own and cannot be a node's");
  Result<std::string> identity = identity_of(certificate->get());
  if (!identity) return tl::unexpected<Error>(std::move(identity).error());
  const Result<int64_t> not_before = seconds_of(X509_get0_notBefore(certificate->get()));
  const Result<int64_t> not_after = seconds_of(X509_get0_notAfter(certificate->get()));
  if (!not_before) return tl::unexpected<Error>(not_before.error());
  if (!not_after) return tl::unexpected<Error>(not_after.error());
  return Certificate{std::move(*identity), *not_before, *not_after};
}

Status check_private_key(std::string_view certificate_pem, std::string_view key_pem) {
  const ErrorMark mark;
  const Owned<BIO> in = reader(key_pem);
  const Owned<EVP_PKEY> key(PEM_read_bio_PrivateKey(in.get(), nullptr, no_password, nullptr));
  if (key == nullptr)
    return fail(Code::kInvalidArgument, "BAD_KEY",
                "holds no private key in PEM form that is free of a password");
  Result<Owned<X509>> certificate = read_first(certificate_pem);
  if (!certificate) return tl::unexpected<Error>(std::move(certificate).error());
  if (X509_check_private_key(certificate->get(), key.get()) != 1)
    return fail(Code::kFailedPrecondition, "KEY_MISMATCH", "is not the certificate's key");
  return {};
}

Status check_certificates(std::string_view pem) {
  const ErrorMark mark;
  Result<std::vector<Owned<X509>>> all = read_all(pem);
  if (!all) return tl::unexpected<Error>(std::move(all).error());
  if (all->empty()) return bad_certificate("holds no certificate in PEM form");
  return {};
}

Result<Validity> last_validity(std::string_view pem) {
  const ErrorMark mark;
  Result<std::vector<Owned<X509>>> all = read_all(pem);
  if (!all) return tl::unexpected<Error>(std::move(all).error());
  if (all->empty()) return bad_certificate("holds no certificate in PEM form");
  Validity last;
  for (const Owned<X509>& one : *all) {
    const Result<int64_t> not_before = seconds_of(X509_get0_notBefore(one.get()));
    const Result<int64_t> not_after = seconds_of(X509_get0_notAfter(one.get()));
    if (!not_before) return tl::unexpected<Error>(not_before.error());
    if (!not_after) return tl::unexpected<Error>(not_after.error());
    if (*not_after > last.not_after) last = {*not_before, *not_after};
  }
  return last;
}

bool may_be_used(std::string_view pem, CertificateUse use) {
  const ErrorMark mark;
  Result<Owned<X509>> certificate = read_first(pem);
  return certificate && X509_check_purpose(certificate->get(), purpose_of(use), 0) == 1;
}

Status verify_certificate(std::string_view pem, std::string_view between, std::string_view roots,
                          CertificateUse use, bool at_any_time) {
  const ErrorMark mark;
  Result<Owned<X509>> certificate = read_first(pem);
  if (!certificate) return tl::unexpected<Error>(std::move(certificate).error());
  Result<std::vector<Owned<X509>>> middle = read_all(between);
  if (!middle) return tl::unexpected<Error>(std::move(middle).error());
  Result<std::vector<Owned<X509>>> trusted = read_all(roots);
  if (!trusted) return tl::unexpected<Error>(std::move(trusted).error());

  const Owned<X509_STORE> store(X509_STORE_new());
  const Owned<STACK_OF(X509)> untrusted(sk_X509_new_null());
  const Owned<X509_STORE_CTX> context(X509_STORE_CTX_new());
  bool made = store != nullptr && untrusted != nullptr && context != nullptr;
  for (const Owned<X509>& root : *trusted)
    made = made && X509_STORE_add_cert(store.get(), root.get()) == 1;
  for (Owned<X509>& one : *middle) {
    made = made && sk_X509_push(untrusted.get(), one.get()) > 0;
    if (made) (void)one.release();
  }
  made = made &&
         X509_STORE_CTX_init(context.get(), store.get(), certificate->get(), untrusted.get()) == 1;
  if (!made) return fail(Code::kInternal, "OUT_OF_MEMORY", "libcrypto has no memory");
  X509_VERIFY_PARAM* const rules = X509_STORE_CTX_get0_param(context.get());
  X509_VERIFY_PARAM_set_purpose(rules, purpose_of(use));
  // An authority below the root may be trusted by itself, as the TLS library does.
  X509_VERIFY_PARAM_set_flags(rules, X509_V_FLAG_PARTIAL_CHAIN | X509_V_FLAG_TRUSTED_FIRST);
  if (at_any_time) X509_VERIFY_PARAM_set_flags(rules, X509_V_FLAG_NO_CHECK_TIME);
  if (X509_verify_cert(context.get()) == 1) return {};
  return fail(Code::kFailedPrecondition, "CERTIFICATE_REFUSED",
              X509_verify_cert_error_string(X509_STORE_CTX_get_error(context.get())));
}

std::string format_date(int64_t seconds_since_1970) {
  const auto time = static_cast<time_t>(seconds_since_1970);
  tm parts{};
  std::array<char, 64> text{};
  if (gmtime_r(&time, &parts) == nullptr) return "another age";
  return {text.data(), std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S UTC", &parts)};
}

}  // namespace kvferry
