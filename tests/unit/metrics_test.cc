#include "daemon/ops/metrics.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "daemon/ops/http.h"
#include "daemon/ops/log.h"
#include "daemon/ops/service_manager.h"
#include "daemon/ops/watchdog.h"

using namespace kvferry;
using namespace kvferry::ops;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

BuildLabels build() {
  return {"1.2.3", "abcdef", "1.13.1"};
}

bool has_line(const std::string& text, const std::string& line) {
  return ("\n" + text).find("\n" + line + "\n") != std::string::npos;
}

// One request over a connection of its own; the whole answer.
std::string request(uint16_t port, const std::string& method, const std::string& path) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  REQUIRE(fd >= 0);
  timeval limit{20, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0);
  const std::string text = method + " " + path + " HTTP/1.1\r\nHost: x\r\n\r\n";
  REQUIRE(::send(fd, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size()));
  std::string out;
  std::array<char, 4096> block{};
  for (;;) {
    const ssize_t got = ::recv(fd, block.data(), block.size(), 0);
    if (got <= 0) break;
    out.append(block.data(), static_cast<std::size_t>(got));
  }
  ::close(fd);
  return out;
}

std::string body_of(const std::string& answer) {
  const std::size_t end = answer.find("\r\n\r\n");
  return end == std::string::npos ? "" : answer.substr(end + 4);
}

}  // namespace

TEST_CASE("every series exists at zero before anything has happened") {
  const Metrics metrics(build(), {{"host", "shared_host"}}, {{"tcp", "lo"}});
  const std::string text = metrics.text();
  for (const char* line :
       {"kvferry_transfers_started_total{role=\"send\"} 0",
        "kvferry_transfers_ended_total{role=\"receive\",outcome=\"cancelled\"} 0",
        "kvferry_transfers_unfinished_total{role=\"send\",reason=\"PEER_LOST\"} 0",
        "kvferry_transfer_bytes_total{direction=\"local\"} 0",
        "kvferry_chunks_total{event=\"corrupt\"} 0",
        "kvferry_arena_bytes{arena=\"0\",device=\"host\",state=\"quarantined\"} 0",
        "kvferry_arena_reserved_bytes{arena=\"0\",device=\"host\"} 0",
        "kvferry_arena_info{arena=\"0\",device=\"host\",kind=\"shared_host\",mapped=\"false\"} 1",
        "kvferry_packed_bytes 0",
        "kvferry_packed_copies 0",
        "kvferry_packed_made_total 0",
        "kvferry_packed_refused_total 0",
        "kvferry_reuse_entries 0",
        "kvferry_reuse_pins 0",
        "kvferry_reuse_commits_total 0",
        "kvferry_reuse_blocks_total 0",
        "kvferry_reuse_lookups_total 0",
        "kvferry_reuse_lookup_hits_total 0",
        "kvferry_reuse_withdrawn_total 0",
        "kvferry_reuse_evicted_total 0",
        "kvferry_rail_up{rail=\"0\",transport=\"tcp\",device=\"lo\"} 0",
        "kvferry_rail_send_rate_bytes_per_second{rail=\"0\",transport=\"tcp\",device=\"lo\"} 0",
        "kvferry_messages_dropped_total{cause=\"bad_tag\"} 0",
        "kvferry_stage_duration_seconds_count{stage=\"wire\"} 0",
        "kvferry_rpcs_total{code=\"OK\"} 0",
        "kvferry_config_reloads_total{result=\"ok\"} 0",
        "kvferry_config_reloads_total{result=\"refused\"} 0",
        "kvferry_config_keys_waiting 0",
        "kvferry_build_info{version=\"1.2.3\",commit=\"abcdef\",ucx=\"1.13.1\"} 1"}) {
    INFO(line);
    CHECK(has_line(text, line));
  }
}

TEST_CASE("no two series are the same and every family keeps the naming rules") {
  const Metrics metrics(build(), {{"host", "a"}, {"gpu0", "b"}}, {{"tcp", "lo"}, {"tcp", "eth0"}},
                        {{"gpu0", "GPU-1", "x"}, {"gpu1", "GPU-2", "x"}});
  std::istringstream in(metrics.text());
  std::set<std::string> seen;
  std::set<std::string> counters;
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("# TYPE ", 0) == 0) {
      const std::size_t blank = line.find(' ', 7);
      const std::string name = line.substr(7, blank - 7);
      INFO(name);
      CHECK((name.rfind("kvferry_", 0) == 0 || name.rfind("process_", 0) == 0));
      const bool total = name.size() > 6 && name.substr(name.size() - 6) == "_total";
      CHECK(total == (line.substr(blank + 1) == "counter"));
      continue;
    }
    if (line.empty() || line[0] == '#') continue;
    const std::string series = line.substr(0, line.rfind(' '));
    INFO(series);
    CHECK(seen.insert(series).second);
  }
  CHECK(seen.size() > 200);
  CHECK(seen.size() < 1500);
}

