#include "tests/sim/mapping.h"

#include <algorithm>
#include <cstring>

#include "tests/sim/rng.h"
#include "tests/sim/violation.h"

namespace kvferry::sim {

Pool::Pool(const Shape& shape_in, Range units_in, uint32_t blocks_in)
    : shape(shape_in),
      units(units_in),
      blocks(blocks_in),
      bytes(uint64_t{shape_in.groups} * blocks_in * shape_in.layers_per_group * units_in.size() *
            kTokensPerBlock * kCellBytes),
      owner(uint64_t{shape_in.groups} * blocks_in),
      readable(uint64_t{shape_in.groups} * blocks_in) {
  for (uint32_t g = 0; g < shape.groups; ++g)
    for (uint32_t b = 0; b < blocks; ++b) fill_block(g, b, 0xB10C);
}

uint64_t Pool::block_bytes() const {
  return uint64_t{shape.layers_per_group} * units.size() * kTokensPerBlock * kCellBytes;
}

uint64_t Pool::cell_at(uint32_t group, uint32_t block, uint32_t layer, uint64_t unit,
                       uint64_t token_in_block) const {
  const uint64_t in_group = layer - group * shape.layers_per_group;
  return (uint64_t{group} * blocks + block) * block_bytes() +
         ((in_group * units.size() + (unit - units.begin)) * kTokensPerBlock + token_in_block) *
             kCellBytes;
}

uint64_t& Pool::owner_of(uint32_t group, uint32_t block) {
  return owner[uint64_t{group} * blocks + block];
}

uint8_t& Pool::readable_at(uint32_t group, uint32_t block) {
  return readable[uint64_t{group} * blocks + block];
}

bool SimLayout::serves(uint32_t group, const LayoutHandle& other, uint32_t other_group) const {
  const Range& mine = pool->units;
  const Range& theirs = static_cast<const SimLayout&>(other).pool->units;
  return group == other_group && mine.begin <= theirs.begin && theirs.end <= mine.end;
}

bool SimPlan::same_source(const engine::Plan& other) const {
  const auto& there = static_cast<const SimPlan&>(other);
  return layout == there.layout && pieces == there.pieces;
}

std::pair<uint32_t, uint32_t> Pool::block_of(uint64_t offset) const {
  const uint64_t index = offset / block_bytes();
  return {static_cast<uint32_t>(index / blocks), static_cast<uint32_t>(index % blocks)};
}

void Pool::fill_block(uint32_t group, uint32_t block, uint64_t pattern) {
  const uint64_t begin = (uint64_t{group} * blocks + block) * block_bytes();
  uint64_t word = mix(pattern);
  for (uint64_t i = 0; i < block_bytes(); i += 4) {
    word = mix(word);
    const auto half = static_cast<uint32_t>(word);
    std::memcpy(bytes.data() + begin + i, &half, 4);
  }
}

Range Ranks::units_of(uint32_t rank) const {
  if (replicated) return {0, units};
  const uint64_t index = rank % tp;
  return {index * units / tp, (index + 1) * units / tp};
}

std::vector<Leg> legs_between(const Ranks& sender, uint32_t sender_group, const Ranks& receiver,
                              uint32_t receiver_group) {
  const uint32_t s0 = sender_group * sender.tp;
  const uint32_t r0 = receiver_group * receiver.tp;
  std::vector<Leg> legs;
  std::vector<bool> sender_used(sender.tp), receiver_used(receiver.tp);
  for (uint32_t j = 0; j < receiver.tp; ++j) {
    const uint32_t g = r0 + j;
    bool first = true;
    for (uint32_t i = 0; i < sender.tp; ++i) {
      const uint32_t s = s0 + i;
      Range units;
      if (sender.replicated)
        units = g % sender.tp == i ? receiver.units_of(g) : Range{};
      else
        units = intersect(sender.units_of(s), receiver.units_of(g));
      if (units.empty()) continue;
      legs.push_back({s, g, units, false, first});
      first = false;
      sender_used[i] = receiver_used[j] = true;
    }
  }
  for (uint32_t i = 0; i < sender.tp; ++i)
    if (!sender_used[i]) {
      const uint32_t j = i % receiver.tp;
      legs.push_back({s0 + i, r0 + j, {}, true, !receiver_used[j]});
      receiver_used[j] = true;
    }
  for (uint32_t j = 0; j < receiver.tp; ++j)
    if (!receiver_used[j]) legs.push_back({s0 + j % sender.tp, r0 + j, {}, true, true});
  std::sort(legs.begin(), legs.end(), [](const Leg& a, const Leg& b) {
    return std::pair(a.sender_rank, a.receiver_rank) < std::pair(b.sender_rank, b.receiver_rank);
  });
  return legs;
}

uint64_t expected_bytes(const Shape& shape, const Leg& leg,
                        const std::vector<engine::GroupNeed>& needs) {
  uint64_t tokens = 0;
  for (const auto& need : needs)
    for (const Range& range : need.ranges) tokens += range.size();
  return tokens * leg.units.size() * shape.layers_per_group * kCellBytes;
}

namespace {

const engine::GroupBlocks& blocks_for(const std::vector<engine::GroupBlocks>& blocks,
                                      uint32_t group) {
  for (const auto& list : blocks)
    if (list.group == group) return list;
  throw Violation("compile", "a slice of a group without blocks");
}

uint32_t block_at(const engine::GroupBlocks& list, uint64_t token) {
  const uint64_t position = token / kTokensPerBlock;
  if (position < list.first_block || position - list.first_block >= list.ids.size() ||
      list.ids[position - list.first_block] < 0)
    throw Violation("compile", "a range of a slice has no block");
  return static_cast<uint32_t>(list.ids[position - list.first_block]);
}

uint64_t fold(uint64_t digest, uint64_t value) {
  return mix(digest ^ mix(value));
}

// The cells of a block from `token` (of the prompt) on, for a plan that has moved that block.
void add_tail(SimPlan& plan, uint32_t group, uint32_t block, uint32_t layer, Range units,
              uint64_t token) {
  if (plan.tail == nullptr) {
    plan.tail = std::make_shared<SimPlan>(plan);
    plan.tail->id = plan.id + 1;
    plan.tail->pieces.clear();
    plan.tail->bytes = 0;
    plan.has_tail = true;
  }
  SimPlan& tail = *plan.tail;
  const uint64_t bytes = (kTokensPerBlock - token % kTokensPerBlock) * kCellBytes;
  for (uint64_t unit = units.begin; unit < units.end; ++unit) {
    const uint64_t page =
        plan.layout->pool->cell_at(group, block, layer, unit, token % kTokensPerBlock);
    tail.pieces.push_back({tail.bytes, page, bytes});
    tail.bytes += bytes;
  }
}

}  // namespace

std::shared_ptr<SimPlan> compile(const engine::Compile& command, uint64_t id, uint64_t side) {
  const bool sending = command.side == engine::Role::kSender;
  require(command.context != nullptr, "compile", "no context");
  require(
      sending ? command.send && command.pull && !command.receive : command.receive && !command.send,
      "compile", "the calls that a compilation needs are not there");
  const auto& context = static_cast<const SimContext&>(*command.context);
  auto plan = std::make_shared<SimPlan>();
  plan->id = id;
  plan->side = side;
  plan->role = command.side;
  plan->sender_rank = context.sender_rank;
  plan->receiver_rank = context.receiver_rank;
  plan->layout = std::static_pointer_cast<const SimLayout>(sending ? command.send->layout
                                                                   : command.receive->layout);
  const Pool& pool = *plan->layout->pool;
  const Shape& shape = pool.shape;
  const auto& needs = sending ? command.pull->needs : command.receive->needs;
  const auto& blocks = sending ? command.send->blocks : command.receive->blocks;
  uint64_t digest = fold(context.units.begin, context.units.end);
  for (const auto& offer : command.offer) {
    for (const auto& need : needs) {
      if (need.group != offer.group) continue;
      for (const Range& offered : offer.ranges)
        for (const Range& needed : need.ranges) {
          const Range tokens = intersect(offered, needed);
          if (tokens.empty() || context.units.empty()) continue;
          const uint32_t first_layer = offer.group * shape.layers_per_group;
          const Range layers = intersect({first_layer, first_layer + shape.layers_per_group},
                                         command.layers.value_or(Range{0, shape.layers()}));
          if (layers.empty()) continue;
          digest =
              fold(fold(fold(fold(digest, layers.begin), layers.end), tokens.begin), tokens.end);
          const auto& list = blocks_for(blocks, offer.group);
          for (uint64_t layer = layers.begin; layer < layers.end; ++layer)
            for (uint64_t token = tokens.begin; token < tokens.end;) {
              const uint64_t stop =
                  std::min(tokens.end, round_down(token, kTokensPerBlock) + kTokensPerBlock);
              const uint32_t block = block_at(list, token);
              for (uint64_t unit = context.units.begin; unit < context.units.end; ++unit) {
                const uint64_t page = pool.cell_at(offer.group, block, static_cast<uint32_t>(layer),
                                                   unit, token % kTokensPerBlock);
                const uint64_t bytes = (stop - token) * kCellBytes;
                plan->pieces.push_back({plan->bytes, page, bytes});
                plan->bytes += bytes;
              }
              if (!sending && shape.zero_tail && token < need.end && need.end < stop)
                add_tail(*plan, offer.group, block, static_cast<uint32_t>(layer), context.units,
                         need.end);
              token = stop;
            }
        }
    }
  }
  plan->digest = (context.weak ? 0 : digest) + (context.skewed ? 1 : 0);
  return plan;
}

CopyPlans compile_copy(const engine::CompileCopy& command, uint64_t id, uint64_t side) {
  CopyPlans plans;
  const auto make = [&](const std::shared_ptr<const engine::LayoutHandle>& layout) {
    auto plan = std::make_shared<SimPlan>();
    plan->id = id++;
    plan->role = engine::Role::kReceiver;
    plan->layout = std::static_pointer_cast<const SimLayout>(layout);
    return plan;
  };
  plans.source = make(command.source);
  plans.destination = make(command.destination);
  plans.destination->side = side;
  const Pool& from = *plans.source->layout->pool;
  const Pool& to = *plans.destination->layout->pool;
  for (const auto& need : command.needs) {
    const auto& source = blocks_for(command.source_blocks, need.group);
    const auto& destination = blocks_for(command.destination_blocks, need.group);
    const uint32_t first = need.group * to.shape.layers_per_group;
    for (const Range& range : need.ranges)
      for (uint64_t token = range.begin; token < range.end; token += kTokensPerBlock)
        for (uint32_t layer = first; layer < first + to.shape.layers_per_group; ++layer)
          for (uint64_t unit = to.units.begin; unit < to.units.end; ++unit) {
            constexpr uint64_t kBytes = kTokensPerBlock * kCellBytes;
            const auto add = [&](SimPlan& plan, const Pool& pool, const auto& blocks) {
              plan.pieces.push_back(
                  {plan.bytes, pool.cell_at(need.group, block_at(blocks, token), layer, unit, 0),
                   kBytes});
              plan.bytes += kBytes;
            };
            add(*plans.source, from, source);
            add(*plans.destination, to, destination);
          }
  }
  return plans;
}

namespace {

// Calls fn(group, tokens, layers) for each range that the slice offers.
template <typename Fn>
void each_offer(const Shape& shape, const engine::SendOp& send, Fn&& fn) {
  for (const auto& offer : send.offer)
    for (const Range& tokens : offer.ranges) {
      const uint32_t first = offer.group * shape.layers_per_group;
      const Range layers = intersect({first, first + shape.layers_per_group},
                                     send.layers.value_or(Range{0, shape.layers()}));
      if (!tokens.empty() && !layers.empty()) fn(offer.group, tokens, layers);
    }
}

}  // namespace

uint64_t packed_bytes_of(const Shape& shape, const Pool& pool, const engine::SendOp& send) {
  uint64_t cells = 0;
  each_offer(shape, send, [&](uint32_t, const Range& tokens, const Range& layers) {
    cells += tokens.size() * layers.size() * pool.units.size();
  });
  return cells * kCellBytes;
}

PackedPlans compile_packed(const engine::SendOp& send, uint64_t id, uint64_t side) {
  const auto source = std::static_pointer_cast<const SimLayout>(send.layout);
  const Pool& from = *source->pool;
  PackedPlans out;
  out.layout = std::make_shared<SimLayout>(*source);
  out.layout->packed_side = side;
  out.layout->arena = 0;  // host memory
  uint64_t most = 0;
  each_offer(from.shape, send, [&](uint32_t, const Range& tokens, const Range&) {
    most = std::max(most, tokens.size() / kTokensPerBlock);
  });
  out.layout->pool = std::make_shared<Pool>(from.shape, from.units, static_cast<uint32_t>(most));
  const auto make = [&](const std::shared_ptr<const SimLayout>& layout) {
    auto plan = std::make_shared<SimPlan>();
    plan->id = id++;
    plan->side = side;
    plan->layout = layout;
    return plan;
  };
  out.copy = {make(source), make(out.layout)};
  each_offer(from.shape, send, [&](uint32_t group, const Range& tokens, const Range& layers) {
    const auto& blocks = blocks_for(send.blocks, group);
    engine::GroupBlocks packed{group, tokens.begin / kTokensPerBlock, {}};
    for (uint64_t token = tokens.begin; token < tokens.end; token += kTokensPerBlock) {
      const auto block = static_cast<uint32_t>(packed.ids.size());
      packed.ids.push_back(static_cast<int32_t>(block));
      for (uint64_t layer = layers.begin; layer < layers.end; ++layer)
        for (uint64_t unit = from.units.begin; unit < from.units.end; ++unit) {
          constexpr uint64_t kBytes = kTokensPerBlock * kCellBytes;
          const auto add = [&](SimPlan& plan, const Pool& pool, uint32_t at) {
            plan.pieces.push_back({plan.bytes,
                                   pool.cell_at(group, at, static_cast<uint32_t>(layer), unit, 0),
                                   kBytes});
            plan.bytes += kBytes;
          };
          add(*out.copy.source, from, block_at(blocks, token));
          add(*out.copy.destination, *out.layout->pool, block);
        }
    }
    out.blocks.push_back(std::move(packed));
  });
  return out;
}

namespace {

uint64_t cell_word(uint64_t text, uint32_t layer, uint64_t unit, uint64_t token) {
  return mix(mix(mix(text) ^ layer) ^ (unit << 32) ^ token);
}

}  // namespace

void make_cell(uint64_t text, uint32_t version, uint32_t layer, uint64_t unit, uint64_t token,
               uint8_t* out) {
  const uint64_t word = cell_word(text, layer, unit, token);
  std::memcpy(out, &word, 8);
  const uint64_t rest = mix(word + version);
  out[8] = static_cast<uint8_t>(version);
  std::memcpy(out + 9, &rest, 3);
}

std::optional<uint32_t> version_of(uint64_t text, uint32_t layer, uint64_t unit, uint64_t token,
                                   const uint8_t* cell) {
  uint8_t expected[kCellBytes];
  make_cell(text, cell[8], layer, unit, token, expected);
  if (std::memcmp(expected, cell, kCellBytes) != 0) return std::nullopt;
  return cell[8];
}

void read_stream(const SimPlan& plan, uint64_t offset, uint64_t bytes, uint8_t* out) {
  const Pool& pool = *plan.layout->pool;
  each_piece(plan, offset, bytes, [&](uint64_t page, uint64_t length, uint64_t stream) {
    std::memcpy(out + (stream - offset), pool.bytes.data() + page, length);
  });
}

void write_stream(const SimPlan& plan, uint64_t offset, uint64_t bytes, const uint8_t* in) {
  Pool& pool = *plan.layout->pool;
  each_piece(plan, offset, bytes, [&](uint64_t page, uint64_t length, uint64_t stream) {
    std::memcpy(pool.bytes.data() + page, in + (stream - offset), length);
  });
}

}  // namespace kvferry::sim
