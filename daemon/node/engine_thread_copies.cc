// Copies that the engine asks for: pages to arena, arena to pages, pages to pages, pages to packed
// copies. Each is a job of the copy threads that holds what it touches.
#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/node/engine_thread.h"
#include "daemon/node/packed_copy.h"
#include "daemon/node/registered_layout.h"
#include "daemon/node/task_pool.h"
#include "daemon/ops/log.h"
#include "kernels/host_copy.h"

namespace kvferry::node {
namespace {

// The first byte of each pool that the plan's layout names.
std::vector<std::byte*> pool_bases(const CompiledPlan& plan) {
  std::vector<std::byte*> bases;
  bases.reserve(plan.layout->pools.size());
  for (const auto& pool : plan.layout->pools) bases.push_back(pool->base());
  return bases;
}

engine::Check check_of(engine::CheckKind kind, const std::byte* data, uint64_t bytes) {
  engine::Check check;
  if (kind != engine::CheckKind::kXxh3) return check;
  check.kind = kind;
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, bytes));
  std::copy(std::begin(canonical.digest), std::end(canonical.digest), check.value.begin());
  return check;
}

}  // namespace

void EngineThread::copy_ended(CopyId copy, engine::CopyOutcome outcome, engine::Check check) {
  post(engine::CopyEnded{copy, outcome, check});
}

void EngineThread::execute(engine::Gather& command) {
  auto plan = std::static_pointer_cast<const CompiledPlan>(command.plan);
  std::byte* const to = parts_.arena->address_of(command.region);
  KVFERRY_CHECK(to != nullptr && command.bytes <= command.region.bytes, "a gather fits its region");
  copy::Job job;
  job.bytes = command.bytes;
  job.pools = plan->layout->pools;
  job.copy = [form = &plan->plan->form(), bases = pool_bases(*plan), offset = command.offset, to](
                 uint64_t begin, uint64_t end) {
    return kernels::gather(*form, bases, offset + begin, end - begin, to + begin);
  };
  job.done = [this, plan, copy = command.copy, to, bytes = command.bytes,
              kind = command.check_kind](copy::Outcome outcome) {
    const bool ok = outcome == copy::Outcome::kOk;
    parts_.metrics->copy_ended(ops::CopyKind::kGather, bytes, 0, !ok);
    copy_ended(copy, ok ? engine::CopyOutcome::kOk : engine::CopyOutcome::kFailed,
               ok ? check_of(kind, to, bytes) : engine::Check{});
  };
  if (!parts_.copies->submit(std::move(job)))
    follow_up_.push_back(engine::CopyEnded{command.copy, engine::CopyOutcome::kFailed, {}});
}

void EngineThread::execute(engine::Scatter& command) {
  auto plan = std::static_pointer_cast<const CompiledPlan>(command.plan);
  const std::byte* const from = parts_.arena->address_of(command.region);
  KVFERRY_CHECK(from != nullptr && command.bytes <= command.region.bytes,
                "a scatter fits its region");
  copy::Job job;
  job.bytes = command.bytes;
  job.pools = plan->layout->pools;
  job.copy = [form = &plan->plan->form(), bases = pool_bases(*plan), offset = command.offset, from](
                 uint64_t begin, uint64_t end) {
    return kernels::scatter(*form, bases, offset + begin, end - begin, from + begin);
  };
  job.done = [this, plan, copy = command.copy, bytes = command.bytes](copy::Outcome outcome) {
    const bool ok = outcome == copy::Outcome::kOk;
    parts_.metrics->copy_ended(ops::CopyKind::kScatter, bytes, 0, !ok);
    copy_ended(copy, ok ? engine::CopyOutcome::kOk : engine::CopyOutcome::kFailed);
  };
  const auto submit = [this, copy = command.copy](copy::Job ready) {
    if (!parts_.copies->submit(std::move(ready))) copy_ended(copy, engine::CopyOutcome::kFailed);
  };
  if (command.check.kind == engine::CheckKind::kNone) {
    submit(std::move(job));
    return;
  }
  // Nothing is scattered before the whole chunk has been checked.
  copy::Job verify;
  verify.bytes = 1;
  verify.copy = [from, bytes = command.bytes, check = command.check](uint64_t, uint64_t) {
    return check_of(check.kind, from, bytes) == check;
  };
  verify.done = [this, submit, copy = command.copy,
                 shared = std::make_shared<copy::Job>(std::move(job))](copy::Outcome outcome) {
    if (outcome == copy::Outcome::kOk)
      submit(std::move(*shared));
    else
      copy_ended(copy, engine::CopyOutcome::kCheckMismatch);
  };
  submit(std::move(verify));
}

