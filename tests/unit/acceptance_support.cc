#include "tests/unit/acceptance_support.h"

#include <algorithm>
#include <random>
#include <span>
#include <stdexcept>
#include <utility>

#include "daemon/mapping/coverage.h"
#include "daemon/mapping/plan.h"
#include "daemon/mapping/stream.h"
#include "daemon/mapping/tokens.h"
#include "daemon/mapping/validate.h"
#include "kernels/host_copy.h"
#include "tests/unit/acceptance_sides.h"

namespace kvferry::acceptance {
namespace {

using namespace mapping;

void give_memory(std::vector<Rank>& ranks, std::vector<std::vector<std::byte>>& storage) {
  for (Rank& rank : ranks)
    for (const PoolSpan& pool : rank.layout.pools)
      rank.memory.emplace_back(storage.emplace_back(pool.bytes, kUntouched));
}

std::shared_ptr<const LegTable> table_of(const std::vector<Rank>& sender,
                                         const std::vector<Rank>& receiver) {
  auto prefill = std::make_shared<Instance>();
  auto decode = std::make_shared<Instance>();
  for (const Rank& rank : sender) prefill->ranks.push_back(holding_of(rank.layout));
  for (const Rank& rank : receiver) decode->ranks.push_back(holding_of(rank.layout));
  return good(LegTable::make(std::move(prefill), std::move(decode)), "leg table");
}

// ---- the hand-off ------------------------------------------------------------------------------

std::vector<GroupRanges> offer_of(const Case& of, const Rank& rank, const SliceSpec& slice,
                                  bool last) {
  std::vector<GroupOffer> offers;
  for (uint32_t g = 0; g < rank.layout.groups.size(); ++g) {
    const bool state = is_state(of.sender.groups[rank.model[g]]);
    if (state && !last) continue;
    offers.push_back({of.sender.prompt, state ? Range{0, 1} : slice.tokens, rank.blocks[g]});
  }
  return good(round_offer(rank.layout, offers), "offer");
}

void move_slice(const Case& of, const Stream& stream, const Rank& from, const Rank& to,
                Outcome& outcome) {
  const Plan source = good(bind_plan(stream, Side::kSender, from.layout, from.blocks), "source");
  const Plan target = good(bind_plan(stream, Side::kReceiver, to.layout, to.blocks), "target");
  outcome.bytes += stream.bytes;
  outcome.bytes_of_rank[stream.receiver_rank] += stream.bytes;
  outcome.fragments += fragment_count(source, target);
  const auto from_bases = from.bases();
  const auto to_bases = to.bases();
  std::vector<std::byte> chunk(of.chunk_bytes);
  for (uint64_t at = 0; at < stream.bytes; at += of.chunk_bytes) {
    const uint64_t bytes = std::min(of.chunk_bytes, stream.bytes - at);
    if (!kernels::gather(source.form(), from_bases, at, bytes, chunk.data()) ||
        !kernels::scatter(target.form(), to_bases, at, bytes, chunk.data()))
      wrong("a chunk was refused");
  }
  std::vector<uint64_t> prompts;
  for (const std::size_t m : to.model)
    prompts.push_back(is_state(of.receiver.groups[m]) ? 1 : of.receiver.prompt);
  const Plan tail = good(bind_tail(stream, to.layout, to.blocks, prompts), "tail");
  if (!kernels::clear(tail.form(), to_bases)) wrong("a tail was refused");
}

void run_leg(const Case& of, const LegTable& theirs, const LegTable& ours, const Leg& leg,
             std::span<const GroupNeed> needs, const Rank& from, const Rank& to, Outcome& outcome) {
  auto coverage = good(LegCoverage::make(ours, leg.sender_rank, leg.receiver_rank, needs), "need");
  const std::vector<SliceSpec> slices = slices_of(of);
  uint64_t bytes = 0;
  for (std::size_t i = 0; i < slices.size(); ++i) {
    const auto offer = offer_of(of, from, slices[i], i + 1 == slices.size());
    const Stream sent = good(
        compile_stream(theirs, leg.sender_rank, leg.receiver_rank, needs, offer, slices[i].layers),
        "sender's stream");
    const Stream stream = good(
        compile_stream(ours, leg.sender_rank, leg.receiver_rank, needs, offer, slices[i].layers),
        "receiver's stream");
    if (sent.digest != stream.digest || sent.bytes != stream.bytes) wrong("digests differ");
    good(coverage.add(offer, slices[i].layers), "slices");
    if (leg.empty && stream.bytes != 0) wrong("an empty leg brings bytes");
    bytes += stream.bytes;
    move_slice(of, stream, from, to, outcome);
  }
  if (const auto missing = coverage.missing())
    wrong("layer " + std::to_string(missing->layer) + " position " +
          std::to_string(missing->position) + " was not offered");
  if (bytes != coverage.expected_bytes()) wrong("a leg brought other bytes than expected");
  ++outcome.legs;
  if (leg.empty) ++outcome.empty_legs;
}

}  // namespace

Outcome run_case(const Case& of) {
  std::mt19937_64 random(of.seed);
  Outcome outcome;
  try {
    std::vector<Rank> senders = make_side(of.sender, random);
    std::vector<Rank> receivers = make_side(of.receiver, random);
    std::vector<std::vector<std::byte>> storage;
    for (auto* side : {&senders, &receivers}) give_memory(*side, storage);
    for (const Rank& rank : senders) fill(rank);
    // Each daemon works out its own.
    const auto theirs = table_of(senders, receivers);
    const auto ours = table_of(senders, receivers);
    for (const uint32_t dp_group : ours->sender_dp_groups()) {
      const Holders holders = holders_of(senders, dp_group);
      for (const Rank& to : receivers) {
        clean(to);
        std::vector<GroupReceive> receives;
        for (uint32_t g = 0; g < to.layout.groups.size(); ++g)
          receives.push_back({of.receiver.prompt, cached_of(of, to, g), to.blocks[g]});
        const auto needs = good(compute_needs(to.layout, receives), "needs");
        const uint32_t number = to.layout.topology.rank;
        const auto legs = good(ours->legs_of_receiver(dp_group, number), "legs");
        uint64_t aux = 0;
        for (const Leg& leg : legs) {
          aux += leg.carries_aux ? 1 : 0;
          run_leg(of, *theirs, *ours, leg, needs, senders[leg.sender_rank], to, outcome);
        }
        if (aux != 1) wrong("aux comes by one leg");
        compare(to, expected_memory(of, to, holders, outcome.cells));
      }
      // Every sender rank learns its end from a leg.
      for (const Rank& from : senders) {
        if (from.layout.topology.dp_group != dp_group) continue;
        for (const uint32_t to : ours->receiver_dp_groups())
          if (good(theirs->legs_of_sender(from.layout.topology.rank, to), "legs").empty())
            wrong("a sender rank has no leg");
      }
    }
  } catch (const std::exception& error) {
    wrong(of.name + ": " + error.what());
  }
  return outcome;
}

Case between(const std::string& from, const std::string& to, std::vector<ModelGroup> groups,
             uint64_t prompt) {
  Case of;
  of.name = from + " -> " + to + ", " + std::to_string(prompt) + " tokens";
  of.sender = {topology_named(from), groups, prompt, false};
  of.receiver = {topology_named(to), std::move(groups), prompt, false};
  return of;
}

Part part(std::vector<std::string> roles, uint32_t heads, uint64_t cell_bytes, std::string type,
          std::string memory, Granularity granularity) {
  Part of;
  of.roles = std::move(roles);
  of.heads = heads;
  of.cell_bytes = cell_bytes;
  of.type = std::move(type);
  of.memory = std::move(memory);
  of.granularity = granularity;
  return of;
}

std::vector<ModelGroup> attention(uint32_t layers, uint32_t heads, const std::string& memory,
                                  uint64_t block) {
  ModelGroup group;
  group.layers = every(layers, 1, 0);
  group.parts.front().heads = heads;
  group.parts.front().memory = memory;
  group.block = block;
  return {group};
}

std::vector<ModelGroup> latent(uint32_t layers, uint64_t block) {
  ModelGroup group;
  group.layers = every(layers, 1, 0);
  group.parts.front() = {{"latent"}, 1, 36, "bf16", Granularity::kToken, "l|btu", {}, false};
  group.block = block;
  return {group};
}

std::vector<ModelGroup> windowed(uint32_t layers, const std::vector<uint64_t>& windows,
                                 uint64_t block) {
  std::vector<ModelGroup> groups;
  const auto period = static_cast<uint32_t>(windows.size());
  for (uint32_t i = 0; i < period; ++i) {
    ModelGroup group;
    group.layers = every(layers, period, i);
    group.parts.front().heads = 4;
    group.block = block;
    group.window = windows[i];
    groups.push_back(group);
  }
  return groups;
}

std::vector<uint32_t> every(uint32_t layers, uint32_t period, uint32_t first) {
  std::vector<uint32_t> list;
  for (uint32_t layer = first; layer < layers; layer += period) list.push_back(layer);
  return list;
}

Topology topology_named(const std::string& name) {
  Topology topology;
  for (std::size_t at = 0; at < name.size();) {
    const auto number = [&](std::size_t begin) {
      std::size_t end = begin;
      uint32_t value = 0;
      for (; end < name.size() && name[end] >= '0' && name[end] <= '9'; ++end)
        value = value * 10 + static_cast<uint32_t>(name[end] - '0');
      at = end;
      return value;
    };
    if (name.compare(at, 2, "tp") == 0)
      topology.tp = number(at + 2);
    else if (name.compare(at, 2, "pp") == 0)
      topology.pp = number(at + 2);
    else if (name.compare(at, 2, "cp") == 0)
      topology.cp = number(at + 2);
    else if (name[at] == 'D')
      topology.attention_dp = true, ++at;
    else if (name[at] == '1' || name[at] == ' ')
      ++at;
    else
      wrong("no topology: " + name);
  }
  return topology;
}

}  // namespace kvferry::acceptance
