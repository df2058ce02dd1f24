// The log of these tests: kept, so that they can look at it, and without the daemon's.
#include <mutex>

#include "daemon/ops/log.h"
#include "tests/unit/lending_support.h"

namespace kvferry {
namespace {

std::mutex mutex;
std::vector<std::string> lines;

}  // namespace

namespace ops {

void log_line(LogLevel, std::string_view message, std::span<const LogField> fields) {
  std::string line(message);
  for (const LogField& one : fields) line += " " + std::string(one.key) + "=" + one.value;
  std::lock_guard<std::mutex> lock(mutex);
  lines.push_back(std::move(line));
}
LogField field(std::string_view key, const Error& error) {
  return {key, error.to_string(), true};
}
bool LogLimiter::allow(Time) {
  return true;
}

}  // namespace ops

namespace node {

std::vector<std::string> logged(const std::string& part) {
  std::lock_guard<std::mutex> lock(mutex);
  std::vector<std::string> out;
  for (const std::string& line : lines)
    if (line.find(part) != std::string::npos) out.push_back(line);
  return out;
}
void forget_log() {
  std::lock_guard<std::mutex> lock(mutex);
  lines.clear();
}

}  // namespace node
}  // namespace kvferry
