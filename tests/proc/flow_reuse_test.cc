// Prefix caches of the decode engines of one node: what one of them has committed, another gets by
// a copy within the node, and only the rest comes over the network.
#include <future>

#include "tests/proc/flow_scene.h"

using namespace kvferry::testing;
namespace kc = kvferry::client;

namespace {

constexpr uint64_t kWindow = 48;
// Of one token of one group: two layers, keys and values.
constexpr uint64_t kTokenBytes = 2 * 2 * kFlowHeads * kFlowCellBytes;
const FlowGroup kFull{{0, 2}, 0};
const FlowGroup kSliding{{1, 3}, kWindow};

// The first block that a window needs of a prompt.
uint64_t first_of_window(uint64_t prompt, uint64_t window = kWindow) {
  return (prompt + 1 - window) / kFlowBlock;
}

// What a prompt says: text `own` for the first `shared` tokens, then text `other`.
struct Prompt {
  uint64_t own = 0;
  uint64_t shared = 0;
  uint64_t other = 0;
  uint64_t tokens = 0;

  uint64_t blocks() const { return tokens / kFlowBlock; }
  uint64_t window_blocks() const { return blocks() - first_of_window(tokens); }
  // Of each group; hash j names the text up to the end of block j.
  std::vector<kc::PromptHashes> hashes() const {
    std::vector<std::string> names;
    for (uint64_t block = 0; block < blocks(); ++block) {
      std::string name = "text" + std::to_string(own);
      if ((block + 1) * kFlowBlock > shared) name += "then" + std::to_string(other);
      names.push_back(name + "/" + std::to_string(block));
    }
    return {{0, names}, {1, names}};
  }
};

struct Moved {
  uint64_t wire = 0;
  uint64_t local = 0;
};

FlowWorker::Options options_of(const DaemonPair& pair, const std::string& instance, int side) {
  FlowWorker::Options options;
  options.socket = pair.side(static_cast<std::size_t>(side)).socket();
  options.instance = instance;
  options.groups = {kFull, kSliding};
  options.hash_scheme = "sha256-seed-0";
  return options;
}

// A prefill engine on one node; engines A and B, which know nothing of each other, on the other.
struct Scene {
  std::unique_ptr<DaemonPair> pair = start_pair({"engine.chunk_bytes=16KiB"});
  FlowWorker prefill{options_of(*pair, "prefill", 0)};
  FlowWorker a{options_of(*pair, "decode-a", 1)};
  FlowWorker b{options_of(*pair, "decode-b", 1)};
  std::string ticket;
  uint64_t transfers = 0;

  Scene() {
    const auto got = prefill.client().ticket("prefill");
    require_ok(got);
    ticket = *got;
  }
  uint64_t count(const std::string& name, const std::string& part = {}) const {
    return static_cast<uint64_t>(metric(pair->side(1), name, part));
  }
  Moved moved() const {
    return {count("kvferry_transfer_bytes_total", "received"),
            count("kvferry_transfer_bytes_total", "local")};
  }
  void run(const std::function<bool()>& done) { run_until({&prefill, &a, &b}, done); }

  // Tokens of the prompt's beginning that are on the node, of each group.
  std::vector<uint64_t> found(FlowWorker& worker, const Prompt& prompt, milliseconds pin = {},
                              uint64_t* pinned = nullptr) {
    const auto answer = worker.client().lookup_reuse(worker.layout(), prompt.hashes(), pin);
    require_ok(answer);
    if (pinned != nullptr) *pinned = answer->pin;
    std::vector<uint64_t> tokens;
    for (const kc::ReuseMatch& match : answer->groups) tokens.push_back(match.tokens);
    return tokens;
  }

