// A UCX context with its release, and UCX's errors as ours. Movable; used by one thread at a time.
#pragma once

#include <ucp/api/ucp.h>
#include <ucs/memory/memory_type.h>

#include <string>
#include <string_view>
#include <utility>

#include "daemon/base/result.h"

namespace kvferry::rails {

// UCX_FAILED with "ucp_ep_create: Destination is unreachable".
tl::unexpected<Error> fail_ucx(std::string_view call, ucs_status_t status);

class UcxContext {
 public:
  struct Options {
    std::string transports;           // UCX's names, with commas
    std::string device = {};          // network device; empty: all
    const char* keepalive = nullptr;  // replaces UCX_KEEPALIVE_INTERVAL
    uint64_t features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  };
  static Result<UcxContext> make(const Options& options);

  UcxContext() = default;
  ~UcxContext() {
    if (handle_ != nullptr) ucp_cleanup(handle_);
  }
  UcxContext(UcxContext&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  UcxContext& operator=(UcxContext&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  ucp_context_h handle() const { return handle_; }
  // Whether it takes memory of this type in registrations and requests.
  Result<bool> takes(ucs_memory_type_t type) const;

 private:
  ucp_context_h handle_ = nullptr;
};

}  // namespace kvferry::rails
