// The engine, real copy threads and a worker's thread that overwrites its pages in the moment in
// which their withdrawal is answered. The thread sanitizer must see an order between the two.
#include <cstring>
#include <future>
#include <thread>

#include "daemon/base/queue.h"
#include "daemon/copy/copy_pool.h"
#include "tests/unit/engine_reuse_world.h"

namespace kvferry::engine::test {
namespace {

constexpr uint64_t kPage = 96 * 1024;
constexpr std::size_t kPages = 4;  // of the prompt; all of one receive
constexpr Duration kPatience = std::chrono::seconds(60);

struct Pages {
  std::vector<uint8_t> bytes = std::vector<uint8_t>(kPages * kPage);
  void fill(uint8_t value) { std::memset(bytes.data(), value, bytes.size()); }
  bool hold(uint8_t value) const {
    return std::all_of(bytes.begin(), bytes.end(), [=](uint8_t byte) { return byte == value; });
  }
};

EngineConfig race_config() {
  EngineConfig config = small_config(2);
  config.arenas = {{{16 * kPage}}};
  config.chunk_bytes = 32 * 1024;
  return config;
}

// The test's own thread is the engine's.
struct Race : ReuseWorld {
  Race() : ReuseWorld(race_config()) {}

  Pages source;
  Pages destination;
  BoundedQueue<CopyEnded> ended{1024};
  copy::CopyPool copies{{.threads = 3}};
  std::size_t started = 0;
  std::map<uint64_t, std::promise<void>> waiting;  // for the answer to a withdrawal

  void start_copies() {
    const auto asked = seen<LocalCopy>();
    for (; started < asked.size(); ++started) {
      const LocalCopy& command = asked[started];
      copy::Job job;
      job.bytes = command.bytes;
      job.copy = [this, offset = command.offset](uint64_t begin, uint64_t end) {
        std::memcpy(destination.bytes.data() + offset + begin, source.bytes.data() + offset + begin,
                    end - begin);
        return true;
      };
      job.done = [this, copy = command.copy](copy::Outcome) {
        if (ended.try_push({copy, CopyOutcome::kOk, {}}) != PushResult::kPushed) std::abort();
      };
      REQUIRE(copies.submit(std::move(job)));
    }
  }
  // Tells the engine of copies that have ended, of at most so many; waits for the first one.
  std::size_t end_some(std::size_t most) {
    std::vector<CopyEnded> events;
    const std::size_t count = ended.drain_until(events, monotonic_now() + kPatience, most);
    REQUIRE(count > 0);
    for (CopyEnded& event : events) post(event);
    start_copies();
    return count;
  }
  void answer() {
    for (auto it = waiting.begin(); it != waiting.end();) {
      if (reply_to(it->first) == nullptr) {
        ++it;
        continue;
      }
      it->second.set_value();
      it = waiting.erase(it);
    }
  }
};

}  // namespace

TEST_CASE("pages are overwritten after their withdrawal while copies run, and nobody sees it") {
  std::size_t waited = 0;
  for (int round = 0; round < 40; ++round) {
    Race race;
    const auto old_value = static_cast<uint8_t>(round + 1);
    race.source.fill(old_value);
    race.publish(race.a, {0, 1, 2, 3}, hashes_of({1, 2, 3, 4}));
    ReceiveOp op = race.hashed(race.b, {0, 1, 2, 3}, 4 * kReuseBlock, hashes_of({1, 2, 3, 4}));
    race.post(op);
    race.resolve();
    race.last_slice(op.key);
    race.compile_copy(kPages * kPage);
    race.start_copies();
    // Some chunks have been copied, some run, some have not begun.
    const std::size_t chunks = kPages * kPage / race_config().chunk_bytes;
    std::size_t seen_ends = 0;
    const std::size_t before = static_cast<std::size_t>(round) % chunks;
    while (seen_ends < before) seen_ends += race.end_some(before - seen_ends);
    const uint64_t withdrawn = race.withdraw(race.a, {0, 1, 2, 3});
    std::promise<void>& promise = race.waiting[withdrawn];
    std::thread worker([&race, freed = promise.get_future()] {
      freed.wait();
      race.source.fill(0xEE);
    });
    waited += race.reply_to(withdrawn) == nullptr;
    for (race.answer(); seen_ends < chunks; race.answer()) seen_ends += race.end_some(chunks);
    CHECK(race.waiting.empty());
    CHECK(race.record(kB, op.client_handle).state == TransferState::kCompleted);
    worker.join();
    CHECK(race.destination.hold(old_value));
    CHECK(race.source.hold(0xEE));
  }
  CHECK(waited > 0);
}

}  // namespace kvferry::engine::test
