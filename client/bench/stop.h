// Whether a run has to end early: by SIGINT, SIGTERM, or because its time is over. Whoever waits
// asks now and then; the run then unwinds, and what it has started ends with it.
#pragma once

#include <chrono>
#include <optional>

#include "kvferry/result.h"

namespace kvferry::bench {

// Handlers for SIGINT and SIGTERM, and a timer. A second SIGINT or SIGTERM ends the process at
// once, and so does half a minute after the limit. Once per process.
void watch_for_stop(std::chrono::seconds limit);

// CANCELLED BENCH_INTERRUPTED or DEADLINE_EXCEEDED BENCH_TIME_LIMIT, once there is a reason.
std::optional<client::Error> stop_asked();

// Between two looks at something that no descriptor announces.
inline constexpr std::chrono::milliseconds kStopLook{200};

}  // namespace kvferry::bench
