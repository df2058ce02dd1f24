#include "daemon/node/task_pool.h"

#include <pthread.h>

namespace kvferry::node {

TaskPool::TaskPool(const std::string& name, uint32_t threads, std::size_t max_tasks)
    : max_tasks_(max_tasks) {
  for (uint32_t i = 0; i < threads; ++i) {
    threads_.emplace_back([this] { run(); });
    pthread_setname_np(threads_.back().native_handle(), name.substr(0, 15).c_str());
  }
}

TaskPool::~TaskPool() {
  stop();
}

bool TaskPool::post(std::function<void()> task) {
  // Before everything that has a time.
  return post_at(Time{}, std::move(task));
}

bool TaskPool::post_at(Time when, std::function<void()> task) {
  {
    MutexLock lock(mutex_);
    if (stopping_ || tasks_.size() >= max_tasks_) return false;
    tasks_.emplace(std::pair(when, posted_++), std::move(task));
  }
  changed_.notify_one();
  return true;
}

void TaskPool::run() {
  while (true) {
    std::function<void()> task;
    {
      MutexLock lock(mutex_);
      while (true) {
        if (stopping_) return;
        const Time when = tasks_.empty() ? Time::never() : tasks_.begin()->first.first;
        if (when <= monotonic_now()) break;
        changed_.wait_until(mutex_, when);
      }
      task = std::move(tasks_.begin()->second);
      tasks_.erase(tasks_.begin());
      // Another one may be due too, and its notice has been taken by this thread.
      if (!tasks_.empty()) changed_.notify_one();
    }
    task();
  }
}

void TaskPool::stop() {
  std::map<std::pair<Time, uint64_t>, std::function<void()>> dropped;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    dropped.swap(tasks_);
  }
  changed_.notify_all();
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
  // What the dropped tasks held goes here, outside the lock: its end may answer somebody.
}

}  // namespace kvferry::node
