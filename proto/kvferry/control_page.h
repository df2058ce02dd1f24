// Memory format of the control page, and lock-free reading of it. Shared by the daemon, which
// writes, and the clients, which poll; depends on nothing but the standard library.
//
// Two files. `status` (the worker can only read it):
//
//   offset 0       StatusHeader, 4,096 bytes
//   slots_offset   slot_count slots of kSlotBytes: one per open transfer, the truth
//   ring_offset    ring_capacity uint32: numbers of slots that changed, the newest at
//                  (ring_head - 1) mod ring_capacity
//   aux_offset     slot_count areas of aux_bytes: short aux data of completed receives
//
// `words`: timeline_words uint64 that the worker advances, then done_words uint64 that the daemon
// sets. The worker may write all of it: the daemon loads words once and believes nothing else.
//
// Everything is made of naturally aligned words written and read atomically. A slot has a sequence
// lock: odd while it is being written; whoever reads the same even number before and after has a
// consistent record. Words are stored with release and loaded with acquire order: seeing any new
// word of a record implies seeing the odd sequence, so no fences are needed.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kvferry::control_page {

static_assert(std::atomic<uint64_t>::is_always_lock_free);
static_assert(std::atomic<uint32_t>::is_always_lock_free);

inline constexpr uint64_t kMagic = 0x314547415046564B;  // "KVFPAGE1"
inline constexpr uint32_t kVersion = 1;
inline constexpr std::size_t kHeaderBytes = 4096;
inline constexpr std::size_t kSlotBytes = 128;
inline constexpr std::size_t kSlotWords = kSlotBytes / 8;
inline constexpr uint32_t kMaxSlots = 1U << 20;
inline constexpr uint32_t kMaxAuxBytes = 64 * 1024;

// Fixed after creation but for the words marked atomic.
struct StatusHeader {
  uint64_t magic;
  uint32_t version;
  uint32_t slot_count;
  uint32_t ring_capacity;  // a power of two
  uint32_t aux_bytes;      // of each slot's area; a multiple of 8
  uint64_t slots_offset;
  uint64_t ring_offset;
  uint64_t aux_offset;
  uint64_t total_bytes;
  uint32_t timeline_words;
  uint32_t done_words;
  uint8_t boot_id[16];
  uint64_t alive_ns;  // atomic: CLOCK_MONOTONIC of the daemon's last tick
  uint32_t draining;  // atomic: 1 once the daemon takes no new transfers
  uint32_t reserved;
  uint64_t ring_head;  // atomic: entries ever written to the ring
};
static_assert(sizeof(StatusHeader) <= kHeaderBytes);
static_assert(offsetof(StatusHeader, alive_ns) == 80 && offsetof(StatusHeader, ring_head) == 96);

// Bits of a record's flags.
enum Flag : uint32_t {
  kSourceReleased = 1U << 0,  // sender: the source pages may be freed or overwritten
  kDestReleased = 1U << 1,    // receiver: the destination pages may be read, freed, given away
  kCompleted = 1U << 2,       // receiver: pages and aux may be read
  kAuxReady = 1U << 3,        // aux is there; in the slot's area unless kAuxByCall
  kAuxByCall = 1U << 4,       // it is longer than the area: by the call GetAux
  kMemoryInUse = 1U << 5,     // a copy may still touch the pages
  kReceiverReady = 1U << 6,   // sender: a receiver has come
};

// What one slot says. Enumerations have the numbers of worker.proto (0: free slot) and of the
// daemon's list of reasons.
struct Record {
  uint64_t client_handle = 0;  // 0: the slot is free
  uint32_t generation = 0;     // rises each time the slot is given to another transfer
  uint32_t flags = 0;
  uint8_t state = 0;     // TransferState
  uint8_t role = 0;      // TransferRole
  uint8_t delivery = 0;  // Delivery
  uint16_t reason = 0;
  uint16_t released_reason = 0;
  uint64_t slices = 0;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;  // 0 while unknown
  uint32_t aux_length = 0;   // bytes
  uint64_t changed_ns = 0;   // CLOCK_MONOTONIC of the writing
  bool operator==(const Record&) const = default;
};

