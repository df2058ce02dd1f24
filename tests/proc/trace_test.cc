// What operators see of transfers between two real daemons: traces of both ends, live views, and
// the metrics that only such a transfer can move.
#include <signal.h>
#include <sys/wait.h>

#include <map>
#include <sstream>

#include "tests/proc/control.h"
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

using nlohmann::json;

// A sender of one rank, a receiver of two.
struct Scene {
  std::unique_ptr<DaemonPair> pair = start_pair({"engine.chunk_bytes=64KiB"});
  std::unique_ptr<Party> sender = attach("prefill", 0, true, "tp1");
  std::unique_ptr<Party> receiver = attach("decode", 1, false, "tp2");
  std::string ticket;

  Scene() {
    const auto got = sender->ticket();
    require_ok(got);
    ticket = *got;
  }
  std::unique_ptr<Party> attach(const std::string& instance, int side, bool sends,
                                const char* topology) const {
    Party::Options options;
    options.instance = instance;
    options.socket = pair->side(side).socket();
    options.shape = small_shape();
    const auto parsed = bench::parse_topology(topology);
    require_ok(parsed);
    options.topology = *parsed;
    options.sends = sends;
    auto party = Party::make(options);
    require_ok(party);
    return std::move(*party);
  }
  const bench::DaemonProcess& from() const { return pair->side(0); }
  const bench::DaemonProcess& to() const { return pair->side(1); }

  TransferKey send_half() {
    const TransferKey key = new_key("prefill");
    Party::Send slice;
    slice.tokens = client::TokenRange{0, 256};
    slice.last = false;
    require_ok(sender->send(key, slice));
    require_ok(receiver->receive(key, ticket, {}));
    for (uint32_t rank = 0; rank < 2; ++rank)
      REQUIRE(comes_true([&] {
        const auto status = receiver->rank(rank).status(receiver->handle(key.id, rank));
        return status && status->slices == 1;
      }));
    return key;
  }
  void send_rest(const TransferKey& key) {
    Party::Send slice;
    slice.index = 1;
    slice.tokens = client::TokenRange{256, 512};
    require_ok(sender->send(key, slice));
  }
  void end(const TransferKey& key) {
    for (Party* party : {sender.get(), receiver.get()}) require_ok(party->wait(key.id, kPatience));
  }
};

struct Output {
  std::string text;
  int code = -1;
};

// kvferryctl with standard error beside standard output.
Output run_ctl(const bench::DaemonProcess& daemon, const std::string& words) {
  const std::string command =
      binary_directory() + "/kvferryctl --socket " + daemon.admin_socket() + " " + words + " 2>&1";
  std::FILE* const pipe = ::popen(command.c_str(), "re");
  REQUIRE(pipe != nullptr);
  Output out;
  std::array<char, 4096> buffer{};
  for (std::size_t got = 0; (got = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
    out.text.append(buffer.data(), got);
  const int status = ::pclose(pipe);
  out.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return out;
}

std::vector<json> lines_of(const std::string& text) {
  std::vector<json> out;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) out.push_back(json::parse(line));
  return out;
}

// The handle and hash of the only transfer that a daemon shows of that role and rank.
std::pair<std::string, std::string> find(const bench::DaemonProcess& daemon, const char* role,
                                         int rank) {
  const json transfers = control(daemon, "transfers")["transfers"];
  for (const json& row : transfers)
    if (row["role"] == role && row["rank"] == rank) return {row["handle"], row["id_hash"]};
  FAIL("no such transfer in " + transfers.dump());
  return {};
}

std::map<std::string, json> steps_of(const json& part) {
  std::map<std::string, json> steps;
  for (const json& step : part["steps"]) steps[step["name"]] = step;
  return steps;
}

double first(const std::map<std::string, json>& steps, const char* name) {
  REQUIRE(steps.contains(name));
  return steps.at(name)["first_seconds"];
}
double last(const std::map<std::string, json>& steps, const char* name) {
  REQUIRE(steps.contains(name));
  return steps.at(name)["last_seconds"];
}

}  // namespace

