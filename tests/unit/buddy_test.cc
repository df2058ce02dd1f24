#include "daemon/memory/buddy.h"

#include <rapidcheck.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <csignal>
#include <map>

#include "daemon/base/units.h"

namespace kvferry::memory {
namespace {

constexpr uint64_t kMin = 64;

// Whether `body` ends the process with SIGABRT.
template <typename Body>
bool dies(Body body) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::signal(SIGABRT, SIG_DFL);
    ::close(STDERR_FILENO);
    body();
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

TEST_CASE("a region is rounded up to a power of two and aligned to its size") {
  BuddyAllocator buddy({1 << 20}, kMin);
  const auto small = buddy.allocate(1);
  REQUIRE(small == Region{0, 0, kMin});
  const auto odd = buddy.allocate(65);
  REQUIRE(odd == Region{0, 128, 128});
  REQUIRE(buddy.allocate(0) == Region{0, 64, kMin});
  REQUIRE(buddy.used_bytes() == 256);
  REQUIRE(buddy.free_bytes() == (1 << 20) - 256);
  REQUIRE(buddy.region_count() == 3);
  REQUIRE(buddy.block_bytes(65) == 128);
  REQUIRE(buddy.block_bytes(~uint64_t{0}) == 0);
}

TEST_CASE("the smallest block that fits is taken, the lowest address first") {
  BuddyAllocator buddy({256, 1024}, kMin);
  const auto a = buddy.allocate(128);
  const auto b = buddy.allocate(64);
  REQUIRE(a == Region{0, 0, 128});
  REQUIRE(b == Region{0, 128, 64});
  buddy.free(*a);
  // 64 bytes are left whole at (0, 192); the larger hole at 0 stays whole.
  REQUIRE(buddy.allocate(64) == Region{0, 192, 64});
  REQUIRE(buddy.allocate(512) == Region{1, 0, 512});
}

TEST_CASE("a segment that is no power of two is used up to its last whole block") {
  BuddyAllocator buddy({7 * kMin + 13}, kMin);
  REQUIRE(buddy.capacity_bytes() == 7 * kMin);
  REQUIRE(buddy.largest_free_bytes() == 4 * kMin);
  REQUIRE(buddy.largest_block_bytes() == 4 * kMin);
  REQUIRE(buddy.count_fitting_when_empty(kMin) == 7);
  REQUIRE(buddy.count_fitting_when_empty(2 * kMin) == 3);
  REQUIRE(buddy.count_fitting_when_empty(8 * kMin) == 0);
  REQUIRE_FALSE(buddy.can_allocate(4 * kMin + 1));
  std::vector<Region> regions;
  while (auto region = buddy.allocate(kMin)) regions.push_back(*region);
  REQUIRE(regions.size() == 7);
  REQUIRE(buddy.largest_free_bytes() == 0);
  buddy.verify();
  for (const Region& region : regions) buddy.free(region);
  buddy.verify();
  REQUIRE(buddy.largest_free_bytes() == 4 * kMin);
}

TEST_CASE("an arena of terabytes costs no more than its blocks") {
  BuddyAllocator buddy({uint64_t{1} << 44, uint64_t{1} << 44}, 1 << 16);
  REQUIRE(buddy.count_fitting(uint64_t{1} << 20) == uint64_t{1} << 25);
  const auto region = buddy.allocate(1 << 16);
  REQUIRE(region.has_value());
  REQUIRE(buddy.largest_free_bytes() == uint64_t{1} << 44);
  buddy.free(*region);
  REQUIRE(buddy.used_bytes() == 0);
}

TEST_CASE("an arena without usable segments gives nothing") {
  BuddyAllocator none({}, kMin);
  BuddyAllocator tiny({kMin - 1, 0}, kMin);
  for (const BuddyAllocator* buddy : {&none, &tiny}) {
    REQUIRE_FALSE(buddy->can_allocate(1));
    REQUIRE(buddy->capacity_bytes() == 0);
    REQUIRE(buddy->largest_block_bytes() == 0);
    buddy->verify();
  }
  REQUIRE_FALSE(none.allocate(1).has_value());
}

TEST_CASE("freeing what is not allocated exactly so ends the process") {
  BuddyAllocator buddy({1024}, kMin);
  const Region region = *buddy.allocate(128);
  REQUIRE(dies([&] { buddy.free({0, 512, 128}); }));
  REQUIRE(dies([&] { buddy.free({1, region.offset, 128}); }));
  REQUIRE(dies([&] { buddy.free({0, region.offset, 64}); }));
  REQUIRE(dies([&] {
    buddy.free(region);
    buddy.free(region);
  }));
  REQUIRE_FALSE(dies([&] { buddy.free(region); }));
  REQUIRE(dies([] { BuddyAllocator odd({1024}, 96); }));
}

// A model that knows of each minimum block only whether it is taken, and searches.
class Model {
 public:
  explicit Model(const std::vector<uint64_t>& segments) {
    for (const uint64_t bytes : segments) taken_.emplace_back(bytes / kMin, false);
  }
  bool fits(uint64_t block) const { return count(block) > 0; }
  // Aligned places of `block` bytes that are free and lie inside their segment.
  uint64_t count(uint64_t block) const {
    uint64_t places = 0;
    for (const auto& segment : taken_)
      for (uint64_t at = 0; (at + 1) * block <= segment.size() * kMin; ++at)
        if (std::none_of(segment.begin() + offset(at * block),
                         segment.begin() + offset((at + 1) * block), [](bool b) { return b; }))
          ++places;
    return places;
  }
  bool is_free(const Region& region) const { return all(region, false); }
  bool is_taken(const Region& region) const { return all(region, true); }
  void set(const Region& region, bool value) {
    auto& segment = taken_[region.segment];
    std::fill(segment.begin() + offset(region.offset),
              segment.begin() + offset(region.offset + region.bytes), value);
  }

