// This process's view of device memory: which addresses exist, what lies there, and who may touch
// it. A device address is no host address, as its pages are PROT_NONE, unless the machine is one
// whose device memory the host sees. The bytes are mapped at the address plus a constant, which
// only this class knows.
//
// Addresses are used again as late as can be, so that use after free meets nothing. Guarded by the
// caller: changes under State::map_mutex held exclusively, look-ups under it held shared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>

#include "kernels/cuda/abi.h"
#include "kernels/device_copy.h"
#include "tests/fake_cuda/machine.h"

namespace kvferry::fake_cuda {

enum class RangeKind : uint8_t {
  kAllocation,  // cuMemAlloc
  kIpc,         // cuIpcOpenMemHandle
  kMapped,      // cuMemMap
  kHost,        // cuMemHostRegister
};

struct Range {
  RangeKind kind = RangeKind::kAllocation;
  uint64_t base = 0;
  uint64_t bytes = 0;
  std::byte* host = nullptr;                      // where the host finds the bytes
  std::shared_ptr<Allocation> allocation;         // null for kHost
  int device = 0;                                 // that it is on; kHost: that registered it
  int opened_on = 0;                              // kIpc: the device of the context that opened it
  cuda::CUcontext context = nullptr;              // that it belongs to; null for kMapped
  uint64_t opens = 1;                             // kIpc
  bool portable = false;                          // kHost
  bool device_mapped = false;                     // kHost
  std::map<int, cuda::CUmemAccess_flags> access;  // kMapped: by device
  uint64_t number = 0;                            // differs between all ranges ever

  uint64_t end() const { return base + bytes; }
  bool allows(int by, const std::set<int>& peers, bool write) const;
};

class AddressSpace {
 public:
  AddressSpace();
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  // Addresses for `bytes`, with a gap behind them; 0 if there are none left.
  uint64_t take(uint64_t bytes, uint64_t alignment);
  void give_back(uint64_t base);

  // From now on device memory is also mapped at its own address. While nothing is mapped.
  void set_host_visible(bool visible) { host_visible_ = visible; }

  std::byte* shadow(uint64_t address) const { return shadow_base_ + (address - base_); }
  // Maps the allocation's first `bytes` at the address; false if the host is out of something.
  bool map_bytes(uint64_t address, uint64_t bytes, const Allocation& allocation);
  void unmap_bytes(uint64_t address, uint64_t bytes);

  Range& add(Range range);
  void remove(uint64_t base) { ranges_.erase(base); }
  // The range that has this address; null if none has.
  const Range* find(uint64_t address) const;
  Range* find(uint64_t address) {
    return const_cast<Range*>(static_cast<const AddressSpace*>(this)->find(address));
  }
  std::map<uint64_t, Range>& ranges() { return ranges_; }
  const std::map<uint64_t, Range>& ranges() const { return ranges_; }
  // The registration that has these bytes of the host; null if none has all of them.
  const Range* registered(const void* host, uint64_t bytes) const;
  bool overlaps(uint64_t base, uint64_t bytes) const;

 private:
  uint64_t base_ = 0;
  std::byte* shadow_base_ = nullptr;
  bool host_visible_ = false;
  uint64_t cursor_ = 0;
  uint64_t next_number_ = 1;
  std::map<uint64_t, uint64_t> taken_;  // base -> bytes, with the gap
  std::map<uint64_t, Range> ranges_;
};

// Device memory as one device may touch it.
class DeviceView final : public kernels::TwinMemory {
 public:
  DeviceView(const AddressSpace& space, int device, const std::set<int>& peers)
      : space_(space), device_(device), peers_(peers) {}
  const std::byte* readable(uint64_t address, uint64_t bytes) const override {
    return find(address, bytes, false);
  }
  std::byte* writable(uint64_t address, uint64_t bytes) const override {
    return find(address, bytes, true);
  }

 private:
  std::byte* find(uint64_t address, uint64_t bytes, bool write) const;

  const AddressSpace& space_;
  const int device_;
  const std::set<int>& peers_;
  // Kernels touch the same few ranges again and again.
  mutable const Range* last_read_ = nullptr;
  mutable const Range* last_written_ = nullptr;
};

}  // namespace kvferry::fake_cuda