  // A hand-off up to both ends, with every byte looked at. The pages stay the decode engine's.
  struct Received {
    kc::TransferHandle transfer{};
    FlowWorker::Pages pages;
  };
  Received hand_off(FlowWorker& decode, const Prompt& prompt, bool reuse, uint64_t pin = 0,
                    const std::function<void()>& when_asked = {});
  // A hand-off to A that others may find.
  FlowWorker::Pages publish(const Prompt& prompt);
};

Scene::Received Scene::hand_off(FlowWorker& decode, const Prompt& prompt, bool reuse, uint64_t pin,
                                const std::function<void()>& when_asked) {
  kc::TransferKey key;
  key.instance = "prefill";
  key.id = "request-" + std::to_string(++transfers);
  key.secret = kc::random_bytes16();
  const auto source = prefill.allocate(prompt.tokens);
  prefill.compute(prompt.own, source, 0, prompt.shared);
  prefill.compute(prompt.other, source, prompt.shared, prompt.tokens);
  const auto send = prefill.send(key, 0, source, 0, prompt.tokens, prompt.tokens, true);

  // As engines do, without pages before the window.
  const uint64_t first = first_of_window(prompt.tokens);
  Received out;
  out.pages = decode.allocate(prompt.tokens);
  FlowWorker::Pages passed(2);
  for (uint64_t block = 0; block < first; ++block)
    passed[1].push_back(std::exchange(out.pages[1][block], 0));
  decode.give_back(passed);
  const auto hashes = prompt.hashes();
  out.transfer =
      decode.receive(key, ticket, out.pages, prompt.tokens, {}, [&](kc::ReceiveRequest& request) {
        if (reuse) request.prompt_hashes = hashes;
        request.reuse_pin = pin;
      });
  decode.keep(out.transfer);
  if (when_asked) when_asked();
  run([&] { return prefill.told(send).over() && decode.told(out.transfer).over(); });
  INFO(decode.told(out.transfer).reason);
  CHECK(prefill.told(send).delivered == 1);
  CHECK(decode.told(out.transfer).completed == 1);
  CHECK(decode.told(out.transfer).dest_released == 1);
  for (const uint32_t group : {0U, 1U}) {
    const uint64_t from = group == 0 ? 0 : first * kFlowBlock;
    CHECK(decode.holds(prompt.own, out.pages, group, from, prompt.shared));
    CHECK(
        decode.holds(prompt.other, out.pages, group, std::max(from, prompt.shared), prompt.tokens));
  }
  require_ok(prefill.client().close(send));
  return out;
}

std::vector<kc::GroupCommit> commit_of(const Prompt& prompt) {
  std::vector<kc::GroupCommit> groups;
  for (const kc::PromptHashes& of : prompt.hashes())
    groups.push_back({of.group, prompt.tokens, of.hashes});
  return groups;
}

FlowWorker::Pages Scene::publish(const Prompt& prompt) {
  const uint64_t before = count("kvferry_reuse_commits_total");
  const Received received = hand_off(a, prompt, false);
  require_ok(a.client().commit_reuse(received.transfer, commit_of(prompt)));
  REQUIRE(comes_true([&] { return count("kvferry_reuse_commits_total") == before + 1; }));
  require_ok(a.client().close(received.transfer));
  return received.pages;
}

kc::Result<uint32_t> withdraw(FlowWorker& worker, FlowWorker::Pages pages) {
  std::vector<kc::GroupBlocks> groups;
  for (uint32_t g = 0; g < pages.size(); ++g) {
    std::replace(pages[g].begin(), pages[g].end(), 0, kc::kHole);
    groups.push_back({g, 0, pages[g], {}, 0});
  }
  return worker.client().withdraw_reuse(worker.layout(), groups);
}

using Tokens = std::vector<uint64_t>;

}  // namespace

