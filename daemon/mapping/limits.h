// Bounds on what a layout, a slice or a stream may say. What lies beyond is refused before any
// memory is reserved for it.
#pragma once

#include <cstdint>

namespace kvferry::mapping {

inline constexpr uint32_t kMaxRanks = 4096;   // of an instance
inline constexpr uint32_t kMaxGroups = 64;    // of a rank
inline constexpr uint32_t kMaxPlanes = 4096;  // of a rank
inline constexpr uint32_t kMaxPools = 4096;   // of a rank
inline constexpr uint32_t kMaxLayers = 65536;
inline constexpr uint32_t kMaxUnits = 65536;
inline constexpr uint64_t kMaxBlocks = 1 << 20;     // kernel blocks of a group in one transfer
inline constexpr uint64_t kMaxRanges = 4096;        // per group and slice
inline constexpr uint32_t kMaxLegs = 1024;          // of one rank in one transfer
inline constexpr uint64_t kMaxTextBytes = 1 << 20;  // of a stream's description
inline constexpr uint64_t kMaxFingerprintBytes = 256;
inline constexpr uint64_t kMaxNameBytes = 63;

// Not protocol: they keep numbers inside the widths of the compact plan.
inline constexpr uint64_t kMaxTokensPerBlock = 1 << 30;
inline constexpr uint64_t kMaxBlockCount = (uint64_t{1} << 31) - 1;
inline constexpr uint64_t kMaxSpans = 1 << 22;  // token pieces of one pair and slice

}  // namespace kvferry::mapping
