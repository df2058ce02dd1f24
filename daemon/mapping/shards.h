// Which ranks of an instance hold which units of a (layer, role), per dp group. Made once, then
// only read. Internal to the mapping folder.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"

namespace kvferry::mapping {

inline constexpr uint32_t kNone = UINT32_MAX;

// The holders of one (layer, role) in one dp group. Equal ones are kept once.
struct Shard {
  struct Segment {  // units held by the same ranks
    uint32_t cp_index = 0;
    uint32_t begin = 0;
    uint32_t end = 0;
    uint32_t first = 0;  // ranks: candidates[first ... first + count), ascending
    uint32_t count = 0;
  };
  std::vector<Segment> segments;  // by cp_index, then begin
  std::vector<uint32_t> candidates;
  uint32_t coverage = 0;  // equal numbers: the same units are held by anybody
};

class ShardIndex {
 public:
  // RESOURCE_EXHAUSTED TOO_FRAGMENTED if ranks overlap in too many different ways.
  static Result<ShardIndex> make(const Instance& instance);

  // Dense number of a (layer, role), or kNone.
  uint32_t key_of(uint32_t layer, std::string_view role) const;
  uint32_t key_count() const { return static_cast<uint32_t>(first_holder_.size()); }
  // Some group and plane that holds the key.
  std::pair<const Group*, const Plane*> holder_of(uint32_t key) const { return first_holder_[key]; }

  std::span<const uint32_t> dp_groups() const { return dp_groups_; }  // ascending
  uint32_t dp_position(uint32_t dp_group) const;                      // kNone if unknown
  std::span<const uint32_t> ranks_of(uint32_t dp_position) const { return ranks_[dp_position]; }
  // nullptr: nobody there holds it.
  const Shard* shard(uint32_t dp_position, uint32_t key) const;

  // The planes of a rank with that key: its group and plane numbers by first unit.
  struct Local {
    uint32_t key = 0;
    uint32_t group = 0;
    uint32_t first = 0;
    uint32_t count = 0;
  };
  const Local* local(uint32_t rank, uint32_t key) const;
  std::span<const uint32_t> planes_of(uint32_t rank, const Local& local) const {
    return {local_planes_[rank].data() + local.first, local.count};
  }

 private:
  struct Piece {
    uint32_t dp = 0;
    uint32_t key = 0;
    uint32_t cp_index = 0;
    uint32_t begin = 0;
    uint32_t end = 0;
    uint32_t rank = 0;
    auto operator<=>(const Piece&) const = default;
  };
  void index_rank(const Holding& holding, uint32_t rank, std::vector<Piece>& pieces);
  Status build_shards(std::vector<Piece>& pieces);

  std::map<std::string, uint32_t, std::less<>> roles_;
  std::unordered_map<uint64_t, uint32_t> keys_;  // role << 32 | layer
  std::vector<std::pair<const Group*, const Plane*>> first_holder_;
  std::vector<uint32_t> dp_groups_;
  std::vector<std::vector<uint32_t>> ranks_;
  std::vector<std::vector<std::pair<uint32_t, uint32_t>>> shard_of_key_;  // per dp: (key, shard)
  std::vector<Shard> shards_;
  std::vector<std::vector<Local>> locals_;           // per rank, by key
  std::vector<std::vector<uint32_t>> local_planes_;  // per rank
};

}  // namespace kvferry::mapping
