#include "daemon/rpc/control_page.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cerrno>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace kvferry::rpc {
namespace {

namespace cp = control_page;

// The worker's view of a page: what it maps from the descriptors it is given.
struct WorkerView {
  explicit WorkerView(ControlPage& page)
      : ends(page.take_worker_ends()), bytes(page.status_bytes()) {
    data = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, ends.status_fd, 0);
    REQUIRE(data != MAP_FAILED);
    REQUIRE(reader.open({static_cast<const std::byte*>(data), bytes}));
  }
  ~WorkerView() { ::munmap(data, bytes); }

  ControlPage::WorkerEnds ends;
  std::size_t bytes;
  void* data = nullptr;
  cp::StatusReader reader;
};

std::unique_ptr<ControlPage> make_page(uint32_t slots = 8, uint32_t ring = 16,
                                       uint32_t aux_bytes = 64) {
  BootId boot;
  boot.bytes.fill(7);
  auto page = ControlPage::create({slots, ring, aux_bytes, 4, 4}, boot);
  REQUIRE(page);
  return std::move(*page);
}

cp::Record record_of(uint64_t handle, uint64_t bytes_done = 0) {
  cp::Record r;
  r.client_handle = handle;
  r.state = 1;
  r.role = 2;
  r.bytes_done = bytes_done;
  return r;
}

std::string read_aux(const cp::StatusReader& reader, uint32_t slot, const cp::Record& record) {
  std::string out(record.aux_length, '\0');
  REQUIRE(reader.read_aux(slot, record, std::as_writable_bytes(std::span(out))));
  return out;
}

}  // namespace

TEST_CASE("a record survives being encoded and decoded") {
  cp::Record r;
  r.client_handle = 0x1122334455667788;
  r.generation = 0x99aabbcc;
  r.flags = cp::kDestReleased | cp::kCompleted;
  r.state = 4;
  r.role = 2;
  r.delivery = 3;
  r.reason = 0xabcd;
  r.released_reason = 0x1234;
  r.slices = 1ULL << 40;
  r.bytes_done = 3;
  r.bytes_total = 5;
  r.aux_length = 65536;
  r.changed_ns = 77;
  CHECK(cp::decode(cp::encode(r)) == r);
}

TEST_CASE("what the daemon publishes is what the worker reads") {
  auto page = make_page();
  WorkerView worker(*page);
  page->publish(3, record_of(42, 1000));
  std::vector<uint32_t> changed;
  uint64_t tail = 0;
  REQUIRE(worker.reader.take_changed(tail, [&](uint32_t slot) { changed.push_back(slot); }));
  CHECK(changed == std::vector<uint32_t>{3});
  cp::Record r;
  REQUIRE(worker.reader.read(3, r));
  CHECK(r.client_handle == 42);
  CHECK(r.bytes_done == 1000);
  CHECK(r.generation == 1);
  CHECK(r.changed_ns != 0);
  page->free_slot(3);
  REQUIRE(worker.reader.read(3, r));
  CHECK(r.client_handle == 0);
  page->publish(3, record_of(43));
  REQUIRE(worker.reader.read(3, r));
  CHECK(r.generation == 2);
}

TEST_CASE("a slot out of range and a record without a handle change nothing") {
  auto page = make_page(4);
  WorkerView worker(*page);
  page->publish(4, record_of(1));
  page->publish(1, record_of(0));
  page->free_slot(99);
  CHECK(worker.reader.ring_head() == 0);
}

TEST_CASE("short aux lies in the page, long aux is told to be fetched") {
  auto page = make_page();
  WorkerView worker(*page);
  const auto small = std::make_shared<const std::string>("token 17, token 9");
  const auto large = std::make_shared<const std::string>(std::string(5000, 'x'));
  page->publish(0, record_of(1));
  cp::Record r;
  REQUIRE(worker.reader.read(0, r));
  CHECK((r.flags & cp::kAuxReady) == 0);
  page->publish(0, record_of(1), small);
  page->publish(1, record_of(2), large);
  REQUIRE(worker.reader.read(0, r));
  CHECK(r.flags == cp::kAuxReady);
  CHECK(read_aux(worker.reader, 0, r) == *small);
  // A later change of the record keeps the aux.
  page->publish(0, record_of(1, 5));
  REQUIRE(worker.reader.read(0, r));
  CHECK(read_aux(worker.reader, 0, r) == *small);
  cp::Record big;
  REQUIRE(worker.reader.read(1, big));
  CHECK(big.flags == (cp::kAuxReady | cp::kAuxByCall));
  std::string out(5000, '\0');
  CHECK_FALSE(worker.reader.read_aux(1, big, std::as_writable_bytes(std::span(out))));
  CHECK(page->aux_of(2) == large);
  page->free_slot(0);
  CHECK(page->aux_of(1) == nullptr);
  // The old record's aux is not read from a slot that has moved on.
  page->publish(0, record_of(9), std::make_shared<const std::string>("other"));
  CHECK_FALSE(worker.reader.read_aux(0, r, std::as_writable_bytes(std::span(out))));
}

