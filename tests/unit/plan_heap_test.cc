// What a transfer of 131,072 fragments may cost in memory: on the heap, kept and in passing.
#include <catch2/catch.hpp>
#include <optional>

#include "tests/bench/large_transfer.h"
#include "tests/unit/heap_count.h"

using namespace kvferry;
using namespace kvferry::mapping::test;

TEST_CASE("streams and plans of 131,072 fragments take less than a mebibyte, while compiling too") {
  const LargeTransfer transfer;
  const uint64_t before = heap_bytes;
  heap_peak = heap_bytes;
  // Both daemons' share, as if they were one. The legs, which the first stream works out and the
  // table keeps, are counted with it.
  std::optional<mapping::Stream> stream = transfer.stream();
  const mapping::Plan source = transfer.source(*stream);
  const mapping::Plan destination = transfer.destination(*stream);
  const uint64_t kept = heap_bytes - before;
  const uint64_t peak = heap_peak - before;
  stream.reset();
  const uint64_t plans = heap_bytes - before;
  REQUIRE(mapping::fragment_count(source, destination) == LargeTransfer::kFragments);
  INFO("plans " << plans << ", with the stream " << kept << ", at most " << peak);
  CHECK(peak >= kept);
  CHECK(plans > LargeTransfer::kBlocks * 2 * sizeof(uint32_t));  // the count counts
  CHECK(peak < (1U << 20));
}

TEST_CASE("walking the plans of 131,072 fragments allocates nothing") {
  const LargeTransfer transfer;
  const mapping::Stream stream = transfer.stream();
  const mapping::Plan source = transfer.source(stream);
  const mapping::Plan destination = transfer.destination(stream);
  const uint64_t before = allocations;
  const uint64_t fragments = mapping::fragment_count(source, destination);
  const uint64_t made = allocations - before;
  CHECK(fragments == LargeTransfer::kFragments);
  CHECK(made == 0);
}
