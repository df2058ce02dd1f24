// The worker's side of the contract: what calls cost the caller, and how soon they and their
// events are seen. Starts two daemons of its own. Times are of single calls; p50 and p99 are over
// the iterations of a run.
#include <benchmark/benchmark.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "client/bench/daemons.h"
#include "kvferry/client.h"

namespace {

namespace kc = kvferry::client;
using Clock = std::chrono::steady_clock;

constexpr uint64_t kIds = 8000;
constexpr uint64_t kTokensPerBlock = 16;

template <typename T>
T must(kc::Result<T> result, const char* what) {
  if (result) return std::move(*result);
  std::fprintf(stderr, "%s: %s\n", what, result.error().to_string().c_str());
  std::exit(1);
}
void must(kc::Status status, const char* what) {
  if (status) return;
  std::fprintf(stderr, "%s: %s\n", what, status.error().to_string().c_str());
  std::exit(1);
}

struct Worker {
  std::unique_ptr<kc::Client> client;
  kc::LayoutRef layout;

  Worker(const std::string& socket, const std::string& instance) {
    kc::AttachOptions options;
    options.socket = socket;
    options.name = instance + "-0";
    client = must(kc::Client::attach(options), "attach");
    kc::AttentionShape shape;
    shape.layers = {0};
    shape.heads_total = shape.head_count = 1;
    shape.tokens_per_block = kTokensPerBlock;
    shape.block_count = kIds + 192;
    shape.head_bytes = 64;
    shape.packing = kc::KvPacking::kSeparate;
    const uint64_t bytes = kc::block_bytes(shape) * shape.block_count;
    (void)must(client->alloc_pool("kv", bytes), "alloc_pool");
    kc::LayoutRegistration registration;
    registration.instance = instance;
    registration.layout.fingerprint = "bench";
    registration.layout.pools = {{"kv", bytes}};
    registration.layout.groups = {must(kc::cross_layer_group(shape, 0), "layout")};
    (void)must(client->register_layout(registration), "register_layout");
    layout = {instance, 0};
  }
};

struct World {
  std::unique_ptr<kvferry::bench::DaemonPair> daemons;
  std::unique_ptr<Worker> prefill;
  std::unique_ptr<Worker> decode;
  std::string ticket;
  std::vector<int32_t> ids;
  uint64_t requests = 0;

  World() {
    kvferry::bench::DaemonOptions options;
    options.binary_directory = KVFERRY_BIN_DIR;
    daemons = must(kvferry::bench::DaemonPair::start(options), "daemons");
    prefill = std::make_unique<Worker>(daemons->side(0).socket(), "prefill");
    decode = std::make_unique<Worker>(daemons->side(1).socket(), "decode");
    ticket = must(prefill->client->ticket("prefill"), "ticket");
    ids.resize(kIds);
    std::iota(ids.rbegin(), ids.rend(), 0);
  }
  kc::TransferKey fresh_key() {
    kc::TransferKey key;
    key.instance = "prefill";
    key.id = "request-" + std::to_string(++requests);
    key.secret = kc::random_bytes16();
    return key;
  }
  kc::TransferHandle send(const kc::TransferKey& key, uint64_t blocks) {
    kc::GroupBlocks group;
    group.ids = std::span(ids).first(blocks);
    kc::SendRequest request;
    request.key = key;
    request.layout = prefill->layout;
    request.num_tokens = blocks * kTokensPerBlock;
    request.tokens = {0, request.num_tokens};
    request.groups = {&group, 1};
    return must(prefill->client->send(request), "send");
  }
  kc::TransferHandle receive(const kc::TransferKey& key, uint64_t blocks,
                             kc::ReadyCondition ready) {
    kc::GroupBlocks group;
    group.ids = std::span(ids).first(blocks);
    kc::ReceiveRequest request;
    request.key = key;
    request.layout = decode->layout;
    request.ticket = ticket;
    request.num_tokens = blocks * kTokensPerBlock;
    request.groups = {&group, 1};
    request.ready = ready;
    return must(decode->client->receive(request), "receive");
  }
  // The transfer is over on this side and forgotten.
  static void finish(Worker& worker, kc::TransferHandle handle) {
    (void)must(worker.client->wait(handle, Clock::now() + std::chrono::seconds(10)), "wait");
    must(worker.client->close(handle), "close");
  }
};

World* world = nullptr;

class Times {
 public:
  explicit Times(benchmark::State& state) : state_(state) {}
  ~Times() {
    if (all_.empty()) return;
    std::sort(all_.begin(), all_.end());
    state_.counters["p50_us"] = all_[all_.size() / 2] * 1e6;
    state_.counters["p99_us"] = all_[std::min(all_.size() - 1, all_.size() * 99 / 100)] * 1e6;
  }
  void add(Clock::time_point from, Clock::time_point to) {
    const double seconds = std::chrono::duration<double>(to - from).count();
    all_.push_back(seconds);
    state_.SetIterationTime(seconds);
  }