TEST_CASE("a trace tells of both ends, from either, while a transfer runs and after it") {
  Scene scene;
  const TransferKey key = scene.send_half();
  const auto [sending, hash] = find(scene.from(), "send", 0);
  const auto [receiving, same_hash] = find(scene.to(), "receive", 1);
  CHECK(hash == same_hash);
  CHECK(control(scene.from(), "transfers")["transfers"][0]["peer"] == "receiver");

  const json half = control(scene.from(), "trace " + sending);
  REQUIRE(half["parts"].size() == 3);
  CHECK(half["gaps"].empty());
  CHECK(half["parts"][0]["node_id"] == "sender");
  CHECK(half["parts"][0]["handle"] == sending);
  CHECK(half["parts"][0]["peers"] == json::array({"receiver"}));
  CHECK(half["parts"][0]["state"] == "ACTIVE");
  CHECK(half["parts"][0]["clock_error_seconds"] == 0);
  for (const std::size_t part : {1U, 2U}) {
    CHECK(half["parts"][part]["node_id"] == "receiver");
    CHECK(half["parts"][part]["role"] == "receive");
    CHECK_FALSE(steps_of(half["parts"][part]).contains("ended"));
  }

  scene.send_rest(key);
  scene.end(key);
  const json whole = control(scene.to(), "trace " + receiving);
  REQUIRE(whole["parts"].size() == 3);
  const json& sent = whole["parts"][2];
  CHECK(sent["role"] == "send");
  CHECK(sent["node_id"] == "sender");
  CHECK(sent["state"] == "DELIVERED");
  CHECK(sent["bytes_done"] == 4 << 20);
  CHECK(sent["chunks"] == 64);
  CHECK(sent["fragments"] >= 64);
  const double error = sent["clock_error_seconds"];
  CHECK(error > 0);
  CHECK(error < 1);
  const auto there = steps_of(sent);
  CHECK(there.at("asked")["count"] == 2);
  CHECK(there.at("pulled")["count"] == 2);
  CHECK(there.at("gathered")["count"] == 64);
  CHECK(there.at("arrived")["count"] == 64);
  CHECK(first(there, "asked") <= first(there, "gathering"));
  CHECK(first(there, "gathering") <= first(there, "gathered"));
  CHECK(first(there, "gathered") <= first(there, "offered"));
  CHECK(first(there, "offered") <= first(there, "arrived"));
  CHECK(last(there, "arrived") <= last(there, "ended"));
  for (const std::size_t part : {0U, 1U}) {
    CHECK(whole["parts"][part]["state"] == "COMPLETED");
    const auto here = steps_of(whole["parts"][part]);
    CHECK(here.at("slice")["count"] == 2);
    CHECK(here.at("scattered")["count"] == 32);
    CHECK(first(here, "asked") <= first(here, "resolved"));
    CHECK(first(here, "resolved") <= first(here, "pulled"));
    CHECK(first(here, "pulled") <= first(here, "arrived"));
    CHECK(last(here, "scattered") <= last(here, "ended"));
    // Across two clocks no chunk is here before it was gathered there.
    CHECK(first(here, "arrived") >= first(there, "gathering") - error);
    CHECK(last(here, "ended") >= last(there, "gathered") - error);
  }

  // Closed: no more in the list, still known by either name.
  for (Party* party : {scene.sender.get(), scene.receiver.get()}) require_ok(party->close(key.id));
  REQUIRE(comes_true([&] { return control(scene.to(), "transfers")["total"] == 0; }));
  CHECK(control(scene.to(), "trace " + hash)["parts"].size() == 3);
  CHECK(control(scene.to(), "trace " + receiving)["parts"].size() == 3);
  const Output text = run_ctl(scene.from(), "trace " + hash);
  CHECK(text.code == 0);
  CHECK(text.text.find("send rank 0 on sender, " + sending + " (" + hash + "): DELIVERED\n") == 0);
  CHECK(text.text.find("receive rank 1 on receiver (" + hash + "): COMPLETED\n") !=
        std::string::npos);
  const Output nobody = run_ctl(scene.from(), "trace s9x9");
  CHECK(nobody.code == 1);
  CHECK(nobody.text.find("TRANSFER_UNKNOWN") != std::string::npos);

  // A peer that is gone is named, and what is known here is told.
  REQUIRE(scene.pair->side(1).terminate() == 0);
  REQUIRE(comes_true([&] { return metric(scene.from(), "kvferry_links") == 0; }));
  const json alone = control(scene.from(), "trace " + hash);
  REQUIRE(alone["parts"].size() == 1);
  REQUIRE(alone["gaps"].size() == 1);
  CHECK(alone["gaps"][0]["node_id"] == "receiver");
  CHECK(alone["gaps"][0]["detail"].get<std::string>().find("LINK_DOWN") != std::string::npos);
}

