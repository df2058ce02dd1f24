// A transfer of 131,072 fragments, for what must hold of large ones: one leg of tp2 to tp8, 64
// layers, 8 KV heads, keys and values apart in blocks of 16 tokens, so that the one head that
// travels is a fragment of 4,096 bytes in each of 1,024 blocks, layers and roles: 512 MiB.
#pragma once

#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "daemon/mapping/plan.h"
#include "daemon/mapping/stream.h"
#include "daemon/mapping/tokens.h"
#include "tests/unit/mapping_support.h"

namespace kvferry::mapping::test {

struct LargeTransfer {
  static constexpr uint64_t kFragments = 131072;
  static constexpr uint64_t kBlocks = 1024;
  static constexpr uint64_t kTokens = kBlocks * 16;

  std::vector<RankLayout> senders;
  std::vector<RankLayout> receivers;
  std::shared_ptr<const LegTable> table;
  GroupBlocks from;
  GroupBlocks to;
  std::vector<GroupNeed> needs;
  std::vector<GroupRanges> offer;

  LargeTransfer() {
    GroupSpec spec;
    spec.block_count = 2 * kBlocks;
    senders = ranks_of({.tp = 2}, 64, 8, spec);
    receivers = ranks_of({.tp = 8}, 64, 8, spec);
    table = table_of(senders, receivers);
    // Ids that never follow each other.
    for (uint64_t i = 0; i < kBlocks; ++i) {
      from.ids.push_back(static_cast<int32_t>((i * 769 + 5) % (2 * kBlocks)));
      to.ids.push_back(static_cast<int32_t>((i * 1283 + 11) % (2 * kBlocks)));
    }
    const GroupReceive receive{kTokens, 0, to};
    const GroupOffer offered{kTokens, {0, kTokens}, from};
    needs = *compute_needs(receivers[7], std::span(&receive, 1));
    offer = *round_offer(senders[1], std::span(&offered, 1));
  }

  Stream stream() const { return *compile_stream(*table, 1, 7, needs, offer); }
  Plan source(const Stream& stream) const {
    return *bind_plan(stream, Side::kSender, senders[1], std::span(&from, 1));
  }
  Plan destination(const Stream& stream) const {
    return *bind_plan(stream, Side::kReceiver, receivers[7], std::span(&to, 1));
  }
};

}  // namespace kvferry::mapping::test
