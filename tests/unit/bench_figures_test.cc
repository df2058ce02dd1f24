// What kvferry-bench rests on without a daemon: percentiles, fairness, plots, the limits' copies,
// and that its comparison of bytes sees every kind of wrong byte.
#include <catch2/catch.hpp>
#include <cstring>
#include <vector>

#include "client/bench/limits.h"
#include "client/bench/plot.h"
#include "client/bench/samples.h"
#include "client/bench/shapes.h"

namespace kvferry::bench {

TEST_CASE("percentiles are values that were measured") {
  Samples samples;
  CHECK(samples.median() == 0);
  for (int i = 100; i >= 1; --i) samples.add(i);
  CHECK(samples.percentile(0.5) == 50);
  CHECK(samples.percentile(0.9) == 90);
  CHECK(samples.percentile(0.99) == 99);
  CHECK(samples.percentile(0) == 1);
  CHECK(samples.max() == 100);
  CHECK(samples.mean() == 50.5);
  Samples few;
  few.add(3);
  few.add(1);
  few.add(2);
  CHECK(few.median() == 2);
  CHECK(few.percentile(0.99) == 3);
}

TEST_CASE("Jain's index is 1 for equal shares and 1/n for one that takes all") {
  CHECK(fairness({2, 2, 2, 2}) == Approx(1));
  CHECK(fairness({8, 0, 0, 0}) == Approx(0.25));
  CHECK(fairness({1, 3}) == Approx(0.8));
}

TEST_CASE("a plot places points by their logarithms and leaves out what has none") {
  Plot plot;
  plot.title = "a < b & c";
  plot.x_in_powers_of_two = true;
  plot.lines = {{"first", {{1024, 1}, {2048, 10}, {4096, 100}}}, {"second", {{1024, 0}}}};
  const std::string svg = to_svg(plot);
  CHECK(svg.find("a &lt; b &amp; c") != std::string::npos);
  CHECK(svg.find(">2 Ki<") != std::string::npos);
  CHECK(svg.find(">first<") != std::string::npos);
  CHECK(svg.find(">second<") == std::string::npos);
  // The ends and the middle of both axes.
  CHECK(svg.find("M80.0 450.0L375.0 260.0L670.0 70.0") != std::string::npos);
  CHECK(binary_text(512) == "512");
  CHECK(binary_text(3 * 1024 * 1024) == "3 Mi");
}

TEST_CASE("the limits move every fragment to its place, also when pieces cut fragments") {
  const uint64_t fragment = GENERATE(uint64_t{8}, uint64_t{4096}, RawSocket::kPieceBytes / 2 * 3);
  const uint64_t count = RawSocket::kPieceBytes * 2 / fragment + 3;
  std::vector<std::byte> from(count * fragment);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i * 31 + i / 255);
  std::vector<std::byte> to(from.size());
  Places places;
  places.from = from.data();
  places.to = to.data();
  places.fragment_bytes = fragment;
  for (uint64_t i = 0; i < count; ++i) {
    places.source.push_back(i * fragment);
    places.destination.push_back((count - 1 - i) * fragment);
  }
  const bool by_socket = GENERATE(false, true);
  if (by_socket) {
    auto socket = RawSocket::make();
    REQUIRE(socket);
    REQUIRE((*socket)->stream(1000));  // what is left over must not come later
    const auto seconds = (*socket)->scattered(places);
    REQUIRE(seconds);
    CHECK(*seconds > 0);
  } else {
    CHECK(scattered_memcpy(places) > 0);
  }
  bool right = true;
  for (uint64_t i = 0; i < count; ++i)
    right = right && std::memcmp(to.data() + places.destination[i], from.data() + places.source[i],
                                 fragment) == 0;
  CHECK(right);
}

namespace {

struct Memory {
  RankMemory memory;
  std::vector<std::byte> pool;
};

Memory memory_of(const Shape& shape, const std::string& topology, uint32_t rank) {
  auto made = rank_memory(shape, *parse_topology(topology), rank, 1.5, 7);
  REQUIRE(made);
  Memory out{std::move(*made), {}};
  out.pool.resize(out.memory.pool_bytes);
  fill_untouched(out.pool.size(), out.pool.data());
  return out;
}

}  // namespace

