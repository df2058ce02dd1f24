// The loop of a rail's thread: commands, progress, records; a short spin while work keeps coming,
// then sleep on UCX's event descriptor and the doorbell. Every sleep is bounded: UCX 1.13's wake-up
// can stall, and a full doorbell is dropped.
#pragma once

#include <cstdint>

#include "daemon/rails/process/rail.h"

namespace kvferry::rails {

class RailThread {
 public:
  RailThread(const ProcessSetup& setup, uint32_t index, Rail& rail);
  // Never returns; the process ends as a whole.
  [[noreturn]] void run();

 private:
  bool work();
  void sleep();

  Rail& rail_;
  RingConsumer<Record> commands_;
  int doorbell_;
  int64_t spin_limit_ns_;
  int64_t spin_ns_;  // adapts between 0 and the limit
};

}  // namespace kvferry::rails
