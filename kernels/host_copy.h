// Gather and scatter on the host: the twins of the GPU kernels. They copy between scattered pool
// memory and a contiguous piece of the stream. No allocation, no locks, no blocking; any number of
// threads may run them at once on disjoint stream ranges. Callers that copy from or to memory of
// other processes put their SIGBUS guard around the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/copy_plan.h"

namespace kvferry::kernels {

// Copies the stream's bytes [stream_offset, stream_offset + bytes) out of the pools into `to`.
// pool_bases[i] is the first byte of pool i. False, with nothing touched, if the range does not lie
// in the plan or a pool is missing.
[[nodiscard]] bool gather(const CopyPlan& plan, std::span<std::byte* const> pool_bases,
                          uint64_t stream_offset, uint64_t bytes, std::byte* to);

// The reverse: `from` holds the stream's bytes [stream_offset, stream_offset + bytes).
[[nodiscard]] bool scatter(const CopyPlan& plan, std::span<std::byte* const> pool_bases,
                           uint64_t stream_offset, uint64_t bytes, const std::byte* from);

// Copies that range straight from the source's pools to the destination's, which must not overlap.
// Both plans must be of the same stream.
[[nodiscard]] bool transfer(const CopyPlan& source, std::span<std::byte* const> source_bases,
                            const CopyPlan& destination,
                            std::span<std::byte* const> destination_bases, uint64_t stream_offset,
                            uint64_t bytes);

// Writes zeros to everything that the plan names.
[[nodiscard]] bool clear(const CopyPlan& plan, std::span<std::byte* const> pool_bases);

}  // namespace kvferry::kernels