TEST_CASE("an overflown ring is reported once and then read on") {
  auto page = make_page(8, 4);
  WorkerView worker(*page);
  uint64_t tail = 0;
  for (uint32_t i = 0; i < 5; ++i) page->publish(i, record_of(i + 1));
  int calls = 0;
  const auto count = [&](uint32_t) { ++calls; };
  CHECK_FALSE(worker.reader.take_changed(tail, count));
  CHECK(worker.reader.take_changed(tail, count));
  CHECK(calls == 0);
  page->publish(6, record_of(7));
  CHECK(worker.reader.take_changed(tail, count));
  CHECK(calls == 1);
}

TEST_CASE("the worker cannot write the status file in any way") {
  auto page = make_page();
  WorkerView worker(*page);
  const int fd = worker.ends.status_fd;
  CHECK(::mmap(nullptr, worker.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
  const char byte = 1;
  CHECK(::pwrite(fd, &byte, 1, 0) == -1);
  CHECK(::ftruncate(fd, 0) == -1);
  CHECK(::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) == -1);
  CHECK(::fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) == -1);
  CHECK(::mprotect(worker.data, worker.bytes, PROT_READ | PROT_WRITE) == -1);
}

TEST_CASE("words are read once each, and only inside their range") {
  auto page = make_page();
  WorkerView worker(*page);
  void* data = ::mmap(nullptr, page->words_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED,
                      worker.ends.words_fd, 0);
  REQUIRE(data != MAP_FAILED);
  auto* words = static_cast<uint64_t*>(data);
  cp::store<uint64_t>(&words[2], 99);
  CHECK(page->load_timeline(2) == 99U);
  CHECK_FALSE(page->load_timeline(4));
  CHECK(page->store_done(1, 5));
  CHECK(cp::load<uint64_t>(&words[5]) == 5);
  CHECK_FALSE(page->store_done(4, 5));
  CHECK(::ftruncate(worker.ends.words_fd, 0) == -1);
  ::munmap(data, page->words_bytes());
}

TEST_CASE("the doorbell rings for what a worker waits for, and for nothing else") {
  auto page = make_page();
  WorkerView worker(*page);
  const auto rung = [&] {
    int count = 0;
    char byte = 0;
    while (::recv(worker.ends.doorbell.get(), &byte, 1, MSG_DONTWAIT) == 1) ++count;
    return count;
  };
  cp::Record r;
  r.client_handle = 7;
  r.role = 2;
  r.state = 1;
  page->publish(0, r);
  r.state = 2;
  page->publish(0, r);
  r.bytes_done = 100;
  r.flags = cp::kMemoryInUse;
  page->publish(0, r);
  CHECK(rung() == 0);
  cp::Record seen;
  REQUIRE(worker.reader.read(0, seen));
  CHECK(seen.bytes_done == 100);  // shown all the same

  r.slices = 1;
  page->publish(0, r);
  CHECK(rung() == 1);
  page->publish(0, r);
  CHECK(rung() == 0);
  r.state = 4;
  page->publish(0, r);
  CHECK(rung() == 1);
  r.flags |= cp::kDestReleased;
  page->publish(0, r);
  CHECK(rung() == 1);
  r.flags &= ~uint32_t{cp::kMemoryInUse};
  page->publish(0, r);
  page->free_slot(0);
  CHECK(rung() == 0);

  // Another transfer in the slot has told nothing yet.
  r.client_handle = 8;
  r.role = 1;
  r.slices = 3;
  r.state = 1;
  r.flags = 0;
  page->publish(0, r);
  CHECK(rung() == 0);  // a sender's slices are no event
  r.flags = cp::kReceiverReady;
  page->publish(0, r);
  CHECK(rung() == 1);
  page->set_draining(true);
  CHECK(rung() == 1);
  r.client_handle = 9;
  r.state = 5;
  r.flags = cp::kSourceReleased;
  page->publish(0, r);
  CHECK(rung() == 1);
}

TEST_CASE("a full doorbell and a worker that is gone do not hold the daemon up") {
  auto page = make_page();
  {
    WorkerView worker(*page);
    for (int i = 0; i < 100000; ++i) page->ring_doorbell();
    char byte = 0;
    CHECK(::recv(worker.ends.doorbell.get(), &byte, 1, MSG_DONTWAIT) == 1);
  }
  page->publish(0, record_of(1));
}

