// The GPU kernels' twin, which runs their code, against the copies of the host.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>
#include <set>

#include "kernels/host_copy.h"
#include "kernels/walk.h"
#include "tests/unit/random_plan.h"
#include "tests/unit/twin_support.h"

namespace kvferry::kernels::test {
namespace {

// A side's pools, filled at random, at addresses of any alignment or of a good one.
class Pools {
 public:
  Pools(const RandomPlan& made, Dice& dice) : sizes_(made.pool_bytes) {
    const bool aligned = dice.one_in(2);
    for (const uint64_t bytes : sizes_) {
      auto& pool = memory_.emplace_back(bytes + kRoom);
      for (std::byte& byte : pool) byte = static_cast<std::byte>(dice.below(256));
      shift_.push_back(aligned ? 0 : dice.below(kRoom));
    }
  }
  std::vector<std::byte*> bases() {
    std::vector<std::byte*> bases;
    for (std::size_t i = 0; i < memory_.size(); ++i) bases.push_back(memory_[i].data() + shift_[i]);
    return bases;
  }
  std::span<const uint64_t> sizes() const { return sizes_; }
  bool operator==(const Pools& other) const { return memory_ == other.memory_; }

 private:
  static constexpr uint64_t kRoom = 32;
  std::vector<uint64_t> sizes_;
  std::vector<uint64_t> shift_;
  std::vector<std::vector<std::byte>> memory_;
};

// A piece of a chunk, with guards around it.
class Chunk {
 public:
  Chunk(uint64_t bytes, Dice& dice)
      : shift_(dice.one_in(2) ? 32 : 32 + dice.below(32)), memory_(bytes + 128, std::byte{0xEE}) {}
  std::byte* data() { return memory_.data() + shift_; }
  bool operator==(const Chunk& other) const { return memory_ == other.memory_; }

 private:
  uint64_t shift_;
  std::vector<std::byte> memory_;
};

struct Piece {
  uint64_t begin = 0;
  uint64_t bytes = 0;
};

// All of it, or a range that cuts anywhere, perhaps nothing.
Piece random_piece(uint64_t bytes, Dice& dice) {
  if (bytes == 0 || dice.one_in(4)) return {0, bytes};
  uint64_t begin = dice.below(bytes + 1);
  uint64_t end = dice.below(bytes + 1);
  if (dice.one_in(2)) {
    begin = begin / 16 * 16;
    end = end / 16 * 16;
  }
  return {std::min(begin, end), std::max(begin, end) - std::min(begin, end)};
}

void check_flat(const RandomPlan& made, Dice& dice) {
  Pools pools(made, dice);
  const Piece piece = random_piece(made.plan.bytes, dice);
  const uint32_t blocks = dice.one_in(2) ? 0 : dice.between(1, 5);
  Chunk expected(piece.bytes, dice);
  Chunk chunk = expected;
  REQUIRE(gather(made.plan, pools.bases(), piece.begin, piece.bytes, expected.data()));
  const auto bases = pools.bases();
  REQUIRE(twin_copy(CopyKind::kGather, {made.plan, bases, pools.sizes()}, piece.begin, piece.bytes,
                    chunk.data(), blocks) == TwinResult::kOk);
  REQUIRE(chunk == expected);

  Pools by_host(made, dice);
  Pools by_twin = by_host;
  REQUIRE(scatter(made.plan, by_host.bases(), piece.begin, piece.bytes, chunk.data()));
  const auto twin_bases = by_twin.bases();
  const TwinSide side{made.plan, twin_bases, by_twin.sizes()};
  REQUIRE(twin_copy(CopyKind::kScatter, side, piece.begin, piece.bytes, chunk.data(), blocks) ==
          TwinResult::kOk);
  REQUIRE(by_twin == by_host);

  REQUIRE(clear(made.plan, by_host.bases()));
  REQUIRE(twin_copy(CopyKind::kClear, side, 0, made.plan.bytes, nullptr, blocks) ==
          TwinResult::kOk);
  REQUIRE(by_twin == by_host);
}

void check_transfer(const RandomPlan& from, const RandomPlan& to, Dice& dice) {
  Pools source(from, dice);
  Pools by_host(to, dice);
  Pools by_twin = by_host;
  const Piece piece = random_piece(std::min(from.plan.bytes, to.plan.bytes), dice);
  const auto source_bases = source.bases();
  const auto host_bases = by_host.bases();
  const auto twin_bases = by_twin.bases();
  REQUIRE(transfer(from.plan, source_bases, to.plan, host_bases, piece.begin, piece.bytes));
  REQUIRE(twin_transfer({from.plan, source_bases, source.sizes()},
                        {to.plan, twin_bases, by_twin.sizes()}, piece.begin, piece.bytes,
                        dice.one_in(2) ? 0 : dice.between(1, 5)) == TwinResult::kOk);
  REQUIRE(by_twin == by_host);
}

TEST_CASE("the kernels' twin does on random plans what the host's copies do") {
  // KVFERRY_SEED replays one, KVFERRY_SEEDS runs more of them.
  const char* one = std::getenv("KVFERRY_SEED");
  const char* many = std::getenv("KVFERRY_SEEDS");
  const uint64_t first = one != nullptr ? std::strtoull(one, nullptr, 10) : 1;
#ifdef __SANITIZE_THREAD__
  constexpr uint64_t kUsual = 50;  // one thread: there is little to find, slowly
#else
  constexpr uint64_t kUsual = 500;
#endif
  const uint64_t last = one != nullptr    ? first
                        : many != nullptr ? std::strtoull(many, nullptr, 10)
                                          : kUsual;
  for (uint64_t seed = first; seed <= last; ++seed) {
    INFO("seed " << seed);
    Dice dice(seed * 7919);
    const RandomPlan plan = PlanMaker(seed).make();
    const RandomPlan other = PlanMaker(seed + 1'000'000).make();
    check_flat(plan, dice);
    check_transfer(plan, other, dice);
  }
}

// Memory of any size: a byte's value follows from its address.
class Endless : public TwinMemory {
 public:
  static constexpr uint64_t kBase = uint64_t{1} << 44;
  static std::byte value(uint64_t address) {
    return static_cast<std::byte>((address * 0x9E3779B97F4A7C15) >> 56);
  }
  explicit Endless(const Shown& shown) : shown_(shown) {}
  const std::byte* readable(uint64_t address, uint64_t bytes) const override {
    if (address < kBase || address - kBase >= kBase) return shown_.readable(address, bytes);
    for (uint64_t i = 0; i < bytes; ++i) scratch_[i] = value(address + i);
    return scratch_;
  }
  std::byte* writable(uint64_t address, uint64_t bytes) const override {
    return shown_.writable(address, bytes);
  }

