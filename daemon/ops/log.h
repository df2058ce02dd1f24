// Structured log lines on stderr: text for people, JSON for programs, with a <N> priority in front
// when stderr is the journal. One line an event: a short sentence that never varies, and fields.
//
//   log_info("worker attached", {field("worker", name), field("uid", uid)});
//
// Any thread. Writing is handed to a thread of its own through a bounded queue; when that is full
// the oldest lines go, so a stuck terminal never stops the daemon. Values are escaped: a name
// chosen by a worker or peer can neither break a line nor fake a field. Types that hold secrets
// have no field(): what is not convertible does not compile.
#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "daemon/base/ids.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/ops/config.h"

namespace kvferry::ops {

struct LogField {
  std::string_view key;  // a literal: lower_snake
  std::string value;
  bool quoted = true;  // false for numbers and booleans in JSON
};

inline LogField field(std::string_view key, std::string_view value) {
  return {key, std::string(value), true};
}
inline LogField field(std::string_view key, const char* value) {
  return {key, std::string(value), true};
}
inline LogField field(std::string_view key, const std::string& value) {
  return {key, value, true};
}
template <typename T>
requires std::same_as<T, bool> LogField field(std::string_view key, T value) {
  return {key, value ? "true" : "false", false};
}
template <typename T>
requires(std::integral<T> && !std::same_as<T, bool> && !std::same_as<T, char>) LogField
    field(std::string_view key, T value) {
  return {key, std::to_string(value), false};
}
LogField field(std::string_view key, double value);
// Seconds, as in the metrics.
LogField field(std::string_view key, Duration value);
// Code, reason, field and message as one text.
LogField field(std::string_view key, const Error& error);
LogField field(std::string_view key, const BootId& boot);
template <typename Tag, std::size_t N>
LogField field(std::string_view key, const SecretBytes<Tag, N>&) = delete;

// Call once before threads are made, and log_stop() last: it writes out what is queued. Without
// log_start lines are written at level info as text, synchronously.
void log_start(LogLevel level, LogFormat format);
void log_stop();
bool log_enabled(LogLevel level);
void log_level(LogLevel level);     // any time
void log_format(LogFormat format);  // any time; for lines from then on

void log_line(LogLevel level, std::string_view message, std::span<const LogField> fields);
inline void log_line(LogLevel level, std::string_view message,
                     std::initializer_list<LogField> fields) {
  log_line(level, message, std::span<const LogField>(fields.begin(), fields.size()));
}
inline void log_debug(std::string_view message, std::initializer_list<LogField> fields = {}) {
  log_line(LogLevel::kDebug, message, fields);
}
inline void log_info(std::string_view message, std::initializer_list<LogField> fields = {}) {
  log_line(LogLevel::kInfo, message, fields);
}
inline void log_warning(std::string_view message, std::initializer_list<LogField> fields = {}) {
  log_line(LogLevel::kWarning, message, fields);
}
inline void log_error(std::string_view message, std::initializer_list<LogField> fields = {}) {
  log_line(LogLevel::kError, message, fields);
}

// Holds back what somebody else could repeat without end. One owner, one thread.
class LogLimiter {
 public:
  LogLimiter(uint32_t burst, Duration period) : burst_(burst), period_(period) {}
  // True when a line may be written now; then suppressed() tells how many were not since the last.
  bool allow(Time now);
  uint64_t suppressed() const { return suppressed_; }

 private:
  const uint32_t burst_;
  const Duration period_;
  Time started_{};
  uint32_t used_ = 0;
  uint64_t held_ = 0;
  uint64_t suppressed_ = 0;
};

// The line as it is written, without priority, time and level in text form; for tests.
std::string format_text(std::string_view message, std::span<const LogField> fields);
// The members after time and level: "message":"...","key":"value".
std::string format_json(std::string_view message, std::span<const LogField> fields);

}  // namespace kvferry::ops
