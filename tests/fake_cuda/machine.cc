#include "tests/fake_cuda/machine.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace kvferry::fake_cuda {
namespace {

using namespace cuda;

constexpr uint64_t kPage = 4096;
uint64_t whole_pages(uint64_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

// Descriptors to be closed in a forked child. Lock-free, as the child may not take locks.
std::array<std::atomic<int>, 8192> all_fds{};  // 0: free; the descriptor + 1

void remember(int fd) {
  for (auto& slot : all_fds) {
    int expected = 0;
    if (slot.compare_exchange_strong(expected, fd + 1)) return;
  }
}

void forget(int fd) {
  for (auto& slot : all_fds) {
    int expected = fd + 1;
    if (slot.compare_exchange_strong(expected, 0)) return;
  }
}

bool try_lock(const std::string& path) {
  const OwnedFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  return fd.get() >= 0 && ::flock(fd.get(), LOCK_EX | LOCK_NB) == 0;
}

std::string name_of(const AllocationInfo& info) {
  std::array<char, 128> text{};
  std::snprintf(text.data(), text.size(), "mem.%c.%d.%016lx.%lu.%u.%u",
                static_cast<char>(info.kind), info.device, info.id, info.bytes, info.handle_types,
                info.rdma);
  return text.data();
}

std::optional<AllocationInfo> parse(const char* name) {
  AllocationInfo info;
  char kind = 0;
  if (std::sscanf(name, "mem.%c.%d.%lx.%lu.%u.%u", &kind, &info.device, &info.id, &info.bytes,
                  &info.handle_types, &info.rdma) != 6) {
    return std::nullopt;
  }
  info.kind = static_cast<MemoryKind>(kind);
  return info;
}

std::string event_name(uint64_t id, uint64_t identity) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "event.%016lx.%016lx", id, identity);
  return text.data();
}

std::string process_name(uint64_t identity) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "proc.%016lx", identity);
  return text.data();
}

template <typename Fn>
void for_each_name(const std::string& directory, Fn&& fn) {
  DIR* dir = ::opendir(directory.c_str());
  if (dir == nullptr) return;
  while (const dirent* entry = ::readdir(dir)) fn(static_cast<const char*>(entry->d_name));
  ::closedir(dir);
}

Config with_directory(Config config) {
  if (!config.directory.empty()) return config;
  std::string pattern = "/tmp/kvferry-fake-cuda-XXXXXX";
  if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp " + pattern);
  config.directory = pattern;
  config.temporary = true;
  return config;
}

}  // namespace

uint64_t random_id() {
  uint64_t id = 0;
  while (id == 0) {
    if (::getrandom(&id, sizeof id, 0) != sizeof id) id = 0;
  }
  return id;
}

OwnedFd::OwnedFd(int fd) : fd_(fd), process_(::getpid()) {
  if (fd_ >= 0) remember(fd_);
}

OwnedFd::~OwnedFd() {
  if (fd_ < 0 || process_ != ::getpid()) return;
  forget(fd_);
  ::close(fd_);
}

OwnedFd::OwnedFd(OwnedFd&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), process_(other.process_) {}

OwnedFd& OwnedFd::operator=(OwnedFd&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(process_, other.process_);
  return *this;
}

void OwnedFd::close_all_in_child() {
  for (auto& slot : all_fds) {
    const int fd = slot.exchange(0) - 1;
    if (fd >= 0) ::close(fd);
  }
}

Allocation::Allocation(std::shared_ptr<Machine> machine, AllocationInfo info, OwnedFd fd)
    : machine_(std::move(machine)), info_(info), fd_(std::move(fd)) {}

Allocation::~Allocation() {
  { const OwnedFd closing = std::move(fd_); }
  machine_->reap();
}

int Allocation::exported_fd() const {
  return ::fcntl(fd_.get(), F_DUPFD_CLOEXEC, 3);
}

