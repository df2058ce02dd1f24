// Two daemons, a prefill engine of two ranks and a decode engine, for the flow tests.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/proc/flow_worker.h"
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {

struct FlowScene {
  std::unique_ptr<DaemonPair> pair;
  std::vector<std::unique_ptr<FlowWorker>> prefill;
  std::vector<std::unique_ptr<FlowWorker>> decode;
  std::string ticket;
  uint64_t next_request = 1;

  // `decode_groups`: where the decode engine numbers its groups otherwise.
  explicit FlowScene(std::vector<FlowGroup> groups = {FlowGroup{}},
                     std::vector<FlowGroup> decode_groups = {}, uint32_t decode_ranks = 1,
                     std::vector<std::string> settings = {}) {
    settings.push_back("engine.chunk_bytes=16KiB");
    pair = start_pair(std::move(settings));
    if (decode_groups.empty()) decode_groups = groups;
    add(prefill, "prefill", 0, 2, groups);
    add(decode, "decode", 1, decode_ranks, decode_groups);
    const auto got = prefill[0]->client().ticket("prefill");
    require_ok(got);
    ticket = *got;
  }
  void add(std::vector<std::unique_ptr<FlowWorker>>& to, const std::string& instance, int side,
           uint32_t ranks, const std::vector<FlowGroup>& groups) {
    FlowWorker::Options options;
    options.socket = pair->side(side).socket();
    options.instance = instance;
    options.ranks = ranks;
    options.groups = groups;
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      options.rank = rank;
      to.push_back(std::make_unique<FlowWorker>(options));
    }
  }
  std::vector<FlowWorker*> all() const {
    std::vector<FlowWorker*> workers;
    for (const auto& worker : prefill) workers.push_back(worker.get());
    for (const auto& worker : decode) workers.push_back(worker.get());
    return workers;
  }
  client::TransferKey key() {
    client::TransferKey key;
    key.instance = "prefill";
    key.id = "request-" + std::to_string(next_request++);
    key.secret = client::random_bytes16();
    return key;
  }
  void run(const std::function<bool()>& done) { run_until(all(), done); }

  // Nothing is held any more by anybody: all pages are back and as they were left.
  void require_quiet() {
    for (const int side : {0, 1})
      CHECK(comes_true([&] { return arena_in_use(pair->side(side)) == 0; }));
    // What has been told meanwhile too: a second RELEASED throws.
    for (FlowWorker* worker : all()) {
      CHECK_NOTHROW(worker->step());
      CHECK_NOTHROW(worker->check_free_pages());
    }
  }
};

// One request as the engines know it: pages and transfers of every rank.
struct FlowRequest {
  FlowScene& scene;
  client::TransferKey key;
  uint64_t number = 0;
  uint64_t prompt = 0;
  std::vector<FlowWorker::Pages> prefill_pages;
  std::vector<FlowWorker::Pages> decode_pages;
  std::vector<client::TransferHandle> sends;
  std::vector<client::TransferHandle> receives;
  uint32_t next_slice = 0;
  bool right = true;  // what was received

  FlowRequest(FlowScene& of, uint64_t tokens)
      : scene(of), key(of.key()), number(of.next_request), prompt(tokens) {
    for (const auto& worker : scene.prefill) prefill_pages.push_back(worker->allocate(tokens));
  }
  // The forward pass of tokens [begin, end) on all ranks.
  void compute(uint64_t begin, uint64_t end) {
    for (std::size_t r = 0; r < scene.prefill.size(); ++r)
      scene.prefill[r]->compute(number, prefill_pages[r], begin, end);
  }
  void send(uint64_t begin, uint64_t end, bool last,
            const std::function<void(client::SendRequest&)>& more = {}) {
    sends.resize(scene.prefill.size());
    for (std::size_t r = 0; r < scene.prefill.size(); ++r)
      sends[r] =
          scene.prefill[r]->send(key, next_slice, prefill_pages[r], begin, end, prompt, last, more);
    ++next_slice;
  }
  void prefill_all() {
    compute(0, prompt);
    send(0, prompt, true);
  }
  void receive(const std::vector<uint64_t>& cached = {},
               const std::function<void(client::ReceiveRequest&)>& more = {}) {
    for (std::size_t r = 0; r < scene.decode.size(); ++r) {
      FlowWorker& worker = *scene.decode[r];
      decode_pages.push_back(worker.allocate(prompt));
      receives.push_back(worker.receive(key, scene.ticket, decode_pages[r], prompt, cached, more));
      worker.on_completed(receives[r], [this, r, cached] { right = right && holds(r, cached); });
    }
  }
  // Rank r of the decode engine has all that it needs: of each group what it had not cached and
  // what the window still sees.
  bool holds(std::size_t r, const std::vector<uint64_t>& cached) const {
    const FlowWorker& worker = *scene.decode[r];
    for (uint32_t g = 0; g < worker.groups().size(); ++g) {
      uint64_t from = g < cached.size() ? cached[g] : 0;
      const uint64_t window = worker.groups()[g].window;
      if (window != 0 && prompt + 1 > window) from = std::max(from, prompt + 1 - window);
      if (!worker.holds(number, decode_pages[r], g, from, prompt)) return false;
    }
    return true;
  }
  bool sent() const {
    for (std::size_t r = 0; r < sends.size(); ++r)
      if (!scene.prefill[r]->told(sends[r]).over()) return false;
    return !sends.empty();
  }
  bool received() const {
    for (std::size_t r = 0; r < receives.size(); ++r)
      if (!scene.decode[r]->told(receives[r]).over()) return false;
    return !receives.empty();
  }
  void close() {
    for (std::size_t r = 0; r < sends.size(); ++r)
      require_ok(scene.prefill[r]->client().close(sends[r]));
    for (std::size_t r = 0; r < receives.size(); ++r)
      require_ok(scene.decode[r]->client().close(receives[r]));
  }
  // Delivered and completed on all ranks, each released once, every byte right.
  void require_well() {
    for (std::size_t r = 0; r < sends.size(); ++r) {
      const auto& told = scene.prefill[r]->told(sends[r]);
      CHECK(told.delivered == 1);
      CHECK(told.source_released == 1);
      CHECK(told.failed + told.cancelled == 0);
    }
    for (std::size_t r = 0; r < receives.size(); ++r) {
      const auto& told = scene.decode[r]->told(receives[r]);
      CHECK(told.completed == 1);
      CHECK(told.dest_released == 1);
      CHECK(told.failed + told.cancelled == 0);
    }
    CHECK(right);
  }
};

}  // namespace kvferry::testing
