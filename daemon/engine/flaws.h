// Test-only switches, each of which puts back one flaw that the protocol's rules forbid, so that
// the simulator can show that it would notice. In every build but the simulator's own copy of the
// engine (KVFERRY_ENGINE_FLAWS) flawed() is a constant false and costs nothing.
#pragma once

#include <cstdint>

namespace kvferry::engine {

enum class Flaw : uint8_t {
  kNone,
  kFresh,               // a lost offer waits for a fresh credit that nobody asks for
  kErrorOnly,           // lane down retries only sends that failed locally
  kNoRefuse,            // a dropped offer is not answered
  kStatus,              // local completion of a send taken for delivery
  kLocalDone,           // staging freed at local completion
  kFreeShared,          // a staging region is freed when the first leg that uses it is done
  kShareByDigest,       // streams with one digest are taken for one
  kScatterQuarantined,  // a quarantined receive that ends well is scattered
  kFreeLanding,         // a landing region is freed when its transfer ends
  kKeepCredit,          // a dropped duplicate keeps its credit
  kNoResync,            // no resync after a lane is lost
  kRefuseByControl,     // REFUSE goes by the control lane instead of its offer's
  kUpdateFirst,         // messages are handled as they come, not in sequence
  kNoGapTimer,          // a gap in the sequence lasts as long as the lane answers pings
  kOldNumbers,          // a new control lane goes on with the old numbers
  kKeepReservation,     // a reservation outlives its transfer
  kWithdrawNow,         // a withdrawal is answered while the block is read
  kWriteUnread,         // a receive writes blocks that others still read
  kReleaseUnpacked,     // pages are released before their packed copy is made
  kRepayEarly,          // a page that is lent to a local receiver counts as read while it is read
  kTailFirst,           // a slice's tail is cleared beside its last chunks, not after them
  kPagesArena,          // a packed copy is staged in the arena of its pages
  kFreeLent,            // a granted region of a mapped arena is freed when its transfer ends
  kFreeUnproven,        // ... when the peer's END or its link's end has come before
  kDrainEarly,          // DRAINED is answered while a gather writes
  kKeepWritten,         // WRITTEN of a dropped slice leaves its credit LIVE
  kForgetWritten,       // a resync tells no WRITTEN of dropped slices
  kReuseWritten,        // a Revoke makes the credit of a written chunk usable again
  kDeliverLess,         // a leg is DELIVERED that lacks what a Revoke has taken back
  kTrustPull,           // a pull is served whose proof is wrong
  kForeignAck,          // what a peer says of another peer's pull counts
  kForeignLeg,          // ... of another peer's leg, at the receiver
  kHoldAll,             // a leg holds as many offers as come
  kFreeByTime,          // a quarantined region is freed when time has passed
  kForgetStray,         // a lost lane gives back no credit of an offer that nobody waits for
  kLifeByBoot,          // a life of a peer is found by its boot id alone, whatever its node
  kSticky,              // an older message of another lane undoes a later fact
};

#ifdef KVFERRY_ENGINE_FLAWS
inline Flaw active_flaw = Flaw::kNone;
inline bool flawed(Flaw flaw) {
  return active_flaw == flaw;
}
#else
constexpr bool flawed(Flaw) {
  return false;
}
#endif

}  // namespace kvferry::engine
