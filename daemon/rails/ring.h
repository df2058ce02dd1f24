// A single-producer, single-consumer ring of 64-byte records in memory that two processes share.
//
// Each side keeps its own index in private memory and believes nothing it reads: the other side's
// index is loaded once and range-checked, a record is copied word by word into private memory
// before anybody looks at it. A value that cannot be right makes the ring kCorrupt for good; what
// to do then is the owner's business (the main process ends the rails process).
//
// Waking: the consumer says that it is about to sleep and what it wants to be woken for
// (prepare_sleep), the producer asks after a batch whether somebody must be woken for what it has
// pushed (take_wake) and rings a doorbell that lies outside this file. Both are only hints; every
// wait has a bound of its own.
//
// One thread per side. Nothing here blocks or allocates.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <type_traits>

namespace kvferry::rails {

inline constexpr uint64_t kCacheLineBytes = 64;
inline constexpr uint64_t kRecordBytes = 64;

enum class RingState : uint8_t {
  kOk,       // a record was moved
  kBlocked,  // full for the producer, empty for the consumer
  kCorrupt,  // the other side's index is impossible; nothing was moved and nothing will be
};

// What a sleeping consumer is woken for, and what a batch of records holds. Some records only give
// back what nobody waits for (a message's slot): they can lie until there is something to do.
enum class Wake : uint32_t {
  kWork = 1,  // records that somebody has to act on
  kAny = 2,   // every record
};

// Lies in shared memory, zero when fresh. Each word has one writer, on a cache line of its own,
// except `consumer_sleeps`, which the consumer raises and either side lowers.
struct RingHeader {
  alignas(kCacheLineBytes) std::atomic<uint64_t> tail;             // records ever pushed
  alignas(kCacheLineBytes) std::atomic<uint64_t> head;             // records ever popped
  alignas(kCacheLineBytes) std::atomic<uint32_t> consumer_sleeps;  // 0: awake, else a Wake
};
static_assert(sizeof(RingHeader) == 3 * kCacheLineBytes);
static_assert(std::atomic<uint64_t>::is_always_lock_free);
static_assert(std::atomic<uint32_t>::is_always_lock_free);

// Where a ring lies. `records` has `capacity` records of kRecordBytes, a power of two.
struct RingMemory {
  RingHeader* header = nullptr;
  std::byte* records = nullptr;
  uint32_t capacity = 0;
};

constexpr bool is_ring_capacity(uint64_t capacity) {
  return capacity >= 2 && capacity <= (1U << 20) && std::has_single_bit(capacity);
}

namespace detail {
inline constexpr uint64_t kRecordWords = kRecordBytes / sizeof(uint64_t);
using RecordWords = std::array<uint64_t, kRecordWords>;

inline uint64_t* slot_words(const RingMemory& memory, uint64_t index) {
  std::byte* at = memory.records + (index & (memory.capacity - 1)) * kRecordBytes;
  return reinterpret_cast<uint64_t*>(at);
}
}  // namespace detail

template <typename Record>
class RingProducer {
  static_assert(sizeof(Record) == kRecordBytes && std::is_trivially_copyable_v<Record>);

 public:
  RingProducer() = default;
  explicit RingProducer(RingMemory memory) : memory_(memory) {}

  // Copies the record into the ring and makes it visible.
  RingState push(const Record& record) {
    if (corrupt_) return RingState::kCorrupt;
    if (tail_ - seen_head_ == memory_.capacity) {
      const uint64_t head = memory_.header->head.load(std::memory_order_acquire);
      // head may only move forward, and never past what was pushed.
      if (head - seen_head_ > memory_.capacity || tail_ - head > memory_.capacity) {
        corrupt_ = true;
        return RingState::kCorrupt;
      }
      seen_head_ = head;
      if (tail_ - seen_head_ == memory_.capacity) return RingState::kBlocked;
    }
    const auto words = std::bit_cast<detail::RecordWords>(record);
    uint64_t* const at = detail::slot_words(memory_, tail_);
    for (uint64_t i = 0; i < detail::kRecordWords; ++i)
      std::atomic_ref<uint64_t>(at[i]).store(words[i], std::memory_order_relaxed);
    ++tail_;
    // Sequentially consistent, paired with prepare_sleep: either the consumer sees this record or
    // take_wake sees its flag.
    memory_.header->tail.store(tail_, std::memory_order_seq_cst);
    return RingState::kOk;
  }

  // After pushing records of which the most urgent is `pushed` (kWork before kAny). True at most
  // once per sleep of the consumer: somebody has to ring its doorbell.
  bool take_wake(Wake pushed = Wake::kWork) {
    auto& flag = memory_.header->consumer_sleeps;
    return flag.load(std::memory_order_seq_cst) >= static_cast<uint32_t>(pushed) &&
           flag.exchange(0, std::memory_order_seq_cst) != 0;
  }

 private:
  RingMemory memory_;
  uint64_t tail_ = 0;
  uint64_t seen_head_ = 0;
  bool corrupt_ = false;
};

template <typename Record>
class RingConsumer {
  static_assert(sizeof(Record) == kRecordBytes && std::is_trivially_copyable_v<Record>);

 public:
  RingConsumer() = default;
  explicit RingConsumer(RingMemory memory) : memory_(memory) {}

  // Moves the oldest record into `out`.
  RingState pop(Record& out) {
    const RingState state = look();
    if (state != RingState::kOk) return state;
    uint64_t* const at = detail::slot_words(memory_, head_);
    detail::RecordWords words;
    for (uint64_t i = 0; i < detail::kRecordWords; ++i)
      words[i] = std::atomic_ref<uint64_t>(at[i]).load(std::memory_order_relaxed);
    out = std::bit_cast<Record>(words);
    ++head_;
    memory_.header->head.store(head_, std::memory_order_release);
    return RingState::kOk;
  }

  // True: the ring is empty and the producer will ring the doorbell for the next record of that
  // kind. False: there is something to read (or the ring is corrupt), do not sleep.
  bool prepare_sleep(Wake wake = Wake::kAny) {
    memory_.header->consumer_sleeps.store(static_cast<uint32_t>(wake), std::memory_order_seq_cst);
    if (look() == RingState::kBlocked) return true;
    end_sleep();
    return false;
  }
  void end_sleep() { memory_.header->consumer_sleeps.store(0, std::memory_order_relaxed); }

 private:
  // Whether there is a record at head_.
  RingState look() {
    if (corrupt_) return RingState::kCorrupt;
    if (seen_tail_ != head_) return RingState::kOk;
    const uint64_t tail = memory_.header->tail.load(std::memory_order_seq_cst);
    if (tail - head_ > memory_.capacity) {
      corrupt_ = true;
      return RingState::kCorrupt;
    }
    seen_tail_ = tail;
    return seen_tail_ == head_ ? RingState::kBlocked : RingState::kOk;
  }

  RingMemory memory_;
  uint64_t head_ = 0;
  uint64_t seen_tail_ = 0;
  bool corrupt_ = false;
};

}  // namespace kvferry::rails
