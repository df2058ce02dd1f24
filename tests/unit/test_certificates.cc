#include "tests/unit/test_certificates.h"

#include <openssl/asn1.h>
#include <openssl/bio.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <array>
#include <stdexcept>

namespace kvferry::testing {
namespace {

struct Free {
  void operator()(BIO* p) const { BIO_free(p); }
  void operator()(X509* p) const { X509_free(p); }
  void operator()(EVP_PKEY* p) const { EVP_PKEY_free(p); }
  void operator()(X509_EXTENSION* p) const { X509_EXTENSION_free(p); }
  void operator()(GENERAL_NAMES* p) const { GENERAL_NAMES_free(p); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;

void demand(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(std::string("test certificate: ") + what);
}

Owned<EVP_PKEY> make_key() {
  Owned<EVP_PKEY> key(EVP_EC_gen("P-256"));
  demand(key != nullptr, "EVP_EC_gen");
  return key;
}

template <typename Write>
std::string pem_of(Write write) {
  const Owned<BIO> out(BIO_new(BIO_s_mem()));
  demand(write(out.get()) == 1, "PEM_write");
  char* text = nullptr;
  const long bytes = BIO_get_mem_data(out.get(), &text);
  return {text, static_cast<std::size_t>(bytes)};
}

void add_extension(X509* to, int kind, const std::string& value) {
  X509V3_CTX context{};
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, to, to, nullptr, nullptr, 0);
  const Owned<X509_EXTENSION> made(X509V3_EXT_conf_nid(nullptr, &context, kind, value.c_str()));
  demand(made != nullptr && X509_add_ext(to, made.get(), -1) == 1, value.c_str());
}

void push_name(GENERAL_NAMES* names, int type, const std::string& text) {
  GENERAL_NAME* name = GENERAL_NAME_new();
  ASN1_IA5STRING* value = ASN1_IA5STRING_new();
  demand(ASN1_STRING_set(value, text.data(), static_cast<int>(text.size())) == 1, "a name");
  GENERAL_NAME_set0_value(name, type, value);
  sk_GENERAL_NAME_push(names, name);
}

// By hand, as the text form would take commas and zero bytes for its own.
void add_names(X509* to, const TestAuthority::Names& names) {
  if (names.uris.empty() && names.dns.empty()) {
    std::string text;
    for (const std::string& other : names.others) text += (text.empty() ? "" : ",") + other;
    if (!text.empty()) add_extension(to, NID_subject_alt_name, text);
    return;
  }
  const Owned<GENERAL_NAMES> all(GENERAL_NAMES_new());
  for (const std::string& uri : names.uris) push_name(all.get(), GEN_URI, uri);
  for (const std::string& dns : names.dns) push_name(all.get(), GEN_DNS, dns);
  demand(X509_add1_ext_i2d(to, NID_subject_alt_name, all.get(), 0, 0) == 1, "names");
}

Owned<X509> make_certificate(const TestAuthority::Names& names, EVP_PKEY* key, X509* issuer,
                             EVP_PKEY* issuer_key) {
  Owned<X509> made(X509_new());
  X509_set_version(made.get(), X509_VERSION_3);
  uint64_t serial = 0;
  RAND_bytes(reinterpret_cast<unsigned char*>(&serial), sizeof serial);
  ASN1_INTEGER_set_uint64(X509_get_serialNumber(made.get()), serial);
  X509_gmtime_adj(X509_getm_notBefore(made.get()), names.begins);
  X509_gmtime_adj(X509_getm_notAfter(made.get()), names.ends);
  X509_NAME* subject = X509_get_subject_name(made.get());
  X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(names.common_name.c_str()), -1,
                             -1, 0);
  X509_set_issuer_name(made.get(), issuer == nullptr ? subject : X509_get_subject_name(issuer));
  demand(X509_set_pubkey(made.get(), key) == 1, "X509_set_pubkey");
  add_names(made.get(), names);
  add_extension(made.get(), NID_basic_constraints,
                names.authority ? "critical,CA:true" : "critical,CA:false");
  add_extension(made.get(), NID_key_usage,
                names.authority ? "critical,keyCertSign" : "critical,digitalSignature");
  if (!names.extended_usage.empty() && !names.authority)
    add_extension(made.get(), NID_ext_key_usage, names.extended_usage);
  demand(X509_sign(made.get(), issuer_key, EVP_sha256()) > 0, "X509_sign");
  return made;
}

TestAuthority::Names authority_names(const std::string& name) {
  TestAuthority::Names names;
  names.common_name = name;
  names.authority = true;
  return names;
}

std::string text_of(X509* certificate) {
  return pem_of([&](BIO* out) { return PEM_write_bio_X509(out, certificate); });
}

}  // namespace

struct TestAuthority::Parts {
  Owned<EVP_PKEY> key;
  Owned<X509> certificate;
  std::string pem;
};

TestAuthority::TestAuthority(const std::string& name) : parts_(std::make_unique<Parts>()) {
  parts_->key = make_key();
  parts_->certificate =
      make_certificate(authority_names(name), parts_->key.get(), nullptr, parts_->key.get());
  parts_->pem = text_of(parts_->certificate.get());
}

TestAuthority::TestAuthority(const std::string& name, const TestAuthority& parent)
    : parts_(std::make_unique<Parts>()) {
  parts_->key = make_key();
  parts_->certificate =
      make_certificate(authority_names(name), parts_->key.get(), parent.parts_->certificate.get(),
                       parent.parts_->key.get());
  parts_->pem = text_of(parts_->certificate.get());
}

TestAuthority::~TestAuthority() = default;

const std::string& TestAuthority::certificate() const {
  return parts_->pem;
}

KeyPair TestAuthority::issue(const Names& names) const {
  const Owned<EVP_PKEY> key = make_key();
  const Owned<X509> made =
      make_certificate(names, key.get(), parts_->certificate.get(), parts_->key.get());
  return {text_of(made.get()), pem_of([&](BIO* out) {
            return PEM_write_bio_PrivateKey(out, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
          })};
}

}  // namespace kvferry::testing