 private:
  const Shown& shown_;
  mutable std::byte scratch_[64] = {};
};

// One plane of blocks of one span each; places from the strides.
CopyPlan large_plan(uint64_t cell, uint32_t units, uint32_t tokens, uint32_t blocks,
                    uint64_t unit_stride, uint64_t token_stride, uint64_t block_stride) {
  CopyPlan plan;
  Bundle bundle;
  bundle.cell_bytes = cell;
  bundle.order = {Axis::kRow, Axis::kPlane, Axis::kBlock, Axis::kUnit, Axis::kToken};
  bundle.row_count = bundle.plane_count = bundle.segment_count = 1;
  bundle.block_count = blocks;
  bundle.unit_count = units;
  bundle.token_count = uint64_t{tokens} * blocks;
  bundle.rows_regular = bundle.planes_regular = true;
  bundle.bytes = plan.bytes = cell * units * bundle.token_count;
  plan.bundles = {bundle};
  plan.rows = {0, 1};
  plan.segments = {0, units};
  plan.strips = {{0, block_stride, unit_stride, token_stride, 0}};
  for (uint32_t b = 0; b < blocks; ++b) {
    plan.blocks.push_back({uint64_t{b} * tokens, b});
    plan.spans.push_back({blocks - 1 - b, 0, tokens});
  }
  plan.blocks.push_back({bundle.token_count, blocks});
  plan.pool_count = 1;
  return plan;
}

// Gathers pieces all over the stream out of memory that is not there.
void check_large(const CopyPlan& plan) {
  const uint64_t base = Endless::kBase;
  const auto packed = PackedPlan::make(plan, std::span(&base, 1));
  REQUIRE(packed);
  Dice dice(plan.bytes);
  std::vector<uint64_t> image(packed->image().size() / 8 + 1);
  const uint64_t skip = address_of(image.data()) % PackedPlan::kAlignment / 8;
  std::memcpy(image.data() + skip, packed->image().data(), packed->image().size());
  for (int i = 0; i < 50; ++i) {
    const uint64_t bytes = std::min<uint64_t>(plan.bytes, 3000 + dice.below(6000));
    const uint64_t begin = i == 0 ? plan.bytes - bytes : dice.below(plan.bytes - bytes + 1);
    std::vector<std::byte> to(bytes);
    std::vector<std::byte> expected;
    for_each_run(plan, begin, bytes, [&](uint32_t, uint64_t offset, uint64_t, uint64_t length) {
      for (uint64_t b = 0; b < length; ++b) expected.push_back(Endless::value(base + offset + b));
    });
    Shown shown;
    shown.show(image.data(), image.size() * 8, false);
    shown.show(to.data(), bytes, true);
    CopyArgs args{};
    args.plan = packed->view_at(address_of(image.data() + skip));
    args.stream_offset = begin;
    args.bytes = bytes;
    args.flat = address_of(to.data());
    INFO("stream offset " << begin << ", " << bytes << " bytes");
    REQUIRE(run_copy_twin(Endless(shown), args, launch_shape(args, 1)) == TwinResult::kOk);
    REQUIRE(to == expected);
  }
}

TEST_CASE("boxes and offsets beyond 32 bits are found") {
  const uint64_t gib = uint64_t{1} << 30;
  // Contiguous boxes of 16 GiB.
  check_large(large_plan(gib, 4, 4, 3, 4 * gib, gib, 16 * gib));
  // Contiguous per unit, units apart: a box in pieces would be longer than 2^32.
  check_large(large_plan(gib / 4, 8, 16, 2, 5 * gib, gib / 4, 64 * gib));
  // Cells that no power of two divides, in two dimensions.
  check_large(large_plan((uint64_t{1} << 24) + 9, 3, 5, 40, uint64_t{1} << 25, uint64_t{1} << 27,
                         uint64_t{1} << 31));
  // Many cells.
  check_large(large_plan(2, 7, 16, 1 << 17, 32, 2, 224));
  check_large(large_plan(656, 1, 64, 1 << 14, 0, 656, 64 * 656 + 16));
}

TEST_CASE("what is too large for the packed form is refused") {
  const uint64_t base = 0;
  CopyPlan plan = large_plan(1, 1 << 12, 1 << 20, 1, 0, 0, 0);
  REQUIRE_FALSE(PackedPlan::make(plan, std::span(&base, 1)));
  plan = large_plan(uint64_t{1} << 32, 1, 1, 1, 0, 0, 0);
  REQUIRE_FALSE(PackedPlan::make(plan, std::span(&base, 1)));
  plan = large_plan(16, 1, 1, 1, 0, 0, 0);
  REQUIRE_FALSE(PackedPlan::make(plan, {}));
  REQUIRE(PackedPlan::make(plan, std::span(&base, 1)));
}

TEST_CASE("an empty plan packs, and there is nothing to launch") {
  const auto packed = PackedPlan::make(CopyPlan{}, {});
  REQUIRE(packed);
  REQUIRE(packed->bytes() == 0);
  REQUIRE(packed->image().empty());
  CopyArgs args{};
  args.plan = packed->view_at(64);
  REQUIRE(launch_shape(args, 132).blocks == 0);
}

TEST_CASE("a launch fills the GPU for a small chunk and does not exceed it for a large one") {
  const auto blocks = [](CopyKind kind, uint64_t bytes, FlatMemory flat_in) {
    CopyArgs args{};
    args.kind = kind;
    args.bytes = bytes;
    args.flat = 1 << 20;
    const LaunchShape shape = launch_shape(args, 132, flat_in);
    CHECK(shape.threads == kBlockThreads);
    return shape.blocks;
  };
  const uint64_t mib = 1 << 20;
  CHECK(blocks(CopyKind::kGather, 1, FlatMemory::kDevice) == 1);
  CHECK(blocks(CopyKind::kGather, 4096, FlatMemory::kDevice) == 2);
  CHECK(blocks(CopyKind::kGather, mib, FlatMemory::kDevice) >= 132 * 2);
  CHECK(blocks(CopyKind::kGather, 32 * mib, FlatMemory::kDevice) == 132 * 8);
  CHECK(blocks(CopyKind::kTransfer, 32 * mib, FlatMemory::kDevice) == 132 * 6);
  CHECK(blocks(CopyKind::kScatter, 32 * mib, FlatMemory::kHost) == 132);
  CHECK(blocks(CopyKind::kScatter, uint64_t{1} << 44, FlatMemory::kDevice) == 132 * 8);
}

TEST_CASE("the twin refuses what a GPU would refuse") {
  alignas(16) std::byte pool[64] = {};
  std::byte* const base = pool;
  alignas(16) std::byte chunk[64] = {};
  const CopyPlan plan = large_plan(16, 1, 4, 1, 0, 16, 0);
  const uint64_t bytes = sizeof(pool);
  const uint64_t fewer = 48;
  const auto gathers = [&](uint64_t shown_bytes) {
    return twin_copy(CopyKind::kGather, {plan, std::span(&base, 1), std::span(&shown_bytes, 1)}, 0,
                     64, chunk, 1);
  };
  CHECK(gathers(bytes) == TwinResult::kOk);
  CHECK(gathers(fewer) == TwinResult::kIllegalAddress);

  // A plan that promises more alignment than its memory has.
  Uploaded uploaded(plan, std::span(&base, 1));
  Shown memory;
  uploaded.show(&memory);
  memory.show(pool, sizeof(pool), false);
  memory.show(chunk, sizeof(chunk), true);
  CopyArgs args{};
  args.plan = uploaded.view();
  args.plan.strips += 8;
  args.bytes = 64;
  args.flat = address_of(chunk);
  CHECK(run_copy_twin(memory, args, {1, kBlockThreads}) == TwinResult::kMisalignedAddress);
}

TEST_CASE("each kind has a kernel of a known name, and the image says whether it is real") {
  std::set<std::string> names;
  for (const char* name : kernel_names()) names.insert(name);
  CHECK(names.size() == 2);
  for (const CopyKind kind :
       {CopyKind::kGather, CopyKind::kScatter, CopyKind::kTransfer, CopyKind::kClear})
    CHECK(names.contains(kernel_name(kind)));
  REQUIRE(kernel_image().size() > 16);
  // What nvcc's fat binaries begin with.
  const unsigned char magic[] = {0x50, 0xED, 0x55, 0xBA};
  CHECK((std::memcmp(kernel_image().data(), magic, sizeof(magic)) == 0) == kernels_built());
}

}  // namespace
}  // namespace kvferry::kernels::test