TEST_CASE("a transfer's end counts its outcome, reason, duration and size") {
  Metrics metrics(build(), {}, {});
  metrics.transfer_opened(TransferRole::kReceive);
  metrics.transfer_opened(TransferRole::kReceive);
  metrics.transfer_opened(TransferRole::kReceive);
  CHECK(metrics.transfers_open(TransferRole::kReceive) == 3);
  metrics.transfer_ended(TransferRole::kReceive, TransferOutcome::kDone, Reason::kNone,
                         milliseconds(2), 1 << 20);
  metrics.transfer_ended(TransferRole::kReceive, TransferOutcome::kFailed, Reason::kPeerLost,
                         seconds(60), 0);
  CHECK(metrics.transfers_open(TransferRole::kReceive) == 1);
  const std::string text = metrics.text();
  CHECK(has_line(text, "kvferry_transfers_open{role=\"receive\"} 1"));
  CHECK(has_line(text, "kvferry_transfers_ended_total{role=\"receive\",outcome=\"done\"} 1"));
  CHECK(has_line(text,
                 "kvferry_transfers_unfinished_total{role=\"receive\",reason=\"PEER_LOST\"} 1"));
  CHECK(
      has_line(text, "kvferry_transfer_duration_seconds_bucket{role=\"receive\",le=\"0.001\"} 0"));
  CHECK(
      has_line(text, "kvferry_transfer_duration_seconds_bucket{role=\"receive\",le=\"0.0025\"} 1"));
  CHECK(has_line(text, "kvferry_transfer_duration_seconds_bucket{role=\"receive\",le=\"+Inf\"} 2"));
  CHECK(has_line(text, "kvferry_transfer_duration_seconds_count{role=\"receive\"} 2"));
  CHECK(has_line(text, "kvferry_transfer_size_bytes_count{role=\"receive\"} 1"));
}

TEST_CASE("a histogram puts a bound's own value below it and the rest above all") {
  Histogram histogram({10, 100}, 1.0);
  for (const uint64_t value : {uint64_t{10}, uint64_t{11}, uint64_t{100}, uint64_t{101}})
    histogram.observe(value);
  histogram.observe(Duration(-5));
  const Histogram::Snapshot snapshot = histogram.snapshot();
  CHECK(snapshot.cumulative == std::vector<uint64_t>{2, 4, 5});
  CHECK(snapshot.count == 5);
  CHECK(snapshot.sum == Approx(222));
}

TEST_CASE("threads count together without losing anything while somebody reads") {
  Metrics metrics(build(), {{"host", "shared_host"}}, {{"tcp", "lo"}});
  constexpr uint64_t kRounds = 20'000;
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] {
      for (uint64_t n = 0; n < kRounds; ++n) {
        metrics.of(ChunkEvent::kLanded).add();
        metrics.rail(0).sent_bytes.add(2);
        metrics.arena(0).of(RegionState::kFree).add(1);
        metrics.stage(Stage::kWire, Duration(1));
      }
    });
  for (int i = 0; i < 5; ++i) CHECK_FALSE(metrics.text().empty());
  for (std::thread& thread : threads) thread.join();
  const std::string text = metrics.text();
  CHECK(has_line(text, "kvferry_chunks_total{event=\"landed\"} 60000"));
  CHECK(has_line(text,
                 "kvferry_rail_bytes_total{rail=\"0\",transport=\"tcp\",device=\"lo\","
                 "direction=\"sent\"} 120000"));
  CHECK(has_line(text, "kvferry_arena_bytes{arena=\"0\",device=\"host\",state=\"free\"} 60000"));
  CHECK(has_line(text, "kvferry_stage_duration_seconds_count{stage=\"wire\"} 60000"));
}

TEST_CASE("the page is what promtool accepts") {
  const std::string promtool = KVFERRY_PROMTOOL;
  if (promtool.empty()) {
    WARN("promtool was not found when this was built: not checked");
    return;
  }
  Metrics metrics(build(), {{"host", "shared_host"}}, {{"tcp", "lo"}});
  metrics.transfer_opened(TransferRole::kSend);
  const auto file = std::filesystem::temp_directory_path() /
                    ("kvferry-metrics-" + std::to_string(::getpid()) + ".txt");
  std::ofstream(file) << metrics.text();
  const std::string command = promtool + " check metrics < " + file.string();
  const int result = std::system(command.c_str());
  std::filesystem::remove(file);
  CHECK(result == 0);
}