TEST_CASE("live views show a transfer move and end with the daemon") {
  Scene scene;
  const TransferKey key = scene.send_half();
  // The rest goes out while the views look.
  std::thread later([&] {
    // Once a view has taken its first look; that the look is counted says so.
    const double calls = metric(scene.to(), "kvferry_rpcs_total");
    (void)comes_true([&] { return metric(scene.to(), "kvferry_rpcs_total") > calls; });
    Party::Send slice;
    slice.index = 1;
    slice.tokens = client::TokenRange{256, 512};
    (void)scene.sender->send(key, slice);
    for (Party* party : {scene.sender.get(), scene.receiver.get()})
      (void)party->wait(key.id, kPatience);
  });
  const Output watched = run_ctl(scene.to(), "--json transfers --watch 0.5 --count 8");
  later.join();
  CHECK(watched.code == 0);
  const std::vector<json> pictures = lines_of(watched.text);
  REQUIRE(pictures.size() == 8);
  double moved = 0;
  for (const json& picture : pictures)
    for (const json& row : picture["transfers"])
      if (!row["bytes_per_second"].is_null())
        moved += row["bytes_per_second"].get<double>() * picture["interval_seconds"].get<double>();
  CHECK(moved == Approx(2 << 20));
  for (const json& row : pictures.back()["transfers"]) CHECK(row["state"] == "COMPLETED");

  const Output top = run_ctl(scene.to(), "--json top --once --interval 0.1");
  REQUIRE(top.code == 0);
  const json picture = json::parse(top.text);
  CHECK(picture["transfers_by_state"]["receive"]["COMPLETED"] == 2);
  CHECK(picture["status"]["received_bytes"] == 4 << 20);
  CHECK(control(scene.from(), "status")["sent_bytes"] == 4 << 20);
  CHECK(picture["rails"][0]["received_bytes_per_second"].is_number());
  CHECK(picture["workers"].size() == 2);
  CHECK(picture["arenas"][0]["total_bytes"] == 32 << 20);

  // Three samples, of five calls each, are two pictures.
  const double calls = metric(scene.to(), "kvferry_rpcs_total");
  std::thread stops([&] {
    (void)comes_true([&] { return metric(scene.to(), "kvferry_rpcs_total") >= calls + 15; });
    ::kill(scene.to().pid(), SIGTERM);
  });
  const Output last = run_ctl(scene.to(), "top --interval 0.05");
  stops.join();
  INFO(last.text);
  CHECK(last.code == 69);
  CHECK(last.text.find("kvferryd ") == 0);
  CHECK(last.text.find("kvferryctl: ") != std::string::npos);
}

TEST_CASE("a transfer moves every metric that is about it, at its own end") {
  Scene scene;
  const TransferKey key = scene.send_half();
  scene.send_rest(key);
  scene.end(key);
  const auto chunks = [](const bench::DaemonProcess& daemon, const std::string& event) {
    return metric(daemon, "kvferry_chunks_total", "event=\"" + event + "\"");
  };
  for (const char* event : {"gathered", "acked"}) {
    CAPTURE(event);
    CHECK(chunks(scene.from(), event) == 64);
    CHECK(chunks(scene.to(), event) == 0);
  }
  CHECK(chunks(scene.from(), "offered") >= 64);
  for (const char* event : {"accepted", "landed", "scattered"}) {
    CAPTURE(event);
    CHECK(chunks(scene.to(), event) == 64);
    CHECK(chunks(scene.from(), event) == 0);
  }
  const auto credits = [&](const std::string& event) {
    return metric(scene.to(), "kvferry_credits_total", "event=\"" + event + "\"");
  };
  CHECK(credits("granted") >= 64);
  CHECK(credits("spent") >= 64);
  CHECK(credits("granted") == credits("spent") + credits("withdrawn"));
  CHECK(metric(scene.to(), "kvferry_credits_live") == 0);
  CHECK(metric(scene.from(), "kvferry_fragments_total", "role=\"send\"") >= 64);
  CHECK(metric(scene.from(), "kvferry_fragments_total", "role=\"receive\"") == 0);
  CHECK(metric(scene.to(), "kvferry_fragments_total", "role=\"receive\"") >= 64);
  for (const bench::DaemonProcess* daemon : {&scene.from(), &scene.to()}) {
    CHECK(metric(*daemon, "kvferry_copy_busy_seconds_total") > 0);
    CHECK(metric(*daemon, "kvferry_copies_outstanding") == 0);
    CHECK(metric(*daemon, "kvferry_rails_process_resident_memory_bytes") > 1 << 20);
    CHECK(metric(*daemon, "kvferry_rails_process_threads") >= 1);
    CHECK(metric(*daemon, "kvferry_rpcs_total", "code=\"OK\"") > 0);
  }
  CHECK(comes_true(
      [&] { return metric(scene.to(), "kvferry_rails_process_cpu_seconds_total") > 0; }));

  // A send that nobody comes for.
  const TransferKey lonely = new_key("prefill");
  Party::Send send;
  send.lease = milliseconds(100);
  require_ok(scene.sender->send(lonely, send));
  require_ok(scene.sender->wait(lonely.id, kPatience));
  CHECK(metric(scene.from(), "kvferry_leases_expired_total") == 1);

  // The rails process dies and comes back.
  const double downs = metric(scene.to(), "kvferry_rail_downs_total");
  REQUIRE(scene.to().rails_pid() > 0);
  ::kill(scene.to().rails_pid(), SIGKILL);
  CHECK(comes_true([&] { return metric(scene.to(), "kvferry_rail_downs_total") > downs; }));
}

TEST_CASE("handshakes that fail are counted") {
  Scene scene;
  CHECK(metric(scene.to(), "kvferry_handshakes_failed_total") == 0);
  // Nobody is where the ticket leads to.
  scene.pair->side(0).kill_now();
  require_ok(scene.receiver->receive(new_key("prefill"), scene.ticket, {}));
  CHECK(comes_true([&] { return metric(scene.to(), "kvferry_handshakes_failed_total") > 0; }));
}

}  // namespace kvferry::testing
