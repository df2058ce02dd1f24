// The stream of a slice on a leg: the bundles of cells in canonical order, their number of bytes,
// and the digest by which two daemons see that they compiled the same. Pure functions of what both
// daemons know; any thread, nothing blocks. A Stream has no addresses: plan.h binds it to memory.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "daemon/mapping/legs.h"
#include "daemon/mapping/tokens.h"

namespace kvferry::mapping {

// Planes of the receiver that agree in all that shapes them: a full product of planes, units and
// positions, sorted by `order`.
struct Bundle {
  struct PlaneRef {
    uint32_t layer = 0;
    std::string role;
    uint32_t receiver_plane = 0;          // index in the receiver's group
    std::vector<uint32_t> sender_planes;  // indices in the sender's group, by first unit
  };
  std::string order;  // permutation of "lrbut", slowest first
  Granularity granularity = Granularity::kToken;
  uint64_t cell_bytes = 0;
  uint32_t receiver_group = 0;
  uint32_t sender_group = 0;
  std::vector<Range> units;
  std::vector<Range> tokens;  // moved ranges, before dealing
  Dealing sender_dealing;
  Dealing receiver_dealing;
  uint64_t sender_block = 0;  // tokens per block
  uint64_t receiver_block = 0;
  std::vector<PlaneRef> planes;  // in the receiver's list order
  uint64_t cells_per_unit = 0;   // positions (BLOCK: blocks) of one plane and unit
  uint64_t stream_offset = 0;
  uint64_t bytes = 0;
};

struct Stream {
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  uint64_t bytes = 0;
  uint64_t digest = 0;  // XXH64 of the text
  std::vector<Bundle> bundles;
};

// Compiles the stream of one slice on the leg (sender_rank, receiver_rank). `layers` limits it to
// those layers. An empty leg or slice gives a stream of no bytes. Errors: those of validate_needs
// and validate_offer; RESOURCE_EXHAUSTED TOO_FRAGMENTED (text beyond 1 MiB); NOT_FOUND.
Result<Stream> compile_stream(const LegTable& table, uint32_t sender_rank, uint32_t receiver_rank,
                              std::span<const GroupNeed> needs, std::span<const GroupRanges> offer,
                              std::optional<Range> layers = std::nullopt);

// Bytes that must have come over this leg, in all slices together, when its last slice is in.
Result<uint64_t> expected_bytes(const LegTable& table, uint32_t sender_rank, uint32_t receiver_rank,
                                std::span<const GroupNeed> needs);

// The text that the digest is made of, for tools and tests.
std::string text_of(const Stream& stream);

}  // namespace kvferry::mapping
