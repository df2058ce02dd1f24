// Sequences of calls on the buddy allocator, compared with a model that has one flag for each
// smallest block.
#include "daemon/memory/buddy.h"

#include <bit>
#include <map>

#include "tests/fuzz/input.h"

namespace {

using namespace kvferry;
using memory::Region;

constexpr uint64_t kMinBlock = 16;

class Model {
 public:
  explicit Model(const std::vector<uint64_t>& segments) {
    for (uint32_t segment = 0; segment < segments.size(); ++segment) {
      const uint64_t blocks = segments[segment] / kMinBlock;
      taken_.emplace_back(blocks, false);
      // The largest aligned blocks, one after the other.
      for (uint64_t at = 0; at < blocks;) {
        uint64_t size = std::bit_floor(blocks - at);
        while (at % size != 0) size /= 2;
        roots_.push_back({segment, at, size});
        at += size;
      }
    }
  }
  std::optional<Region> place(uint64_t bytes) const {
    const uint64_t size = std::bit_ceil(std::max<uint64_t>((bytes + kMinBlock - 1) / kMinBlock, 1));
    std::optional<Block> best;
    for (const Block& block : free_blocks())
      if (block.size >= size && (!best || block.size < best->size)) best = block;
    if (!best) return std::nullopt;
    return Region{best->segment, best->at * kMinBlock, size * kMinBlock};
  }
  uint64_t fitting(uint64_t bytes) const {
    const uint64_t size = std::bit_ceil(std::max<uint64_t>((bytes + kMinBlock - 1) / kMinBlock, 1));
    uint64_t count = 0;
    for (const Block& block : free_blocks()) count += block.size / size;
    return count;
  }
  uint64_t largest() const {
    uint64_t most = 0;
    for (const Block& block : free_blocks()) most = std::max(most, block.size);
    return most * kMinBlock;
  }
  void set(const Region& region, bool taken) {
    for (uint64_t i = 0; i < region.bytes / kMinBlock; ++i) {
      auto flag = taken_.at(region.segment).begin() +
                  static_cast<std::ptrdiff_t>(region.offset / kMinBlock + i);
      FUZZ_CHECK(*flag != taken, "a block has one holder");
      *flag = taken;
    }
  }

 private:
  struct Block {
    uint32_t segment = 0;
    uint64_t at = 0;  // both in smallest blocks
    uint64_t size = 0;
  };
  // By segment and offset; buddies that are both free are one.
  std::vector<Block> free_blocks() const {
    std::vector<Block> out;
    for (const Block& root : roots_) collect(root, out);
    return out;
  }
  void collect(const Block& block, std::vector<Block>& out) const {
    uint64_t used = 0;
    for (uint64_t i = 0; i < block.size; ++i) used += taken_[block.segment][block.at + i] ? 1U : 0U;
    if (used == 0) return out.push_back(block);
    if (used == block.size) return;
    collect({block.segment, block.at, block.size / 2}, out);
    collect({block.segment, block.at + block.size / 2, block.size / 2}, out);
  }

  std::vector<std::vector<bool>> taken_;
  std::vector<Block> roots_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  fuzz::Input in(data, size);
  std::vector<uint64_t> segments(1 + in.below(3));
  for (uint64_t& bytes : segments) bytes = in.number<uint16_t>() % 1200;
  memory::BuddyAllocator buddy(segments, kMinBlock);
  Model model(segments);
  std::vector<Region> held;
  for (int steps = 0; !in.empty() && steps < 400; ++steps) {
    const uint8_t what = in.byte();
    if (what % 3 != 0 || held.empty()) {
      const uint64_t bytes = in.size();
      // Beyond what the model counts in: nothing is that large.
      const bool huge = bytes > (uint64_t{1} << 40);
      const auto expected = huge ? std::nullopt : model.place(bytes);
      FUZZ_CHECK(buddy.can_allocate(bytes) == expected.has_value(), "can_allocate() tells");
      if (!huge) FUZZ_CHECK(buddy.count_fitting(bytes) == model.fitting(bytes), "it counts");
      const auto region = buddy.allocate(bytes);
      FUZZ_CHECK(region == expected, "the smallest and lowest block is taken");
      if (!region) continue;
      FUZZ_CHECK(region->bytes == buddy.block_bytes(bytes), "block_bytes() tells");
      model.set(*region, true);
      held.push_back(*region);
    } else {
      const std::size_t which = in.byte() % held.size();
      FUZZ_CHECK(buddy.is_allocated(held[which]), "what is held is allocated");
      buddy.free(held[which]);
      model.set(held[which], false);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
    }
    uint64_t used = 0;
    for (const Region& region : held) used += region.bytes;
    FUZZ_CHECK(buddy.used_bytes() == used && buddy.region_count() == held.size(), "it adds up");
    FUZZ_CHECK(buddy.largest_free_bytes() == model.largest(), "it knows its largest block");
    buddy.verify();
  }
  for (const Region& region : held) buddy.free(region);
  buddy.verify();
  FUZZ_CHECK(buddy.used_bytes() == 0, "all of it comes back");
  FUZZ_CHECK(buddy.largest_free_bytes() == buddy.largest_block_bytes(), "in one piece");
  return 0;
}
