// RegisterLayout: the bytes of a RankLayout as a worker writes them, checked, made a holding, and
// used as an instance of one rank that sends to itself. What the checks have let through must
// compile to plans that lie in the pools, in bounded time.
#include "daemon/mapping/legs.h"
#include "daemon/mapping/needs.h"
#include "daemon/mapping/plan.h"
#include "daemon/mapping/stream.h"
#include "daemon/mapping/tokens.h"
#include "daemon/mapping/validate.h"
#include "daemon/rpc/layout_proto.h"
#include "daemon/rpc/quiet_parser.h"
#include "tests/fuzz/input.h"

namespace {

using namespace kvferry;

// Walking every run of a large plan takes long and says nothing new.
constexpr uint64_t kMostBytes = 1 << 16;

void check_runs(const mapping::Plan& plan, const mapping::RankLayout& layout) {
  if (plan.bytes() == 0) return;
  const uint64_t bytes = std::min(plan.bytes(), kMostBytes);
  for (const uint64_t from : {uint64_t{0}, plan.bytes() - bytes}) {
    uint64_t next = from;
    plan.for_each_run(from, bytes, [&](uint32_t pool, uint64_t offset, uint64_t at, uint64_t n) {
      FUZZ_CHECK(n > 0 && at == next, "runs follow each other");
      FUZZ_CHECK(pool < layout.pools.size() && offset <= layout.pools[pool].bytes &&
                     n <= layout.pools[pool].bytes - offset,
                 "a run lies in its pool");
      next += n;
    });
    FUZZ_CHECK(next == from + bytes, "runs cover what was asked for");
  }
}

std::vector<int32_t> some_ids(const mapping::Group& group, fuzz::Input& in) {
  const uint64_t ids = group.block_count / group.blocks_per_id;
  std::vector<int32_t> out;
  if (ids == 0) return out;
  for (uint32_t n = 1 + in.below(8); n > 0; --n) {
    const uint64_t id = in.number<uint16_t>() % ids;
    if (std::find(out.begin(), out.end(), static_cast<int32_t>(id)) == out.end())
      out.push_back(in.below(8) == 1 ? mapping::kHole : static_cast<int32_t>(id));
  }
  return out;
}

void compile(const mapping::RankLayout& layout, mapping::Holding holding, fuzz::Input& in) {
  auto instance = std::make_shared<mapping::Instance>();
  instance->name = "default/one";
  instance->ranks.push_back(std::move(holding));
  if (!mapping::validate_instance(*instance)) return;
  const auto table = mapping::LegTable::make(instance, instance);
  if (!table) return;
  const uint32_t dp = layout.topology.dp_group;
  const auto legs = (*table)->legs_of_receiver(dp, 0);
  FUZZ_CHECK(legs.has_value(), "a rank that there is has its legs");

  std::vector<mapping::GroupReceive> receives;
  std::vector<mapping::GroupOffer> offers;
  std::vector<mapping::GroupBlocks> blocks;
  std::vector<uint64_t> prompts(layout.groups.size(), 0);
  for (uint32_t g = 0; g < std::min<std::size_t>(layout.groups.size(), 8); ++g) {
    const mapping::Group& group = layout.groups[g];
    const mapping::GroupBlocks of{g, in.chance() ? 0 : uint64_t{in.byte()}, some_ids(group, in)};
    const uint64_t prompt = in.chance() ? group.tokens_per_block * 4 : in.size();
    receives.push_back({prompt, in.chance() ? 0 : in.size(), of});
    offers.push_back({prompt, {in.chance() ? 0 : in.size(), prompt}, of});
    blocks.push_back(of);
    prompts[g] = prompt;
  }
  const auto needs = mapping::compute_needs(layout, receives);
  const auto offer = mapping::round_offer(layout, offers);
  if (!needs || !offer) return;
  FUZZ_CHECK(mapping::validate_needs(instance->ranks[0], *needs).has_value(),
             "own needs are valid");
  FUZZ_CHECK(mapping::validate_offer(instance->ranks[0], *offer).has_value(), "as is an own offer");
  (void)mapping::needs_by_sender_group(**table, 0, 0, *needs);
  const auto stream = mapping::compile_stream(**table, 0, 0, *needs, *offer);
  if (!stream) return;
  const auto source = mapping::bind_plan(*stream, mapping::Side::kSender, layout, blocks);
  const auto destination = mapping::bind_plan(*stream, mapping::Side::kReceiver, layout, blocks);
  if (source) {
    FUZZ_CHECK(source->bytes() == stream->bytes, "a plan has its stream's bytes");
    check_runs(*source, layout);
    FUZZ_CHECK(source->same_places(*source), "a plan is where it is");
  }
  if (destination) {
    FUZZ_CHECK(destination->bytes() == stream->bytes, "on both sides");
    check_runs(*destination, layout);
    const auto tail = mapping::bind_tail(*stream, layout, blocks, prompts);
    if (tail) check_runs(*tail, layout);
  }
}

}  // namespace

// Two bytes say how long the message is; what follows it chooses blocks and prompts.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  [[maybe_unused]] static const bool quiet = (kvferry::rpc::quiet_parser(), true);
  fuzz::Input in(data, size);
  const auto bytes = in.bytes(in.number<uint16_t>());
  v1::RankLayout message;
  if (!message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return 0;
  const auto layout = rpc::from_proto(message);
  if (!layout) {
    FUZZ_CHECK(!layout.error().field.empty(), "what is wrong has a name");
    return 0;
  }
  v1::RankLayout written;
  rpc::to_proto(*layout, written);
  const auto again = rpc::from_proto(written);
  FUZZ_CHECK(again && *again == *layout, "a layout goes into a message and comes back the same");
  if (const Status valid = mapping::validate_layout(*layout); !valid) {
    FUZZ_CHECK(!valid.error().field.empty(), "what is wrong has a name");
    return 0;
  }
  mapping::Holding holding = mapping::holding_of(*layout);
  FUZZ_CHECK(mapping::validate_holding(holding).has_value(), "a valid layout has a valid holding");
  if (layout->topology.rank == 0 && layout->topology.rank_count == 1)
    compile(*layout, std::move(holding), in);
  return 0;
}
