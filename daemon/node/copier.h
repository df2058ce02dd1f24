// Carries out copies where their memory is: between host pages and the arena by the copy threads,
// for pages on a GPU by the queue of that GPU. Two layouts of one daemon may lie on the host and on
// a GPU, or on two GPUs, and pages of the host may go to a peer's arena on a GPU: then the GPU
// copies, and what it has not yet seen is shown to it first.
//
// Any thread; nothing blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "daemon/base/result.h"
#include "daemon/copy/copy_pool.h"
#include "daemon/gpu/queues.h"
#include "daemon/node/registered_layout.h"
#include "daemon/node/segments.h"
#include "daemon/node/task_pool.h"

namespace kvferry::node {

struct Copy {
  kernels::CopyKind kind = kernels::CopyKind::kGather;
  std::shared_ptr<const CompiledPlan> plan;   // clear: its tail, all of it
  std::shared_ptr<const CompiledPlan> other;  // transfer: where to
  uint64_t offset = 0;                        // in the stream
  uint64_t bytes = 0;
  // Gather, scatter: at least `bytes`, in this daemon's arenas, or if there is `mapped` in what has
  // been mapped of a peer's. Of pages on the host it is in host memory, but for a gather into
  // `mapped`; of pages on a GPU it is in memory that this GPU sees.
  memory::Region region;
  std::shared_ptr<const Segments> mapped;
  // Gather, scatter between pages and an arena both in host memory: one that has it goes by memory
  // that nobody but this process can write, and it sees the bytes there; the rails process, which
  // may have been taken over, cannot change them between a look and their use. Of a scatter it may
  // say no before a page is written, and the copy fails. Runs on a copy thread; must not wait.
  std::function<bool(std::span<const std::byte>)> through;
  // Called exactly once for a copy that was taken, when nothing touches its memory any more; on one
  // of several threads, which it must not keep for long.
  std::function<void(bool ok)> done;
};

class Copier {
 public:
  struct Parts {
    const Segments* arenas = nullptr;
    copy::CopyPool* copies = nullptr;
    gpu::Queues* queues = nullptr;  // null: no GPU
    TaskPool* tasks = nullptr;      // for what takes time before a copy
  };
  // All outlive it.
  explicit Copier(Parts parts) : parts_(parts) {}

  // Errors of the copy threads and queues: then the copy is dropped and done is not called. Between
  // GPUs that do not reach each other it is taken and fails.
  Status submit(Copy copy);
  // Whether pages and region are in host memory, so that `through` may be given.
  bool is_on_host(const Copy& copy) const;
  // `work` on a copy thread, for checks over the arena's bytes; then done(work()).
  Status compute(std::function<bool()> work, std::function<void(bool ok)> done);

 private:
  Status submit_on_host(Copy copy);
  Status submit_on(const gpu::Device& device, Copy copy);
  // Of pages on the host and memory on a GPU.
  Status submit_mixed(const gpu::Device& device, Copy copy);
  void carry_out_mixed(const gpu::Device& device, Copy copy);
  Status carry_out_on(const gpu::Device& device, Copy copy);
  const Segments& memory_of(const Copy& copy) const {
    return copy.mapped != nullptr ? *copy.mapped : *parts_.arenas;
  }
  // The region as kernels on the device find it. UNAVAILABLE ARENA_NOT_PINNED.
  Status find_region(const gpu::Device& device, const Copy& copy, gpu::DeviceJob& job) const;
  Result<std::shared_ptr<const gpu::HostPins>> pins_of(const RegisteredLayout& layout);
  Status hand_over(const gpu::Device& device, gpu::DeviceJob job, Copy copy);

  const Parts parts_;
};

}  // namespace kvferry::node