TEST_CASE("the process's own numbers are there and plausible") {
  const std::string text = Metrics(build(), {}, {}).text();
  const auto value = [&](const std::string& name) {
    const std::size_t at = ("\n" + text).find("\n" + name + " ");
    REQUIRE(at != std::string::npos);
    return std::strtod(text.c_str() + at + name.size(), nullptr);
  };
  CHECK(value("process_resident_memory_bytes") > 100'000);
  CHECK(value("process_open_fds") >= 3);
  CHECK(value("process_threads") >= 1);
  CHECK(value("process_start_time_seconds") > 1.5e9);
}

TEST_CASE("the HTTP server tells metrics, health and readiness with reasons") {
  HttpHandlers handlers;
  handlers.metrics = [] { return std::string("kvferry_x 1\n"); };
  handlers.healthy = [] { return HealthReport{{{"engine", true, ""}}}; };
  handlers.ready = [] {
    return HealthReport{{{"arena", true, ""}, {"rails", false, "both are \"down\""}}};
  };
  auto server = HttpServer::start("127.0.0.1", 0, std::move(handlers));
  REQUIRE(server);
  const uint16_t port = (*server)->port();
  REQUIRE(port != 0);

  const std::string metrics = request(port, "GET", "/metrics");
  CHECK(metrics.rfind("HTTP/1.1 200 ", 0) == 0);
  CHECK(metrics.find("Content-Type: text/plain; version=0.0.4") != std::string::npos);
  CHECK(body_of(metrics) == "kvferry_x 1\n");

  const std::string healthy = request(port, "GET", "/healthz");
  CHECK(healthy.rfind("HTTP/1.1 200 ", 0) == 0);
  CHECK(nlohmann::json::parse(body_of(healthy))["status"] == "ok");

  const std::string ready = request(port, "GET", "/readyz");
  CHECK(ready.rfind("HTTP/1.1 503 ", 0) == 0);
  const auto json = nlohmann::json::parse(body_of(ready));
  CHECK(json["status"] == "failing");
  CHECK(json["reason"] == "rails: both are \"down\"");
  CHECK(json["checks"].size() == 2);

  CHECK(request(port, "GET", "/other").rfind("HTTP/1.1 404 ", 0) == 0);
  CHECK(request(port, "GET", "/metricsx").rfind("HTTP/1.1 404 ", 0) == 0);
  CHECK(request(port, "POST", "/metrics").rfind("HTTP/1.1 405 ", 0) == 0);
  const std::string head = request(port, "HEAD", "/metrics");
  CHECK(head.find("Content-Length: 12") != std::string::npos);
  CHECK(body_of(head).empty());

  // The address is taken.
  const auto second = HttpServer::start("127.0.0.1", port, {});
  REQUIRE_FALSE(second);
  CHECK(second.error().reason == "HTTP_LISTEN");

  const Time before = monotonic_now();
  (*server)->stop_async();
  (*server)->join();
  // Not the two seconds after which civetweb looks up by itself.
  CHECK(monotonic_now() - before < std::chrono::milliseconds(1500));
  (*server)->stop_async();
  (*server)->join();
}

TEST_CASE("the watchdog names the thread that stopped turning and no other") {
  Watchdog watchdog;
  const Time start{1'000'000'000};
  Ticker& engine = watchdog.add("engine", seconds(2), start);
  Ticker& rails = watchdog.add("rails", seconds(5), start);
  CHECK(watchdog.stale(start + seconds(2)).empty());
  engine.tick(start + seconds(3));
  CHECK(watchdog.stale(start + seconds(5)).empty());
  const auto stale = watchdog.stale(start + seconds(6));
  REQUIRE(stale.size() == 2);
  CHECK(stale[0].name == "engine");
  CHECK(stale[0].silent == seconds(3));
  engine.tick(start + seconds(6));
  rails.retire();
  CHECK(watchdog.stale(start + seconds(7)).empty());
  CHECK(watchdog.stale(start).empty());
}

TEST_CASE("the service manager is told by datagrams, and nobody is told without one") {
  ::unsetenv("NOTIFY_SOCKET");
  ServiceManager absent;
  CHECK_FALSE(absent.present());
  CHECK_FALSE(absent.watchdog_interval());
  absent.ready("serving");
  absent.watchdog_ping();

  const std::string path =
      (std::filesystem::temp_directory_path() / ("kvferry-notify-" + std::to_string(::getpid())))
          .string();
  const int fd = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  REQUIRE(fd >= 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  REQUIRE(::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0);
  ::setenv("NOTIFY_SOCKET", path.c_str(), 1);
  ::setenv("WATCHDOG_USEC", "4000000", 1);
  const auto next = [&] {
    std::array<char, 256> text{};
    const ssize_t got = ::recv(fd, text.data(), text.size(), MSG_DONTWAIT);
    return std::string(text.data(), got > 0 ? static_cast<std::size_t>(got) : 0);
  };
  ServiceManager manager;
  CHECK(manager.present());
  REQUIRE(manager.watchdog_interval());
  CHECK(*manager.watchdog_interval() == seconds(2));
  manager.ready("serving\nMAINPID=1");
  CHECK(next() == "READY=1\nSTATUS=serving MAINPID=1");
  manager.watchdog_ping();
  CHECK(next() == "WATCHDOG=1");
  manager.extend_timeout(seconds(3));
  CHECK(next() == "EXTEND_TIMEOUT_USEC=3000000");
  manager.stopping("draining");
  CHECK(next() == "STOPPING=1\nSTATUS=draining");
  ::unsetenv("NOTIFY_SOCKET");
  ::unsetenv("WATCHDOG_USEC");
  ::close(fd);
  ::unlink(path.c_str());
}

TEST_CASE("log values can neither break a line nor fake a field") {
  const std::array<LogField, 4> fields{field("name", "a b\" level=error\n\xff"), field("n", 7),
                                       field("ok", true), field("took", milliseconds(1500))};
  CHECK(format_text("worker attached", fields) ==
        "worker attached name=\"a b\\\" level=error\\u000a\\u00ff\" n=7 ok=true took=1.5");
  const auto json = nlohmann::json::parse("{" + format_json("worker attached", fields) + "}");
  CHECK(json["message"] == "worker attached");
  CHECK(json["n"] == 7);
  CHECK(json["ok"] == true);
  CHECK(json["took"] == 1.5);
  const std::array<LogField, 1> empty{field("x", "")};
  CHECK(format_text("m", empty) == "m x=\"\"");
  const std::array<LogField, 1> longer{field("x", std::string(100'000, 'y'))};
  CHECK(format_text("m", longer).size() < 5000);
}

TEST_CASE("repeated lines are held back and counted") {
  LogLimiter limiter(2, seconds(1));
  const Time start{5};
  CHECK(limiter.allow(start));
  CHECK(limiter.allow(start));
  CHECK_FALSE(limiter.allow(start));
  CHECK_FALSE(limiter.allow(start + milliseconds(999)));
  CHECK(limiter.allow(start + seconds(1)));
  CHECK(limiter.suppressed() == 2);
  CHECK(limiter.allow(start + seconds(1)));
  CHECK(limiter.suppressed() == 0);
}

TEST_CASE("what was logged is on stderr, a JSON object a line, when logging has stopped") {
  const auto file = std::filesystem::temp_directory_path() /
                    ("kvferry-log-" + std::to_string(::getpid()) + ".txt");
  std::FILE* out = std::fopen(file.c_str(), "we");
  REQUIRE(out != nullptr);
  const int stderr_before = ::dup(STDERR_FILENO);
  ::dup2(::fileno(out), STDERR_FILENO);
  log_start(LogLevel::kInfo, LogFormat::kJson);
  log_debug("not told");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([i] {
      for (int n = 0; n < 100; ++n) log_warning("a {} line", {field("thread", i), field("n", n)});
    });
  for (std::thread& thread : threads) thread.join();
  // Lines that wait to be written keep the format that they were made in.
  log_format(LogFormat::kText);
  log_warning("\"text\"", {field("n", 7)});
  log_format(LogFormat::kJson);
  log_warning("a {} line");
  log_stop();
  ::dup2(stderr_before, STDERR_FILENO);
  ::close(stderr_before);
  std::fclose(out);

  std::ifstream in(file);
  int lines = 0;
  int texts = 0;
  for (std::string line; std::getline(in, line); ++lines) {
    if (line.front() != '{') {
      CHECK(line.find("Z warning \\\"text\\\" n=7") == 23);
      ++texts;
      continue;
    }
    const auto json = nlohmann::json::parse(line);
    REQUIRE(json["level"] == "warning");
    REQUIRE(json["message"] == "a {} line");
    REQUIRE(json["time"].get<std::string>().size() == 24);
  }
  CHECK(lines == 402);
  CHECK(texts == 1);
  std::filesystem::remove(file);
}
