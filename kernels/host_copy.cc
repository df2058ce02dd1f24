#include "kernels/host_copy.h"

#include <cstring>

#include "kernels/walk.h"

namespace kvferry::kernels {
namespace {

bool range_fits(const CopyPlan& plan, std::size_t pools, uint64_t stream_offset, uint64_t bytes) {
  return pools >= plan.pool_count && stream_offset <= plan.bytes &&
         bytes <= plan.bytes - stream_offset;
}

// Calls copy(pool offset, bytes) for the pieces. A piece of a common size goes with the size as a
// constant: below a kilobyte the call into the C library costs as much as the copy.
template <typename Copy>
void copy_pieces(const Tile& tile, uint64_t begin, uint64_t end, Copy&& copy) {
  for_each_piece(tile, begin, end, [&](uint64_t offset, uint64_t bytes) {
    switch (bytes) {
      case 2:
        return copy(offset, std::integral_constant<uint64_t, 2>());
      case 4:
        return copy(offset, std::integral_constant<uint64_t, 4>());
      case 64:
        return copy(offset, std::integral_constant<uint64_t, 64>());
      case 128:
        return copy(offset, std::integral_constant<uint64_t, 128>());
      case 256:
        return copy(offset, std::integral_constant<uint64_t, 256>());
      default:
        return copy(offset, bytes);
    }
  });
}

}  // namespace

bool gather(const CopyPlan& plan, std::span<std::byte* const> pool_bases, uint64_t stream_offset,
            uint64_t bytes, std::byte* to) {
  if (!range_fits(plan, pool_bases.size(), stream_offset, bytes)) return false;
  for_each_tile(plan, stream_offset, bytes,
                [&](const Tile& tile, uint64_t begin, uint64_t end, uint64_t) {
                  const std::byte* base = pool_bases[tile.pool];
                  copy_pieces(tile, begin, end, [&](uint64_t offset, auto size) {
                    std::memcpy(to, base + offset, size);
                    to += static_cast<uint64_t>(size);
                  });
                });
  return true;
}

bool scatter(const CopyPlan& plan, std::span<std::byte* const> pool_bases, uint64_t stream_offset,
             uint64_t bytes, const std::byte* from) {
  if (!range_fits(plan, pool_bases.size(), stream_offset, bytes)) return false;
  for_each_tile(plan, stream_offset, bytes,
                [&](const Tile& tile, uint64_t begin, uint64_t end, uint64_t) {
                  std::byte* base = pool_bases[tile.pool];
                  copy_pieces(tile, begin, end, [&](uint64_t offset, auto size) {
                    std::memcpy(base + offset, from, size);
                    from += static_cast<uint64_t>(size);
                  });
                });
  return true;
}

bool transfer(const CopyPlan& source, std::span<std::byte* const> source_bases,
              const CopyPlan& destination, std::span<std::byte* const> destination_bases,
              uint64_t stream_offset, uint64_t bytes) {
  if (!range_fits(source, source_bases.size(), stream_offset, bytes) ||
      !range_fits(destination, destination_bases.size(), stream_offset, bytes))
    return false;
  for_each_fragment(source, destination, stream_offset, bytes,
                    [&](uint32_t source_pool, uint64_t source_offset, uint32_t pool,
                        uint64_t offset, uint64_t, uint64_t size) {
                      std::memcpy(destination_bases[pool] + offset,
                                  source_bases[source_pool] + source_offset, size);
                    });
  return true;
}

bool clear(const CopyPlan& plan, std::span<std::byte* const> pool_bases) {
  if (!range_fits(plan, pool_bases.size(), 0, plan.bytes)) return false;
  for_each_run(plan, 0, plan.bytes, [&](uint32_t pool, uint64_t offset, uint64_t, uint64_t size) {
    std::memset(pool_bases[pool] + offset, 0, size);
  });
  return true;
}

}  // namespace kvferry::kernels
