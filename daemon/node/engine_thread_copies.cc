// Copies that the engine asks for: pages to arena, arena to pages, pages to pages, pages to packed
// copies. The copier carries them out; each holds what it touches.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/node/engine_thread.h"
#include "daemon/node/link_manager.h"
#include "daemon/node/packed_copy.h"
#include "daemon/node/registered_layout.h"
#include "daemon/node/task_pool.h"
#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

using kernels::CopyKind;

engine::CopyOutcome outcome_of(bool ok) {
  return ok ? engine::CopyOutcome::kOk : engine::CopyOutcome::kFailed;
}

}  // namespace

// Nothing if it takes a key of a link that has ended, and with it the leg.
std::optional<link::ChunkCheck> EngineThread::checker_of(LinkId link, bool sent,
                                                         engine::CheckKind kind, uint64_t number) {
  if (kind != engine::CheckKind::kGmac) return link::ChunkCheck(kind);
  const auto key = links_.chunk_key(link, sent, number);
  if (!key) return std::nullopt;
  return link::ChunkCheck(*key, number);
}

void EngineThread::copy_ended(CopyId copy, engine::CopyOutcome outcome, engine::Check check) {
  post(engine::CopyEnded{copy, outcome, check});
}

// Told to the engine if it is not taken, which is logged: the queues are as large as what the
// engine has outstanding, so it is a device that is down.
void EngineThread::submit(CopyId id, Copy copy) {
  const Status taken = copier_.submit(std::move(copy));
  if (taken) return;
  copy_refused(taken.error());
  copy_ended(id, engine::CopyOutcome::kFailed);
}

void EngineThread::copy_refused(const Error& error) {
  const Time now = monotonic_now();
  const int64_t last = last_refusal_ns_.load(std::memory_order_relaxed);
  if (last != 0 && now.ns - last < Duration(std::chrono::seconds(1)).count()) return;
  last_refusal_ns_.store(now.ns, std::memory_order_relaxed);
  ops::log_warning("copy refused", {ops::field("error", error)});
}

// The leg has failed, and so would each to come: on a new link, without that arena, chunks go by
// the rails.
void EngineThread::distrust(const engine::PeerArena& arena) {
  if (parts_.distrust) parts_.distrust(arena);
  parts_.links->end_link(arena.link);
}

void EngineThread::execute(engine::Gather& command) {
  Copy copy;
  copy.kind = CopyKind::kGather;
  copy.plan = std::static_pointer_cast<const CompiledPlan>(command.plan);
  copy.offset = command.offset;
  copy.bytes = command.bytes;
  copy.region = command.region;
  if (command.mapped) {
    if (parts_.peer_arena) copy.mapped = parts_.peer_arena(*command.mapped);
    // What the peer has said of its region is the peer's word.
    if (copy.mapped == nullptr || copy.bytes > copy.region.bytes ||
        !copy.mapped->holds(copy.region)) {
      copy_refused({Code::kFailedPrecondition,
                    "NOT_MAPPED",
                    "a peer's region is not in what is mapped of its arenas",
                    {}});
      copy_ended(command.copy, engine::CopyOutcome::kFailed);
      return;
    }
  }
  KVFERRY_CHECK((copy.mapped != nullptr ? *copy.mapped : *parts_.arenas).holds(command.region),
                "a gather has a region");
  const auto made = std::make_shared<engine::Check>();
  const auto checker = checker_of(command.link, true, command.check_kind,
                                  links_.chunk_number(command.link, command.copy.value));
  if (command.check_kind != engine::CheckKind::kNone && copier_.is_on_host(copy))
    copy.through = [made, checker](std::span<const std::byte> data) {
      if (checker) *made = checker->of(data);
      return checker.has_value();
    };
  copy.done = [this, id = command.copy, bytes = command.bytes, arena = command.mapped, made,
               checker, seen = copy.through != nullptr, region = command.region,
               mapped = copy.mapped, kind = command.check_kind](bool ok) {
    parts_.metrics->copy_ended(ops::CopyKind::kGather, bytes, !ok);
    if (!ok && arena) distrust(*arena);
    if (!ok || kind == engine::CheckKind::kNone || seen) {
      copy_ended(id, outcome_of(ok), *made);
      return;
    }
    // By a GPU, into host memory; the check is not made on the thread that looks after it.
    const Segments& memory = mapped != nullptr ? *mapped : *parts_.arenas;
    const std::span<const std::byte> data(memory.host_address(region), bytes);
    const Status taken = copier_.compute(
        [made, checker, data, mapped] {
          if (checker) *made = checker->of(data);
          return checker.has_value();
        },
        [this, id, made](bool computed) { copy_ended(id, outcome_of(computed), *made); });
    if (!taken) copy_ended(id, engine::CopyOutcome::kFailed);
  };
  submit(command.copy, std::move(copy));
}

