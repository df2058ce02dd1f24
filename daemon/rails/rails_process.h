// One life of the rails process as the main process sees it: the child, its channel, its doorbells,
// the shared memory of its rings and slots. Fresh for every life, so nothing of a dead process is
// met by the next. Knows records, not what they mean. Used by one thread.
#pragma once

#include <poll.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/rails/child_process.h"
#include "daemon/rails/records.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::rails {

class RailsProcess {
 public:
  struct Plan {
    std::string executable;
    std::vector<std::string> environment;
    Setup setup;
    std::vector<int> segment_fds;  // borrowed
  };

  // Spawns the child and sends it the set-up. Fails with RAILS_SPAWN_FAILED or what making shared
  // memory fails with.
  static Result<std::unique_ptr<RailsProcess>> spawn(const Plan& plan);

  uint32_t rail_count() const { return layout_.rail_count(); }
  const SharedLayout& layout() const { return layout_; }
  ChildProcess& child() { return child_; }
  const ChildProcess& child() const { return child_; }
  // Doorbells, channel, process.
  void append_pollfds(std::vector<pollfd>& out) const;

  // --- Commands. The rail sees them at once if it is awake; ring() wakes those that sleep.
  // False: no room (or the ring is corrupt).
  bool push(uint32_t rail, const Record& record);
  // Kept here until there is room.
  void push_later(uint32_t rail, const Record& record);
  // Once after a batch. A slot that is given back wakes only a rail that wants for slots.
  void ring();
  // More is kept for the rail than an honest process could have made us keep.
  bool overrun(uint32_t rail) const;
  void flush();

  // --- Events.
  RingState pop(uint32_t rail, Record& record);
  // Rings first, as nobody does while this thread sleeps.
  bool prepare_wait(Wake wake = Wake::kAny);
  // After a sleep; `polled` is what append_pollfds gave, in its order, as poll left it. The
  // doorbells that rang are silent again; says what else was there to see.
  struct Seen {
    bool channel = false;
    bool exit = false;
  };
  Seen end_wait(std::span<const pollfd> polled);
  // What the process says over its channel, cleaned of everything unprintable; the last text
  // counts.
  const std::string& read_last_words();

  // --- Outbound slots: copies `bytes` into a free one; nothing if none is free or they do not fit.
  std::optional<uint32_t> write_slot(std::span<const uint8_t> bytes);
  void free_slot(uint32_t slot);
  // Copies an inbound slot of `rail` into `out` and gives it back. False if the process named a
  // slot or size that does not exist, or never takes slots back.
  bool take_slot(uint32_t rail, uint32_t slot, uint32_t bytes, std::vector<uint8_t>& out);

  const RailCounters& counters(uint32_t rail) const;

 private:
  struct RailEnds {
    UniqueFd doorbell;
    RingProducer<Record> commands;
    RingConsumer<Record> events;
    std::deque<Record> later;
    std::optional<Wake> unrung;  // the most urgent record since the last ring()
    uint32_t unrung_records = 0;
  };

  explicit RailsProcess(SharedLayout layout) : layout_(layout) {}
  Status send_setup(const Plan& plan, int memory, std::span<const UniqueFd> their_doorbells);
  bool push_now(RailEnds& rail, const Record& record);
  static void ring(RailEnds& rail);

  SharedLayout layout_;
  ChildProcess child_;
  UniqueFd channel_;
  Mapping shared_;
  std::vector<RailEnds> rails_;
  std::vector<uint32_t> free_small_;
  std::vector<uint32_t> free_large_;
  std::string last_words_;
};

}  // namespace kvferry::rails
