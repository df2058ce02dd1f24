// The two sides of an acceptance case: every rank's layout, block ids and memory, what their cells
// contain, and what a receiver's memory must be afterwards. Used in one process (run_case) and
// through real daemons (tests/proc).
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "daemon/mapping/legs.h"
#include "tests/unit/acceptance_support.h"

namespace kvferry::acceptance {

// What no cell contains.
inline constexpr std::byte kUntouched{0xEE};

// All of these throw std::runtime_error with what is wrong.
[[noreturn]] void wrong(const std::string& what);
void good(const Status& status, const std::string& what);
template <typename T>
T good(Result<T> result, const std::string& what) {
  if (!result) wrong(what + ": " + result.error().to_string());
  return std::move(*result);
}

struct Rank {
  mapping::RankLayout layout;
  std::vector<std::size_t> model;  // layout group -> model group
  std::vector<mapping::GroupBlocks> blocks;
  std::vector<std::span<std::byte>> memory;  // by pool, of layout.pools[i].bytes

  std::vector<std::byte*> bases() const;
};

bool is_state(const ModelGroup& group);

// Without memory.
std::vector<Rank> make_side(const SideSpec& side, std::mt19937_64& random);

// Writes every cell of the listed blocks.
void fill(const Rank& rank);
void clean(const Rank& rank);

// Who of a dp group has which units of a (layer, role).
struct Held {
  Range units;
  const mapping::Group* group = nullptr;
};
using Holders = std::map<std::pair<uint32_t, std::string>, std::vector<Held>>;
Holders holders_of(const std::vector<Rank>& ranks, uint32_t dp_group);

// A receiver's memory as it must be after the hand-off; counts the cells that have come.
std::vector<std::vector<std::byte>> expected_memory(const Case& of, const Rank& rank,
                                                    const Holders& holders, uint64_t& cells);
void compare(const Rank& rank, const std::vector<std::vector<std::byte>>& expected);

std::vector<SliceSpec> slices_of(const Case& of);
// What the receiver rank has already of its layout's group g.
uint64_t cached_of(const Case& of, const Rank& rank, std::size_t g);

}  // namespace kvferry::acceptance
