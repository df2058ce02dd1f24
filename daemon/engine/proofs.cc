#include "daemon/engine/proofs.h"

#include <array>
#include <vector>

#include "daemon/base/crypto.h"

namespace kvferry::engine {
namespace {

constexpr std::string_view kTagLabel = "kvferry secret tag 1";
constexpr std::string_view kProofLabel = "kvferry proof 1";

void append_number(std::vector<uint8_t>& out, uint64_t number) {
  for (unsigned shift = 0; shift < 64; shift += 8)
    out.push_back(static_cast<uint8_t>(number >> shift));
}

void append_field(std::vector<uint8_t>& out, Bytes field) {
  append_number(out, field.size());
  out.insert(out.end(), field.begin(), field.end());
}

void append_field(std::vector<uint8_t>& out, uint64_t number) {
  append_number(out, sizeof number);
  append_number(out, number);
}

Proof proof(const Secret& secret, char label, const ProofFields& f) {
  std::vector<uint8_t> text;
  text.reserve(256 + f.id.size() + f.instance.size() + f.sender_node.size() +
               f.receiver_node.size());
  append_field(text, bytes_of(kProofLabel));
  append_field(text, bytes_of(std::string_view(&label, 1)));
  append_field(text, f.pull.receiver.span());
  append_field(text, f.pull.counter);
  append_field(text, f.send.sender.span());
  append_field(text, f.send.counter);
  append_field(text, bytes_of(f.id));
  append_field(text, bytes_of(f.instance));
  append_field(text, f.incarnation.span());
  append_field(text, f.sender_rank);
  append_field(text, f.receiver_rank);
  append_field(text, bytes_of(f.sender_node));
  append_field(text, bytes_of(f.receiver_node));
  append_field(text, f.cards.span());
  return Proof{cut<16>(hmac_sha256(secret.span(), {Bytes(text)}))};
}

}  // namespace

SecretTagBytes secret_tag(const Secret& secret) {
  return SecretTagBytes{cut<8>(hmac_sha256(secret.span(), {bytes_of(kTagLabel)}))};
}

TransferName wire_name(const TransferKey& key, const Incarnation& sender_incarnation) {
  return TransferName{key.instance, sender_incarnation, key.id, secret_tag(key.secret)};
}

Proof receiver_proof(const Secret& secret, const ProofFields& fields) {
  return proof(secret, 'R', fields);
}

Proof sender_proof(const Secret& secret, const ProofFields& fields) {
  return proof(secret, 'S', fields);
}

bool same_proof(const Proof& a, const Proof& b) {
  return equal_constant_time(a.span(), b.span());
}

}  // namespace kvferry::engine