TEST_CASE("a prefix that a neighbour has committed is copied, and only the rest is fetched") {
  Scene s;
  const Prompt whole{1, 256, 1, 256};
  const Prompt half{1, 128, 2, 256};
  const uint64_t in_windows = whole.window_blocks() * kFlowBlock;
  CHECK(s.found(s.b, whole) == Tokens{0, 0});
  const auto pages = s.publish(whole);
  CHECK(s.count("kvferry_reuse_entries") == whole.blocks() + whole.window_blocks());

  // All that B needs is here. Of a prompt with the first half of it: of the full group the half, of
  // the other nothing, as the window of a prompt that ended there lies before what A has.
  CHECK(s.found(s.b, whole) == Tokens{256, 256});
  CHECK(s.found(s.b, half) == Tokens{128, 0});

  const auto difference = [&](const Prompt& prompt) {
    const Moved before = s.moved();
    s.b.give_back(s.hand_off(s.b, prompt, true).pages);
    const Moved after = s.moved();
    return Moved{after.wire - before.wire, after.local - before.local};
  };
  Moved moved = difference(half);
  CHECK(moved.local == 128 * kTokenBytes);
  CHECK(moved.wire == (128 + in_windows) * kTokenBytes);
  CHECK(s.count("kvferry_reuse_blocks_total") == 8);
  moved = difference(whole);
  CHECK(moved.local == (256 + in_windows) * kTokenBytes);
  CHECK(moved.wire == 0);

  // A wants its pages for something else.
  const auto withdrawn = withdraw(s.a, pages);
  require_ok(withdrawn);
  CHECK(*withdrawn == whole.blocks() + whole.window_blocks());
  CHECK(s.count("kvferry_reuse_entries") == 0);
  s.a.give_back(pages);
  CHECK(s.found(s.b, whole) == Tokens{0, 0});
  moved = difference(whole);
  CHECK(moved.local == 0);
  CHECK(moved.wire == (256 + in_windows) * kTokenBytes);
  s.a.check_free_pages();
  s.b.check_free_pages();
}

TEST_CASE("a commit before completion is refused, and one that is made twice is one") {
  Scene s;
  const Prompt prompt{1, 256, 1, 256};
  kc::TransferKey key;
  key.instance = "prefill";
  key.id = "waits";
  key.secret = kc::random_bytes16();
  const auto waiting = s.a.receive(key, s.ticket, s.a.allocate(prompt.tokens), prompt.tokens);
  require_ok(s.a.client().commit_reuse(waiting, commit_of(prompt)));
  s.run([&] { return s.a.told(waiting).rejected.has_value(); });
  CHECK(s.a.told(waiting).rejected->reason == "NOT_COMPLETED");
  CHECK(s.found(s.b, prompt) == Tokens{0, 0});
  require_ok(s.a.client().cancel(waiting));
  s.run([&] { return s.a.told(waiting).dest_released == 1; });

  const auto received = s.hand_off(s.a, prompt, false);
  require_ok(s.a.client().commit_reuse(received.transfer, commit_of(prompt)));
  require_ok(s.a.client().commit_reuse(received.transfer, commit_of(prompt)));
  auto other = commit_of(prompt);
  other[0].hashes[0] = "another text";
  require_ok(s.a.client().commit_reuse(received.transfer, other));
  s.run([&] { return s.a.told(received.transfer).rejected.has_value(); });
  CHECK(s.a.told(received.transfer).rejected->reason == "COMMITTED_OTHERWISE");
  CHECK(s.a.told(received.transfer).rejected->field == "groups");
  REQUIRE(comes_true([&] { return s.count("kvferry_reuse_commits_total") > 0; }));
  CHECK(s.count("kvferry_reuse_commits_total") == 1);
  CHECK(s.count("kvferry_reuse_entries") == prompt.blocks() + prompt.window_blocks());
  CHECK(s.found(s.b, prompt) == Tokens{256, 256});
  require_ok(withdraw(s.a, received.pages));
  s.a.give_back(received.pages);
  s.a.check_free_pages();
}

