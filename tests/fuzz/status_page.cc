// A worker's reading of its status page, of any bytes: a daemon of another version, or a page that
// is written while it is read. The first byte says how many words are changed between two reads.
#include <cstring>
#include <memory>
#include <vector>

#include "proto/kvferry/control_page.h"
#include "tests/fuzz/input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  using namespace kvferry;
  using namespace kvferry::control_page;
  fuzz::Input in(data, size);
  const uint32_t changes = in.below(16);
  // A header that can be taken is unlikely to be met: by choice a good one, spoiled in a word.
  StatusHeader header{};
  header.magic = kMagic;
  header.version = kVersion;
  header.slot_count = 1 + in.below(4);
  header.ring_capacity = 1U << in.below(4);
  header.aux_bytes = 8 * in.below(4);
  header.slots_offset = kHeaderBytes;
  header.ring_offset = header.slots_offset + uint64_t{header.slot_count} * kSlotBytes;
  header.aux_offset = header.ring_offset + (uint64_t{header.ring_capacity} * 4 + 7) / 8 * 8;
  header.total_bytes = header.aux_offset + uint64_t{header.slot_count} * header.aux_bytes;
  std::vector<uint64_t> page(header.total_bytes / 8, 0);
  if (in.chance()) {
    const std::size_t at = in.below(sizeof header / 8) * 8;
    const uint64_t word = in.size();
    std::memcpy(reinterpret_cast<char*>(&header) + at, &word, sizeof word);
  }
  std::memcpy(page.data(), &header, sizeof header);
  const std::size_t first = in.chance() ? offsetof(StatusHeader, alive_ns) / 8 : kHeaderBytes / 8;

  StatusReader reader;
  if (!reader.open(std::as_bytes(std::span(page)))) return 0;
  FUZZ_CHECK(reader.slot_count() != 0 && reader.slot_count() <= kMaxSlots, "bounded");
  uint64_t tail = in.chance() ? 0 : in.size();
  for (uint32_t round = 0; round < 8; ++round) {
    for (uint32_t i = 0; i < changes; ++i) {
      const std::size_t at = first + in.byte() % (page.size() - first);
      page[at] = in.size();
    }
    uint32_t reported = 0;
    reader.take_changed(tail, [&](uint32_t slot) {
      FUZZ_CHECK(slot < reader.slot_count(), "only slots there are");
      ++reported;
    });
    FUZZ_CHECK(reported <= reader.ring_capacity(), "at most a ring of changes");
    FUZZ_CHECK(tail == reader.ring_head(), "the tail follows");
    for (uint32_t slot = 0; slot < std::min<uint32_t>(reader.slot_count(), 8); ++slot) {
      Record record;
      if (!reader.try_read(slot, record)) continue;
      if (record.aux_length > kMaxAuxBytes) {
        std::byte none[8];
        FUZZ_CHECK(!reader.read_aux(slot, record, none), "no aux is longer than its area");
        continue;
      }
      std::vector<std::byte> aux(record.aux_length);
      reader.read_aux(slot, record, aux);
    }
  }
  return 0;
}
