#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cerrno>
#include <cstring>
#include <future>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "daemon/copy/copy_pool.h"
#include "daemon/memory/host_pool.h"
#include "daemon/memory/shared_memory.h"
#include "tests/unit/cpus.h"

namespace kvferry::copy {
namespace {

constexpr Duration kGenerous = std::chrono::seconds(60);
constexpr uint64_t kGranule = 64 * 1024;

Time soon() {
  return monotonic_now() + kGenerous;
}

// A job's outcome, to be waited for.
struct Ending {
  std::promise<Outcome> promise;
  std::future<Outcome> future = promise.get_future();
  std::function<void(Outcome)> callback() {
    return [this](Outcome outcome) { promise.set_value(outcome); };
  }
  Outcome get() {
    REQUIRE(future.wait_for(kGenerous) == std::future_status::ready);
    return future.get();
  }
};

// A door that copies wait at, so that a test knows where they are.
class Door {
 public:
  void pass() {
    ++waiting_;
    waiting_.notify_all();
    open_.wait(false);
  }
  void wait_for(int count) {
    for (int seen = waiting_; seen < count; seen = waiting_) waiting_.wait(seen);
  }
  void open() {
    open_ = true;
    open_.notify_all();
  }

 private:
  std::atomic<int> waiting_{0};
  std::atomic<bool> open_{false};
};

TEST_CASE("a large job is cut at 64 KiB borders and copied once, byte for byte") {
  const uint64_t bytes = 5 * 1024 * 1024 + 4321;
  std::vector<uint8_t> from(bytes);
  std::vector<uint8_t> to(bytes);
  std::mt19937 random(1);
  for (uint8_t& byte : from) byte = static_cast<uint8_t>(random());
  std::mutex mutex;
  std::vector<Range> pieces;
  Ending ending;
  CopyPool pool({.threads = 3, .piece_bytes = kGranule + 1});
  REQUIRE(pool.submit({.bytes = bytes,
                       .prepare = {},
                       .copy =
                           [&](uint64_t begin, uint64_t end) {
                             std::memcpy(&to[begin], &from[begin], end - begin);
                             const std::lock_guard lock(mutex);
                             pieces.push_back({begin, end});
                             return true;
                           },
                       .done = ending.callback(),
                       .pools = {}}));
  REQUIRE(ending.get() == Outcome::kOk);
  REQUIRE(to == from);
  std::sort(pieces.begin(), pieces.end());
  uint64_t next = 0;
  for (const Range& piece : pieces) {
    REQUIRE(piece.begin == next);
    REQUIRE(piece.begin % kGranule == 0);
    REQUIRE(piece.size() <= 2 * kGranule);
    next = piece.end;
  }
  REQUIRE(next == bytes);
  REQUIRE(pool.close(soon()).has_value());
  REQUIRE(pool.stats().jobs == 1);
  REQUIRE(pool.stats().bytes == bytes);
  REQUIRE(pool.stats().outstanding == 0);
  REQUIRE(pool.stats().busy_ns > 0);
}

TEST_CASE("all threads take part in one large job") {
  Door door;
  Ending ending;
  CopyPool pool({.threads = 3, .piece_bytes = kGranule});
  REQUIRE(pool.submit({.bytes = 3 * kGranule,
                       .prepare = {},
                       .copy =
                           [&](uint64_t, uint64_t) {
                             door.pass();
                             return true;
                           },
                       .done = ending.callback(),
                       .pools = {}}));
  door.wait_for(3);
  door.open();
  REQUIRE(ending.get() == Outcome::kOk);
}

TEST_CASE("threads keep to their processors, and work where they cannot") {
  const CpuSet own = usable_cpus(0);
  std::vector<CpuSet> one_each;
  for (std::size_t cpu = 0; cpu < own.size() && one_each.size() < 2; ++cpu)
    if (own.test(cpu)) one_each.emplace_back().set(cpu);
  REQUIRE_FALSE(one_each.empty());
  // All threads of a pool look at once what they may use.
  const auto seen = [](CopyPool& pool) {
    std::mutex mutex;
    std::vector<CpuSet> sets;
    Door door;
    Ending ending;
    REQUIRE(pool.submit({.bytes = pool.threads() * kGranule,
                         .prepare = {},
                         .copy =
                             [&](uint64_t, uint64_t) {
                               const CpuSet cpus = usable_cpus(0);
                               {
                                 const std::lock_guard lock(mutex);
                                 sets.push_back(cpus);
                               }
                               door.pass();
                               return true;
                             },
                         .done = ending.callback(),
                         .pools = {}}));
    door.wait_for(static_cast<int>(pool.threads()));
    door.open();
    REQUIRE(ending.get() == Outcome::kOk);
    return sets;
  };
  {
    CopyPool pool({.threads = 4, .piece_bytes = kGranule, .cpus = one_each});
    CHECK(pool.binding_errno() == 0);
    const std::vector<CpuSet> sets = seen(pool);
    for (const CpuSet& cpus : one_each)
      CHECK(static_cast<std::size_t>(std::count(sets.begin(), sets.end(), cpus)) ==
            4 / one_each.size());
  }
  // No processor that this machine has.
  CpuSet none;
  none.set(none.size() - 1);
  if ((own & none).any()) return;
  CopyPool pool({.threads = 2, .piece_bytes = kGranule, .cpus = {none}});
  CHECK(pool.binding_errno() == EINVAL);
  CHECK(seen(pool).size() == 2);
}

TEST_CASE("jobs begin in the order of their submission, and a callback may submit") {
  std::vector<int> order;
  Ending last;
  CopyPool pool({.threads = 1});
  std::function<void(int)> next = [&](int i) {
    const Status taken = pool.submit({.bytes = 1,
                                      .prepare = {},
                                      .copy =
                                          [&order, i](uint64_t, uint64_t) {
                                            order.push_back(i);
                                            return true;
                                          },
                                      .done =
                                          [&, i](Outcome outcome) {
                                            if (i < 3)
                                              next(i + 1);
                                            else
                                              last.promise.set_value(outcome);
                                          },
                                      .pools = {}});
    if (!taken) last.promise.set_value(Outcome::kFailed);
  };
  next(0);
  REQUIRE(last.get() == Outcome::kOk);
  REQUIRE(order == std::vector<int>{0, 1, 2, 3});
}

TEST_CASE("an empty job ends well without a copy") {
  Ending ending;
  CopyPool pool;
  REQUIRE(
      pool.submit({.bytes = 0, .prepare = {}, .copy = {}, .done = ending.callback(), .pools = {}}));
  REQUIRE(ending.get() == Outcome::kOk);
}

TEST_CASE("the preparation runs once and before any copy, and may refuse") {
  std::atomic<int> prepared{0};
  std::atomic<int> early{0};
  std::atomic<int> copies{0};
  const auto job = [&](Ending& ending, bool good, uint64_t bytes) {
    return Job{.bytes = bytes,
               .prepare =
                   [&, good] {
                     ++prepared;
                     return good;
                   },
               .copy =
                   [&](uint64_t, uint64_t) {
                     if (prepared == 0) ++early;
                     ++copies;
                     return true;
                   },
               .done = ending.callback(),
               .pools = {}};
  };
  CopyPool pool({.threads = 4, .piece_bytes = kGranule});
  Ending good;
  REQUIRE(pool.submit(job(good, true, 8 * kGranule)));
  REQUIRE(good.get() == Outcome::kOk);
  REQUIRE(prepared == 1);
  REQUIRE(early == 0);
  REQUIRE(copies == 8);
  Ending bad;
  REQUIRE(pool.submit(job(bad, false, 8 * kGranule)));
  REQUIRE(bad.get() == Outcome::kFailed);
  REQUIRE(copies == 8);
  Ending empty;
  REQUIRE(pool.submit(job(empty, true, 0)));
  REQUIRE(empty.get() == Outcome::kOk);
  REQUIRE(prepared == 3);
}

TEST_CASE("while one job is prepared the next one goes on") {
  Door door;
  Ending slow;
  Ending fast;
  CopyPool pool({.threads = 2});
  REQUIRE(pool.submit({.bytes = 1,
                       .prepare =
                           [&] {
                             door.pass();
                             return true;
                           },
                       .copy = [](uint64_t, uint64_t) { return true; },
                       .done = slow.callback(),
                       .pools = {}}));
  door.wait_for(1);
  REQUIRE(pool.submit({.bytes = 1,
                       .prepare = {},
                       .copy = [](uint64_t, uint64_t) { return true; },
                       .done = fast.callback(),
                       .pools = {}}));
  REQUIRE(fast.get() == Outcome::kOk);
  door.open();
  REQUIRE(slow.get() == Outcome::kOk);
}

TEST_CASE("a job that fails leaves out the pieces that have not begun and ends once") {
  std::atomic<int> copies{0};
  Ending ending;
  CopyPool pool({.threads = 1, .piece_bytes = kGranule});
  REQUIRE(pool.submit({.bytes = 100 * kGranule,
                       .prepare = {},
                       .copy = [&](uint64_t, uint64_t) { return ++copies < 3; },
                       .done = ending.callback(),
                       .pools = {}}));
  REQUIRE(ending.get() == Outcome::kFailed);
  REQUIRE(copies == 3);
  REQUIRE(pool.close(soon()).has_value());
  REQUIRE(pool.stats().failed == 1);
}

TEST_CASE("more jobs than allowed are refused, and none after the pool is closed") {
  Door door;
  Ending first;
  const auto waits = [&](uint64_t, uint64_t) {
    door.pass();
    return true;
  };
  CopyPool pool({.threads = 1, .max_jobs = 1});
  REQUIRE(pool.submit(
      {.bytes = 1, .prepare = {}, .copy = waits, .done = first.callback(), .pools = {}}));
  const Job another{.bytes = 1, .prepare = {}, .copy = waits, .done = [](Outcome) {}, .pools = {}};
  REQUIRE(pool.submit(another).error().reason == "COPY_QUEUE_FULL");
  REQUIRE(pool.stats().refused == 1);
  door.open();
  REQUIRE(first.get() == Outcome::kOk);
  REQUIRE(pool.close(soon()).has_value());
  REQUIRE(pool.submit(another).error().reason == "COPY_POOL_CLOSED");
  REQUIRE(pool.close(soon()).has_value());
}

TEST_CASE("closing at once drops what has not begun and lets a running piece end") {
  Door door;
  Ending running;
  Ending waiting;
  std::atomic<bool> ended{false};
  CopyPool pool({.threads = 1, .piece_bytes = kGranule});
  REQUIRE(pool.submit({.bytes = 4 * kGranule,
                       .prepare = {},
                       .copy =
                           [&](uint64_t, uint64_t) {
                             door.pass();
                             ended = true;
                             return true;
                           },
                       .done = running.callback(),
                       .pools = {}}));
  door.wait_for(1);
  REQUIRE(pool.submit({.bytes = 1,
                       .prepare = {},
                       .copy = [](uint64_t, uint64_t) { return true; },
                       .done = waiting.callback(),
                       .pools = {}}));
  std::thread opener([&] { door.open(); });
  const Status closed = pool.close(Time{0});
  opener.join();
  REQUIRE(ended);
  // The opener may win the race against the deadline; either way every job has told its outcome.
  const Outcome first = running.get();
  const Outcome second = waiting.get();
  if (closed) {
    REQUIRE(first == Outcome::kOk);
    REQUIRE(second == Outcome::kOk);
  } else {
    REQUIRE(closed.error().reason == "COPY_DRAIN");
    REQUIRE((first == Outcome::kFailed || second == Outcome::kFailed));
  }
}

TEST_CASE("closing with time left drains everything") {
  std::atomic<int> ended{0};
  CopyPool pool({.threads = 2, .piece_bytes = kGranule});
  for (int i = 0; i < 50; ++i)
    REQUIRE(pool.submit({.bytes = 3 * kGranule,
                         .prepare = {},
                         .copy = [](uint64_t, uint64_t) { return true; },
                         .done = [&](Outcome outcome) { ended += outcome == Outcome::kOk ? 1 : 0; },
                         .pools = {}}));
  REQUIRE(pool.close(soon()).has_value());
  REQUIRE(ended == 50);
}

// The pool of a worker that takes its memory back: it cannot be truncated (it is sealed), so the
// test maps an unsealed file over the pool's pages, as a hostile hugetlbfs or a bad page would
// look.
std::shared_ptr<memory::HostPool> pool_without_memory(uint64_t bytes) {
  auto memory = memory::SharedMemory::create("worker", bytes);
  REQUIRE(memory.has_value());
  auto pool = memory::HostPool::import(UniqueFd(::dup(memory->fd())), bytes);
  REQUIRE(pool.has_value());
  const UniqueFd gone(::memfd_create("gone", MFD_CLOEXEC));
  REQUIRE(gone);
  void* at =
      ::mmap((*pool)->base(), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, gone.get(), 0);
  REQUIRE(at == (*pool)->base());
  return *pool;
}

TEST_CASE("a fault fails the job and the pool that was hit, and no other") {
  auto gone = pool_without_memory(4 * kGranule);
  auto memory = memory::SharedMemory::create("worker", 4 * kGranule);
  REQUIRE(memory.has_value());
  auto healthy = *memory::HostPool::import(UniqueFd(::dup(memory->fd())), 4 * kGranule);
  CopyPool pool({.threads = 2, .piece_bytes = kGranule});
  const auto job = [](const auto& to, const auto& from, Ending& ending) {
    return Job{.bytes = to->bytes(),
               .prepare = {},
               .copy =
                   [to = to.get(), from = from.get()](uint64_t begin, uint64_t end) {
                     std::memcpy(to->base() + begin, from->base() + begin, end - begin);
                     return true;
                   },
               .done = ending.callback(),
               .pools = {to, from}};
  };
  Ending faulted;
  REQUIRE(pool.submit(job(healthy, gone, faulted)));
  REQUIRE(faulted.get() == Outcome::kFaulted);
  REQUIRE(gone->failed());
  REQUIRE_FALSE(healthy->failed());

  Ending refused;
  REQUIRE(pool.submit(job(gone, healthy, refused)));
  REQUIRE(refused.get() == Outcome::kFailed);
  Ending good;
  REQUIRE(pool.submit(job(healthy, healthy, good)));
  REQUIRE(good.get() == Outcome::kOk);
  REQUIRE(pool.close(soon()).has_value());
  REQUIRE(pool.stats().faulted == 1);
  REQUIRE(pool.stats().failed == 1);
  REQUIRE(pool.stats().jobs == 3);
  // The copies have let go: whoever registered it owns it alone.
  REQUIRE(gone.use_count() == 1);
}

TEST_CASE("memory taken away in the middle of a running copy is noticed, time after time") {
  for (int round = 0; round < 20; ++round) {
    constexpr uint64_t kBytes = 64 * kGranule;
    const UniqueFd fd(::memfd_create("worker", MFD_CLOEXEC));
    REQUIRE(::ftruncate(fd.get(), kBytes) == 0);
    void* mapped = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    REQUIRE(mapped != MAP_FAILED);
    auto* const from = static_cast<std::byte*>(mapped);
    std::vector<std::byte> to(kBytes);
    std::atomic<int> begun{0};
    Ending ending;
    CopyPool pool({.threads = 2, .piece_bytes = kGranule});
    REQUIRE(pool.submit({.bytes = kBytes,
                         .prepare = {},
                         .copy =
                             [&](uint64_t begin, uint64_t end) {
                               ++begun;
                               begun.notify_all();
                               std::memcpy(&to[begin], from + begin, end - begin);
                               return true;
                             },
                         .done = ending.callback(),
                         .pools = {}}));
    for (int seen = begun; seen < 2; seen = begun) begun.wait(seen);
    REQUIRE(::ftruncate(fd.get(), 0) == 0);
    const Outcome outcome = ending.get();
    // It may have been through before the memory went; if not, it was a fault.
    REQUIRE((outcome == Outcome::kFaulted || begun == 64));
    REQUIRE(pool.close(soon()).has_value());
    ::munmap(mapped, kBytes);
  }
}

TEST_CASE("the number of threads follows the cores and has a bound") {
  REQUIRE(default_threads() >= 1);
  REQUIRE(default_threads() <= 4);
  CopyPool pool;
  REQUIRE(pool.threads() == default_threads());
}

}  // namespace
}  // namespace kvferry::copy
