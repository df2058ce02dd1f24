#include "tests/proc/soak_line.h"

#include <signal.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <sstream>

#include "kvferry/client.h"

namespace kvferry::testing {
namespace {

using std::chrono::milliseconds;

// A transfer's own limits are ten seconds for each of its phases; beyond this it hangs.
constexpr int kEndMs = 45'000;

// What a transfer that a fault has met may end with.
const std::set<std::string, std::less<>> kAllowed = {
    "PEER_LOST", "WORKER_LOST", "DAEMON_RESTARTED", "SHUTDOWN",    "DEADLINE",        "EXPIRED",
    "DECLINED",  "NO_SEND",     "REFUSED",          "STALE_CARDS", "PEER_UNREACHABLE"};

// The reason in "ERROR CODE REASON: message".
std::string reason_of(const std::string& error) {
  std::istringstream words(error);
  std::string first, code, reason;
  words >> first >> code >> reason;
  while (!reason.empty() && reason.back() == ':') reason.pop_back();
  return reason.empty() ? error : reason;
}

}  // namespace

uint64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

void SoakCounts::add(const SoakCounts& more) {
  completed += more.completed;
  bytes += more.bytes;
  with_worker += more.with_worker;
  for (const auto& [what, count] : more.failed) failed[what] += count;
  for (const auto& [what, count] : more.refused) refused[what] += count;
}

// ---- the world ---------------------------------------------------------------------------------

void SoakWorld::begin_disturbance() {
  if (weather_ % 2 == 0) ++weather_;
}

void SoakWorld::end_disturbance() {
  if (weather_ % 2 == 1) ++weather_;
}

void SoakWorld::violate(const std::string& what) {
  const std::lock_guard lock(mutex_);
  if (violation_.empty()) violation_ = what;
}

std::string SoakWorld::violation() const {
  const std::lock_guard lock(mutex_);
  return violation_;
}

bool SoakWorld::may_go_on(std::atomic<bool>& idle) {
  std::unique_lock lock(mutex_);
  idle = paused_ || left_ == 0;
  changed_.wait(lock, [&] { return over_ || (!paused_ && left_ > 0); });
  idle = false;
  if (over_) return false;
  if (left_ != UINT64_MAX) --left_;
  return true;
}

void SoakWorld::pause(bool paused) {
  {
    const std::lock_guard lock(mutex_);
    paused_ = paused;
  }
  changed_.notify_all();
}

void SoakWorld::allow(uint64_t transfers) {
  {
    const std::lock_guard lock(mutex_);
    left_ = transfers;
  }
  changed_.notify_all();
}

void SoakWorld::end() {
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
  }
  changed_.notify_all();
}

// ---- a line ------------------------------------------------------------------------------------

SoakLine::SoakLine(Plan plan, SoakWorld& world)
    : plan_(std::move(plan)), world_(world), random_(plan_.seed), thread_([this] { run(); }) {}

SoakLine::~SoakLine() {
  thread_.join();
}

void SoakLine::signal_worker(int side, int signal) {
  const std::lock_guard lock(mutex_);
  if (!workers_[side] || workers_[side]->pid() <= 0) return;
  if (signal == SIGKILL) killed_[side] = true;
  ::kill(workers_[side]->pid(), signal);
}

SoakCounts SoakLine::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

void SoakLine::run() {
  while (world_.may_go_on(idle_)) {
    if (have_workers())
      hand_over();
    else
      std::this_thread::sleep_for(milliseconds(50));  // between two tries
  }
}

bool SoakLine::have_workers() {
  for (const int side : {0, 1}) {
    if (workers_[side]) continue;
    const uint64_t weather = world_.weather();
    auto fresh = std::make_unique<WorkerProcess>(
        plan_.binary_directory, side == 0, plan_.sockets[side],
        plan_.name + (side == 0 ? "-prefill" : "-decode"), plan_.topologies[side], plan_.shape);
    {
      const std::lock_guard lock(mutex_);
      killed_[side] = false;
      workers_[side] = std::move(fresh);
    }
    const std::string wrong = workers_[side]->wait_until_ready();
    if (wrong.empty()) continue;
    const bool calm = weather % 2 == 0 && world_.weather() == weather;
    if (calm) world_.violate(plan_.name + ": a worker cannot be started: " + wrong);
    const std::lock_guard lock(mutex_);
    ++counts_.refused[reason_of(wrong)];
    workers_[side].reset();
    return false;
  }
  return true;
}

bool SoakLine::forget_if_lost(int side, const std::string& answer) {
  if (answer != "ERROR the worker has ended" && answer != "ERROR the worker does not answer")
    return false;
  const std::lock_guard lock(mutex_);
  if (!killed_[side]) world_.violate(plan_.name + ": " + answer + ", which nobody killed");
  workers_[side].reset();
  return true;
}

