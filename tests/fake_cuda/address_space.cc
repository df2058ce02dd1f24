#include "tests/fake_cuda/address_space.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace kvferry::fake_cuda {
namespace {

constexpr uint64_t kSpace = uint64_t{64} << 30;
constexpr uint64_t kUnit = uint64_t{2} << 20;
constexpr uint64_t kPage = 4096;

uint64_t round_up(uint64_t value, uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Past the sanitizers' own mmap, which keeps books of every page.
uint64_t reserve(uint64_t bytes) {
  const long at = ::syscall(SYS_mmap, nullptr, bytes + kUnit, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == -1) throw std::runtime_error("fake CUDA: no address space");
  return round_up(static_cast<uint64_t>(at), kUnit);
}

}  // namespace

bool Range::allows(int by, const std::set<int>& peers, bool write) const {
  switch (kind) {
    case RangeKind::kAllocation:
      return by == device || peers.contains(device);
    case RangeKind::kIpc:
      return by == device || by == opened_on || peers.contains(device);
    case RangeKind::kHost:
      return device_mapped && (portable || by == device);
    case RangeKind::kMapped: {
      const auto found = access.find(by);
      if (found == access.end()) return false;
      return write ? found->second == cuda::CU_MEM_ACCESS_FLAGS_PROT_READWRITE
                   : found->second != cuda::CU_MEM_ACCESS_FLAGS_PROT_NONE;
    }
  }
  return false;
}

AddressSpace::AddressSpace()
    : base_(reserve(kSpace)),
      shadow_base_(reinterpret_cast<std::byte*>(reserve(kSpace))),
      cursor_(base_) {}

uint64_t AddressSpace::take(uint64_t bytes, uint64_t alignment) {
  alignment = std::max(alignment, kUnit);
  if (bytes == 0 || bytes > kSpace / 2 || (alignment & (alignment - 1)) != 0) return 0;
  const uint64_t size = round_up(bytes, kUnit) + kUnit;
  for (int round = 0; round < 2; ++round) {
    uint64_t at = round_up(cursor_, alignment);
    while (at + size <= base_ + kSpace) {
      auto next = taken_.upper_bound(at);
      if (next != taken_.begin()) {
        const auto before = std::prev(next);
        if (before->first + before->second > at) {
          at = round_up(before->first + before->second, alignment);
          continue;
        }
      }
      if (next == taken_.end() || next->first >= at + size) {
        taken_[at] = size;
        cursor_ = at + size;
        return at;
      }
      at = round_up(next->first + next->second, alignment);
    }
    cursor_ = base_;
  }
  return 0;
}

void AddressSpace::give_back(uint64_t base) {
  taken_.erase(base / kUnit * kUnit);
}

bool AddressSpace::map_bytes(uint64_t address, uint64_t bytes, const Allocation& allocation) {
  const auto map = [&](void* at) {
    return ::mmap(at, round_up(bytes, kPage), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                  allocation.fd(), 0) != MAP_FAILED;
  };
  if (!map(shadow(address))) return false;
  if (!host_visible_ || map(reinterpret_cast<void*>(address))) return true;
  unmap_bytes(address, bytes);
  return false;
}

void AddressSpace::unmap_bytes(uint64_t address, uint64_t bytes) {
  const auto unmap = [&](void* at) {
    (void)::mmap(at, round_up(bytes, kPage), PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  };
  unmap(shadow(address));
  if (host_visible_) unmap(reinterpret_cast<void*>(address));
}

Range& AddressSpace::add(Range range) {
  range.number = next_number_++;
  const uint64_t base = range.base;
  return ranges_[base] = std::move(range);
}

const Range* AddressSpace::find(uint64_t address) const {
  auto next = ranges_.upper_bound(address);
  if (next == ranges_.begin()) return nullptr;
  const Range& range = std::prev(next)->second;
  return address < range.end() ? &range : nullptr;
}

const Range* AddressSpace::registered(const void* host, uint64_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(host);
  for (const auto& [base, range] : ranges_) {
    if (range.kind == RangeKind::kHost && begin >= range.host &&
        begin + bytes <= range.host + range.bytes) {
      return &range;
    }
  }
  return nullptr;
}

bool AddressSpace::overlaps(uint64_t base, uint64_t bytes) const {
  auto next = ranges_.lower_bound(base + bytes);
  return next != ranges_.begin() && std::prev(next)->second.end() > base;
}

std::byte* DeviceView::find(uint64_t address, uint64_t bytes, bool write) const {
  const Range*& last = write ? last_written_ : last_read_;
  if (last == nullptr || address < last->base || address >= last->end()) {
    const Range* range = space_.find(address);
    if (range == nullptr || !range->allows(device_, peers_, write)) return nullptr;
    last = range;
  }
  std::byte* const host = last->host + (address - last->base);
  if (bytes > ~address) return nullptr;
  // On through the ranges that follow without a gap, here and on the host.
  const Range* range = last;
  while (address + bytes > range->end()) {
    const Range* next = space_.find(range->end());
    if (next == nullptr || next->host != range->host + range->bytes ||
        !next->allows(device_, peers_, write)) {
      return nullptr;
    }
    range = next;
  }
  return host;
}

}  // namespace kvferry::fake_cuda
