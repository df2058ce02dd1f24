// This daemon's bounce memory. First the arenas that the rails use: arena 0 in host memory, then
// one in the memory of each GPU that has its own. Then the mapped ones, which peers write by
// themselves and which are for landing alone: one in host memory and one on each GPU, where there
// are any. Numbered as EngineConfig::arenas, with segments numbered through.
//
// Made at start by arena_setup.h; from then on constant, for any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/gpu/device_arena.h"
#include "daemon/memory/shared_memory.h"
#include "daemon/node/arena_lender.h"
#include "daemon/node/segments.h"
#include "daemon/rails/rails_client.h"
#include "daemon/rpc/admin_backend.h"

namespace kvferry::node {

// Says from which NUMA nodes the pages of a mapping come that nobody has touched yet.
using BindMemory = std::function<Status(const void* data, uint64_t bytes)>;

class Arenas {
 public:
  struct Arena {
    rpc::MemoryChoice choice;             // where, which kind, and why
    const gpu::Device* device = nullptr;  // null: host memory
    bool mapped = false;
    uint32_t first_segment = 0;
    std::vector<uint64_t> segment_bytes;             // what regions are cut from
    std::shared_ptr<const gpu::DeviceArena> memory;  // of a device's
    std::string binding_problem;  // the first error of BindMemory; the arena works all the same
  };

  // Arena 0, of shared host memory, which no GPU sees yet. Blocks while it is zeroed. `bind`, if
  // any, is called for each host segment here and later. Errors of HostArena::create.
  static Result<std::unique_ptr<Arenas>> create(const std::vector<uint64_t>& segment_bytes,
                                                BindMemory bind = nullptr);

  // Adding, in the order that stands above. Host memory comes as that of arena 0 does.
  Status add_mapped_host(const std::vector<uint64_t>& segment_bytes);
  // For the pages of that device. `segment_bytes` as it was asked for.
  void add(std::shared_ptr<const gpu::DeviceArena> memory, bool mapped,
           const std::vector<uint64_t>& segment_bytes, rpc::MemoryChoice choice);
  // Registers with all devices what host memory is not yet, which makes it pinned host memory. All
  // of it or nothing; a device that does not see a segment is taken down. FAILED_PRECONDITION
  // PIN_FAILED if none does.
  Status pin(const gpu::Devices& devices);
  void set_host_reason(std::string reason) { all_[0].choice.reason = std::move(reason); }

  const std::vector<Arena>& all() const { return all_; }
  const Segments& segments() const { return segments_; }
  uint64_t total_bytes() const;
  // Whether all arenas that the rails use are in host memory.
  bool rails_use_host_only() const;
  // The number of the arena through which pages of that device go; null: pages of the host.
  uint32_t of(const gpu::Device* device) const;
  // The mapped one where they land if the sender reaches it; nothing where there is none.
  std::optional<uint32_t> mapped_of(const gpu::Device* device) const;

  // The segments that the rails process gets, in the order of their numbers, which begin at 0. The
  // descriptors stay this object's. Calls the driver. Errors of DeviceArena::export_segment.
  Result<std::vector<rails::Segment>> for_rails();
  // The mapped arenas, as peers get them; descriptors and errors as above.
  Result<std::vector<LentArena>> lent();

 private:
  Arenas() = default;
  Status add_host(const std::string& name, const std::vector<uint64_t>& segment_bytes, bool mapped);
  Arena& next(bool mapped, const std::vector<uint64_t>& segment_bytes, rpc::MemoryChoice choice);

  BindMemory bind_;
  std::vector<memory::HostArena> hosts_;
  std::vector<int> host_fds_;  // by segment number; -1: not in host memory
  std::vector<UniqueFd> exported_;
  std::vector<Arena> all_;
  Segments segments_;  // goes first: it holds what registers host memory
};

}  // namespace kvferry::node
