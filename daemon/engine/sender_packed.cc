// Packed copies: the slices that a worker wants off its pages before anybody pulls. Each takes its
// bytes of the limit when its Send is accepted, is made when its condition holds, serves the legs
// as pages would, and goes with its slice or send, once nobody reads it.
#include <string>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {

// Whether the call asks for a packed copy that there is no room for; then it has its answer.
bool Sender::packed_refused(const SendOp& op) {
  const uint64_t bytes = op.packed_bytes.value_or(0);
  const uint64_t limit = core_.config.max_packed_bytes;
  const bool crowded = bytes > 0 && packed_copies_ >= core_.config.max_packed_copies;
  if (bytes <= limit - packed_bytes_ && !crowded) return false;
  ++core_.stats.packed_refused;
  if (crowded) {
    core_.reply_error(op.op, Code::kResourceExhausted, "PACKED_MEMORY_FULL",
                      "there are " + std::to_string(packed_copies_) + " packed copies already",
                      "packed_copy");
    return true;
  }
  core_.reply_error(op.op, Code::kResourceExhausted, "PACKED_MEMORY_FULL",
                    "the copy takes " + std::to_string(bytes) + " bytes, and of the limit of " +
                        std::to_string(limit) + " are " + std::to_string(limit - packed_bytes_) +
                        " free",
                    "packed_copy");
  return true;
}

void Sender::add_packed(Send& send, SendSlice& slice) {
  slice.packed.state = PackedCopy::State::kAwaited;
  slice.packed.bytes = *slice.op->packed_bytes;
  packed_bytes_ += slice.packed.bytes;  // there was room: it does not overflow
  if (slice.packed.bytes > 0) ++packed_copies_;
  ++send.packed;
  ++send.unpacked;
}

// The slice's condition holds: its copy is made now, if it wants one.
void Sender::make_packed(Send& send, uint32_t index) {
  SendSlice& slice = send.sends[index];
  PackedCopy& packed = slice.packed;
  if (packed.state != PackedCopy::State::kAwaited) return;
  if (packed.bytes == 0) {  // no cell: there is nothing to copy
    packed.state = PackedCopy::State::kMade;
    packed.source = slice.op;
    --send.unpacked;
    return;
  }
  packed.state = PackedCopy::State::kMaking;
  packed.copy = CopyId{core_.next_number()};
  packings_[packed.copy] = {send.id, index};
  ++send.gathers;
  ++send.reads;
  core_.emit(MakePacked{packed.copy, slice.op});
}

void Sender::packed(Packed& event) {
  const auto it = packings_.find(event.copy);
  if (it == packings_.end()) return;
  const auto [id, index] = it->second;
  packings_.erase(it);
  Send& send = sends_.at(id);
  SendSlice& slice = send.sends[index];
  --send.gathers;
  --send.reads;
  if (slice.dropped || send.terminal()) {
    slice.packed.state = PackedCopy::State::kMade;
    free_packed(slice);
  } else if (event.reason != Reason::kNone || event.layout == nullptr) {
    slice.packed.state = PackedCopy::State::kMade;
    end_send(send, TransferState::kFailed,
             event.reason == Reason::kNone ? Reason::kInternal : event.reason);
  } else {
    KVFERRY_CHECK(event.layout->arena < core_.arenas.size(),
                  "a layout's arena is one of the configuration's");
    slice.packed.state = PackedCopy::State::kMade;
    auto source = std::make_shared<SendOp>(*slice.op);
    source->layout = std::move(event.layout);
    source->blocks = std::move(event.blocks);
    slice.packed.source = std::move(source);
    --send.unpacked;
    ++core_.stats.packed_made;
    const std::set<uint64_t> legs = send.legs;
    for (const uint64_t leg : legs) {
      const auto found = legs_.find(leg);
      if (found != legs_.end() && found->second.resolved) pump(found->second);
    }
  }
  answer_revokes(send);
  evaluate(send);
}

// The slice counts no more, packed or not.
void Sender::drop_packed(Send& send, SendSlice& slice) {
  if (!slice.op->packed_bytes) {
    if (offers_something(*slice.op)) --send.paged;
    return;
  }
  --send.packed;
  if (slice.packed.state != PackedCopy::State::kMade) --send.unpacked;
  free_packed(slice);
}

void Sender::free_packed(Send& send) {
  for (SendSlice& slice : send.sends) free_packed(slice);
}

// The copy goes, as soon as nobody writes or reads it.
void Sender::free_packed(SendSlice& slice) {
  PackedCopy& packed = slice.packed;
  if (packed.state == PackedCopy::State::kMaking || packed.gathers > 0) return;
  KVFERRY_CHECK(packed_bytes_ >= packed.bytes, "packed copies are counted");
  packed_bytes_ -= packed.bytes;
  if (packed.bytes > 0) --packed_copies_;
  packed = {};
}

}  // namespace kvferry::engine
