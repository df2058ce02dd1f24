// Which sender rank feeds which receiver rank, worked out from the holdings alone, so that both
// daemons find the same legs whatever one transfer needs.
//
// A LegTable is made once per (sender instance, receiver instance), off the engine's thread, and is
// immutable to its users: any thread may query it. Legs of a pair of dp groups are worked out at
// the first query and remembered under a lock that is held for look-ups only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"

namespace kvferry::mapping {

struct Leg {
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  bool empty = false;        // no cell; still runs its pull and its last slice
  bool carries_aux = false;  // the receiver takes aux from this leg
  auto operator<=>(const Leg&) const = default;
};

// The receiver's planes of which one sender rank owns units, in the receiver's list order.
struct Ownership {
  struct OwnedPlane {
    uint32_t receiver_group = 0;
    uint32_t receiver_plane = 0;
    uint32_t sender_group = 0;
    uint32_t units = 0;                       // index into unit_sets
    std::span<const uint32_t> sender_planes;  // planes of sender_group with this layer and role
  };
  std::vector<OwnedPlane> planes;
  std::vector<std::vector<Range>> unit_sets;  // distinct, ascending, joined, never empty
};

class LegTable {
 public:
  // Validates both instances and their compatibility. Errors: those of validate_instance (the field
  // begins with "sender." or "receiver.") and check_compatible; RESOURCE_EXHAUSTED TOO_FRAGMENTED
  // where the shards would make too large a table.
  static Result<std::shared_ptr<const LegTable>> make(std::shared_ptr<const Instance> sender,
                                                      std::shared_ptr<const Instance> receiver);
  ~LegTable();
  LegTable(const LegTable&) = delete;
  LegTable& operator=(const LegTable&) = delete;

  const Instance& sender() const { return *sender_; }
  const Instance& receiver() const { return *receiver_; }
  std::span<const uint32_t> sender_dp_groups() const { return sender_dp_; }      // ascending
  std::span<const uint32_t> receiver_dp_groups() const { return receiver_dp_; }  // ascending

  // Legs to receiver rank g from the ranks of a sender dp group, by sender rank. NOT_FOUND for an
  // unknown rank or dp group; TOO_FRAGMENTED beyond kMaxLegs.
  Result<std::vector<Leg>> legs_of_receiver(uint32_t sender_dp, uint32_t g) const;
  // Legs from sender rank s to the ranks of a receiver dp group, by receiver rank.
  Result<std::vector<Leg>> legs_of_sender(uint32_t s, uint32_t receiver_dp) const;

  // Whether the legs of this pair of dp groups have been worked out, so that asking for them is a
  // look-up. It may be forgotten by then.
  bool remembers(uint32_t sender_dp, uint32_t receiver_dp) const;

  // What s owns for g (spans stay valid as long as the table). Empty for an empty leg.
  Result<Ownership> ownership(uint32_t s, uint32_t g) const;

 private:
  struct Index;
  struct DpLegs;
  LegTable(std::shared_ptr<const Instance> sender, std::shared_ptr<const Instance> receiver);
  Result<std::shared_ptr<const DpLegs>> between(uint32_t sender_dp, uint32_t receiver_dp) const;
  Result<std::shared_ptr<const DpLegs>> work_out(uint32_t sender_dp, uint32_t receiver_dp) const;

  std::shared_ptr<const Instance> sender_;
  std::shared_ptr<const Instance> receiver_;
  std::vector<uint32_t> sender_dp_;
  std::vector<uint32_t> receiver_dp_;
  std::unique_ptr<const Index> index_;
  mutable Mutex mutex_;
  mutable std::unordered_map<uint64_t, std::shared_ptr<const DpLegs>> legs_
      KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::mapping
