#include "daemon/rpc/control_page.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstring>

namespace kvferry::rpc {

namespace cp = control_page;

Result<std::unique_ptr<ControlPage>> ControlPage::create(const ControlPageConfig& config,
                                                         const BootId& boot) {
  if (config.slots == 0 || config.slots > cp::kMaxSlots || config.ring_capacity == 0 ||
      config.ring_capacity > 4 * cp::kMaxSlots || !std::has_single_bit(config.ring_capacity) ||
      config.aux_bytes % 8 != 0 || config.aux_bytes > cp::kMaxAuxBytes ||
      config.timeline_words > cp::kMaxSlots || config.done_words > cp::kMaxSlots ||
      config.timeline_words + config.done_words == 0)
    return fail(Code::kInvalidArgument, "CONTROL_PAGE_CONFIG",
                "a size of the control page is out of range");
  const uint64_t slots_bytes = uint64_t{config.slots} * cp::kSlotBytes;
  const uint64_t ring_bytes = round_up(uint64_t{config.ring_capacity} * 4, 64);
  const uint64_t aux_bytes = uint64_t{config.slots} * config.aux_bytes;
  auto status = memory::SharedMemory::create(
      "kvferry-status", cp::kHeaderBytes + slots_bytes + ring_bytes + aux_bytes);
  if (!status) return tl::unexpected<Error>(std::move(status).error());
  // Mapped here before the seal, so this mapping stays writable and no later one is.
  KVFERRY_RETURN_IF_ERROR(status->seal(F_SEAL_FUTURE_WRITE | F_SEAL_SEAL));
  auto words = memory::SharedMemory::create(
      "kvferry-words", (uint64_t{config.timeline_words} + config.done_words) * 8);
  if (!words) return tl::unexpected<Error>(std::move(words).error());
  KVFERRY_RETURN_IF_ERROR(words->seal(F_SEAL_SEAL));
  int pair[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0)
    return fail_errno("CONTROL_PAGE_FAILED", "socketpair", errno);
  std::unique_ptr<ControlPage> page(new ControlPage(config, std::move(*status), std::move(*words),
                                                    UniqueFd(pair[0]), UniqueFd(pair[1])));
  page->write_header(boot);
  return page;
}

ControlPage::ControlPage(const ControlPageConfig& config, memory::SharedMemory status,
                         memory::SharedMemory words, UniqueFd doorbell, UniqueFd worker_doorbell)
    : config_(config),
      status_(std::move(status)),
      words_(std::move(words)),
      doorbell_(std::move(doorbell)),
      worker_doorbell_(std::move(worker_doorbell)),
      slots_offset_(cp::kHeaderBytes),
      ring_offset_(slots_offset_ + uint64_t{config.slots} * cp::kSlotBytes),
      aux_offset_(ring_offset_ + round_up(uint64_t{config.ring_capacity} * 4, 64)),
      slots_(config.slots) {}

void ControlPage::write_header(const BootId& boot) {
  cp::StatusHeader header{};
  header.magic = cp::kMagic;
  header.version = cp::kVersion;
  header.slot_count = config_.slots;
  header.ring_capacity = config_.ring_capacity;
  header.aux_bytes = config_.aux_bytes;
  header.slots_offset = slots_offset_;
  header.ring_offset = ring_offset_;
  header.aux_offset = aux_offset_;
  header.total_bytes = status_.bytes();
  header.timeline_words = config_.timeline_words;
  header.done_words = config_.done_words;
  std::memcpy(header.boot_id, boot.bytes.data(), sizeof header.boot_id);
  std::memcpy(status_.data(), &header, sizeof header);
  reader_.open({status_.data(), status_.bytes()});
}

ControlPage::WorkerEnds ControlPage::take_worker_ends() {
  return {status_.fd(), words_.fd(), std::move(worker_doorbell_)};
}

void ControlPage::drain_doorbell() {
  // Bounded, since the worker may ring as fast as it likes; what is left wakes the caller again.
  char bytes[16];
  for (int i = 0; i < 64; ++i)
    if (::recv(doorbell_.get(), bytes, sizeof bytes, MSG_DONTWAIT) <= 0) return;
}

void ControlPage::publish(uint32_t slot, cp::Record record,
                          std::shared_ptr<const std::string> aux) {
  if (slot >= config_.slots || record.client_handle == 0) return;
  Slot& own = slots_[slot];
  if (own.client_handle != record.client_handle) {
    if (own.client_handle != 0) {
      MutexLock lock(mutex_);
      aux_.erase(own.client_handle);
    }
    own.client_handle = record.client_handle;
    ++own.generation;
    own.aux_length = 0;
    own.aux_flags = 0;
    own.shown = {};
  }
  std::string_view inline_aux;
  if (aux && own.aux_flags == 0 && aux->size() <= cp::kMaxAuxBytes) {
    own.aux_length = static_cast<uint32_t>(aux->size());
    own.aux_flags = cp::kAuxReady;
    if (aux->size() > config_.aux_bytes)
      own.aux_flags |= cp::kAuxByCall;
    else
      inline_aux = *aux;
    MutexLock lock(mutex_);
    aux_[record.client_handle] = aux;
  }
  record.generation = own.generation;
  record.aux_length = own.aux_length;
  record.flags = (record.flags & ~uint32_t{cp::kAuxReady | cp::kAuxByCall}) | own.aux_flags;
  record.changed_ns = static_cast<uint64_t>(monotonic_now().ns);
  write_slot(slot, record, inline_aux);
  note_change(slot, cp::worth_waking(own.shown, record) ? Ring::kYes : Ring::kNo);
  own.shown = record;
}

void ControlPage::free_slot(uint32_t slot) {
  if (slot >= config_.slots) return;
  Slot& own = slots_[slot];
  if (own.client_handle != 0) {
    MutexLock lock(mutex_);
    aux_.erase(own.client_handle);
  }
  own.client_handle = 0;
  own.aux_length = 0;
  own.aux_flags = 0;
  cp::Record free;
  free.generation = own.generation;
  write_slot(slot, free, {});
  note_change(slot, Ring::kNo);
}

void ControlPage::write_slot(uint32_t slot, const cp::Record& record, std::string_view aux) {
  std::byte* at = status_.data() + slots_offset_ + uint64_t{slot} * cp::kSlotBytes;
  uint64_t& sequence = slots_[slot].sequence;
  cp::store<uint64_t>(at, ++sequence);  // odd: readers stay away
  std::byte* aux_at = status_.data() + aux_offset_ + uint64_t{slot} * config_.aux_bytes;
  for (std::size_t i = 0; i < aux.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, aux.data() + i, std::min<std::size_t>(8, aux.size() - i));
    cp::store<uint64_t>(aux_at + i, word);
  }
  const cp::SlotImage image = cp::encode(record);
  for (std::size_t i = 1; i < cp::kUsedWords; ++i) cp::store<uint64_t>(at + 8 * i, image[i]);
  cp::store<uint64_t>(at, ++sequence);
}