void EngineThread::execute(engine::ClearTail& command) {
  auto plan = std::static_pointer_cast<const CompiledPlan>(command.plan);
  KVFERRY_CHECK(plan->tail != nullptr, "only a plan with a tail has it cleared");
  copy::Job job;
  job.bytes = 1;  // one piece: it is a part of one block of each plane
  job.pools = plan->layout->pools;
  job.copy = [form = &plan->tail->form(), bases = pool_bases(*plan)](uint64_t, uint64_t) {
    return kernels::clear(*form, bases);
  };
  job.done = [this, plan, copy = command.copy](copy::Outcome outcome) {
    const bool ok = outcome == copy::Outcome::kOk;
    parts_.metrics->copy_ended(ops::CopyKind::kClear, plan->tail->bytes(), 0, !ok);
    copy_ended(copy, ok ? engine::CopyOutcome::kOk : engine::CopyOutcome::kFailed);
  };
  if (!parts_.copies->submit(std::move(job)))
    follow_up_.push_back(engine::CopyEnded{command.copy, engine::CopyOutcome::kFailed, {}});
}

void EngineThread::execute(engine::LocalCopy& command) {
  auto source = std::static_pointer_cast<const CompiledPlan>(command.source);
  auto destination = std::static_pointer_cast<const CompiledPlan>(command.destination);
  copy::Job job;
  job.bytes = command.bytes;
  job.pools = source->layout->pools;
  job.pools.insert(job.pools.end(), destination->layout->pools.begin(),
                   destination->layout->pools.end());
  job.copy = [from = &source->plan->form(), from_bases = pool_bases(*source),
              to = &destination->plan->form(), to_bases = pool_bases(*destination),
              offset = command.offset](uint64_t begin, uint64_t end) {
    return kernels::transfer(*from, from_bases, *to, to_bases, offset + begin, end - begin);
  };
  job.done = [this, source, destination, copy = command.copy,
              bytes = command.bytes](copy::Outcome outcome) {
    const bool ok = outcome == copy::Outcome::kOk;
    parts_.metrics->copy_ended(ops::CopyKind::kFused, bytes, 0, !ok);
    copy_ended(copy, ok ? engine::CopyOutcome::kOk : engine::CopyOutcome::kFailed);
  };
  if (!parts_.copies->submit(std::move(job)))
    follow_up_.push_back(engine::CopyEnded{command.copy, engine::CopyOutcome::kFailed, {}});
}

// Memory for it is taken and its plans are made by a thread that may take its time.
void EngineThread::execute(engine::MakePacked& command) {
  const auto failed = [copy = command.copy](Reason reason, std::string message) {
    return engine::Packed{copy, reason, std::move(message), nullptr, {}};
  };
  auto work = [this, failed, copy = command.copy, send = command.send] {
    auto packing = prepare_packed(*send);
    if (!packing) {
      ops::log_warning("packed copy not made", {ops::field("error", packing.error())});
      post(failed(Reason::kGatherFailed, packing.error().to_string()));
      return;
    }
    copy::Job job;
    job.bytes = packing->source->bytes;
    job.pools = packing->source->layout->pools;
    job.pools.insert(job.pools.end(), packing->layout->pools.begin(), packing->layout->pools.end());
    job.copy = [from = &packing->source->plan->form(), from_bases = pool_bases(*packing->source),
                to = &packing->destination->plan->form(),
                to_bases = pool_bases(*packing->destination)](uint64_t begin, uint64_t end) {
      return kernels::transfer(*from, from_bases, *to, to_bases, begin, end - begin);
    };
    job.done = [this, failed, copy, packed = *packing](copy::Outcome outcome) {
      const bool ok = outcome == copy::Outcome::kOk;
      parts_.metrics->copy_ended(ops::CopyKind::kPack, packed.source->bytes, 0, !ok);
      post(ok ? engine::Packed{copy, Reason::kNone, {}, packed.layout, packed.blocks}
              : failed(Reason::kGatherFailed, {}));
    };
    if (!parts_.copies->submit(std::move(job))) post(failed(Reason::kGatherFailed, {}));
  };
  if (!parts_.packer->post(std::move(work)))
    follow_up_.push_back(failed(Reason::kInternal, "too many packed copies wait to be made"));
}

}  // namespace kvferry::node