TEST_CASE("a pin keeps what was found from being overwritten, for its time or its receive") {
  Scene s;
  const Prompt prompt{1, 256, 1, 256};
  auto pages = s.publish(prompt);
  auto began = std::chrono::steady_clock::now();
  uint64_t pin = 0;
  CHECK(s.found(s.b, prompt, milliseconds(500), &pin) == Tokens{256, 256});
  CHECK(pin != 0);
  require_ok(withdraw(s.a, pages));
  CHECK(std::chrono::steady_clock::now() - began >= milliseconds(500));
  CHECK(s.found(s.b, prompt) == Tokens{0, 0});
  s.a.give_back(pages);

  // Named by a receive, it is copied from although it is found by nobody else any more.
  pages = s.publish(prompt);
  CHECK(s.found(s.b, prompt, milliseconds(1000), &pin) == Tokens{256, 256});
  auto freed = std::async(std::launch::async, [&] {
    const auto withdrawn = withdraw(s.a, pages);
    return withdrawn.ok() && *withdrawn > 0;
  });
  REQUIRE(comes_true([&] { return s.count("kvferry_reuse_entries") == 0; }));
  const Moved before = s.moved();
  const auto received = s.hand_off(s.b, prompt, true, pin);
  CHECK(s.moved().wire == before.wire);
  CHECK(freed.get());
  s.a.give_back(pages);
  s.b.give_back(received.pages);
}

TEST_CASE("pages that are withdrawn while they are copied are overwritten only after that") {
  Scene s;
  const Prompt prompt{1, 256, 1, 256};
  uint64_t copied = 0;
  for (int round = 0; round < 25; ++round) {
    const auto pages = s.publish(prompt);
    std::promise<void> start;
    // Sooner or later after the receive's call, by turns; the pages are overwritten the moment it
    // returns.
    auto freed = std::async(std::launch::async, [&, go = start.get_future()]() mutable {
      go.wait();
      std::this_thread::sleep_for(std::chrono::microseconds(200 * (round % 10)));
      const auto withdrawn = withdraw(s.a, pages);
      if (withdrawn) s.a.give_back(pages);
      return withdrawn.ok();
    });
    const uint64_t before = s.moved().local;
    const auto received = s.hand_off(s.b, prompt, true, 0, [&] { start.set_value(); });
    copied += s.moved().local - before;
    REQUIRE(freed.get());
    require_ok(s.b.client().close(received.transfer));
    s.b.give_back(received.pages);
  }
  CHECK(copied > 0);
  s.a.check_free_pages();
}

TEST_CASE("workers with another key or another way to hash find nothing") {
  Scene s;
  const Prompt prompt{1, 256, 1, 256};
  (void)s.publish(prompt);
  auto options = options_of(*s.pair, "decode-c", 1);
  options.hash_scheme = "sha256-seed-1";
  FlowWorker other(options);
  CHECK(s.found(other, prompt) == Tokens{0, 0});
  options.hash_scheme.clear();
  options.instance = "decode-d";
  FlowWorker none(options);
  const auto refused = none.client().lookup_reuse(none.layout(), prompt.hashes(), {});
  REQUIRE_FALSE(refused);
  CHECK(refused.error().reason == "NO_REUSE");
  const auto not_withdrawn = withdraw(none, {{1}, {}});
  REQUIRE_FALSE(not_withdrawn);
  CHECK(not_withdrawn.error().reason == "NO_REUSE");
  // A scheduler asks for any of its tenant's layouts, with the key of their domain; here there is
  // none but the user.
  kc::AttachOptions attach;
  attach.socket = s.pair->side(1).socket();
  attach.name = "scheduler";
  attach.role = kc::WorkerRole::kController;
  const auto scheduler = kc::Client::attach(attach);
  require_ok(scheduler);
  const auto ask = [&](const std::optional<kc::Bytes16>& key, milliseconds pin = {}) {
    const auto answer = (*scheduler)->lookup_reuse(s.b.layout(), prompt.hashes(), pin, key);
    require_ok(answer);
    Tokens tokens;
    for (const kc::ReuseMatch& match : answer->groups) tokens.push_back(match.tokens);
    CHECK((answer->pin != 0) == (pin > milliseconds(0) && tokens[0] > 0));
    return tokens;
  };
  CHECK(ask({}, milliseconds(100)) == Tokens{256, 256});
  CHECK(ask(kc::random_bytes16(), milliseconds(100)) == Tokens{0, 0});
  // What its worker held goes with it.
  s.a.die();
  CHECK(comes_true([&] { return s.count("kvferry_reuse_entries") == 0; }));
  CHECK(s.found(s.b, prompt) == Tokens{0, 0});
}

