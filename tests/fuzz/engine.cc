// The engine under sequences of events in any order from a hostile worker, two hostile peers and an
// unlucky executor. All its invariants are checked after every event.
#include "tests/fuzz/engine_world.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  using namespace kvferry;
  fuzz::Input in(data, size);
  fuzz::EngineWorld world(in);
  for (int steps = 0; !in.empty() && steps < 400; ++steps) world.step();
  world.finish();
  return 0;
}
