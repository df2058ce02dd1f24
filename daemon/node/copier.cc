#include "daemon/node/copier.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "daemon/base/check.h"
#include "daemon/ops/log.h"
#include "kernels/host_copy.h"

namespace kvferry::node {
namespace {

using kernels::CopyKind;

// The first byte of each pool that the plan's layout names.
std::vector<std::byte*> pool_bases(const CompiledPlan& plan) {
  std::vector<std::byte*> bases;
  bases.reserve(plan.layout->pools.size());
  for (const auto& pool : plan.layout->pools) bases.push_back(pool->base());
  return bases;
}

std::vector<std::shared_ptr<memory::Pool>> pools_of(const Copy& copy) {
  std::vector<std::shared_ptr<memory::Pool>> pools = copy.plan->layout->pools;
  if (copy.other != nullptr)
    pools.insert(pools.end(), copy.other->layout->pools.begin(), copy.other->layout->pools.end());
  return pools;
}

// Of this thread, for a chunk at most: kept, as the next one will want it.
std::span<std::byte> own_memory(uint64_t bytes) {
  thread_local std::vector<std::byte> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return std::span(memory).first(bytes);
}

// The whole copy as one piece.
std::function<bool(uint64_t, uint64_t)> through_function(const Copy& copy, std::byte* flat) {
  return [form = &copy.plan->plan->form(), bases = pool_bases(*copy.plan), offset = copy.offset,
          bytes = copy.bytes, kind = copy.kind, through = copy.through, flat](uint64_t, uint64_t) {
    const std::span<std::byte> own = own_memory(bytes);
    if (kind == CopyKind::kGather) {
      if (!kernels::gather(*form, bases, offset, bytes, own.data()) || !through(own)) return false;
      std::memcpy(flat, own.data(), bytes);
      return true;
    }
    std::memcpy(own.data(), flat, bytes);
    return through(own) && kernels::scatter(*form, bases, offset, bytes, own.data());
  };
}

std::function<bool(uint64_t, uint64_t)> host_function(const Copy& copy, std::byte* flat) {
  const auto* form = &copy.plan->plan->form();
  auto bases = pool_bases(*copy.plan);
  const uint64_t offset = copy.offset;
  switch (copy.kind) {
    case CopyKind::kGather:
      return [form, bases, offset, flat](uint64_t begin, uint64_t end) {
        return kernels::gather(*form, bases, offset + begin, end - begin, flat + begin);
      };
    case CopyKind::kScatter:
      return [form, bases, offset, flat](uint64_t begin, uint64_t end) {
        return kernels::scatter(*form, bases, offset + begin, end - begin, flat + begin);
      };
    case CopyKind::kTransfer:
      return [form, bases, offset, to = &copy.other->plan->form(),
              to_bases = pool_bases(*copy.other)](uint64_t begin, uint64_t end) {
        return kernels::transfer(*form, bases, *to, to_bases, offset + begin, end - begin);
      };
    case CopyKind::kClear:
      return [tail = &copy.plan->tail->form(), bases](uint64_t, uint64_t) {
        return kernels::clear(*tail, bases);
      };
  }
  return {};
}

bool uses_region(const Copy& copy) {
  return copy.kind == CopyKind::kGather || copy.kind == CopyKind::kScatter;
}

// The plan as `device` takes it; null if that has to be worked out first.
DeviceForms::PlanPtr form_on(const CompiledPlan& plan, const gpu::Device& device, bool tail) {
  DeviceForms& forms = tail ? plan.tail_forms : plan.forms;
  if (auto known = forms.find(device)) return known;
  const gpu::Device* const home = plan.layout->device();
  if (home == nullptr) return nullptr;
  // Addresses of one device's memory are the same on all that reach it.
  const auto packed = forms.find(*home)->shared_packed();
  return forms.put(device, std::make_shared<gpu::DevicePlan>(packed));
}

}  // namespace

bool Copier::is_on_host(const Copy& copy) const {
  return copy.plan->layout->device() == nullptr &&
         memory_of(copy).device_of(copy.region) == nullptr;
}

Status Copier::submit(Copy copy) {
  KVFERRY_CHECK(copy.plan != nullptr && copy.done &&
                    (copy.kind == CopyKind::kTransfer) == (copy.other != nullptr) &&
                    (copy.kind != CopyKind::kClear || copy.plan->tail != nullptr),
                "a copy has its plans and somebody to be told");
  KVFERRY_CHECK(!copy.through || (uses_region(copy) && is_on_host(copy)),
                "only copies within host memory are looked through");
  const gpu::Device* const from = copy.plan->layout->device();
  const gpu::Device* to = copy.other == nullptr ? from : copy.other->layout->device();
  if (uses_region(copy)) {
    KVFERRY_CHECK(copy.bytes <= copy.region.bytes && memory_of(copy).holds(copy.region),
                  "a copy fits its region");
    // A GPU goes to host memory by itself.
    const gpu::Device* const home = memory_of(copy).device_of(copy.region);
    if (from == nullptr) to = home;
  }
  if (from == nullptr && to == nullptr) return submit_on_host(std::move(copy));
  if (parts_.queues == nullptr)
    return fail(Code::kUnavailable, "NO_GPU", "this daemon uses no GPU");
  if (from == nullptr || to == nullptr)
    return submit_mixed(from == nullptr ? *to : *from, std::move(copy));
  // Writes to a peer are faster than reads from it.
  return submit_on(*from, std::move(copy));
}

Status Copier::submit_on_host(Copy copy) {
  std::byte* flat = nullptr;
  copy::Job job;
  job.pools = pools_of(copy);
  if (uses_region(copy)) {
    flat = memory_of(copy).host_address(copy.region);
    if (auto pool = memory_of(copy).pool(copy.region)) job.pools.push_back(std::move(pool));
  }
  // A tail is one piece: a part of one block of each plane.
  job.bytes = copy.kind == CopyKind::kClear || copy.through ? 1 : copy.bytes;
  job.copy = copy.through ? through_function(copy, flat) : host_function(copy, flat);
  job.done = [plan = copy.plan, other = copy.other, mapped = copy.mapped,
              done = std::move(copy.done)](copy::Outcome outcome) {
    done(outcome == copy::Outcome::kOk);
  };
  return parts_.copies->submit(std::move(job));
}

Status Copier::find_region(const gpu::Device& device, const Copy& copy, gpu::DeviceJob& job) const {
  const Segments& memory = memory_of(copy);
  job.flat = memory.address_on(device, copy.region);
  if (job.flat == 0)
    return fail(Code::kUnavailable, "ARENA_NOT_PINNED", "the device does not see the arena");
  const gpu::Device* const home = memory.device_of(copy.region);
  job.over_bus = home == nullptr ? kernels::FlatMemory::kHost : kernels::FlatMemory::kDevice;
  // Where it has no access the job fails and says so: to find that out is a call of the driver.
  if (home != nullptr && home != &device) job.peers.push_back(home);
  job.keep = memory.keep(copy.region);
  return {};
}

Status Copier::submit_on(const gpu::Device& device, Copy copy) {
  gpu::DeviceJob job;
  job.kind = copy.kind;
  job.plan = form_on(*copy.plan, device, copy.kind == CopyKind::kClear);
  job.over_bus = kernels::FlatMemory::kDevice;
  job.stream_offset = copy.offset;
  job.bytes = copy.kind == CopyKind::kClear ? copy.plan->tail->bytes() : copy.bytes;
  if (copy.other != nullptr) {
    const gpu::Device& to = *copy.other->layout->device();
    if (&to != &device) job.peers.push_back(&to);
    job.other = form_on(*copy.other, device, false);
  }
  if (uses_region(copy)) KVFERRY_RETURN_IF_ERROR(find_region(device, copy, job));
  return hand_over(device, std::move(job), std::move(copy));
}

Status Copier::hand_over(const gpu::Device& device, gpu::DeviceJob job, Copy copy) {
  gpu::CopyQueue* const queue = parts_.queues->of(device);
  if (queue == nullptr) return tl::unexpected<Error>(device.down_error());
  job.pools = pools_of(copy);
  job.done = [plan = copy.plan, other = copy.other, mapped = copy.mapped,
              done = std::move(copy.done)](gpu::Outcome outcome) {
    done(outcome == gpu::Outcome::kOk);
  };
  return queue->submit(std::move(job));
}

// ---- between the host and a GPU ----------------------------------------------------------------

Status Copier::submit_mixed(const gpu::Device& device, Copy copy) {
  // In a function object that can be copied, as the task pool wants it.
  auto shared = std::make_shared<Copy>(std::move(copy));
  if (parts_.tasks->post([this, &device, shared] { carry_out_mixed(device, std::move(*shared)); }))
    return {};
  return fail(Code::kResourceExhausted, "COPY_QUEUE_FULL", "too many copies wait");
}

Result<std::shared_ptr<const gpu::HostPins>> Copier::pins_of(const RegisteredLayout& layout) {
  if (auto known = layout.pins()) return known;
  auto made = parts_.queues->pin(layout.pools);
  KVFERRY_RETURN_IF_ERROR(made);
  // Giving pages back takes as long as pinning them, and whoever is last may be the engine.
  std::shared_ptr<const gpu::HostPins> pins(
      made->get(), [tasks = parts_.tasks, own = *made](const gpu::HostPins*) mutable {
        auto last = std::make_shared<std::shared_ptr<const gpu::HostPins>>(std::move(own));
        (void)tasks->post([last] { last->reset(); });
      });
  layout.keep_pins(pins);
  return pins;
}

// On a thread of the task pool. The copy was taken, so it is told in any case.
void Copier::carry_out_mixed(const gpu::Device& device, Copy copy) {
  const auto done = copy.done;
  if (const Status taken = carry_out_on(device, std::move(copy)); !taken) {
    ops::log_warning("copy between host and gpu not made", {ops::field("error", taken.error())});
    done(false);
  }
}

Status Copier::carry_out_on(const gpu::Device& device, Copy copy) {
  const CompiledPlan& host = copy.plan->layout->device() == nullptr ? *copy.plan : *copy.other;
  auto pins = pins_of(*host.layout);
  KVFERRY_RETURN_IF_ERROR(pins);
  if (host.forms.find(device) == nullptr) {
    std::vector<uint64_t> bases;
    for (std::size_t i = 0; i < host.layout->pools.size(); ++i)
      bases.push_back((*pins)->address(i, device));
    if (std::find(bases.begin(), bases.end(), 0U) != bases.end())
      return fail(Code::kUnavailable, "PIN_FAILED", "the device does not see the host's pages");
    auto form = DeviceForms::make(*host.plan, bases);
    KVFERRY_RETURN_IF_ERROR(form);
    (void)host.forms.put(device, std::move(*form));
  }
  gpu::DeviceJob job;
  job.kind = copy.kind;
  job.plan = form_on(*copy.plan, device, false);
  if (copy.other != nullptr) job.other = form_on(*copy.other, device, false);
  job.stream_offset = copy.offset;
  job.bytes = copy.bytes;
  if (uses_region(copy)) KVFERRY_RETURN_IF_ERROR(find_region(device, copy, job));
  job.over_bus = kernels::FlatMemory::kHost;
  job.keep = std::make_shared<
      std::pair<std::shared_ptr<const gpu::HostPins>, std::shared_ptr<const void>>>(
      std::move(*pins), std::move(job.keep));
  return hand_over(device, std::move(job), std::move(copy));
}

Status Copier::compute(std::function<bool()> work, std::function<void(bool ok)> done) {
  copy::Job job;
  job.bytes = 1;
  job.copy = [work = std::move(work)](uint64_t, uint64_t) { return work(); };
  job.done = [done = std::move(done)](copy::Outcome outcome) {
    done(outcome == copy::Outcome::kOk);
  };
  return parts_.copies->submit(std::move(job));
}

}  // namespace kvferry::node
