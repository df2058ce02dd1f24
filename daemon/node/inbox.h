// What waits for the engine thread: one bounded queue a source (a worker, a link, the daemon's own
// parts), served in turn, so that a worker that floods its queue delays nobody else.
//
// Any thread may post; one thread (the engine's) drains. Posting never blocks.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/units.h"
#include "daemon/engine/commands.h"
#include "daemon/engine/engine.h"
#include "daemon/engine/events.h"

namespace kvferry::node {

// Called once, on the engine thread; must not block.
using ReplyFn = std::function<void(const engine::Reply&)>;
// Looks at the engine on its thread; must not block.
using QuestionFn = std::function<void(const engine::Engine&, Time now)>;

// One entry: a question if `question` is set, else an event (with `reply` for a worker's call,
// whose op_id is chosen by the engine thread).
struct Posted {
  engine::Event event;
  ReplyFn reply;
  QuestionFn question;
};

class Inbox {
 public:
  // Sources: 0 is the daemon itself, whose posts are answers to the engine's own commands (bounded
  // by those) and are never refused.
  static constexpr uint64_t kInternal = 0;

  explicit Inbox(std::size_t per_source_limit);
  ~Inbox();
  Inbox(const Inbox&) = delete;
  Inbox& operator=(const Inbox&) = delete;

  // False if that source has its limit waiting, or the inbox is closed; nothing is kept then.
  [[nodiscard]] bool post(uint64_t source, Posted posted) KVFERRY_EXCLUDES(mutex_);
  // Moves up to `most` entries to `out`, one of each source in turn.
  void drain(std::size_t most, std::vector<Posted>& out) KVFERRY_EXCLUDES(mutex_);
  // Before the draining thread sleeps on fd(): true if nothing waits; the next post() then makes it
  // readable. Nobody is woken who has not said so, as a write costs more than what is posted.
  [[nodiscard]] bool prepare_sleep() KVFERRY_EXCLUDES(mutex_);
  // After the sleep; `readable`: what poll() said of fd().
  void end_sleep(bool readable) KVFERRY_EXCLUDES(mutex_);
  int fd() const { return event_fd_; }
  // Makes fd() readable once.
  void wake();
  std::size_t waiting() const KVFERRY_EXCLUDES(mutex_);
  // No more posts are taken; what waits is dropped.
  void close() KVFERRY_EXCLUDES(mutex_);

 private:
  const std::size_t limit_;
  int event_fd_ = -1;
  mutable Mutex mutex_;
  std::map<uint64_t, std::deque<Posted>> queues_ KVFERRY_GUARDED_BY(mutex_);
  uint64_t last_served_ KVFERRY_GUARDED_BY(mutex_) = 0;
  std::size_t waiting_ KVFERRY_GUARDED_BY(mutex_) = 0;
  bool sleeps_ KVFERRY_GUARDED_BY(mutex_) = false;
  bool closed_ KVFERRY_GUARDED_BY(mutex_) = false;
};

}  // namespace kvferry::node