 private:
  benchmark::State& state_;
  std::vector<double> all_;
};

// Looks again and again, but leaves the processor to whoever has work: the client's and the
// daemon's threads share two of them with this one.
template <typename Condition>
void await(Condition&& condition) {
  const auto limit = Clock::now() + std::chrono::seconds(10);
  while (!condition()) {
    if (Clock::now() > limit) {
      std::fprintf(stderr, "nothing happened for ten seconds\n");
      std::exit(1);
    }
    std::this_thread::yield();
  }
}
bool known(const Worker& worker, kc::TransferHandle handle) {
  const auto status = worker.client->status(handle);
  return status && status->state != kc::TransferState::kNone;
}

// The yardstick: a sleeping thread is woken over an eventfd, and wakes the caller. Half of it is
// what each hand-over between threads or processes costs here.
void wake_and_back(benchmark::State& state) {
  const int there = eventfd(0, 0);
  const int back = eventfd(0, 0);
  std::atomic<bool> stop{false};
  std::thread other([&] {
    uint64_t word = 0;
    while (read(there, &word, sizeof word) == sizeof word && !stop.load()) {
      word = 1;
      if (write(back, &word, sizeof word) != sizeof word) return;
    }
  });
  uint64_t word = 1;
  for (auto _ : state) {
    word = 1;
    if (write(there, &word, sizeof word) != sizeof word ||
        read(back, &word, sizeof word) != sizeof word)
      state.SkipWithError("eventfd");
  }
  stop.store(true);
  word = 1;
  if (write(there, &word, sizeof word) != sizeof word) std::abort();
  other.join();
  close(there);
  close(back);
}
BENCHMARK(wake_and_back)->UseRealTime()->Unit(benchmark::kMicrosecond);

// What the caller of a send with 8,000 block ids waits.
void enqueue_8000_ids(benchmark::State& state) {
  Times times(state);
  for (auto _ : state) {
    const kc::TransferKey key = world->fresh_key();
    const auto begin = Clock::now();
    const kc::TransferHandle handle = world->send(key, kIds);
    times.add(begin, Clock::now());
    (void)must(world->prefill->client->cancel(handle), "cancel");
    World::finish(*world->prefill, handle);
  }
}
BENCHMARK(enqueue_8000_ids)->UseManualTime()->Iterations(2000)->Unit(benchmark::kMicrosecond);

// From the call until the engine has taken the transfer: its slot shows it.
void enqueue_to_engine(benchmark::State& state) {
  Times times(state);
  for (auto _ : state) {
    const kc::TransferKey key = world->fresh_key();
    const auto begin = Clock::now();
    const kc::TransferHandle handle = world->send(key, 8);
    await([&] { return known(*world->prefill, handle); });
    times.add(begin, Clock::now());
    (void)must(world->prefill->client->cancel(handle), "cancel");
    World::finish(*world->prefill, handle);
  }
}
BENCHMARK(enqueue_to_engine)->UseManualTime()->Iterations(2000)->Unit(benchmark::kMicrosecond);

void empty_poll(benchmark::State& state) {
  std::vector<kc::Event> events(64);
  while (world->prefill->client->poll(events) > 0) {
  }
  for (auto _ : state) benchmark::DoNotOptimize(world->prefill->client->poll(events));
}
BENCHMARK(empty_poll)->Unit(benchmark::kMicrosecond);

void cancel(benchmark::State& state) {
  Times times(state);
  for (auto _ : state) {
    const kc::TransferHandle handle = world->send(world->fresh_key(), 8);
    await([&] { return known(*world->prefill, handle); });
    const auto begin = Clock::now();
    (void)must(world->prefill->client->cancel(handle), "cancel");
    times.add(begin, Clock::now());
    World::finish(*world->prefill, handle);
  }
}
BENCHMARK(cancel)->UseManualTime()->Iterations(2000)->Unit(benchmark::kMicrosecond);

// All data have landed and wait for the worker's word; from its store until the event is seen:
// the daemon notices the word (it looks every 50 us), copies 16 KiB to the pages and publishes.
// An upper bound of how long after the copy's end an event is seen.
void word_to_completed(benchmark::State& state) {
  Times times(state);
  const uint32_t word = must(world->decode->client->alloc_word(), "alloc_word");
  uint64_t value = 0;
  std::vector<kc::Event> events(64);
  for (auto _ : state) {
    const kc::TransferKey key = world->fresh_key();
    const kc::TransferHandle sending = world->send(key, 8);
    const kc::TransferHandle receiving =
        world->receive(key, 8, kc::ReadyCondition::timeline(word, ++value));
    // Everything has landed once the sender knows that it was all gathered and time has passed for
    // the little that is under way; should it not have, the figure is larger, never smaller.
    await([&] { return world->prefill->client->status(sending)->released; });
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    while (world->decode->client->poll(events) > 0) {
    }
    const auto begin = Clock::now();
    must(world->decode->client->signal(word, value), "signal");
    await([&] {
      const std::size_t count = world->decode->client->poll(events);
      return std::any_of(events.begin(), events.begin() + static_cast<std::ptrdiff_t>(count),
                         [](const auto& event) { return event.kind == kc::EventKind::kCompleted; });
    });
    times.add(begin, Clock::now());
    World::finish(*world->prefill, sending);
    await([&] { return world->decode->client->status(receiving)->released; });
    must(world->decode->client->close(receiving), "close");
  }
  world->decode->client->free_word(word);
}
BENCHMARK(word_to_completed)->UseManualTime()->Iterations(1000)->Unit(benchmark::kMicrosecond);

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 64;
  World of;
  world = &of;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
