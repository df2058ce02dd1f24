// Whose blocks can be copied into whose, for reuse within a node.
#include "daemon/node/registered_layout.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "daemon/memory/host_pool.h"
#include "tests/unit/mapping_support.h"

namespace kvferry::node {
namespace {

using mapping::RankLayout;
using mapping::test::GroupSpec;

GroupSpec heads(Range units) {
  GroupSpec spec;
  spec.layers = {0, 1, 2, 3};
  spec.units_total = 8;
  spec.units = units;
  return spec;
}

std::shared_ptr<RegisteredLayout> registered(const std::vector<GroupSpec>& groups) {
  auto out = std::make_shared<RegisteredLayout>();
  out->layout.fingerprint = "model";
  for (const GroupSpec& spec : groups) mapping::test::add_group(out->layout, spec);
  out->holding = mapping::holding_of(out->layout);
  out->reuse_groups = reuse_groups_of(out->layout);
  return out;
}

bool serves(const GroupSpec& from, const GroupSpec& to) {
  const auto source = registered({from});
  const auto destination = registered({to});
  const bool answer = source->serves(0, *destination, 0);
  CHECK(source->serves(0, *destination, 0) == answer);  // as remembered
  return answer;
}

// A pool of its own, or one more of the same file.
std::shared_ptr<memory::HostPool> pool_of(int fd) {
  auto pool = memory::HostPool::import(UniqueFd(::dup(fd)), 4096);
  REQUIRE(pool);
  return std::move(*pool);
}
UniqueFd memory_of_worker() {
  UniqueFd fd(::memfd_create("worker", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(fd.get(), 4096) == 0);
  REQUIRE(::fallocate(fd.get(), 0, 0, 4096) == 0);
  REQUIRE(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK) == 0);
  return fd;
}

}  // namespace

TEST_CASE("Layouts share pages if some pool of both is of one file") {
  const UniqueFd one = memory_of_worker();
  const UniqueFd other = memory_of_worker();
  const auto a = registered({heads({0, 8})});
  const auto b = registered({heads({0, 8})});
  CHECK_FALSE(a->shares_pages(*b));
  a->pools = {pool_of(one.get())};
  b->pools = {pool_of(other.get())};
  CHECK_FALSE(a->shares_pages(*b));
  CHECK(a->shares_pages(*a));
  b->pools.push_back(pool_of(one.get()));
  CHECK(a->shares_pages(*b));
  CHECK(b->shares_pages(*a));
  // Of another kind of layout nothing is known.
  CHECK(a->shares_pages(engine::LayoutHandle{}));
}

TEST_CASE("A holder of more heads or layers serves one of fewer, not the other way round") {
  const GroupSpec all = heads({0, 8});
  const GroupSpec half = heads({4, 8});
  CHECK(serves(all, all));
  CHECK(serves(all, half));
  CHECK_FALSE(serves(half, all));
  CHECK_FALSE(serves(half, heads({0, 4})));
  GroupSpec stage = all;
  stage.layers = {2, 3};
  CHECK(serves(all, stage));
  CHECK_FALSE(serves(stage, all));
}

TEST_CASE("How the bytes lie does not matter, what they are does") {
  const GroupSpec all = heads({0, 8});
  GroupSpec other = all;
  other.memory = "|bltru";  // one pool, all of a block together
  other.padding = 512;
  other.block_count = 20;
  CHECK(serves(all, other));
  CHECK(serves(other, all));
  other.cell_bytes = 128;
  CHECK_FALSE(serves(all, other));
}

TEST_CASE("Blocks of other lengths have other hashes") {
  GroupSpec longer = heads({0, 8});
  longer.block = 32;
  CHECK_FALSE(serves(heads({0, 8}), longer));
  CHECK_FALSE(serves(longer, heads({0, 8})));
}

TEST_CASE("Optional planes are wanted too, as the sender might have brought them") {
  const GroupSpec plain = heads({0, 8});
  GroupSpec indexed = plain;
  indexed.roles = {"key", "value", "index"};
  indexed.optional = true;
  CHECK(serves(indexed, indexed));
  CHECK_FALSE(serves(plain, indexed));
}

TEST_CASE("Groups without hashed blocks of their own take no part") {
  GroupSpec dealt = heads({0, 8});
  dealt.cp_size = 2;
  dealt.interleave = 16;
  CHECK(registered({dealt})->reuse_groups.at(0).block_tokens == 0);
  CHECK_FALSE(serves(dealt, dealt));
  GroupSpec state = heads({0, 8});
  state.granularity = mapping::Granularity::kRequest;
  CHECK(registered({state})->reuse_groups.at(0).block_tokens == 0);
  CHECK_FALSE(serves(state, state));
  GroupSpec windowed = heads({0, 8});
  windowed.window = 48;
  windowed.blocks_per_id = 2;
  windowed.id_space = 3;
  const engine::ReuseGroup group = registered({windowed})->reuse_groups.at(0);
  CHECK(group.block_tokens == 32);
  CHECK(group.window == 48);
  CHECK(group.id_space == 3);
  // Of another kind of layout, or a group that is not there, nothing is known.
  CHECK_FALSE(registered({windowed})->serves(0, engine::LayoutHandle{}, 0));
  CHECK_FALSE(registered({windowed})->serves(1, *registered({windowed}), 0));
}

TEST_CASE("Blocks are found within one tenant, key, model and way to hash, and nowhere else") {
  ReuseDomain domain{"blue", 1000, {}, {}, "model", "sha256"};
  const auto other = [&](const auto& change) {
    ReuseDomain changed = domain;
    change(changed);
    return reuse_space_of(changed) != reuse_space_of(domain);
  };
  const auto check_parts = [&] {
    CHECK(other([](ReuseDomain& d) { d.tenant = "green"; }));
    CHECK(other([](ReuseDomain& d) { d.fingerprint = "model2"; }));
    CHECK(other([](ReuseDomain& d) { d.hash_scheme = "sha512"; }));
    CHECK(other([](ReuseDomain& d) { d.reuse_key.bytes[0] ^= 1; }));
    // What one part ends with is not what the next begins with.
    CHECK(other([](ReuseDomain& d) {
      d.fingerprint += "s";
      d.hash_scheme = d.hash_scheme.substr(1);
    }));
  };
  {
    INFO("without a key: the user");
    check_parts();
    CHECK(other([](ReuseDomain& d) { d.uid = 1001; }));
    CHECK(other([](ReuseDomain& d) { d.instance_key.bytes[0] = 7; }));
  }
  {
    INFO("with the instance's key: whoever runs it");
    domain.instance_key.bytes.fill(3);
    check_parts();
    CHECK(other([](ReuseDomain& d) { d.instance_key.bytes[15] ^= 1; }));
    CHECK_FALSE(other([](ReuseDomain& d) { d.uid = 1001; }));
    // The same key given by its own name is the same domain.
    CHECK_FALSE(other([](ReuseDomain& d) { std::swap(d.reuse_key, d.instance_key); }));
  }
  {
    INFO("with a key of its own: whatever the instance's is");
    domain.reuse_key.bytes.fill(4);
    check_parts();
    CHECK_FALSE(other([](ReuseDomain& d) { d.instance_key.bytes[15] ^= 1; }));
  }
}

}  // namespace kvferry::node
