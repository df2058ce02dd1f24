#include "daemon/link/keys.h"

#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/params.h>

#include <vector>

#include "daemon/base/check.h"

namespace kvferry::link {
namespace {

template <typename Vector>
void append(Vector& out, Bytes bytes) {
  // With its length, so that no two different inputs give the same text.
  for (unsigned shift = 0; shift < 32; shift += 8)
    out.push_back(static_cast<uint8_t>(bytes.size() >> shift));
  out.insert(out.end(), bytes.begin(), bytes.end());
}

}  // namespace

LinkKeys derive_keys(const KeyMaterial& material, bool initiator) {
  std::vector<uint8_t> salt;
  append(salt, material.initiator_random);
  append(salt, material.responder_random);
  std::vector<uint8_t> info;
  append(info, bytes_of("kvferry link keys 1"));
  append(info, bytes_of(material.initiator_node));
  append(info, bytes_of(material.responder_node));
  append(info, material.initiator_boot.span());
  append(info, material.responder_boot.span());
  append(info, material.transcript);

  // Without a cluster secret the randoms are all the secret there is: good against accidents and
  // strangers who have not seen the handshake, which is why such links are for loopback only.
  SecretVector secret(salt.begin(), salt.end());
  append(secret, material.cluster_secret);
  if (material.renewal > 0) append(secret, material.before.span());

  // Of each direction control, data, call; then the selectors, the link's name, the chain.
  SecretBytes<struct DerivedTag, 6 * kKeyBytes + 2 * 8 + 16 + kKeyBytes> out;
  hkdf_sha256(secret, salt, info, out.bytes);
  const uint8_t* at = out.bytes.data();
  auto take = [&at](uint8_t* to, std::size_t size) {
    std::copy(at, at + size, to);
    at += size;
  };
  DirectionKeys from_initiator;
  DirectionKeys from_responder;
  // Of 252 ids each renewal has the next four, over and over: which keys are meant, the selector
  // says.
  auto index = static_cast<uint8_t>(1 + 4 * (material.renewal % 63));
  for (DirectionKeys* keys : {&from_initiator, &from_responder}) {
    for (KeyBytes* key : {&keys->control, &keys->data, &keys->call})
      take(key->bytes.data(), kKeyBytes);
    keys->control_id = index++;
    keys->data_id = index++;
  }
  for (DirectionKeys* keys : {&from_initiator, &from_responder})
    for (unsigned shift = 0; shift < 64; shift += 8) keys->selector |= uint64_t{*at++} << shift;
  LinkKeys keys;
  take(keys.link_name.data(), keys.link_name.size());
  take(keys.chain.bytes.data(), kKeyBytes);
  keys.renewal = material.renewal;
  keys.out = initiator ? from_initiator : from_responder;
  keys.in = initiator ? from_responder : from_initiator;
  return keys;
}

struct Mac::Context {
  EVP_MAC* mac = nullptr;
  EVP_MAC_CTX* context = nullptr;
  ~Context() {
    EVP_MAC_CTX_free(context);
    EVP_MAC_free(mac);
  }
};

Mac::Mac(const KeyBytes& key) : context_(std::make_unique<Context>()) {
  context_->mac = EVP_MAC_fetch(nullptr, "HMAC", nullptr);
  context_->context = EVP_MAC_CTX_new(context_->mac);
  char digest[] = "SHA256";
  const OSSL_PARAM params[] = {OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
                               OSSL_PARAM_construct_end()};
  KVFERRY_CHECK(context_->context != nullptr &&
                    EVP_MAC_init(context_->context, key.bytes.data(), kKeyBytes, params) == 1,
                "libcrypto has HMAC-SHA256");
}
Mac::~Mac() = default;
Mac::Mac(Mac&&) noexcept = default;
Mac& Mac::operator=(Mac&&) noexcept = default;

TagBytes Mac::tag(std::initializer_list<Bytes> pieces) {
  EVP_MAC_CTX* context = context_->context;
  // Without a key: back to the state after the key was set, which saves hashing it again.
  bool ok = EVP_MAC_init(context, nullptr, 0, nullptr) == 1;
  for (Bytes piece : pieces) ok = ok && EVP_MAC_update(context, piece.data(), piece.size()) == 1;
  Sha256 full{};
  std::size_t size = 0;
  ok = ok && EVP_MAC_final(context, full.data(), &size, full.size()) == 1 && size == full.size();
  KVFERRY_CHECK(ok, "libcrypto computes an HMAC");
  return cut<kTagBytes>(full);
}

}  // namespace kvferry::link
