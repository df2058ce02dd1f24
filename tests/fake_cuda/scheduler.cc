// The work of all streams of this process, done by one thread. It takes the next piece from any
// stream that may go on, picked by the seed, and waits a while before each: so copies and events
// come late and in every order that CUDA allows, and in the same order again where everything was
// submitted while held.
#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>

#include "tests/fake_cuda/state.h"

namespace kvferry::fake_cuda {

using namespace cuda;

namespace {

using Lock = std::unique_lock<std::mutex>;

// Whether something has to be looked at again though nothing was submitted: a word in memory, or
// another process's event.
constexpr std::chrono::microseconds kPoll{50};

bool may_begin(const State& all, const Stream& stream) {
  if (stream.work.empty()) return false;
  if (all.sticky_error(*stream.context) != CUDA_SUCCESS) return true;  // to end with that
  const Work& next = stream.work.front();
  for (const auto& [other, submitted] : next.after) {
    if (other->done < submitted && other->context->sticky == CUDA_SUCCESS) return false;
  }
  return !next.ready || next.ready();
}

void fail_context(State& all, const std::shared_ptr<Context>& context, CUresult error) {
  context->sticky = error;
  std::erase_if(all.scheduled, [&](const std::shared_ptr<Stream>& stream) {
    if (stream->context != context) return false;
    stream->work.clear();
    return true;
  });
}

// Waits its while, then does the stream's next piece if that is still wanted.
void do_next(State& all, Lock& lock, const std::shared_ptr<Stream>& stream) {
  const uint64_t epoch = all.epoch;
  const uint64_t limit = all.config().delay_us;
  if (limit != 0 && !all.held) {
    const std::chrono::microseconds delay(all.random() % limit);
    lock.unlock();
    std::this_thread::sleep_for(delay);
    lock.lock();
    if (all.held) return;
  }
  if (all.epoch != epoch || stream->work.empty()) return;
  const std::shared_ptr<Context> context = stream->context;
  const Work work = std::move(stream->work.front());
  stream->work.pop_front();
  CUresult result = all.sticky_error(*context);
  if (result == CUDA_SUCCESS && work.on_device) result = all.count("(device)");
  if (result == CUDA_SUCCESS) {
    all.busy = true;
    lock.unlock();
    {
      const std::shared_lock<std::shared_mutex> unchanged(all.map_mutex);
      result = work.run(DeviceView(all.space, context->device, context->peers));
    }
    lock.lock();
    all.busy = false;
  }
  ++stream->done;
  if (result != CUDA_SUCCESS) fail_context(all, context, result);
  if (stream->work.empty()) std::erase(all.scheduled, stream);
  all.work_done.notify_all();
}

void run_streams(State& all) {
  Lock lock(all.mutex);
  for (;;) {
    std::vector<std::shared_ptr<Stream>> able;
    if (!all.held || all.steps != 0) {
      for (const auto& stream : all.scheduled) {
        if (may_begin(all, *stream)) able.push_back(stream);
      }
    }
    if (able.empty()) {
      if (all.steps != 0) {
        all.steps = 0;
        all.work_done.notify_all();
      }
      if (all.held || all.scheduled.empty()) {
        all.work_came.wait(lock);
      } else {
        lock.unlock();
        std::this_thread::sleep_for(kPoll);
        lock.lock();
      }
      continue;
    }
    if (all.held) {
      --all.steps;
      ++all.stepped;
    }
    const auto chosen = static_cast<std::size_t>(all.random() % able.size());
    do_next(all, lock, able[chosen]);
  }
}

}  // namespace

void State::submit(const std::shared_ptr<Stream>& stream, Work work) {
  if (!thread_started) {
    thread_started = true;
    std::thread(run_streams, std::ref(*this)).detach();
  }
  // The default stream and the ones that are not "non-blocking" wait for each other.
  const auto found = default_streams.find(stream->context->handle);
  const std::shared_ptr<Stream> by_default =
      found == default_streams.end() ? nullptr : found->second;
  if (stream == by_default) {
    for (const auto& other : streams_of(*stream->context)) {
      if (other->blocking && other != stream) work.after.emplace_back(other, other->submitted);
    }
  } else if (stream->blocking && by_default) {
    work.after.emplace_back(by_default, by_default->submitted);
  }
  if (std::find(scheduled.begin(), scheduled.end(), stream) == scheduled.end()) {
    scheduled.push_back(stream);
  }
  stream->work.push_back(std::move(work));
  ++stream->submitted;
  work_came.notify_all();
}

std::shared_ptr<Stream> State::stream_of(const std::shared_ptr<Context>& context, CUstream handle) {
  const auto value = reinterpret_cast<uintptr_t>(handle);
  if (value <= 1) {  // null, or CU_STREAM_LEGACY
    auto& stream = default_streams[context->handle];
    if (!stream) {
      stream = std::make_shared<Stream>();
      stream->context = context;
    }
    return stream;
  }
  const auto found = streams.find(handle);
  return found != streams.end() && found->second->context == context ? found->second : nullptr;
}

std::vector<std::shared_ptr<Stream>> State::streams_of(const Context& context) const {
  std::vector<std::shared_ptr<Stream>> all;
  for (const auto& [handle, stream] : streams) {
    if (stream->context.get() == &context) all.push_back(stream);
  }
  // Destroyed ones that still have work.
  for (const auto& stream : scheduled) {
    if (stream->context.get() == &context && !streams.contains(stream->handle)) {
      all.push_back(stream);
    }
  }
  const auto found = default_streams.find(context.handle);
  if (found != default_streams.end() && found->second->work.empty()) all.push_back(found->second);
  return all;
}

CUresult State::wait_for(Lock& lock, const std::shared_ptr<Context>& why,
                         const std::vector<std::shared_ptr<Stream>>& all) {
  std::vector<std::pair<std::shared_ptr<Stream>, uint64_t>> until;
  for (const auto& stream : all) until.emplace_back(stream, stream->submitted);
  for (const auto& [stream, submitted] : until) {
    while (why->sticky == CUDA_SUCCESS && why->retains != 0 && stream->done < submitted) {
      work_done.wait(lock);
    }
  }
  if (why->retains == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  return why->sticky;
}

void State::drop_work(Lock& lock, const Context& context) {
  std::erase_if(scheduled, [&](const std::shared_ptr<Stream>& stream) {
    if (stream->context.get() != &context) return false;
    stream->work.clear();
    return true;
  });
  work_done.notify_all();
  while (busy) work_done.wait(lock);
}

}  // namespace kvferry::fake_cuda
