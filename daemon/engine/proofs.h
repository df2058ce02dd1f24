// What two daemons tell each other of a transfer's secret, which itself never travels: an 8-byte
// tag that names it, and proofs that bind it to one leg. Pure functions; any thread.
//
// Each field goes into the hash behind its length, so that no two different lists of fields give
// the same bytes.
#pragma once

#include <cstdint>
#include <string_view>

#include "daemon/base/ids.h"
#include "daemon/engine/events.h"
#include "daemon/engine/messages.h"

namespace kvferry::engine {

// Names the secret among those used with one transfer id. Another secret is another transfer.
SecretTagBytes secret_tag(const Secret& secret);

// The transfer as it is named on the wire.
TransferName wire_name(const TransferKey& key, const Incarnation& sender_incarnation);

// Everything of a leg that a proof binds.
struct ProofFields {
  PullId pull;   // CLAIM, DECLINE: the receiver's boot id and 0
  SendRef send;  // zero in what the receiver says
  std::string_view id;
  std::string_view instance;  // the sender's
  Incarnation incarnation;    // the sender's
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  std::string_view sender_node;
  std::string_view receiver_node;
  Digest16 cards;  // zero in CLAIM and DECLINE, which carry none
};

// In PULL, CLAIM, DECLINE and the receiver's END.
Proof receiver_proof(const Secret& secret, const ProofFields& fields);
// In SLICE.
Proof sender_proof(const Secret& secret, const ProofFields& fields);
// In constant time.
bool same_proof(const Proof& a, const Proof& b);

}  // namespace kvferry::engine