// Whether `after` has something to wake a worker for that `before`, of the same transfer, had not:
// a flag that is set, the end, another slice of a receive. `before` is Record{} for a new transfer.
// For this alone the daemon rings the doorbell; all else a worker sees when it next looks.
inline bool worth_waking(const Record& before, const Record& after) {
  constexpr uint8_t kFirstEnd = 3;  // TRANSFER_STATE_DELIVERED; what follows are ends too
  constexpr uint8_t kReceiver = 2;
  return (after.flags & ~before.flags & ~uint32_t{kMemoryInUse}) != 0 ||
         (after.state >= kFirstEnd && before.state < kFirstEnd) ||
         (after.role == kReceiver && after.slices > before.slices);
}

using SlotImage = std::array<uint64_t, kSlotWords>;  // word 0 is the sequence

inline SlotImage encode(const Record& r) {
  SlotImage w{};
  w[1] = r.client_handle;
  w[2] = r.generation | (uint64_t{r.flags} << 32);
  w[3] = r.state | (uint64_t{r.role} << 8) | (uint64_t{r.delivery} << 16) |
         (uint64_t{r.reason} << 32) | (uint64_t{r.released_reason} << 48);
  w[4] = r.slices;
  w[5] = r.bytes_done;
  w[6] = r.bytes_total;
  w[7] = r.aux_length;
  w[8] = r.changed_ns;
  return w;
}

inline Record decode(const SlotImage& w) {
  Record r;
  r.client_handle = w[1];
  r.generation = static_cast<uint32_t>(w[2]);
  r.flags = static_cast<uint32_t>(w[2] >> 32);
  r.state = static_cast<uint8_t>(w[3]);
  r.role = static_cast<uint8_t>(w[3] >> 8);
  r.delivery = static_cast<uint8_t>(w[3] >> 16);
  r.reason = static_cast<uint16_t>(w[3] >> 32);
  r.released_reason = static_cast<uint16_t>(w[3] >> 48);
  r.slices = w[4];
  r.bytes_done = w[5];
  r.bytes_total = w[6];
  r.aux_length = static_cast<uint32_t>(w[7]);
  r.changed_ns = w[8];
  return r;
}

inline constexpr std::size_t kUsedWords = 9;  // words of a slot that hold something

template <typename T>
T load(const void* at, std::memory_order order = std::memory_order_acquire) {
  // Reading through atomic_ref needs a mutable reference; it only loads, so a read-only mapping is
  // fine.
  return std::atomic_ref<T>(*static_cast<T*>(const_cast<void*>(at))).load(order);
}
template <typename T>
void store(void* at, T value, std::memory_order order = std::memory_order_release) {
  std::atomic_ref<T>(*static_cast<T*>(at)).store(value, order);
}

// Reads a mapped status file. Any thread; never blocks, never writes. The mapping outlives it.
class StatusReader {
 public:
  StatusReader() = default;
  // False if the mapping is not a well-formed page of this version.
  bool open(std::span<const std::byte> mapping) {
    if (mapping.size() < kHeaderBytes) return false;
    std::memcpy(&header_, mapping.data(), sizeof header_);
    const uint64_t slots_bytes = uint64_t{header_.slot_count} * kSlotBytes;
    const uint64_t ring_bytes = uint64_t{header_.ring_capacity} * 4;
    const uint64_t aux_total = uint64_t{header_.slot_count} * header_.aux_bytes;
    const auto inside = [&](uint64_t offset, uint64_t bytes) {
      return offset % 8 == 0 && offset >= kHeaderBytes && offset <= mapping.size() &&
             bytes <= mapping.size() - offset;
    };
    if (header_.magic != kMagic || header_.version != kVersion || header_.slot_count == 0 ||
        header_.slot_count > kMaxSlots || header_.ring_capacity == 0 ||
        header_.ring_capacity > 4 * kMaxSlots ||
        (header_.ring_capacity & (header_.ring_capacity - 1)) != 0 || header_.aux_bytes % 8 != 0 ||
        header_.aux_bytes > kMaxAuxBytes || header_.total_bytes != mapping.size() ||
        !inside(header_.slots_offset, slots_bytes) || !inside(header_.ring_offset, ring_bytes) ||
        !inside(header_.aux_offset, aux_total))
      return false;
    base_ = mapping.data();
    return true;
  }

