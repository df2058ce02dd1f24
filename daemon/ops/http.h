// The plain HTTP listener for scrapes and probes: /metrics, /healthz, /readyz. Nothing else is
// served, nothing is changed by it, only GET and HEAD are answered.
//
// Owns its listener and threads. start, stop_async and join belong to one thread (main); handlers
// run on the server's own threads, several at a time, and must not block long.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/result.h"

namespace kvferry::ops {

// One thing that was looked at, e.g. {"rails", false, "all 2 rails are down"}.
struct HealthCheck {
  std::string name;
  bool ok = true;
  std::string detail;
};

// Answered as 200 or 503 with {"status":"ok|failing","reason":"...","checks":[...]}.
struct HealthReport {
  std::vector<HealthCheck> checks;
  bool ok() const;
  // The details of what failed, joined by "; ".
  std::string reason() const;
};

struct HttpHandlers {
  std::function<std::string()> metrics;   // the Prometheus text page
  std::function<HealthReport()> healthy;  // the process works: restart it if not
  std::function<HealthReport()> ready;    // new work is taken: send none if not
};

class HttpServer {
 public:
  // Listens; port 0 takes any free one. UNAVAILABLE HTTP_LISTEN when the address cannot be bound.
  static Result<std::unique_ptr<HttpServer>> start(const std::string& address, uint16_t port,
                                                   HttpHandlers handlers);
  ~HttpServer();  // stop_async and join
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  uint16_t port() const;

  // Begin to stop early and join at the end: answers that are being given are ended in between.
  // Both repeatable. join() waits for them, at most for the five seconds that a request has.
  void stop_async();
  void join();

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvferry::ops