std::string SoakLine::ask(int side, const std::string& command) {
  if (!workers_[side]) return "ERROR no worker";
  std::string answer = workers_[side]->ask(command);
  forget_if_lost(side, answer);
  return answer;
}

void SoakLine::count_refusal(const std::string& error, bool calm) {
  if (calm) world_.violate(plan_.name + ": a call failed though nothing was wrong: " + error);
  {
    const std::lock_guard lock(mutex_);
    ++counts_.refused[reason_of(error)];
  }
  std::this_thread::sleep_for(milliseconds(50));  // between two tries
}

void SoakLine::hand_over() {
  // Small ones and large ones alike; now and then all of it.
  const double share = std::uniform_real_distribution<double>(0, 1.1)(random_);
  const auto most = static_cast<double>(plan_.shape.tokens);
  const auto tokens = static_cast<uint64_t>(std::min(std::pow(most, share), most));
  const bool packed = random_() % 8 == 0;
  const uint64_t weather = world_.weather();
  const uint64_t begun = monotonic_ns();
  const std::string id = client::to_text(client::random_bytes16());
  const std::string key = id + " " + client::to_text(client::random_bytes16());

  std::string refused;
  std::optional<TransferEnd> ends[2];
  const std::string ticket = ask(0, "ticket");
  if (!ticket.starts_with("TICKET ")) refused = ticket;
  // Whatever an earlier transfer writes from here on is found by the comparison.
  if (refused.empty())
    if (const std::string clean = ask(1, "clean"); clean != "OK") refused = clean;
  const std::string size = " " + std::to_string(tokens);
  for (const int side : {0, 1}) {
    if (!refused.empty()) break;
    const std::string said = side == 0 ? ask(0, "send " + key + size + (packed ? " packed" : ""))
                                       : ask(1, "receive " + key + " " + ticket.substr(7) + size);
    if (said == "OK")
      ends[side].emplace();
    else
      refused = said;
  }
  for (const int side : {1, 0})
    if (ends[side] && workers_[side])
      workers_[side]->tell("wait " + id + " " + std::to_string(kEndMs));
  for (const int side : {1, 0}) {
    if (ends[side] && workers_[side]) {
      *ends[side] = workers_[side]->next_end();
      if (!forget_if_lost(side, ends[side]->error)) ask(side, "close " + id);
    }
    if (!workers_[side]) ends[side].reset();
  }
  judge(ends, refused, tokens, weather, begun);
}

void SoakLine::judge(const std::optional<TransferEnd> (&ends)[2], const std::string& refused,
                     uint64_t tokens, uint64_t weather, uint64_t begun_ns) {
  bool good[2] = {false, false};
  std::string words;  // "sender's/receiver's"
  for (const int side : {0, 1}) {
    std::string word = "-";
    if (ends[side] && !ends[side]->error.empty()) {
      word = reason_of(ends[side]->error);
      if (word == "WAIT_TIMEOUT") world_.violate(plan_.name + ": a transfer does not end");
    } else if (ends[side]) {
      good[side] = true;
      for (const RankEnd& rank : ends[side]->ranks) {
        const bool well = rank.state == (side == 0 ? "DELIVERED" : "COMPLETED");
        good[side] = good[side] && well;
        if (!well) word = rank.reason;
        if (!well && !kAllowed.contains(rank.reason))
          world_.violate(plan_.name + ": " + rank.state + " " + rank.reason +
                         " is no end that a fault explains");
      }
      if (good[side]) word = "NONE";
    }
    words += (side == 0 ? "" : "/") + word;
  }
  if (good[1]) {
    const std::string verified = ask(1, "verify " + std::to_string(tokens));
    if (verified.starts_with("WRONG")) world_.violate(plan_.name + ": " + verified);
    good[1] = verified == "VERIFIED";
  }
  // With one leg, delivered means completed, whoever is asked.
  const bool one_leg = plan_.topologies[0] == "tp1" && plan_.topologies[1] == "tp1";
  if (one_leg && good[0] && words != "NONE/NONE" && words != "NONE/-" &&
      words != "NONE/DAEMON_RESTARTED")
    world_.violate(plan_.name + ": delivered, but its receiver says " + words);
  const bool well = good[0] && good[1];
  const bool calm = weather % 2 == 0 && world_.weather() == weather;
  if (calm && !well)
    world_.violate(plan_.name + ": nothing was wrong, but it ended " + words + " " + refused);
  if (workers_[0] && workers_[1] && !refused.empty()) return count_refusal(refused, calm);
  const std::lock_guard lock(mutex_);
  if (!workers_[0] || !workers_[1]) {
    ++counts_.with_worker;
  } else if (well) {
    ++counts_.completed;
    counts_.bytes +=
        tokens * plan_.shape.layers * plan_.shape.kv_heads * 2 * plan_.shape.head_bytes;
    last_good_begin_ns_ = begun_ns;
  } else {
    ++counts_.failed[words];
  }
}

}  // namespace kvferry::testing
