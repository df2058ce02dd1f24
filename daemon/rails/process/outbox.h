// What a rail has to tell the main process: records, and messages in inbound slots. Keeps what
// finds no room, within bounds: records are as many as the operations, lanes and offers under way,
// message bytes have a limit of their own. While anything is kept (`congested`), the rail stops
// taking more from the network. Used by the rail's thread alone.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "daemon/rails/records.h"

namespace kvferry::rails {

class Outbox {
 public:
  Outbox(const SharedLayout& layout, std::byte* shared, uint32_t rail, int doorbell);

  // `wake`: what main must sleep for to be woken for this one.
  void emit(const Record& record, Wake wake = Wake::kWork);
  // `record` gets a slot with a copy of `bytes`. False: too large or beyond the limit; nothing is
  // kept.
  bool emit_message(const Record& record, std::span<const uint8_t> bytes);
  // False for a slot that is not out.
  bool take_back(uint32_t slot);

  // Moves on what was kept, and rings. True if anything was moved.
  bool flush();
  // Rings the doorbell if main sleeps and wants to be woken for what was emitted since the last
  // time.
  void ring();
  bool congested() const { return !records_.empty() || !messages_.empty(); }

 private:
  struct Kept {
    Record record;
    std::vector<uint8_t> bytes;
  };
  bool place(Record record, std::span<const uint8_t> bytes);

  SharedLayout layout_;
  std::byte* shared_;
  int doorbell_;
  RingProducer<Record> ring_;
  SharedLayout::SlotRange small_;
  SharedLayout::SlotRange large_;
  std::vector<uint32_t> free_small_;
  std::vector<uint32_t> free_large_;
  std::vector<bool> out_;  // by slot number less small_.first
  std::optional<Wake> unrung_;
  std::deque<Record> records_;
  std::deque<Kept> messages_;
  uint64_t kept_bytes_ = 0;
};

}  // namespace kvferry::rails
