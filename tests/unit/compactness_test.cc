// What a transfer of 131,072 fragments may cost in messages; plan_heap_test has what it costs in
// memory.
#include <catch2/catch.hpp>
#include <utility>

#include "daemon/link/envelope.h"
#include "tests/bench/large_transfer.h"

using namespace kvferry;
using namespace kvferry::mapping::test;

namespace {

template <typename Message>
uint64_t on_the_wire(Message message) {
  std::vector<uint8_t> body;
  const Status encoded = link::encode_body(engine::ControlMessage(std::move(message)), body);
  INFO((encoded ? "" : encoded.error().to_string()));
  REQUIRE(encoded);
  return body.size() + link::kOverheadBytes;
}

}  // namespace

TEST_CASE("the control messages of 131,072 fragments take less than 64 KiB") {
  const LargeTransfer transfer;
  constexpr uint64_t kChunkBytes = 1 << 20;  // unless configured otherwise
  const uint64_t bytes = transfer.stream().bytes;
  const uint64_t chunks = ceil_div(bytes, kChunkBytes);
  REQUIRE(chunks == 512);

  engine::MsgPull pull;
  pull.pull.receiver.bytes.fill(1);
  pull.pull.counter = 1000;
  pull.transfer.instance = "default/prefill";
  pull.transfer.id.assign(64, 'x');
  pull.receiver_instance = "default/decode";
  pull.needs = transfer.needs;
  for (uint64_t credit = 1; credit <= 8; ++credit) pull.credits.push_back({{credit}, kChunkBytes});
  engine::MsgSlice slice;
  slice.pull = pull.pull;
  slice.send = {pull.pull.receiver, 1000};
  slice.last = true;
  slice.ranges = transfer.offer;
  slice.bytes = bytes;
  engine::MsgEnd end;
  end.pull = pull.pull;
  end.transfer = pull.transfer;
  uint64_t control = on_the_wire(pull) + on_the_wire(slice) + 2 * on_the_wire(end);
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    // At worst each ack travels alone, with the credit that replaces the spent one.
    engine::MsgUpdate update;
    update.pull = pull.pull;
    update.credits = {{{chunk + 9}, kChunkBytes}};
    update.acks = {{0, chunk}};
    update.oldest = 999;
    control += on_the_wire(update);
  }
  CHECK(control < (64U << 10));

  // The header in front of each chunk's data belongs to the data: 1.5 in 10,000 bytes.
  engine::MsgOffer offer;
  offer.pull = pull.pull;
  offer.send = slice.send;
  offer.chunk = chunks - 1;
  offer.credit = {chunks};
  offer.offer = {1000000};
  offer.bytes = kChunkBytes;
  std::vector<uint8_t> header;
  REQUIRE(link::encode_body(offer, header));
  CHECK(header.size() + link::kOverheadBytes < 200);
}
