#include "daemon/rpc/grpc_log.h"

#include <grpc/support/log.h>

#include <atomic>

namespace kvferry::rpc {
namespace {

std::atomic<void (*)(std::string_view)> taker{nullptr};

void take_line(gpr_log_func_args* args) {
  const std::string_view line(args->message);
  // Said in each TLS handshake in which the client names an address, as ours do.
  if (line.find("No match found for server name") != std::string_view::npos) return;
  if (auto* const take = taker.load()) take(line);
}

}  // namespace

void take_grpc_log(void (*take)(std::string_view line)) {
  taker.store(take);
  gpr_set_log_function(take_line);
}

}  // namespace kvferry::rpc