// Against the machine's other processes, and against this one's threads.
class Machine::Lock {
 public:
  explicit Lock(Machine& machine) : guard_(machine.mutex_), fd_(machine.lock_.get()) {
    while (::flock(fd_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~Lock() { ::flock(fd_, LOCK_UN); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  const std::lock_guard<std::mutex> guard_;
  const int fd_;
};

std::shared_ptr<Machine> Machine::open(const Config& config) {
  return std::shared_ptr<Machine>(new Machine(with_directory(config)));
}

Machine::Machine(const Config& config)
    : config_(config), identity_(random_id()), process_id_(::getpid()) {
  lock_ = OwnedFd(::open(path("lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (lock_.get() < 0) throw std::runtime_error("fake CUDA: cannot write " + config.directory);
  const Lock lock(*this);
  process_ =
      OwnedFd(::open(path(process_name(identity_)).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ::flock(process_.get(), LOCK_EX | LOCK_NB);
}

Machine::~Machine() {
  if (process_id_ != ::getpid()) return;  // a forked child has nothing of it
  ::unlink(path(process_name(identity_)).c_str());
  if (!config_.temporary) return;
  for_each_name(config_.directory, [&](const char* name) { ::unlink(path(name).c_str()); });
  ::rmdir(config_.directory.c_str());
}

bool Machine::alive(uint64_t identity) const {
  const std::string file = path(process_name(identity));
  return ::access(file.c_str(), F_OK) == 0 && !try_lock(file);
}

std::vector<Machine::File> Machine::allocations() const {
  std::vector<File> files;
  for_each_name(config_.directory, [&](const char* name) {
    if (const auto info = parse(name)) files.push_back({name, *info});
  });
  return files;
}

void Machine::reap_locked() {
  std::vector<std::string> gone;
  for_each_name(config_.directory, [&](const char* name) {
    uint64_t id = 0;
    uint64_t identity = 0;
    const bool memory = parse(name).has_value();
    const bool process = std::sscanf(name, "proc.%lx", &identity) == 1;
    const bool event = std::sscanf(name, "event.%lx.%lx", &id, &identity) == 2;
    if ((memory || process) && try_lock(path(name))) gone.emplace_back(name);
    if (event && !alive(identity)) gone.emplace_back(name);
  });
  for (const std::string& name : gone) ::unlink(path(name).c_str());
}

void Machine::reap() {
  if (process_id_ != ::getpid()) return;
  const Lock lock(*this);
  reap_locked();
}

uint64_t Machine::used_bytes_locked(int device) const {
  uint64_t used = 0;
  for (const File& file : allocations()) {
    if (file.info.device == device) used += whole_pages(file.info.bytes);
  }
  return used;
}

uint64_t Machine::used_bytes(int device) {
  const Lock lock(*this);
  reap_locked();
  return used_bytes_locked(device);
}

Answer<std::shared_ptr<Allocation>> Machine::allocate(AllocationInfo info) {
  const Lock lock(*this);
  reap_locked();
  const uint64_t used = used_bytes_locked(info.device);
  if (info.bytes > config_.memory_bytes || used + whole_pages(info.bytes) > config_.memory_bytes) {
    return tl::unexpected(CUDA_ERROR_OUT_OF_MEMORY);
  }
  struct statvfs space {};
  if (::statvfs(config_.directory.c_str(), &space) == 0 &&
      uint64_t{space.f_bavail} * space.f_frsize < info.bytes) {
    return tl::unexpected(CUDA_ERROR_OUT_OF_MEMORY);
  }
  info.id = random_id();
  const std::string file = path(name_of(info));
  OwnedFd fd(::open(file.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (fd.get() < 0) return tl::unexpected(CUDA_ERROR_OPERATING_SYSTEM);
  if (::ftruncate(fd.get(), static_cast<off_t>(whole_pages(info.bytes))) != 0 ||
      ::flock(fd.get(), LOCK_SH | LOCK_NB) != 0) {
    ::unlink(file.c_str());
    return tl::unexpected(CUDA_ERROR_OPERATING_SYSTEM);
  }
  return std::make_shared<Allocation>(shared_from_this(), info, std::move(fd));
}

Answer<std::shared_ptr<Allocation>> Machine::hold(const File& file) {
  OwnedFd fd(::open(path(file.name).c_str(), O_RDWR | O_CLOEXEC));
  if (fd.get() < 0) return tl::unexpected(CUDA_ERROR_INVALID_HANDLE);
  if (::flock(fd.get(), LOCK_SH | LOCK_NB) != 0) {
    return tl::unexpected(CUDA_ERROR_OPERATING_SYSTEM);
  }
  return std::make_shared<Allocation>(shared_from_this(), file.info, std::move(fd));
}

Answer<std::shared_ptr<Allocation>> Machine::find(uint64_t id, MemoryKind kind) {
  const Lock lock(*this);
  reap_locked();
  for (const File& file : allocations()) {
    if (file.info.id == id && file.info.kind == kind) return hold(file);
  }
  return tl::unexpected(CUDA_ERROR_INVALID_HANDLE);
}

Answer<std::shared_ptr<Allocation>> Machine::adopt(int fd) {
  std::array<char, 512> target{};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t length = ::readlink(link.c_str(), target.data(), target.size() - 1);
  const std::string prefix = path("");
  if (length <= 0 || std::strncmp(target.data(), prefix.c_str(), prefix.size()) != 0) {
    return tl::unexpected(CUDA_ERROR_INVALID_VALUE);
  }
  const char* name = target.data() + prefix.size();
  const auto info = parse(name);
  if (!info || info->kind != MemoryKind::kVmm) return tl::unexpected(CUDA_ERROR_INVALID_VALUE);
  // The copy shares the lock with the descriptor that was handed over.
  OwnedFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
  if (copy.get() < 0) return tl::unexpected(CUDA_ERROR_OPERATING_SYSTEM);
  return std::make_shared<Allocation>(shared_from_this(), *info, std::move(copy));
}

void Machine::disown(const Allocation& allocation) {
  const Lock lock(*this);
  AllocationInfo freed = allocation.info();
  const std::string before = name_of(freed);
  freed.kind = MemoryKind::kLegacyFreed;
  ::rename(path(before).c_str(), path(name_of(freed)).c_str());
}

std::shared_ptr<EventCounter> Machine::map_event(const OwnedFd& fd) const {
  void* page = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (page == MAP_FAILED) return nullptr;
  // A new file is zeros, which is what a counter begins with.
  return {static_cast<EventCounter*>(page),
          [](EventCounter* counter) { ::munmap(counter, kPage); }};
}

Answer<std::shared_ptr<EventCounter>> Machine::create_event(uint64_t& id) {
  id = random_id();
  const std::string file = path(event_name(id, identity_));
  const OwnedFd fd(::open(file.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (fd.get() < 0 || ::ftruncate(fd.get(), kPage) != 0) {
    return tl::unexpected(CUDA_ERROR_OPERATING_SYSTEM);
  }
  auto counter = map_event(fd);
  if (!counter) return tl::unexpected(CUDA_ERROR_OPERATING_SYSTEM);
  return counter;
}

Answer<std::shared_ptr<EventCounter>> Machine::open_event(uint64_t id, uint64_t identity) {
  const OwnedFd fd(::open(path(event_name(id, identity)).c_str(), O_RDWR | O_CLOEXEC));
  if (fd.get() < 0) return tl::unexpected(CUDA_ERROR_INVALID_HANDLE);
  auto counter = map_event(fd);
  if (!counter) return tl::unexpected(CUDA_ERROR_OPERATING_SYSTEM);
  return counter;
}

void Machine::remove_event(uint64_t id) {
  ::unlink(path(event_name(id, identity_)).c_str());
}

CUresult Machine::fault(int device) const {
  const std::string file = path("fault." + std::to_string(device));
  if (::access(file.c_str(), F_OK) != 0) return CUDA_SUCCESS;
  FILE* in = std::fopen(file.c_str(), "re");
  if (in == nullptr) return CUDA_SUCCESS;
  int code = 0;
  const bool read = std::fscanf(in, "%d", &code) == 1;
  std::fclose(in);
  return read ? static_cast<CUresult>(code) : CUDA_ERROR_ECC_UNCORRECTABLE;
}

}  // namespace kvferry::fake_cuda