TEST_CASE("each byte of a pool is compared: changing any one is noticed") {
  const std::string model =
      GENERATE("llama-3-8b", "gpt-oss-120b", "minimax-m3-like", "deepseek-r1");
  CAPTURE(model);
  Shape shape = *model_shape(model, 160);  // whole blocks, as bytes past a prompt mean nothing
  shape.layers = 2;
  shape.head_bytes = 20;  // not whole words
  if (shape.index_bytes != 0) shape.index_bytes = 12;
  Memory of = memory_of(shape, "tp2", 1);
  const RequestCells request{of.memory.block_ids, 160, 5};
  // What a receiver would hold: needed blocks with their cells, the others untouched.
  Memory full = memory_of(shape, "tp2", 1);
  fill_request(full.memory, request, full.pool.data());
  uint64_t needed = 0;
  for (const client::Group& group : of.memory.layout.groups) {
    const client::TokenRange range = needed_tokens(group, 160);
    for (const client::Plane& plane : group.planes) {
      for (uint64_t token = range.begin; token < range.end; ++token) {
        for (uint32_t unit = 0; unit < plane.unit_count; ++unit) {
          const uint64_t at =
              plane.offset +
              static_cast<uint64_t>(of.memory.block_ids[token / group.tokens_per_block]) *
                  plane.block_stride +
              unit * plane.unit_stride + token % group.tokens_per_block * plane.token_stride;
          std::memcpy(of.pool.data() + at, full.pool.data() + at, plane.cell_bytes);
          needed += plane.cell_bytes;
        }
      }
    }
  }
  CHECK(request_bytes(of.memory.layout, 160) == needed);
  const Verdict right = verify_requests(of.memory, {&request, 1}, of.pool.data());
  CHECK(right.ok());
  CHECK(right.cell_bytes == needed);
  CHECK(right.cell_bytes + right.outside_bytes == of.pool.size());
  uint64_t missed = 0;
  for (std::size_t at = 0; at < of.pool.size(); at += at % 97 + 1) {
    of.pool[at] ^= std::byte{0x10};
    missed += verify_requests(of.memory, {&request, 1}, of.pool.data()).ok() ? 1U : 0U;
    of.pool[at] ^= std::byte{0x10};
  }
  CHECK(missed == 0);
}

TEST_CASE("another request's bytes in the right place are wrong bytes") {
  Shape shape = fragment_shape(4, 64);
  Memory of = memory_of(shape, "tp1", 0);
  const RequestCells mine{std::span(of.memory.block_ids).first(2), 2, 1};
  const RequestCells other{std::span(of.memory.block_ids).first(2), 2, 2};
  fill_request(of.memory, other, of.pool.data());
  CHECK(verify_requests(of.memory, {&mine, 1}, of.pool.data()).wrong_bytes == 2 * 64);
  CHECK(verify_requests(of.memory, {&other, 1}, of.pool.data()).ok());
  CHECK(verify_requests(of.memory, {}, of.pool.data()).wrong_bytes == 2 * 64);
}

TEST_CASE("topologies are read as engines write them") {
  CHECK(parse_topology("tp2pp3")->ranks() == 6);
  CHECK(parse_topology("tep8")->tp == 8);
  CHECK_FALSE(parse_topology("tep8")->attention_dp);
  const Topology dep = *parse_topology("dep4");
  CHECK(dep.attention_dp);
  CHECK(dep.dp_groups() == 4);
  CHECK(dep.dp_group_of(3) == 3);
  CHECK(dep.name() == "dep4");
  CHECK(parse_topology("tp4")->dp_groups() == 1);
  for (const char* bad : {"", "tp", "tp0", "ep4", "tp65", "tp4x", "2"}) {
    CAPTURE(bad);
    CHECK_FALSE(parse_topology(bad));
  }
}

}  // namespace kvferry::bench