TEST_CASE("a page that is not well formed is refused by the reader") {
  auto page = make_page();
  WorkerView worker(*page);
  std::vector<std::byte> copy(worker.bytes);
  std::memcpy(copy.data(), worker.data, worker.bytes);
  cp::StatusReader reader;
  REQUIRE(reader.open(copy));
  CHECK_FALSE(reader.open(std::span(copy).first(100)));
  CHECK_FALSE(reader.open(std::span(copy).first(copy.size() - 8)));
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i) {
    auto broken = copy;
    const std::size_t at = random() % offsetof(cp::StatusHeader, boot_id);
    broken[at] = static_cast<std::byte>(random());
    // Either refused, or such that all reading stays inside the mapping.
    if (!reader.open(broken)) continue;
    cp::Record r;
    for (uint32_t slot = 0; slot < reader.slot_count(); ++slot) {
      (void)reader.read(slot, r);
      std::vector<std::byte> out(r.aux_length);
      (void)reader.read_aux(slot, r, out);
    }
    uint64_t tail = 0;
    (void)reader.take_changed(tail, [](uint32_t) {});
  }
}

TEST_CASE("configurations out of range are refused") {
  CHECK_FALSE(ControlPage::create({0, 16, 64, 1, 1}, {}));
  CHECK_FALSE(ControlPage::create({8, 12, 64, 1, 1}, {}));
  CHECK_FALSE(ControlPage::create({8, 16, 63, 1, 1}, {}));
  CHECK_FALSE(ControlPage::create({8, 16, 64, 0, 0}, {}));
}

// The fields of every record are tied to each other, so a torn one shows.
TEST_CASE("a reader racing with the writer sees only whole records and misses no last state") {
  constexpr uint32_t kSlots = 8;
  auto page = make_page(kSlots, 16);
  WorkerView worker(*page);
  std::atomic<bool> done{false};
  std::vector<uint64_t> last(kSlots, 0);
  std::thread writer([&] {
    std::mt19937_64 random(42);
    std::vector<uint64_t> handles(kSlots, 0);
    uint64_t next_handle = 1;
    for (uint64_t i = 1; i <= 200000; ++i) {
      const auto slot = static_cast<uint32_t>(random() % kSlots);
      if (handles[slot] != 0 && random() % 16 == 0) {
        page->free_slot(slot);
        handles[slot] = 0;
        last[slot] = 0;
        continue;
      }
      if (handles[slot] == 0) handles[slot] = next_handle++;
      cp::Record r = record_of(handles[slot], i);
      r.slices = i ^ r.client_handle;
      r.bytes_total = i * 3 + r.client_handle;
      r.reason = static_cast<uint16_t>(i);
      std::shared_ptr<const std::string> aux;
      if (random() % 4 == 0)
        aux = std::make_shared<const std::string>(
            std::string(40, static_cast<char>('a' + r.client_handle % 26)));
      page->publish(slot, r, aux);
      last[slot] = i;
    }
    done.store(true);
  });

  std::vector<cp::Record> seen(kSlots);
  std::size_t torn = 0, unread = 0, backwards = 0, bad_aux = 0, overflows = 0;
  const auto look = [&](uint32_t slot) {
    cp::Record r;
    // The writer was stopped in the middle; it notes the change again once it has finished.
    if (!worker.reader.read(slot, r)) {
      ++unread;
      return;
    }
    if (r.client_handle != 0) {
      if (r.slices != (r.bytes_done ^ r.client_handle) ||
          r.bytes_total != r.bytes_done * 3 + r.client_handle ||
          r.reason != static_cast<uint16_t>(r.bytes_done))
        ++torn;
      if (r.client_handle < seen[slot].client_handle ||
          (r.client_handle == seen[slot].client_handle && r.bytes_done < seen[slot].bytes_done))
        ++backwards;
      std::string aux(r.aux_length, '\0');
      if ((r.flags & cp::kAuxReady) != 0 &&
          worker.reader.read_aux(slot, r, std::as_writable_bytes(std::span(aux))) &&
          aux != std::string(40, static_cast<char>('a' + r.client_handle % 26)))
        ++bad_aux;
      seen[slot] = r;
    } else {
      const uint64_t handle = seen[slot].client_handle;
      seen[slot] = {};
      seen[slot].client_handle = handle;
    }
  };
  uint64_t tail = 0;
  const auto take = [&] {
    if (worker.reader.take_changed(tail, look)) return;
    ++overflows;
    for (uint32_t slot = 0; slot < kSlots; ++slot) look(slot);
  };
  while (!done.load()) take();
  writer.join();
  take();
  CHECK(torn == 0);
  CHECK(backwards == 0);
  CHECK(bad_aux == 0);
  for (uint32_t slot = 0; slot < kSlots; ++slot) CHECK(seen[slot].bytes_done == last[slot]);
  INFO("unread " << unread);
  INFO("overflows " << overflows);
}

}  // namespace kvferry::rpc
