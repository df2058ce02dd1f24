// Bodies of the messages between daemons: the first byte is the type, the rest the body.
#include "daemon/link/codec.h"

#include "tests/fuzz/input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  return kvferry::link::fuzz_decode(data, size);
}
