// A bare unary gRPC call over a Unix socket to a process of its own: what any call costs on this
// machine.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <string>

#include "kvferry/result.h"

namespace kvferry::bench {

// Serves until its parent ends or standard input closes. The exit status.
int serve_echo(const std::string& socket);

class Echo {
 public:
  // Starts this program again as the server and waits until it answers; at most 10 s.
  static client::Result<std::unique_ptr<Echo>> start();
  // Ends the server.
  ~Echo();
  Echo(const Echo&) = delete;
  Echo& operator=(const Echo&) = delete;

  // One call with so many bytes there and back; seconds. UNAVAILABLE BENCH_ECHO.
  client::Result<double> call(std::size_t bytes);

 private:
  Echo();
  struct Channel;
  std::unique_ptr<Channel> channel_;
  std::string directory_;
  pid_t server_ = -1;
};

}  // namespace kvferry::bench
