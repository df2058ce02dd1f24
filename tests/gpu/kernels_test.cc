// The kernels on the device against the copies of the host, which share no code with them.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <vector>

#include "kernels/host_copy.h"
#include "tests/gpu/gpu.h"
#include "tests/unit/random_plan.h"

namespace kvferry::testing {
namespace {

using kernels::CopyArgs;
using kernels::CopyKind;
using kernels::test::Dice;
using kernels::test::PlanMaker;
using kernels::test::RandomPlan;

constexpr uint64_t kRoom = 32;  // in front of a pool, so that its address has any alignment

// A side's pools, twice: on the host and on the device, with the same bytes.
class Pools {
 public:
  Pools(Gpu& gpu, const RandomPlan& made, Dice& dice) {
    const bool aligned = dice.one_in(2);
    for (const uint64_t bytes : made.pool_bytes) {
      auto& pool = host_.emplace_back(bytes + kRoom);
      for (std::byte& byte : pool) byte = static_cast<std::byte>(dice.below(256));
      const uint64_t shift = aligned ? 0 : dice.below(kRoom);
      device_.push_back(std::make_unique<DeviceBytes>(gpu, pool.size()));
      device_.back()->put(pool.data());
      bases_.push_back(pool.data() + shift);
      addresses_.push_back(device_.back()->address() + shift);
    }
  }
  std::span<std::byte* const> bases() const { return bases_; }
  std::span<const uint64_t> addresses() const { return addresses_; }
  // Whether both sides still have the same bytes, all of them.
  bool agree() const {
    for (std::size_t i = 0; i < host_.size(); ++i) {
      std::vector<std::byte> bytes(host_[i].size());
      device_[i]->get(bytes.data());
      if (bytes != host_[i]) return false;
    }
    return true;
  }

 private:
  std::vector<std::vector<std::byte>> host_;
  std::vector<std::unique_ptr<DeviceBytes>> device_;
  std::vector<std::byte*> bases_;
  std::vector<uint64_t> addresses_;
};

struct Piece {
  uint64_t begin = 0;
  uint64_t bytes = 0;
};

Piece random_piece(uint64_t bytes, Dice& dice) {
  if (dice.one_in(4)) return {0, bytes};
  const uint64_t begin = dice.below(bytes + 1);
  const uint64_t end = dice.below(bytes + 1);
  return {std::min(begin, end), std::max(begin, end) - std::min(begin, end)};
}

CopyArgs args_of(CopyKind kind, const DevicePlan& plan, const Piece& piece, uint64_t flat) {
  CopyArgs args{};
  args.plan = plan.view();
  args.stream_offset = piece.begin;
  args.bytes = piece.bytes;
  args.flat = flat;
  args.kind = kind;
  return args;
}

void check_flat(Gpu& gpu, const RandomPlan& made, Dice& dice) {
  const Pools pools(gpu, made, dice);
  const DevicePlan plan(gpu, made.plan, pools.addresses());
  const Piece piece = random_piece(made.plan.bytes, dice);
  const uint64_t shift = dice.one_in(2) ? 0 : dice.below(kRoom);
  const uint64_t room = piece.bytes + 2 * kRoom;
  std::vector<std::byte> expected(room, std::byte{0xEE});
  std::vector<std::byte> chunk = expected;
  REQUIRE(gather(made.plan, pools.bases(), piece.begin, piece.bytes, expected.data() + shift));

  DeviceBytes on_device(gpu, room);
  on_device.put(chunk.data());
  gpu.launch(args_of(CopyKind::kGather, plan, piece, on_device.address() + shift));
  on_device.get(chunk.data());
  REQUIRE(chunk == expected);

  const PinnedBytes pinned(gpu, room);
  std::fill_n(pinned.data(), room, std::byte{0xEE});
  gpu.launch(args_of(CopyKind::kGather, plan, piece, pinned.address() + shift),
             kernels::FlatMemory::kHost);
  gpu.synchronize();
  REQUIRE(std::equal(expected.begin(), expected.end(), pinned.data()));

  const Pools to(gpu, made, dice);
  const DevicePlan back(gpu, made.plan, to.addresses());
  REQUIRE(scatter(made.plan, to.bases(), piece.begin, piece.bytes, expected.data() + shift));
  const bool from_host = dice.one_in(2);
  gpu.launch(args_of(CopyKind::kScatter, back, piece,
                     (from_host ? pinned.address() : on_device.address()) + shift),
             from_host ? kernels::FlatMemory::kHost : kernels::FlatMemory::kDevice);
  REQUIRE(to.agree());

  REQUIRE(clear(made.plan, to.bases()));
  gpu.launch(args_of(CopyKind::kClear, back, {0, made.plan.bytes}, 0));
  REQUIRE(to.agree());
  REQUIRE(pools.agree());
}

void check_transfer(Gpu& gpu, const RandomPlan& from, const RandomPlan& to, Dice& dice) {
  const Pools source(gpu, from, dice);
  const Pools destination(gpu, to, dice);
  const DevicePlan source_plan(gpu, from.plan, source.addresses());
  const DevicePlan destination_plan(gpu, to.plan, destination.addresses());
  const Piece piece = random_piece(std::min(from.plan.bytes, to.plan.bytes), dice);
  REQUIRE(
      transfer(from.plan, source.bases(), to.plan, destination.bases(), piece.begin, piece.bytes));
  CopyArgs args = args_of(CopyKind::kTransfer, source_plan, piece, 0);
  args.other = destination_plan.view();
  gpu.launch(args);
  REQUIRE(destination.agree());
}

}  // namespace

TEST_CASE("the kernels do on random plans what the host's copies do") {
  // KVFERRY_SEED replays one, KVFERRY_SEEDS runs more or fewer of them.
  const char* one = std::getenv("KVFERRY_SEED");
  const char* many = std::getenv("KVFERRY_SEEDS");
  const uint64_t first = one != nullptr ? std::strtoull(one, nullptr, 10) : 1;
  const uint64_t last = one != nullptr    ? first
                        : many != nullptr ? std::strtoull(many, nullptr, 10)
                                          : 500;
  Gpu gpu;
  gpu.load_kernels();
  for (uint64_t seed = first; seed <= last; ++seed) {
    INFO("seed " << seed);
    Dice dice(seed * 7919);
    const RandomPlan plan = PlanMaker(seed).make();
    const RandomPlan other = PlanMaker(seed + 1'000'000).make();
    check_flat(gpu, plan, dice);
    check_transfer(gpu, plan, other, dice);
  }
}

}  // namespace kvferry::testing
