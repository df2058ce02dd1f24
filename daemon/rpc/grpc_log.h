// What gRPC itself has to say, which it would print on stderr: failed TLS handshakes above all, of
// which nobody else learns.
#pragma once

#include <string_view>

namespace kvferry::rpc {

// From now on `take` is called with each line, on any thread, under locks of gRPC's: it must only
// note it down. Lines that mean nothing here are left out.
void take_grpc_log(void (*take)(std::string_view line));

}  // namespace kvferry::rpc
