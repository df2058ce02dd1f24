// The ring between the main process and the rails process, also with a liar on the other side; the
// layout of the shared memory; the environment of the rails.
#include "daemon/rails/ring.h"

#include <catch2/catch.hpp>
#include <memory>
#include <thread>
#include <vector>

#include "daemon/rails/records.h"
#include "daemon/rails/ucx_environment.h"

namespace kvferry::rails {
namespace {

class RingFixture {
 public:
  explicit RingFixture(uint32_t capacity)
      : header_(std::make_unique<RingHeader>()), records_(capacity) {
    memory = {header_.get(), reinterpret_cast<std::byte*>(records_.data()), capacity};
  }
  RingMemory memory;

 private:
  std::unique_ptr<RingHeader> header_;
  std::vector<Record> records_;
};

Record numbered(uint64_t number) {
  Record record;
  record.token = number;
  record.bytes = ~number;
  return record;
}

TEST_CASE("A ring gives back what was put in, in order, and says when it is full or empty") {
  RingFixture ring(8);
  RingProducer<Record> producer(ring.memory);
  RingConsumer<Record> consumer(ring.memory);
  Record out;
  REQUIRE(consumer.pop(out) == RingState::kBlocked);
  for (uint64_t round = 0; round < 100; ++round) {
    for (uint64_t i = 0; i < 8; ++i)
      REQUIRE(producer.push(numbered(round * 8 + i)) == RingState::kOk);
    REQUIRE(producer.push(numbered(0)) == RingState::kBlocked);
    for (uint64_t i = 0; i < 8; ++i) {
      REQUIRE(consumer.pop(out) == RingState::kOk);
      REQUIRE(out.token == round * 8 + i);
      REQUIRE(out.bytes == ~(round * 8 + i));
    }
    REQUIRE(consumer.pop(out) == RingState::kBlocked);
  }
}

TEST_CASE("A consumer sees an impossible tail and takes nothing more") {
  RingFixture ring(8);
  RingProducer<Record> producer(ring.memory);
  RingConsumer<Record> consumer(ring.memory);
  Record out;
  REQUIRE(producer.push(numbered(1)) == RingState::kOk);
  REQUIRE(consumer.pop(out) == RingState::kOk);
  const uint64_t tail = GENERATE(as<uint64_t>{}, 0, 10, 1ULL << 40, ~0ULL);
  ring.memory.header->tail.store(tail);
  REQUIRE(consumer.pop(out) == RingState::kCorrupt);
  REQUIRE_FALSE(consumer.prepare_sleep());
  // For good, also when the index looks right again.
  ring.memory.header->tail.store(2);
  REQUIRE(consumer.pop(out) == RingState::kCorrupt);
}

TEST_CASE("A producer sees an impossible head and writes nothing more") {
  RingFixture ring(8);
  RingProducer<Record> producer(ring.memory);
  RingConsumer<Record> consumer(ring.memory);
  Record out;
  // One popped, eight in the ring: the head may be 1 to 9.
  for (uint64_t i = 0; i < 8; ++i) REQUIRE(producer.push(numbered(i)) == RingState::kOk);
  REQUIRE(consumer.pop(out) == RingState::kOk);
  REQUIRE(producer.push(numbered(8)) == RingState::kOk);
  const uint64_t head = GENERATE(as<uint64_t>{}, 0, 10, 1ULL << 40, ~0ULL);
  ring.memory.header->head.store(head);
  REQUIRE(producer.push(numbered(9)) == RingState::kCorrupt);
  ring.memory.header->head.store(1);
  REQUIRE(producer.push(numbered(9)) == RingState::kCorrupt);
}

TEST_CASE("A record changed after it was popped does not change the copy") {
  RingFixture ring(2);
  RingProducer<Record> producer(ring.memory);
  RingConsumer<Record> consumer(ring.memory);
  REQUIRE(producer.push(numbered(7)) == RingState::kOk);
  Record out;
  REQUIRE(consumer.pop(out) == RingState::kOk);
  std::fill_n(ring.memory.records, 2 * kRecordBytes, std::byte{0xFF});
  REQUIRE(out.token == 7);
}

TEST_CASE("A sleeping consumer is woken exactly once") {
  RingFixture ring(8);
  RingProducer<Record> producer(ring.memory);
  RingConsumer<Record> consumer(ring.memory);
  REQUIRE_FALSE(producer.take_wake());
  // Who sleeps for work is not woken for what only gives something back.
  REQUIRE(consumer.prepare_sleep(Wake::kWork));
  REQUIRE_FALSE(producer.take_wake(Wake::kAny));
  REQUIRE(producer.take_wake(Wake::kWork));
  REQUIRE_FALSE(producer.take_wake(Wake::kWork));
  REQUIRE(consumer.prepare_sleep(Wake::kAny));
  REQUIRE(producer.take_wake(Wake::kAny));
  REQUIRE_FALSE(producer.take_wake(Wake::kWork));
  REQUIRE(consumer.prepare_sleep());
  REQUIRE(producer.push(numbered(1)) == RingState::kOk);
  REQUIRE(producer.take_wake());
  REQUIRE_FALSE(producer.take_wake());
  // With something to read there is no sleep.
  REQUIRE_FALSE(consumer.prepare_sleep());
  REQUIRE_FALSE(producer.take_wake());
}

TEST_CASE("Two threads move a million records without loss, sleeping when there is nothing") {
  RingFixture ring(64);
  constexpr uint64_t kCount = 1'000'000;
  std::atomic<uint64_t> bell{0};
  std::thread writer([&] {
    RingProducer<Record> producer(ring.memory);
    for (uint64_t i = 0; i < kCount;) {
      if (producer.push(numbered(i)) == RingState::kOk)
        ++i;
      else
        std::this_thread::yield();
      if (producer.take_wake()) {
        bell.fetch_add(1);
        bell.notify_one();
      }
    }
  });
  RingConsumer<Record> consumer(ring.memory);
  Record out;
  uint64_t next = 0;
  bool right = true;
  while (next < kCount) {
    const uint64_t before = bell.load();
    if (consumer.pop(out) == RingState::kOk) {
      right = right && out.token == next && out.bytes == ~next;
      ++next;
    } else if (consumer.prepare_sleep()) {
      // A lost wake-up would stay here for ever, and the test's time limit would end it.
      bell.wait(before);
    }
  }
  writer.join();
  REQUIRE(right);
}

TEST_CASE("Slots and rings of the shared memory do not overlap and stay inside it") {
  Limits limits;
  limits.ring_records = 16;
  limits.outbound_small = 3;
  limits.outbound_large = 2;
  limits.inbound_small = 4;
  limits.inbound_large = 1;
  const auto layout = SharedLayout::make(limits, 3);
  REQUIRE(layout);
  std::vector<uint8_t> bytes(layout->total_bytes(), 0);
  auto* const base = reinterpret_cast<std::byte*>(bytes.data());
  const auto claim = [&](uint64_t offset, uint64_t count) {
    REQUIRE(offset + count <= bytes.size());
    for (uint64_t i = 0; i < count; ++i) REQUIRE(bytes[offset + i]++ == 0);
  };
  for (uint32_t rail = 0; rail < 3; ++rail) {
    const auto offset_of = [&](const void* at) {
      return static_cast<uint64_t>(static_cast<const std::byte*>(at) - base);
    };
    claim(offset_of(layout->counters(base, rail)), sizeof(RailCounters));
    for (const RingMemory ring :
         {layout->command_ring(base, rail), layout->event_ring(base, rail)}) {
      claim(offset_of(ring.header), sizeof(RingHeader));
      claim(offset_of(ring.records), 16 * kRecordBytes);
    }
  }
  const uint32_t slots = 3 + 2 + 3 * (4 + 1);
  for (uint32_t number = 0; number < slots; ++number) {
    const auto slot = layout->slot(number);
    REQUIRE(slot);
    REQUIRE(slot->inbound == (number >= 5));
    if (slot->inbound) REQUIRE(slot->rail == (number - 5) / 5);
    claim(slot->offset, slot->capacity);
  }
  REQUIRE_FALSE(layout->slot(slots));
  REQUIRE_FALSE(layout->slot(kNoSlot));
}

TEST_CASE("Counts that no shared memory can have are refused") {
  Limits limits;
  REQUIRE(SharedLayout::make(limits, kMaxRails));
  REQUIRE_FALSE(SharedLayout::make(limits, 0));
  REQUIRE_FALSE(SharedLayout::make(limits, kMaxRails + 1));
  limits.ring_records = 100;
  REQUIRE_FALSE(SharedLayout::make(limits, 1));
  limits = {};
  limits.inbound_large = 0;
  REQUIRE_FALSE(SharedLayout::make(limits, 1));
  limits = {};
  limits.outbound_small = UINT32_MAX;
  REQUIRE_FALSE(SharedLayout::make(limits, 1));
}

TEST_CASE("The rails' environment carries the daemon's promises and no override of them") {
  UcxSettings settings;
  settings.port_first = 100;
  settings.port_last = 200;
  settings.overrides = {{"UCX_TCP_SNDBUF", "1m"}, {"TCP_TX_SEG_SIZE", "64k"}};
  const auto lines = make_rails_environment(settings);
  REQUIRE(lines);
  const auto has = [&](const std::string& line) {
    return std::count(lines->begin(), lines->end(), line) == 1;
  };
  REQUIRE(has("UCX_PROTO_ENABLE=n"));
  REQUIRE(has("UCX_TCP_PORT_RANGE=100-200"));
  REQUIRE(has("UCX_TCP_SNDBUF=1m"));
  REQUIRE(has("UCX_TCP_TX_SEG_SIZE=64k"));
  for (const char* name :
       {"UCX_PROTO_ENABLE", "PROTO_ENABLE", "TLS", "UCX_NET_DEVICES", "TCP_PUT_ENABLE",
        "TCP_PREFER_DEFAULT", "TCP_PORT_RANGE", "HANDLE_ERRORS", "DEBUG_SIGNO",
        "MEM_MMAP_HOOK_MODE", "MODULE_DIR", "POSIX_ERROR_HANDLING", "POSIX_SEG_SIZE",
        "KEEPALIVE_INTERVAL", "LOG_FILE"}) {
    INFO(name);
    REQUIRE(check_ucx_overrides({{name, "y"}}).error().reason == "UCX_OVERRIDE_DENIED");
  }
  REQUIRE(check_ucx_overrides({{"tcp", "y"}}).error().reason == "UCX_OVERRIDE_INVALID");
  REQUIRE(check_ucx_overrides({{"A=B", "y"}}).error().reason == "UCX_OVERRIDE_INVALID");
  REQUIRE(check_ucx_overrides({{"A", "x\ny"}}).error().reason == "UCX_OVERRIDE_INVALID");
  // Whatever the daemon sets, but for the sizes of buffers.
  const auto own = make_rails_environment({});
  REQUIRE(own);
  for (const std::string& line : *own) {
    const std::string name = line.substr(0, line.find('='));
    INFO(name);
    if (name != "UCX_TCP_TX_SEG_SIZE" && name != "UCX_TCP_RX_SEG_SIZE")
      CHECK(check_ucx_overrides({{name, "y"}}).error().reason == "UCX_OVERRIDE_DENIED");
  }
  for (const char* promise : {"UCX_HANDLE_ERRORS=none", "UCX_DEBUG_SIGNO=0", "UCX_VFS_ENABLE=n"})
    CHECK(has(promise));
  settings.port_last = 50;
  REQUIRE(make_rails_environment(settings).error().reason == "PORT_RANGE_INVALID");
}

}  // namespace
}  // namespace kvferry::rails
