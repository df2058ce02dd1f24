// A slice's stream by way of a packed copy, for the mapping tests.
#pragma once

#include <catch2/catch.hpp>
#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "daemon/mapping/packed.h"
#include "kernels/host_copy.h"

namespace kvferry::mapping::test {

// Packs the slice out of `pool_bases`, and gathers the stream from the copy. The copy's memory
// begins as 0xEE: a byte that the copy leaves out is seen.
inline std::vector<std::byte> packed_stream(const RankLayout& layout,
                                            std::span<const GroupBlocks> blocks,
                                            std::span<std::byte* const> pool_bases,
                                            std::span<const GroupRanges> offer,
                                            std::optional<Range> layers, const Stream& stream) {
  const auto shape = packed_shape(layout, offer, layers);
  REQUIRE(shape);
  REQUIRE(shape->layout.pools.size() == 1);
  REQUIRE(shape->layout.pools[0].bytes == shape->bytes);
  REQUIRE(shape->bytes >= stream.bytes);
  std::vector<std::byte> memory(shape->bytes, std::byte{0xEE});
  std::byte* const base = memory.data();
  if (shape->bytes > 0) {
    auto copy = bind_packed(layout, blocks, offer, layers, *shape);
    INFO((copy ? "" : copy.error().to_string()));
    REQUIRE(copy);
    REQUIRE(copy->source.bytes() == copy->destination.bytes());
    REQUIRE(copy->destination.bytes() <= shape->bytes);
    REQUIRE(kernels::transfer(copy->source.form(), pool_bases, copy->destination.form(),
                              std::span(&base, 1), 0, copy->source.bytes()));
  }
  const auto plan = bind_plan(stream, Side::kSender, shape->layout, shape->blocks);
  INFO((plan ? "" : plan.error().to_string()));
  REQUIRE(plan);
  REQUIRE(plan->bytes() == stream.bytes);
  plan->for_each_run(0, stream.bytes, [&](uint32_t pool, uint64_t offset, uint64_t, uint64_t n) {
    if (pool != 0 || offset + n > shape->bytes) FAIL("a run outside the packed copy");
  });
  std::vector<std::byte> bytes(stream.bytes);
  REQUIRE(kernels::gather(plan->form(), std::span(&base, 1), 0, stream.bytes, bytes.data()));
  return bytes;
}

}  // namespace kvferry::mapping::test