// Alternate layers look at all tokens and at the last 128, 8 heads of 64 elements of 2 bytes.
TEST_CASE("a hybrid model with a long cached prefix moves each group's missing blocks only") {
  constexpr uint64_t kPrompt = 1000;
  constexpr uint64_t kCached = 768;
  constexpr uint64_t kModelWindow = 128;
  FlowGroup full;
  FlowGroup sliding;
  full.layers.clear();
  sliding.layers.clear();
  sliding.window = kModelWindow;
  for (uint32_t layer = 0; layer < 36; ++layer)
    (layer % 2 == 0 ? sliding : full).layers.push_back(layer);
  auto pair = start_pair();
  const auto worker = [&](const std::string& instance, int side, uint32_t rank, uint32_t ranks) {
    auto options = options_of(*pair, instance, side);
    options.rank = rank;
    options.ranks = ranks;
    options.groups = {full, sliding};
    options.heads = 8;
    options.cell_bytes = 128;
    return options;
  };
  FlowWorker first(worker("prefill", 0, 0, 2));
  FlowWorker second(worker("prefill", 0, 1, 2));
  FlowWorker decode(worker("decode", 1, 0, 1));
  const auto ticket = first.client().ticket("prefill");
  require_ok(ticket);
  kc::TransferKey key;
  key.instance = "prefill";
  key.id = "hybrid";
  key.secret = kc::random_bytes16();

  std::vector<kc::TransferHandle> sends;
  for (FlowWorker* of : {&first, &second}) {
    const auto pages = of->allocate(kPrompt);
    of->compute(1, pages, 0, kPrompt);
    sends.push_back(of->send(key, 0, pages, 0, kPrompt, kPrompt, true));
  }
  // The prefix is in the engine's own cache, of the full group; the window's pages it dropped.
  const uint64_t in_window = first_of_window(kPrompt, kModelWindow);
  auto pages = decode.allocate(kPrompt);
  FlowWorker::Pages passed(2);
  for (uint64_t block = 0; block < in_window; ++block)
    passed[1].push_back(std::exchange(pages[1][block], 0));
  decode.give_back(passed);
  decode.compute(1, {pages[0], std::vector<int32_t>(pages[1].size(), 0)}, 0, kCached);
  const auto receive = decode.receive(key, *ticket, pages, kPrompt, {kCached, 0});
  decode.keep(receive);
  run_until({&first, &second, &decode}, [&] {
    return first.told(sends[0]).over() && second.told(sends[1]).over() &&
           decode.told(receive).over();
  });
  REQUIRE(decode.told(receive).completed == 1);
  CHECK(decode.holds(1, pages, 0, 0, kPrompt));
  CHECK(decode.holds(1, pages, 1, in_window * kFlowBlock, kPrompt));
  // Whole blocks: 768 to 1008 of the full group, 864 to 1008 of the other.
  const double expected = (240 + 144) * 18.0 * 2 * 8 * 128;
  CHECK(metric(pair->side(0), "kvferry_transfer_bytes_total", "sent") == expected);
  CHECK(metric(pair->side(1), "kvferry_transfer_bytes_total", "received") == expected);
  CHECK(decode.client().status(receive)->bytes_done == static_cast<uint64_t>(expected));
}