void EngineThread::execute(engine::Scatter& command) {
  Copy copy;
  copy.kind = CopyKind::kScatter;
  copy.plan = std::static_pointer_cast<const CompiledPlan>(command.plan);
  copy.offset = command.offset;
  copy.bytes = command.bytes;
  copy.region = command.region;
  KVFERRY_CHECK(parts_.arenas->holds(command.region), "a scatter has a region");
  const auto wrong = std::make_shared<bool>(false);
  copy.done = [this, id = command.copy, bytes = command.bytes, wrong](bool ok) {
    parts_.metrics->copy_ended(ops::CopyKind::kScatter, bytes, !ok);
    copy_ended(id, *wrong ? engine::CopyOutcome::kCheckMismatch : outcome_of(ok));
  };
  if (command.check.kind == engine::CheckKind::kNone) {
    submit(command.copy, std::move(copy));
    return;
  }
  // Nothing is scattered before the whole chunk has been checked.
  auto right = [check = command.check, wrong,
                checker = checker_of(command.link, false, command.check.kind,
                                     command.check.number)](std::span<const std::byte> data) {
    *wrong = checker && !checker->matches(data, check);
    return checker && !*wrong;
  };
  if (copier_.is_on_host(copy)) {
    copy.through = std::move(right);
    submit(command.copy, std::move(copy));
    return;
  }
  const std::span<const std::byte> data(parts_.arenas->host_address(command.region), command.bytes);
  auto shared = std::make_shared<Copy>(std::move(copy));
  const Status taken = copier_.compute([data, right = std::move(right)] { return right(data); },
                                       [this, id = command.copy, shared](bool is_right) {
                                         if (is_right)
                                           submit(id, std::move(*shared));
                                         else
                                           shared->done(false);
                                       });
  if (!taken) copy_ended(command.copy, engine::CopyOutcome::kFailed);
}

void EngineThread::execute(engine::ClearTail& command) {
  Copy copy;
  copy.kind = CopyKind::kClear;
  copy.plan = std::static_pointer_cast<const CompiledPlan>(command.plan);
  KVFERRY_CHECK(copy.plan->tail != nullptr, "only a plan with a tail has it cleared");
  copy.done = [this, id = command.copy, bytes = copy.plan->tail->bytes()](bool ok) {
    parts_.metrics->copy_ended(ops::CopyKind::kClear, bytes, !ok);
    copy_ended(id, outcome_of(ok));
  };
  submit(command.copy, std::move(copy));
}

void EngineThread::execute(engine::LocalCopy& command) {
  Copy copy;
  copy.kind = CopyKind::kTransfer;
  copy.plan = std::static_pointer_cast<const CompiledPlan>(command.source);
  copy.other = std::static_pointer_cast<const CompiledPlan>(command.destination);
  copy.offset = command.offset;
  copy.bytes = command.bytes;
  copy.done = [this, id = command.copy, bytes = command.bytes](bool ok) {
    parts_.metrics->copy_ended(ops::CopyKind::kFused, bytes, !ok);
    copy_ended(id, outcome_of(ok));
  };
  submit(command.copy, std::move(copy));
}

// Memory for it is taken and its plans are made by a thread that may take its time.
void EngineThread::execute(engine::MakePacked& command) {
  const auto failed = [copy = command.copy](Reason reason, std::string message) {
    return engine::Packed{copy, reason, std::move(message), nullptr, {}};
  };
  auto work = [this, failed, id = command.copy, send = command.send] {
    auto packing = prepare_packed(*send);
    if (!packing) {
      ops::log_warning("packed copy not made", {ops::field("error", packing.error())});
      post(failed(Reason::kGatherFailed, packing.error().to_string()));
      return;
    }
    Copy copy;
    copy.kind = CopyKind::kTransfer;
    copy.plan = packing->source;
    copy.other = packing->destination;
    copy.bytes = packing->source->bytes;
    copy.done = [this, failed, id, packed = *packing](bool ok) {
      parts_.metrics->copy_ended(ops::CopyKind::kPack, packed.source->bytes, !ok);
      post(ok ? engine::Packed{id, Reason::kNone, {}, packed.layout, packed.blocks}
              : failed(Reason::kGatherFailed, {}));
    };
    if (const Status taken = copier_.submit(std::move(copy)); !taken) {
      copy_refused(taken.error());
      post(failed(Reason::kGatherFailed, taken.error().to_string()));
    }
  };
  if (!parts_.packer->post(std::move(work)))
    follow_up_.push_back(failed(Reason::kInternal, "too many packed copies wait to be made"));
}

// ---- ready conditions
// ----------------------------------------------------------------------------

void EngineThread::execute(engine::WatchCondition& command) {
  if (command.ready.kind != engine::ReadyCondition::Kind::kCudaEvent) {
    conditions_[command.condition] = {command.worker, command.ready.word, command.ready.value};
    return;
  }
  const auto told = [this, id = command.condition](gpu::EventState state) {
    if (state == gpu::EventState::kReached)
      post(engine::ConditionMet{id});
    else
      post(engine::ConditionFailed{id});
  };
  const auto layout = std::dynamic_pointer_cast<const RegisteredLayout>(command.layout);
  const gpu::Device* const device = layout == nullptr ? nullptr : layout->device();
  gpu::CopyQueue* const queue = parts_.queues == nullptr ? nullptr
                                : device != nullptr      ? parts_.queues->of(*device)
                                                         : parts_.queues->any();
  Status watched = fail(Code::kUnavailable, "NO_GPU", "this daemon uses no GPU");
  if (queue != nullptr)
    watched = queue->watch_event(command.condition.value, command.ready.event, told);
  if (watched) {
    events_[command.condition] = {command.worker, queue};
    return;
  }
  copy_refused(watched.error());
  follow_up_.push_back(engine::ConditionFailed{command.condition});
}

void EngineThread::execute(engine::UnwatchCondition& command) {
  conditions_.erase(command.condition);
  const auto event = events_.find(command.condition);
  if (event == events_.end()) return;
  event->second.queue->unwatch_event(command.condition.value);
  events_.erase(event);
}

void EngineThread::forget_conditions(WorkerId worker) {
  std::erase_if(conditions_, [&](const auto& entry) { return entry.second.worker == worker; });
  std::erase_if(events_, [&](const auto& entry) {
    if (entry.second.worker != worker) return false;
    entry.second.queue->unwatch_event(entry.first.value);
    return true;
  });
}

}  // namespace kvferry::node