 private:
  static std::ptrdiff_t offset(uint64_t bytes) { return static_cast<std::ptrdiff_t>(bytes / kMin); }
  bool all(const Region& region, bool value) const {
    if (region.segment >= taken_.size()) return false;
    const auto& segment = taken_[region.segment];
    if (region.offset + region.bytes > segment.size() * kMin) return false;
    return std::all_of(segment.begin() + offset(region.offset),
                       segment.begin() + offset(region.offset + region.bytes),
                       [value](bool b) { return b == value; });
  }
  std::vector<std::vector<bool>> taken_;
};

void random_calls() {
  const auto count = *rc::gen::inRange<std::size_t>(1, 5);
  const auto blocks =
      *rc::gen::container<std::vector<uint64_t>>(count, rc::gen::inRange<uint64_t>(0, 70));
  std::vector<uint64_t> segments;
  for (const uint64_t n : blocks) segments.push_back(n * kMin);
  BuddyAllocator buddy(segments, kMin);
  BuddyAllocator twin(segments, kMin);
  Model model(segments);
  std::vector<Region> live;
  uint64_t used = 0;
  const auto steps = *rc::gen::container<std::vector<std::pair<uint32_t, uint32_t>>>(
      rc::gen::pair(rc::gen::inRange<uint32_t>(0, 5), rc::gen::inRange<uint32_t>(0, 3000)));
  for (const auto& [kind, number] : steps) {
    if (kind >= 2) {
      const uint64_t block = std::max(kMin, std::bit_ceil(uint64_t{number}));
      RC_ASSERT(buddy.block_bytes(number) == block);
      RC_ASSERT(buddy.can_allocate(number) == model.fits(block));
      RC_ASSERT(buddy.count_fitting(number) == model.count(block));
      const auto region = buddy.allocate(number);
      RC_ASSERT(region == twin.allocate(number));
      RC_ASSERT(region.has_value() == model.fits(block));
      if (!region) continue;
      RC_ASSERT(region->bytes == block);
      RC_ASSERT(region->offset % block == 0);
      RC_ASSERT(model.is_free(*region));
      model.set(*region, true);
      live.push_back(*region);
      used += block;
    } else if (!live.empty()) {
      const std::size_t which = number % live.size();
      const Region region = live[which];
      RC_ASSERT(buddy.is_allocated(region));
      RC_ASSERT(model.is_taken(region));
      buddy.free(region);
      twin.free(region);
      RC_ASSERT(!buddy.is_allocated(region));
      model.set(region, false);
      live[which] = live.back();
      live.pop_back();
      used -= region.bytes;
    }
    RC_ASSERT(buddy.used_bytes() == used);
    RC_ASSERT(buddy.region_count() == live.size());
    buddy.verify();
  }
  for (const Region& region : live) buddy.free(region);
  buddy.verify();
  RC_ASSERT(buddy.used_bytes() == 0U);
  RC_ASSERT(buddy.largest_free_bytes() == buddy.largest_block_bytes());
  RC_ASSERT(buddy.count_fitting(kMin) == buddy.count_fitting_when_empty(kMin));
}

TEST_CASE("any sequence of calls agrees with a model and joins to an empty arena again") {
  REQUIRE(rc::check(random_calls));
}

}  // namespace
}  // namespace kvferry::memory