  uint32_t slot_count() const { return header_.slot_count; }
  uint32_t ring_capacity() const { return header_.ring_capacity; }
  uint32_t timeline_words() const { return header_.timeline_words; }
  uint32_t done_words() const { return header_.done_words; }
  uint64_t alive_ns() const { return load<uint64_t>(base_ + offsetof(StatusHeader, alive_ns)); }
  bool draining() const { return load<uint32_t>(base_ + offsetof(StatusHeader, draining)) != 0; }
  uint64_t ring_head() const { return load<uint64_t>(base_ + offsetof(StatusHeader, ring_head)); }

  // One try; false if the writer was at work meanwhile (try again).
  bool try_read(uint32_t slot, Record& out) const {
    SlotImage image;
    const std::byte* at = slot_at(slot);
    const uint64_t before = load<uint64_t>(at);
    if (before & 1) return false;
    for (std::size_t i = 1; i < kUsedWords; ++i) image[i] = load<uint64_t>(at + 8 * i);
    if (load<uint64_t>(at, std::memory_order_relaxed) != before) return false;
    out = decode(image);
    return true;
  }

  // Tries again while the writer is at work, which takes it a fraction of a microsecond; false
  // after some ten microseconds: the writer was stopped in the middle, and will note the change in
  // the ring once it has finished.
  bool read(uint32_t slot, Record& out) const {
    for (int i = 0; i < 1000; ++i)
      if (try_read(slot, out)) return true;
    return false;
  }

  // Copies the aux of `record`, read from `slot` before, into `out` (>= record.aux_length bytes).
  // False if the slot has another record by now, or the aux is not in its area.
  bool read_aux(uint32_t slot, const Record& record, std::span<std::byte> out) const {
    if ((record.flags & kAuxReady) == 0 || (record.flags & kAuxByCall) != 0 ||
        record.aux_length > header_.aux_bytes || out.size() < record.aux_length)
      return false;
    const std::byte* at = base_ + header_.aux_offset + uint64_t{slot} * header_.aux_bytes;
    for (std::size_t i = 0; i < record.aux_length; i += 8) {
      const uint64_t word = load<uint64_t>(at + i);
      std::memcpy(out.data() + i, &word, std::min<std::size_t>(8, record.aux_length - i));
    }
    Record again;
    return read(slot, again) && again.generation == record.generation &&
           again.client_handle == record.client_handle;
  }

  // Calls `changed(slot)` for the slots written since `tail` (0 at first) and advances it. False if
  // entries were overwritten before they were read: then every slot must be looked at, and `tail`
  // is up to date. A slot number is reported after its record is readable; one may be reported
  // twice.
  template <typename F>
  bool take_changed(uint64_t& tail, F&& changed) const {
    const uint64_t head = ring_head();
    if (head == tail) return true;
    const uint64_t capacity = header_.ring_capacity;
    if (head - tail > capacity) {
      tail = head;
      return false;
    }
    const std::byte* ring = base_ + header_.ring_offset;
    for (; tail != head; ++tail) {
      const uint32_t slot = load<uint32_t>(ring + 4 * (tail & (capacity - 1)));
      // The entry is overwritten only once the head has gone a full round beyond it.
      if (const uint64_t now = ring_head(); now - tail >= capacity) {
        tail = now;
        return false;
      }
      if (slot < header_.slot_count) changed(slot);
    }
    return true;
  }

 private:
  const std::byte* slot_at(uint32_t slot) const {
    return base_ + header_.slots_offset + uint64_t{slot} * kSlotBytes;
  }

  const std::byte* base_ = nullptr;
  StatusHeader header_{};
};

}  // namespace kvferry::control_page
