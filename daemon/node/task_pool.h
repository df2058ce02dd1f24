// A few threads that carry out small tasks off the engine's and gRPC's threads, now or later. Tasks
// run in the order of their time, then of their posting. Any thread may post; nothing blocks but
// stop().
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/units.h"

namespace kvferry::node {

class TaskPool {
 public:
  // `name` (at most 15 characters) is what the system's tools show for its threads.
  TaskPool(const std::string& name, uint32_t threads, std::size_t max_tasks);
  ~TaskPool();
  TaskPool(const TaskPool&) = delete;
  TaskPool& operator=(const TaskPool&) = delete;

  // False, keeping nothing, when max_tasks are waiting or the pool has been stopped.
  [[nodiscard]] bool post(std::function<void()> task) KVFERRY_EXCLUDES(mutex_);
  [[nodiscard]] bool post_at(Time when, std::function<void()> task) KVFERRY_EXCLUDES(mutex_);
  // Drops what waits, lets what runs finish, joins. Idempotent. Not from one of its threads.
  void stop() KVFERRY_EXCLUDES(mutex_);

 private:
  void run();

  const std::size_t max_tasks_;
  Mutex mutex_;
  CondVar changed_;
  std::map<std::pair<Time, uint64_t>, std::function<void()>> tasks_ KVFERRY_GUARDED_BY(mutex_);
  uint64_t posted_ KVFERRY_GUARDED_BY(mutex_) = 0;
  bool stopping_ KVFERRY_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvferry::node
