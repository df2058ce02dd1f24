// The rules of a handshake between two daemons, apart from who may shake hands and from how the
// messages travel. Pure functions except random numbers; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/engine/messages.h"
#include "daemon/link/keys.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

// What both sides work out alike from the two hellos.
struct Agreed {
  uint32_t protocol = 0;
  uint64_t chunk_bytes = 0;
  uint32_t max_credits = 0;
  engine::CheckKind check = engine::CheckKind::kNone;
  uint32_t lanes = 0;
  Duration renew_interval{};
};

// FAILED_PRECONDITION PROTOCOL_MISMATCH, UCX_MISMATCH, CHECK_TOO_WEAK.
Result<Agreed> agree(const rpc::PeerHello& mine, const rpc::PeerHello& theirs, uint32_t max_lanes);

// Equal in major and minor number; two daemons of different ones may crash each other.
Status check_ucx(std::string_view mine, std::string_view theirs);

// What proves the cluster secret in a handshake; without one a key that everybody knows.
using HandshakeKey = SecretBytes<struct HandshakeKeyTag, 32>;
HandshakeKey handshake_key(const SecretVector& cluster_secret);
rpc::Tag16 request_tag(const HandshakeKey& key, std::string_view request);
rpc::Tag16 reply_tag(const HandshakeKey& key, std::string_view request, std::string_view reply);

// The link's keys from the two hellos as they were sent; `before`: those that they follow, null for
// the first ones.
link::LinkKeys keys_of(const rpc::PeerHello& request, const std::string& request_bytes,
                       const rpc::PeerHello& reply, const std::string& reply_bytes,
                       const SecretVector& cluster_secret, bool initiator,
                       const link::LinkKeys* before = nullptr);

// Tags of calls about a link that is up.
rpc::Tag16 call_tag(const link::KeyBytes& key, rpc::LinkMethod method, const rpc::LinkCall& call);
rpc::Tag16 call_reply_tag(const link::KeyBytes& key, const rpc::Tag16& call_tag,
                          std::string_view body);

// By what the lender of a link is known at its socket. `key` is the call key of its direction.
rpc::WelcomeProof welcome_proof(const link::KeyBytes& key);

// Seals token and handles of an offer, or opens sealed ones, which is the same. `key` is the call
// key of the direction in which the offer travels, `call_tag` that of the request it answers.
void seal_offer(const link::KeyBytes& key, const rpc::Tag16& call_tag, rpc::ArenasOffer& offer);

}  // namespace kvferry::node