void ControlPage::note_change(uint32_t slot, Ring ring) {
  const uint64_t index = ring_head_ & (config_.ring_capacity - 1);
  cp::store<uint32_t>(status_.data() + ring_offset_ + 4 * index, slot);
  cp::store<uint64_t>(status_.data() + offsetof(cp::StatusHeader, ring_head), ++ring_head_);
  if (ring == Ring::kYes) ring_doorbell();
  tell([slot](StatusObserver& observer) { observer.slot_changed(slot); });
}

template <typename Fn>
void ControlPage::tell(Fn&& what) {
  if (observed_.load(std::memory_order_acquire) == 0) return;
  MutexLock lock(observers_mutex_);
  std::erase_if(observers_, [&](const std::weak_ptr<StatusObserver>& held) {
    const std::shared_ptr<StatusObserver> observer = held.lock();
    if (observer != nullptr) what(*observer);
    return observer == nullptr;
  });
  observed_.store(static_cast<uint32_t>(observers_.size()), std::memory_order_release);
}

Status ControlPage::observe(const std::weak_ptr<StatusObserver>& observer) {
  constexpr std::size_t kMost = 4;
  MutexLock lock(observers_mutex_);
  if (gone_) return fail(Code::kUnavailable, "WORKER_GONE", "the worker is not attached any more");
  std::erase_if(observers_, [](const auto& held) { return held.expired(); });
  if (observers_.size() >= kMost)
    return fail(Code::kResourceExhausted, "TOO_MANY_WATCHES", "four watches of a worker at a time");
  observers_.push_back(observer);
  observed_.store(static_cast<uint32_t>(observers_.size()), std::memory_order_release);
  return {};
}

void ControlPage::worker_gone() {
  {
    MutexLock lock(observers_mutex_);
    gone_ = true;
  }
  tell([](StatusObserver& observer) { observer.worker_gone(); });
}

void ControlPage::tick(Time now) {
  cp::store<uint64_t>(status_.data() + offsetof(cp::StatusHeader, alive_ns),
                      static_cast<uint64_t>(now.ns));
}

void ControlPage::set_draining(bool draining) {
  cp::store<uint32_t>(status_.data() + offsetof(cp::StatusHeader, draining), draining ? 1U : 0U);
  ring_doorbell();
  draining_.store(draining, std::memory_order_relaxed);
  tell([](StatusObserver& observer) { observer.draining_changed(); });
}

void ControlPage::ring_doorbell() {
  const char byte = 1;
  // Full, or the worker is gone: either way there is nothing to do.
  (void)::send(doorbell_.get(), &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

std::shared_ptr<const std::string> ControlPage::aux_of(uint64_t client_handle) const {
  MutexLock lock(mutex_);
  const auto it = aux_.find(client_handle);
  return it == aux_.end() ? nullptr : it->second;
}

bool ControlPage::read(uint32_t slot, cp::Record& out) const {
  return slot < config_.slots && reader_.try_read(slot, out);
}

std::optional<uint64_t> ControlPage::load_timeline(uint32_t word) const {
  if (word >= config_.timeline_words) return std::nullopt;
  return cp::load<uint64_t>(words_.data() + uint64_t{word} * 8);
}

bool ControlPage::store_done(uint32_t word, uint64_t value) {
  if (word >= config_.done_words) return false;
  cp::store<uint64_t>(words_.data() + (uint64_t{config_.timeline_words} + word) * 8, value);
  return true;
}

}  // namespace kvferry::rpc
