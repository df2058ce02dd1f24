#include "daemon/base/crypto.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <openssl/rand.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace kvferry {
namespace {

void demand(bool ok, const char* call) {
  if (ok) return;
  std::fprintf(stderr, "kvferry: libcrypto: %s failed\n", call);
  std::abort();
}

struct Free {
  void operator()(EVP_MD_CTX* p) const { EVP_MD_CTX_free(p); }
  void operator()(EVP_MAC_CTX* p) const { EVP_MAC_CTX_free(p); }
  void operator()(EVP_KDF_CTX* p) const { EVP_KDF_CTX_free(p); }
  void operator()(EVP_CIPHER_CTX* p) const { EVP_CIPHER_CTX_free(p); }
  void operator()(EVP_CIPHER* p) const { EVP_CIPHER_free(p); }
  void operator()(EVP_MAC* p) const { EVP_MAC_free(p); }
  void operator()(EVP_MD* p) const { EVP_MD_free(p); }
  void operator()(EVP_KDF* p) const { EVP_KDF_free(p); }
};

// Fetching an algorithm costs microseconds, so each thread keeps its contexts. The MAC's has its
// digest for good: a key alone begins the next one.
EVP_MAC_CTX* mac_context() {
  thread_local const std::unique_ptr<EVP_MAC_CTX, Free> context = [] {
    const std::unique_ptr<EVP_MAC, Free> mac(EVP_MAC_fetch(nullptr, "HMAC", nullptr));
    std::unique_ptr<EVP_MAC_CTX, Free> made(EVP_MAC_CTX_new(mac.get()));
    char digest[] = "SHA256";
    const OSSL_PARAM params[] = {OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
                                 OSSL_PARAM_construct_end()};
    demand(made && EVP_MAC_CTX_set_params(made.get(), params) == 1, "EVP_MAC_CTX_set_params");
    return made;
  }();
  return context.get();
}

EVP_MD_CTX* sha256_context() {
  thread_local const std::unique_ptr<EVP_MD_CTX, Free> context = [] {
    const std::unique_ptr<EVP_MD, Free> digest(EVP_MD_fetch(nullptr, "SHA256", nullptr));
    std::unique_ptr<EVP_MD_CTX, Free> made(EVP_MD_CTX_new());
    demand(made && EVP_DigestInit_ex(made.get(), digest.get(), nullptr) == 1, "EVP_DigestInit");
    return made;
  }();
  return context.get();
}

EVP_CIPHER_CTX* gcm_context() {
  thread_local const std::unique_ptr<EVP_CIPHER_CTX, Free> context = [] {
    const std::unique_ptr<EVP_CIPHER, Free> cipher(
        EVP_CIPHER_fetch(nullptr, "AES-128-GCM", nullptr));
    std::unique_ptr<EVP_CIPHER_CTX, Free> made(EVP_CIPHER_CTX_new());
    demand(made && EVP_EncryptInit_ex2(made.get(), cipher.get(), nullptr, nullptr, nullptr) == 1,
           "EVP_EncryptInit");
    return made;
  }();
  return context.get();
}

}  // namespace

Sha256 sha256(std::initializer_list<Bytes> pieces) {
  EVP_MD_CTX* context = sha256_context();
  // No type: the one that it has.
  demand(EVP_DigestInit_ex(context, nullptr, nullptr) == 1, "EVP_DigestInit");
  for (Bytes piece : pieces)
    demand(EVP_DigestUpdate(context, piece.data(), piece.size()) == 1, "EVP_DigestUpdate");
  Sha256 out{};
  demand(EVP_DigestFinal_ex(context, out.data(), nullptr) == 1, "EVP_DigestFinal");
  return out;
}

Sha256 hmac_sha256(Bytes key, std::initializer_list<Bytes> pieces) {
  EVP_MAC_CTX* context = mac_context();
  // A null pointer would be the key before this one.
  const uint8_t none = 0;
  demand(EVP_MAC_init(context, key.empty() ? &none : key.data(), key.size(), nullptr) == 1,
         "EVP_MAC_init");
  for (Bytes piece : pieces)
    demand(EVP_MAC_update(context, piece.data(), piece.size()) == 1, "EVP_MAC_update");
  Sha256 out{};
  std::size_t size = 0;
  demand(EVP_MAC_final(context, out.data(), &size, out.size()) == 1 && size == out.size(),
         "EVP_MAC_final");
  return out;
}

void hkdf_sha256(Bytes secret, Bytes salt, Bytes info, std::span<uint8_t> out) {
  std::unique_ptr<EVP_KDF, Free> kdf(EVP_KDF_fetch(nullptr, "HKDF", nullptr));
  std::unique_ptr<EVP_KDF_CTX, Free> context(EVP_KDF_CTX_new(kdf.get()));
  demand(context != nullptr, "EVP_KDF_CTX_new");
  char digest[] = "SHA256";
  auto octets = [](const char* name, Bytes bytes) {
    // The parameter type is not const, the call does not write.
    return OSSL_PARAM_construct_octet_string(name, const_cast<uint8_t*>(bytes.data()),
                                             bytes.size());
  };
  std::vector<OSSL_PARAM> params{OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
                                 octets(OSSL_KDF_PARAM_KEY, secret)};
  // An empty one is left out: it means the same, and a null pointer is refused.
  if (!salt.empty()) params.push_back(octets(OSSL_KDF_PARAM_SALT, salt));
  if (!info.empty()) params.push_back(octets(OSSL_KDF_PARAM_INFO, info));
  params.push_back(OSSL_PARAM_construct_end());
  demand(EVP_KDF_derive(context.get(), out.data(), out.size(), params.data()) == 1,
         "EVP_KDF_derive");
}

std::array<uint8_t, 16> gmac_aes128(const std::array<uint8_t, 16>& key, Bytes data) {
  EVP_CIPHER_CTX* context = gcm_context();
  const std::array<uint8_t, 12> nonce{};
  demand(EVP_EncryptInit_ex2(context, nullptr, key.data(), nonce.data(), nullptr) == 1,
         "EVP_EncryptInit");
  constexpr std::size_t kPiece = 1 << 30;  // lengths are ints there
  int written = 0;
  for (; !data.empty(); data = data.subspan(std::min(data.size(), kPiece)))
    demand(EVP_EncryptUpdate(context, nullptr, &written, data.data(),
                             static_cast<int>(std::min(data.size(), kPiece))) == 1,
           "EVP_EncryptUpdate");
  std::array<uint8_t, 16> tag{};
  demand(EVP_EncryptFinal_ex(context, tag.data(), &written) == 1 && written == 0 &&
             EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, static_cast<int>(tag.size()),
                                 tag.data()) == 1,
         "EVP_EncryptFinal");
  return tag;
}

void wipe(std::span<uint8_t> bytes) {
  OPENSSL_cleanse(bytes.data(), bytes.size());
}
void wipe(std::string& text) {
  OPENSSL_cleanse(text.data(), text.size());
  text.clear();
}

bool equal_constant_time(Bytes a, Bytes b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

void random_bytes(std::span<uint8_t> out) {
  demand(RAND_bytes(out.data(), static_cast<int>(out.size())) == 1, "RAND_bytes");
}

}  // namespace kvferry
