#include "daemon/ops/crash.h"

#include <absl/debugging/failure_signal_handler.h>
#include <absl/debugging/stacktrace.h>
#include <absl/debugging/symbolize.h>
#include <execinfo.h>

#include <algorithm>

namespace kvferry::ops {
namespace {

// By the tables that exceptions are unwound by: code without frame pointers has them, too, and
// Abseil's own way stops there. The first frames are this function, the handler and what the kernel
// put in between.
int unwind(void** pcs, int* sizes, int max_depth, int skip, const void*, int* dropped) {
  constexpr int kMost = 64;
  void* all[kMost];
  const int found = ::backtrace(all, kMost);
  const int first = std::min(found, skip + 1);
  const int kept = std::min(found - first, max_depth);
  std::copy_n(all + first, kept, pcs);
  if (sizes != nullptr) std::fill_n(sizes, kept, 0);
  if (dropped != nullptr) *dropped = found - first - kept;
  return kept;
}

}  // namespace

void install_crash_handler(const char* program) {
  void* once[1];
  (void)::backtrace(once, 1);  // loads what it needs, which a handler must not
  absl::SetStackUnwinder(unwind);
  absl::InitializeSymbolizer(program);
  absl::FailureSignalHandlerOptions options;
  options.alarm_on_failure_secs = 3;  // a handler that hangs must not keep the dead alive
  absl::InstallFailureSignalHandler(options);
}

}  // namespace kvferry::ops
