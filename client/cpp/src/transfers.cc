#include "client/cpp/src/transfers.h"

#include <algorithm>
#include <utility>

#include "daemon/base/reason.h"

namespace kvferry::client {

namespace cp = control_page;

namespace {

constexpr uint32_t kReleased = cp::kSourceReleased | cp::kDestReleased;

TransferState state_of(const cp::Record& record) {
  return record.state <= static_cast<uint8_t>(TransferState::kCancelled)
             ? static_cast<TransferState>(record.state)
             : TransferState::kFailed;
}

Delivery delivery_of(const cp::Record& record) {
  return record.delivery <= static_cast<uint8_t>(Delivery::kDelivered)
             ? static_cast<Delivery>(record.delivery)
             : Delivery::kUnknown;
}

std::string_view reason_name(uint16_t number) {
  return name_of(static_cast<Reason>(number));
}

Error unknown_transfer() {
  return {Code::kNotFound, "TRANSFER_UNKNOWN", "no transfer has this handle", "transfer", {}};
}

EventKind end_event(TransferState state) {
  switch (state) {
    case TransferState::kDelivered:
      return EventKind::kDelivered;
    case TransferState::kCompleted:
      return EventKind::kCompleted;
    case TransferState::kCancelled:
      return EventKind::kCancelled;
    default:
      return EventKind::kFailed;
  }
}

}  // namespace

Result<Transfers::Opened> Transfers::begin(Side side, std::string key) {
  MutexLock lock(mutex_);
  if (unread_ >= max_unread_)
    return Error{
        Code::kResourceExhausted, "EVENTS_UNREAD", "too many refusals wait to be polled", {}, {}};
  if (const auto it = by_key_.find(key); it != by_key_.end()) {
    ++transfers_.at(it->second)->operations;
    return Opened{it->second, false};
  }
  const TransferHandle handle = next_++;
  auto transfer = std::make_unique<Transfer>();
  transfer->handle = handle;
  transfer->side = side;
  transfer->key = key;
  transfer->home = attachment_;
  transfer->operations = 1;
  by_key_.emplace(std::move(key), handle);
  transfers_.emplace(handle, std::move(transfer));
  return Opened{handle, true};
}

Status Transfers::begin(TransferHandle handle) {
  MutexLock lock(mutex_);
  Transfer* transfer = find(handle);
  if (transfer == nullptr) return unknown_transfer();
  ++transfer->operations;
  return {};
}

void Transfers::undo(TransferHandle handle, bool created) {
  MutexLock lock(mutex_);
  Transfer* transfer = find(handle);
  if (transfer == nullptr) return;
  if (transfer->operations > 0) --transfer->operations;
  if (created && transfer->operations == 0) remove(*transfer);
}

void Transfers::remove(const Transfer& transfer) {
  by_key_.erase(transfer.key);
  transfers_.erase(transfer.handle);
}

void Transfers::remove_if_declined(const Transfer& t) {
  if (t.declined && !t.accepted && t.operations == 0 && !t.refusal) remove(t);
}

TransferHandle Transfers::handle_of(const std::string& key) const {
  MutexLock lock(mutex_);
  const auto it = by_key_.find(key);
  return it == by_key_.end() ? 0 : it->second;
}

void Transfers::settle(TransferHandle handle, Time deadline) {
  MutexLock lock(mutex_);
  while (true) {
    const Transfer* transfer = find(handle);
    if (transfer == nullptr || transfer->lost || transfer->operations == 0) return;
    if (!answered_.wait_until(mutex_, deadline)) return;
  }
}

bool Transfers::answer(TransferHandle handle, OperationAnswer answer) {
  MutexLock lock(mutex_);
  answered_.notify_all();
  if (answer.accepted)
    ++counts_.accepted;
  else
    ++counts_.rejected;
  Transfer* transfer = find(handle);
  if (transfer != nullptr) {
    if (transfer->operations > 0 && !answer.decline) --transfer->operations;
    if (answer.accepted) {
      if (answer.decline)
        transfer->declined = true;
      else if (!answer.claim)
        transfer->accepted = true;
      remove_if_declined(*transfer);
    }
  }
  if (!answer.error) return false;
  ++unread_;
  if (transfer != nullptr && !answer.decline) {
    transfer->refusal = answer.error;
    transfer->rejections.push_back(std::move(*answer.error));
    mark(*transfer);
    return true;
  }
  Event event;
  event.kind = EventKind::kRejected;
  event.reason = "REJECTED";
  event.error = std::move(answer.error);
  global_.push_back(std::move(event));
  return true;
}

void Transfers::attach(std::shared_ptr<Attachment> attachment) {
  MutexLock lock(mutex_);
  attachment_ = std::move(attachment);
  tail_ = 0;
  retry_.clear();
  draining_ = false;
}

void Transfers::lose() {
  MutexLock lock(mutex_);
  answered_.notify_all();
  if (!attachment_) return;
  look();
  retry_.clear();  // slots of a page that nobody will finish writing
  attachment_.reset();
  for (auto& [handle, transfer] : transfers_) {
    Transfer& t = *transfer;
    if (t.lost || (refused(t) && t.operations == 0)) continue;
    t.lost = true;
    t.operations = 0;
    t.accepted = true;
    if (!is_terminal(state_of(t.seen))) {
      t.seen.state = static_cast<uint8_t>(TransferState::kFailed);
      t.seen.reason = static_cast<uint16_t>(Reason::kDaemonRestarted);
    }
    mark(t);
  }
}

void Transfers::exited(const Attachment* attachment) {
  MutexLock lock(mutex_);
  for (auto& [handle, transfer] : transfers_) {
    Transfer& t = *transfer;
    if (!t.lost || t.home.get() != attachment || (t.seen.flags & kReleased) != 0) continue;
    t.seen.flags |= t.side == Side::kSender ? cp::kSourceReleased : cp::kDestReleased;
    t.seen.flags &= ~uint32_t{cp::kMemoryInUse};
    t.seen.released_reason = static_cast<uint16_t>(Reason::kDaemonRestarted);
    mark(t);
  }
}

void Transfers::announce(EventKind kind, std::optional<Error> error) {
  Event event;
  event.kind = kind;
  event.reason = "NONE";
  event.error = std::move(error);
  MutexLock lock(mutex_);
  // Restarts that nobody polls for are told once.
  for (const Event& waiting : global_)
    if (waiting.kind == kind && kind != EventKind::kRejected && !waiting.error && !event.error)
      return;
  if (global_.size() >= max_unread_ + 16) return;
  if (kind == EventKind::kRejected) {
    event.reason = "REJECTED";
    ++unread_;
  }
  global_.push_back(std::move(event));
}

void Transfers::look() {
  if (!attachment_) return;
  const cp::StatusReader& page = attachment_->page();
  if (!retry_.empty()) {
    std::vector<uint32_t> again;
    again.swap(retry_);
    for (const uint32_t slot : again) look_at(slot);
  }
  changed_.clear();
  if (page.take_changed(tail_, [&out = changed_](uint32_t slot) { out.push_back(slot); })) {
    for (const uint32_t slot : changed_) look_at(slot);
  } else {
    ++counts_.overflows;
    for (uint32_t slot = 0; slot < page.slot_count(); ++slot) look_at(slot);
  }
  if (!draining_ && page.draining()) {
    draining_ = true;
    Event event;
    event.kind = EventKind::kDraining;
    event.reason = "NONE";
    global_.push_back(std::move(event));
  }
}

void Transfers::look_at(uint32_t slot) {
  cp::Record record;
  if (!attachment_->page().read(slot, record)) {
    retry_.push_back(slot);
    return;
  }
  if (record.client_handle == 0) return;
  Transfer* transfer = find(record.client_handle);
  if (transfer == nullptr || transfer->lost) return;
  transfer->slot = slot;
  transfer->seen = record;
  transfer->accepted = true;
  mark(*transfer);
}

void Transfers::refresh(Transfer& transfer) {
  if (transfer.lost || !attachment_ || transfer.home != attachment_) return;
  if (transfer.slot)
    look_at(*transfer.slot);
  else
    look();
}

void Transfers::mark(Transfer& transfer) {
  if (transfer.dirty) return;
  transfer.dirty = true;
  dirty_.push_back(transfer.handle);
}

Transfers::Transfer* Transfers::find(TransferHandle handle) {
  const auto it = transfers_.find(handle);
  return it == transfers_.end() ? nullptr : it->second.get();
}

bool Transfers::next_event(Transfer& t, Event& out) {
  out = Event{};
  out.transfer = t.handle;
  out.side = t.side;
  out.state = state_of(t.seen);
  out.reason = reason_name(t.seen.reason);
  out.slices = t.seen.slices;
  out.bytes_done = t.seen.bytes_done;
  out.bytes_total = t.seen.bytes_total;
  out.delivery = delivery_of(t.seen);
  if (!t.rejections.empty()) {
    out.kind = EventKind::kRejected;
    out.error = std::move(t.rejections.front());
    out.reason = "REJECTED";
    t.rejections.pop_front();
    --unread_;
    return true;
  }
  const uint32_t fresh = t.seen.flags & ~t.told.flags;
  if ((fresh & cp::kReceiverReady) != 0) {
    t.told.flags |= cp::kReceiverReady;
    out.kind = EventKind::kReceiverReady;
    return true;
  }
  if (t.side == Side::kReceiver && t.seen.slices > t.told.slices) {
    t.told.slices = t.seen.slices;
    out.kind = EventKind::kSliceReceived;
    return true;
  }
  const bool ends = is_terminal(out.state) && !is_terminal(state_of(t.told));
  const bool releases = (fresh & kReleased) != 0;
  // A source is normally released before the end is known; a destination only after it.
  if (releases && (!ends || out.state == TransferState::kDelivered)) {
    t.told.flags |= kReleased;
    out.kind = t.side == Side::kSender ? EventKind::kSourceReleased : EventKind::kDestReleased;
    out.reason = reason_name(t.seen.released_reason);
    return true;
  }
  if (ends) {
    t.told.state = t.seen.state;
    out.kind = end_event(out.state);
    return true;
  }
  return false;
}

std::size_t Transfers::take(std::span<Event> out) {
  MutexLock lock(mutex_);
  look();
  std::size_t count = 0;
  while (count < out.size() && !global_.empty()) {
    if (global_.front().kind == EventKind::kRejected && unread_ > 0) --unread_;
    out[count++] = std::move(global_.front());
    global_.pop_front();
  }
  while (count < out.size() && !dirty_.empty()) {
    Transfer* transfer = find(dirty_.front());
    if (transfer != nullptr && next_event(*transfer, out[count])) {
      ++count;
      continue;
    }
    if (transfer != nullptr) transfer->dirty = false;
    dirty_.pop_front();
  }
  counts_.events += count;
  return count;
}

bool Transfers::over(const Transfer& t) {
  return is_terminal(state_of(t.seen)) && (t.seen.flags & kReleased) != 0;
}

bool Transfers::refused(const Transfer& t) {
  return !t.accepted && t.operations == 0 && t.refusal.has_value();
}

std::optional<Result<TransferStatus>> Transfers::ended(TransferHandle handle) {
  MutexLock lock(mutex_);
  look();
  Transfer* transfer = find(handle);
  if (transfer == nullptr) return Result<TransferStatus>(unknown_transfer());
  const bool refusal = refused(*transfer);
  if (!over(*transfer) && !refusal) return std::nullopt;
  Event event;
  while (next_event(*transfer, event)) ++counts_.events;
  if (transfer->dirty) {
    transfer->dirty = false;
    std::erase(dirty_, handle);
  }
  if (refusal) return Result<TransferStatus>(*transfer->refusal);
  return Result<TransferStatus>(status_of(*transfer));
}

bool Transfers::pending() const {
  MutexLock lock(mutex_);
  return !dirty_.empty() || !global_.empty();
}

bool Transfers::unsettled() const {
  MutexLock lock(mutex_);
  return !retry_.empty();
}

TransferStatus Transfers::status_of(const Transfer& t) {
  TransferStatus out;
  out.state = state_of(t.seen);
  out.side = t.side;
  out.reason = reason_name(t.seen.reason);
  out.released_reason = reason_name(t.seen.released_reason);
  out.released = (t.seen.flags & kReleased) != 0;
  out.aux_ready = (t.seen.flags & cp::kAuxReady) != 0;
  out.memory_in_use = (t.seen.flags & cp::kMemoryInUse) != 0;
  out.delivery = delivery_of(t.seen);
  out.slices = t.seen.slices;
  out.bytes_done = t.seen.bytes_done;
  out.bytes_total = t.seen.bytes_total;
  return out;
}

Result<TransferStatus> Transfers::status(TransferHandle handle) {
  MutexLock lock(mutex_);
  Transfer* transfer = find(handle);
  if (transfer == nullptr) return unknown_transfer();
  refresh(*transfer);
  return status_of(*transfer);
}

Result<std::optional<std::string>> Transfers::aux(TransferHandle handle) {
  MutexLock lock(mutex_);
  Transfer* transfer = find(handle);
  if (transfer == nullptr) return unknown_transfer();
  refresh(*transfer);
  if ((transfer->seen.flags & cp::kAuxReady) == 0)
    return Error{Code::kFailedPrecondition,
                 "AUX_NOT_READY",
                 "the transfer is not completed, or came without aux",
                 {},
                 {}};
  if ((transfer->seen.flags & cp::kAuxByCall) != 0 || !transfer->slot || !transfer->home)
    return std::optional<std::string>();
  std::string out(transfer->seen.aux_length, '\0');
  // Also after the daemon's end: its page is still mapped.
  if (!transfer->home->page().read_aux(*transfer->slot, transfer->seen,
                                       std::as_writable_bytes(std::span(out))))
    return std::optional<std::string>();
  return std::optional<std::string>(std::move(out));
}

Result<Transfers::Closing> Transfers::may_close(TransferHandle handle) {
  MutexLock lock(mutex_);
  Transfer* transfer = find(handle);
  if (transfer == nullptr) return unknown_transfer();
  refresh(*transfer);
  const bool refusal = refused(*transfer);
  if (!over(*transfer) && !refusal)
    return Error{Code::kFailedPrecondition,
                 "TRANSFER_OPEN",
                 "the transfer has not ended, or its memory is not released",
                 "transfer",
                 {}};
  return transfer->lost || refusal ? Closing::kLocalOnly : Closing::kTellDaemon;
}

void Transfers::forget(TransferHandle handle) {
  MutexLock lock(mutex_);
  Transfer* transfer = find(handle);
  if (transfer == nullptr) return;
  unread_ -= std::min(unread_, transfer->rejections.size());
  remove(*transfer);
}

bool Transfers::draining() const {
  MutexLock lock(mutex_);
  return attachment_ != nullptr && attachment_->page().draining();
}

Transfers::Counts Transfers::counts() const {
  MutexLock lock(mutex_);
  Counts out = counts_;
  out.open = transfers_.size();
  return out;
}

}  // namespace kvferry::client
