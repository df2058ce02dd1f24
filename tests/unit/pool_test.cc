// Shared memory, the host arena, imported worker pools and the guard that their copies run under.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/huge_pages.h"
#include "daemon/memory/fault_guard.h"
#include "daemon/memory/host_pool.h"
#include "daemon/memory/shared_memory.h"

namespace kvferry::memory {
namespace {

constexpr uint64_t kPage = 4096;

// A memfd as a worker may make it.
UniqueFd worker_memory(uint64_t bytes, int seals, bool allocate = true) {
  UniqueFd fd(::memfd_create("worker", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(fd);
  REQUIRE(::ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0);
  if (allocate) REQUIRE(::fallocate(fd.get(), 0, 0, static_cast<off_t>(bytes)) == 0);
  if (seals != 0) REQUIRE(::fcntl(fd.get(), F_ADD_SEALS, seals) == 0);
  return fd;
}

std::string reason_of(UniqueFd fd, uint64_t bytes, const HostPoolLimits& limits = {}) {
  auto pool = HostPool::import(std::move(fd), bytes, limits, "pools[0].fd");
  if (pool) return "OK";
  CHECK(pool.error().field == "pools[0].fd");
  return pool.error().reason;
}

// An unsealed mapping of `pages` pages, of which all from `kept` on are gone.
class Truncated {
 public:
  Truncated(uint64_t pages, uint64_t kept) : bytes_(pages * kPage) {
    const UniqueFd fd = worker_memory(bytes_, 0);
    void* at = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    REQUIRE(at != MAP_FAILED);
    data_ = static_cast<std::byte*>(at);
    std::memset(data_, 0x5A, bytes_);
    REQUIRE(::ftruncate(fd.get(), static_cast<off_t>(kept * kPage)) == 0);
  }
  ~Truncated() { ::munmap(data_, bytes_); }
  Truncated(const Truncated&) = delete;
  Truncated& operator=(const Truncated&) = delete;
  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t bytes_;
  std::byte* data_ = nullptr;
};

int ending_of(void (*body)()) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::close(STDERR_FILENO);
    body();
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

// Of memory files, and what is set aside for them: other threads of a sanitizer map, too.
std::size_t mappings() {
  std::ifstream maps("/proc/self/maps");
  std::size_t lines = 0;
  for (std::string line; std::getline(maps, line);)
    if (line.find("memfd:") != std::string::npos) ++lines;
  return lines;
}

bool on_huge_page(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kHugePageBytes == 0;
}

// The kernel is 6.1 or later and has transparent huge pages.
bool huge_pages_can_be_had() {
  const UniqueFd fd = worker_memory(kHugePageBytes, 0, false);
  void* const at = map_aligned(fd.get(), kHugePageBytes, PROT_READ | PROT_WRITE);
  REQUIRE(at != MAP_FAILED);
  std::memset(at, 1, 1);
  const bool had = ::madvise(at, kHugePageBytes, 25 /* MADV_COLLAPSE */) == 0;
  ::munmap(at, kHugePageBytes);
  return had;
}

TEST_CASE("huge pages are spread over NUMA nodes as their small ones would be") {
  for (const uint64_t nodes : {2UL, 3UL, 4UL, 5UL, 6UL, 8UL}) {
    CAPTURE(nodes);
    std::vector<uint64_t> of_node(nodes);
    constexpr uint64_t kHuge = 240;
    for (uint64_t i = 0; i < kHuge; ++i) {
      REQUIRE(first_touched_page(i) < kHugePageBytes / kPage);
      ++of_node[(i * (kHugePageBytes / kPage) + first_touched_page(i)) % nodes];
    }
    for (const uint64_t count : of_node) CHECK(count >= kHuge / nodes / 2);
  }
}

TEST_CASE("what is large enough lies where huge pages can be") {
  // A length that is no multiple of a page, too: the rest of the room goes back all the same.
  const std::size_t before = mappings();
  for (const uint64_t bytes : {kHugePageBytes, kHugePageBytes + 1, 3 * kHugePageBytes - kPage}) {
    SharedMemoryOptions options;
    options.huge_pages = true;
    auto made = SharedMemory::create("huge", bytes, options);
    CAPTURE(bytes);
    REQUIRE(made);
    CHECK(on_huge_page(made->data()));
    if (huge_pages_can_be_had())
      CHECK(made->huge_page_bytes() == bytes / kHugePageBytes * kHugePageBytes);
    else
      CHECK(made->huge_page_bytes() == 0);
    std::memset(made->data(), 0x5A, bytes);

    auto mapped = SharedMemory::map(UniqueFd(::dup(made->fd())), bytes, Access::kReadOnly);
    REQUIRE(mapped);
    CHECK(on_huge_page(mapped->data()));
    CHECK(mapped->data()[bytes - 1] == std::byte{0x5A});

    auto pool = HostPool::import(worker_memory(bytes, F_SEAL_SHRINK), bytes, {}, "pools[0].fd");
    REQUIRE(pool);
    CHECK(on_huge_page((*pool)->base()));
    CHECK(mappings() > before);
  }
  CHECK(mappings() == before);
}

TEST_CASE("more memory than the machine has is refused before any is taken") {
  SharedMemoryOptions options;
  options.huge_pages = true;
  const auto made = SharedMemory::create("large", uint64_t{1} << 45, options);
  REQUIRE_FALSE(made);
  CHECK(made.error().reason == "MEMORY_EXHAUSTED");
  // 64 TiB in pieces that would fit one by one.
  const std::vector<uint64_t> segments(1024, uint64_t{1} << 36);
  const auto arena = HostArena::create("many", segments, options);
  REQUIRE_FALSE(arena);
  CHECK(arena.error().reason == "MEMORY_EXHAUSTED");
}

TEST_CASE("shared memory is zeroed, sealed, without holes, and the same through a second mapping") {
  auto memory = SharedMemory::create("test", 5 * kPage + 100);
  REQUIRE(memory.has_value());
  REQUIRE(memory->bytes() == 5 * kPage + 100);
  for (uint64_t i = 0; i < memory->bytes(); i += 511) REQUIRE(memory->data()[i] == std::byte{0});
  struct stat file {};
  REQUIRE(::fstat(memory->fd(), &file) == 0);
  REQUIRE(file.st_blocks * 512 >= file.st_size);
  REQUIRE((::fcntl(memory->fd(), F_GETFD) & FD_CLOEXEC) != 0);
  REQUIRE(::ftruncate(memory->fd(), 0) != 0);
  REQUIRE(::ftruncate(memory->fd(), 1 << 20) != 0);

  UniqueFd second(::dup(memory->fd()));
  auto view = SharedMemory::map(std::move(second), memory->bytes(), Access::kReadOnly);
  REQUIRE(view.has_value());
  memory->data()[5 * kPage] = std::byte{7};
  REQUIRE(view->data()[5 * kPage] == std::byte{7});
}

TEST_CASE("nobody adds seals to memory that was made with its last ones") {
  auto memory = SharedMemory::create("test", kPage, {.last_seals = true});
  REQUIRE(memory.has_value());
  CHECK(::fcntl(memory->fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE) != 0);
  auto open = SharedMemory::create("test", kPage);
  REQUIRE(open.has_value());
  CHECK(::fcntl(open->fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0);
}

TEST_CASE("moving shared memory keeps its address") {
  auto made = SharedMemory::create("test", kPage, {.huge_pages = true, .populate = true});
  REQUIRE(made.has_value());
  std::byte* const at = made->data();
  SharedMemory moved = std::move(*made);
  REQUIRE(moved.data() == at);
  REQUIRE_FALSE(static_cast<bool>(*made));
  SharedMemory other;
  other = std::move(moved);
  REQUIRE(other.data() == at);
  other.data()[0] = std::byte{1};
}

TEST_CASE("memory sealed for future writers stays writable for its maker only") {
  auto memory = SharedMemory::create("test", kPage);
  REQUIRE(memory.has_value());
  REQUIRE(memory->seal(F_SEAL_FUTURE_WRITE).has_value());
  memory->data()[0] = std::byte{1};
  REQUIRE_FALSE(SharedMemory::map(UniqueFd(::dup(memory->fd())), kPage, Access::kReadWrite));
  REQUIRE(SharedMemory::map(UniqueFd(::dup(memory->fd())), kPage, Access::kReadOnly).has_value());
}

TEST_CASE("sizes that cannot be mapped are refused") {
  REQUIRE(SharedMemory::create("test", 0).error().reason == "SIZE_INVALID");
  REQUIRE(SharedMemory::create("test", ~uint64_t{0}).error().reason == "SIZE_INVALID");
  REQUIRE(SharedMemory::map(worker_memory(kPage, 0), kPage, Access::kReadWrite).error().reason ==
          "SHARED_MEMORY_NOT_SEALED");
  REQUIRE(SharedMemory::map(worker_memory(kPage, F_SEAL_SHRINK), kPage + 1, Access::kReadWrite)
              .error()
              .reason == "SHARED_MEMORY_TOO_SMALL");
  REQUIRE_FALSE(SharedMemory::map(UniqueFd(), kPage, Access::kReadWrite).has_value());
}

TEST_CASE("an arena answers addresses only for regions inside a segment") {
  auto arena = HostArena::create("arena", {4 * kPage, 2 * kPage});
  REQUIRE(arena.has_value());
  REQUIRE(arena->segment_count() == 2);
  REQUIRE(arena->total_bytes() == 6 * kPage);
  REQUIRE(arena->segment_bytes() == std::vector<uint64_t>{4 * kPage, 2 * kPage});
  REQUIRE(arena->address_of({0, kPage, 3 * kPage}) == arena->segment(0).data() + kPage);
  REQUIRE(arena->address_of({1, 0, 2 * kPage}) == arena->segment(1).data());
  REQUIRE(arena->address_of({1, 0, 2 * kPage + 1}) == nullptr);
  REQUIRE(arena->address_of({1, kPage, 2 * kPage}) == nullptr);
  REQUIRE(arena->address_of({2, 0, 1}) == nullptr);
  REQUIRE(arena->address_of({0, ~uint64_t{0}, 2}) == nullptr);
  REQUIRE(arena->address_of({0, 2, ~uint64_t{0}}) == nullptr);

  std::vector<HostArena::Segment> parts;
  for (uint32_t i = 0; i < 2; ++i)
    parts.push_back({UniqueFd(::dup(arena->fds()[i])), arena->segment(i).bytes()});
  auto other = HostArena::map(std::move(parts));
  REQUIRE(other.has_value());
  *arena->address_of({1, 9, 1}) = std::byte{42};
  REQUIRE(*other->address_of({1, 9, 1}) == std::byte{42});
}

// Whether a core dump would hold the mapping that begins there.
bool in_core_dumps(const void* at) {
  std::ifstream maps("/proc/self/smaps");
  bool ours = false;
  for (std::string line; std::getline(maps, line);) {
    uint64_t begin = 0;
    uint64_t end = 0;
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " ", &begin, &end) == 2)
      ours = begin == reinterpret_cast<uintptr_t>(at);
    else if (ours && line.starts_with("VmFlags:"))
      return line.find(" dd") == std::string::npos;
  }
  FAIL("no mapping begins there");
  return true;
}

TEST_CASE("no core dump holds arenas, workers' pools or packed copies") {
  const auto arena = HostArena::create("arena", {2 * kPage});
  REQUIRE(arena);
  CHECK_FALSE(in_core_dumps(arena->segment(0).data()));
  const auto again =
      SharedMemory::map(UniqueFd(::dup(arena->fds()[0])), 2 * kPage, Access::kReadWrite);
  REQUIRE(again);
  CHECK_FALSE(in_core_dumps(again->data()));
  const auto pool = HostPool::import(worker_memory(kPage, F_SEAL_SHRINK), kPage);
  REQUIRE(pool);
  CHECK_FALSE(in_core_dumps((*pool)->base()));
  const auto copy = HostPool::create(kPage);
  REQUIRE(copy);
  CHECK_FALSE(in_core_dumps((*copy)->base()));
  const auto open = SharedMemory::create("test", kPage, {.in_core_dumps = true});
  REQUIRE(open);
  CHECK(in_core_dumps(open->data()));
}

TEST_CASE("a sealed and allocated memfd becomes a pool that shares its bytes with the worker") {
  UniqueFd fd = worker_memory(8 * kPage, F_SEAL_SHRINK | F_SEAL_GROW);
  const int worker = ::dup(fd.get());
  auto pool = HostPool::import(std::move(fd), 8 * kPage);
  REQUIRE(pool.has_value());
  REQUIRE((*pool)->bytes() == 8 * kPage);
  REQUIRE_FALSE((*pool)->failed());
  REQUIRE((*pool)->still_allocated());
  (*pool)->base()[3 * kPage] = std::byte{9};
  char seen = 0;
  REQUIRE(::pread(worker, &seen, 1, static_cast<off_t>(3 * kPage)) == 1);
  REQUIRE(seen == 9);
  REQUIRE((*pool)->contains((*pool)->base() + 8 * kPage - 1));
  REQUIRE_FALSE((*pool)->contains((*pool)->base() + 8 * kPage));
  REQUIRE_FALSE((*pool)->contains(&seen));

  REQUIRE(::fallocate(worker, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kPage) == 0);
  REQUIRE_FALSE((*pool)->still_allocated());
  ::close(worker);
}

TEST_CASE("a hole punched since the import ends the pool at the next look") {
  UniqueFd fd = worker_memory(4 * kPage, F_SEAL_SHRINK);
  const UniqueFd worker(::dup(fd.get()));
  const auto pool = HostPool::import(std::move(fd), 4 * kPage);
  REQUIRE(pool);
  const kvferry::Time now{1'000'000'000};
  CHECK((*pool)->usable(now));
  REQUIRE(::fallocate(worker.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, kPage, kPage) == 0);
  CHECK((*pool)->usable(now + (HostPool::kLookEvery - kvferry::Duration(1))));
  CHECK_FALSE((*pool)->failed());
  CHECK_FALSE((*pool)->usable(now + HostPool::kLookEvery));
  CHECK((*pool)->failed());
  // For good, whether or not the hole is filled.
  REQUIRE(::fallocate(worker.get(), 0, 0, 4 * kPage) == 0);
  CHECK_FALSE((*pool)->usable(now + HostPool::kLookEvery));
}

TEST_CASE("pools of one file are told, whatever part of it they are") {
  const UniqueFd file = worker_memory(2 * kPage, F_SEAL_SHRINK);
  const auto import = [](int fd, uint64_t bytes) {
    auto pool = HostPool::import(UniqueFd(::dup(fd)), bytes);
    REQUIRE(pool);
    return std::move(*pool);
  };
  const auto one = import(file.get(), 2 * kPage);
  const auto again = import(file.get(), kPage);
  const UniqueFd another = worker_memory(2 * kPage, F_SEAL_SHRINK);
  CHECK(one->same_memory(*again));
  CHECK(again->same_memory(*one));
  CHECK_FALSE(one->same_memory(*import(another.get(), 2 * kPage)));
}

TEST_CASE("a pool may be smaller than its file and need not end on a page") {
  REQUIRE(reason_of(worker_memory(4 * kPage, F_SEAL_SHRINK), kPage + 1) == "OK");
}

TEST_CASE("what a worker must not hand over as a pool is refused with its reason") {
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW;
  REQUIRE(reason_of(worker_memory(kPage, 0), kPage) == "POOL_NOT_SEALED");
  REQUIRE(reason_of(worker_memory(kPage, F_SEAL_GROW), kPage) == "POOL_NOT_SEALED");
  REQUIRE(reason_of(worker_memory(kPage, seals), 2 * kPage) == "POOL_TOO_SMALL");
  REQUIRE(reason_of(worker_memory(kPage, seals), 0) == "POOL_SIZE_INVALID");
  REQUIRE(reason_of(worker_memory(kPage, seals), ~uint64_t{0}) == "POOL_SIZE_INVALID");
  REQUIRE(reason_of(worker_memory(kPage, seals), kPage, {.max_bytes = kPage - 1}) == "POOL_LIMIT");
  REQUIRE(reason_of(worker_memory(4 * kPage, seals, false), 4 * kPage) == "POOL_SPARSE");
  REQUIRE(reason_of(worker_memory(kPage, seals | F_SEAL_WRITE), kPage) == "POOL_NOT_WRITABLE");
  REQUIRE(reason_of(worker_memory(kPage, seals | F_SEAL_FUTURE_WRITE), kPage) ==
          "POOL_NOT_WRITABLE");
  REQUIRE(reason_of(UniqueFd(), kPage) == "POOL_NOT_A_FILE");
  REQUIRE(reason_of(UniqueFd(::open("/proc/self/mem", O_RDWR | O_CLOEXEC)), kPage) ==
          "POOL_WRONG_FILESYSTEM");
  REQUIRE(reason_of(UniqueFd(::open("/dev/zero", O_RDWR | O_CLOEXEC)), kPage) == "POOL_NOT_A_FILE");
  int pair[2] = {-1, -1};
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  ::close(pair[1]);
  REQUIRE(reason_of(UniqueFd(pair[0]), kPage) == "POOL_NOT_A_FILE");
}

TEST_CASE("a hole outside the told size is a hole too") {
  UniqueFd fd = worker_memory(8 * kPage, 0, false);
  REQUIRE(::fallocate(fd.get(), 0, static_cast<off_t>(4 * kPage), 4 * kPage) == 0);
  REQUIRE(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK) == 0);
  REQUIRE(reason_of(std::move(fd), 4 * kPage) == "POOL_SPARSE");
}

TEST_CASE("a descriptor without the right to write is refused") {
  const UniqueFd fd = worker_memory(kPage, F_SEAL_SHRINK);
  const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  REQUIRE(reason_of(UniqueFd(::open(path.c_str(), O_RDONLY | O_CLOEXEC)), kPage) ==
          "POOL_NOT_WRITABLE");
  REQUIRE(reason_of(UniqueFd(::open(path.c_str(), O_WRONLY | O_CLOEXEC)), kPage) ==
          "POOL_NOT_WRITABLE");
  REQUIRE(reason_of(UniqueFd(::open(path.c_str(), O_PATH | O_CLOEXEC)), kPage) ==
          "POOL_NOT_A_FILE");
}

TEST_CASE("a copy from memory that is gone ends in false and names the address") {
  Truncated memory(4, 2);
  std::vector<std::byte> to(memory.bytes());
  const void* address = nullptr;
  REQUIRE(guarded_copy(to.data(), memory.data(), 2 * kPage, &address));
  REQUIRE(address == nullptr);
  REQUIRE_FALSE(guarded_copy(to.data(), memory.data(), memory.bytes(), &address));
  REQUIRE(address >= memory.data() + 2 * kPage);
  REQUIRE(address < memory.data() + memory.bytes());
  REQUIRE(to[0] == std::byte{0x5A});
  REQUIRE_FALSE(guarded_copy(memory.data(), to.data(), memory.bytes(), &address));
  // Once more, now that the handler has been left by a jump.
  REQUIRE_FALSE(guarded_copy(to.data(), memory.data() + 3 * kPage, 1));
  REQUIRE(guarded_copy(to.data(), memory.data(), kPage));
}

TEST_CASE("the innermost guard catches, and the outer one goes on") {
  Truncated memory(2, 0);
  bool inner = true;
  bool after = false;
  const bool outer = run_guarded([&] {
    inner = run_guarded([&] { memory.data()[0] = std::byte{1}; });
    after = true;
  });
  REQUIRE_FALSE(inner);
  REQUIRE(after);
  REQUIRE(outer);
  REQUIRE_FALSE(run_guarded([&] {
    run_guarded([] {});
    memory.data()[0] = std::byte{1};
  }));
}

TEST_CASE("threads that inherited a blocked SIGBUS are guarded all the same, each for itself") {
  Truncated memory(2, 1);
  sigset_t mask;
  sigset_t before;
  sigemptyset(&mask);
  sigaddset(&mask, SIGBUS);
  REQUIRE(pthread_sigmask(SIG_BLOCK, &mask, &before) == 0);
  std::vector<int> good(4, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < good.size(); ++t) {
    threads.emplace_back([&, t] {
      std::vector<std::byte> to(kPage);
      for (int i = 0; i < 200; ++i) {
        const bool wanted = i % 2 == 0;
        if (guarded_copy(to.data(), memory.data() + (wanted ? 0 : kPage), kPage) == wanted)
          ++good[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  REQUIRE(pthread_sigmask(SIG_SETMASK, &before, nullptr) == 0);
  REQUIRE(good == std::vector<int>(4, 200));
}

TEST_CASE("a fault outside a guard still ends the process") {
  const int status = ending_of([] {
    install_fault_guard();
    Truncated memory(1, 0);
    *static_cast<volatile std::byte*>(memory.data()) = std::byte{1};
  });
  REQUIRE_FALSE((WIFEXITED(status) && WEXITSTATUS(status) == 0));
}

TEST_CASE("a SIGBUS that somebody sends is no fault of a copy") {
  const int status = ending_of([] {
    run_guarded([] { ::kill(::getpid(), SIGBUS); });
    ::_exit(0);
  });
  REQUIRE_FALSE((WIFEXITED(status) && WEXITSTATUS(status) == 0));
}

}  // namespace
}  // namespace kvferry::memory
