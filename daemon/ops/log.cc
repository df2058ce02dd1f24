#include "daemon/ops/log.h"

#include <spdlog/async.h>
#include <spdlog/async_logger.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <utility>

namespace kvferry::ops {
namespace {

constexpr std::size_t kQueueLines = 8192;
constexpr std::size_t kMaxValueBytes = 4096;

spdlog::level::level_enum level_of(LogLevel level) {
  switch (level) {
    case LogLevel::kTrace:
      return spdlog::level::trace;
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

std::string_view word_of(spdlog::level::level_enum level) {
  switch (level) {
    case spdlog::level::trace:
      return "trace";
    case spdlog::level::debug:
      return "debug";
    case spdlog::level::info:
      return "info";
    case spdlog::level::warn:
      return "warning";
    default:
      return "error";
  }
}

// syslog's priorities, as the journal reads them.
std::string_view priority_of(spdlog::level::level_enum level) {
  switch (level) {
    case spdlog::level::trace:
    case spdlog::level::debug:
      return "<7>";
    case spdlog::level::info:
      return "<6>";
    case spdlog::level::warn:
      return "<4>";
    default:
      return "<3>";
  }
}

// JOURNAL_STREAM is "device:inode" of the journal's end; a child with another stderr inherits it.
bool stderr_is_journal() {
  const char* stream = std::getenv("JOURNAL_STREAM");
  struct stat info {};
  if (stream == nullptr || ::fstat(STDERR_FILENO, &info) != 0) return false;
  return std::string_view(stream) ==
         std::to_string(info.st_dev) + ":" + std::to_string(info.st_ino);
}

template <typename Out>
void append_text(Out& out, std::string_view text) {
  out.append(text.data(), text.data() + text.size());
}

std::string utc(spdlog::log_clock::time_point when) {
  const auto ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(when.time_since_epoch()).count();
  const auto seconds = static_cast<std::time_t>(ms / 1000);
  std::tm parts{};
  ::gmtime_r(&seconds, &parts);
  std::array<char, 40> text{};
  const std::size_t size = std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S", &parts);
  std::string out(text.data(), size);
  const std::string millis = std::to_string(1000 + ms % 1000);
  return out + "." + millis.substr(1) + "Z";
}

// Puts priority, time and level around what log_line() has made. The format may change while lines
// wait to be written, so each tells its own: members of a JSON object begin with a quote, which
// text escapes.
class LineFormatter : public spdlog::formatter {
 public:
  explicit LineFormatter(bool journal) : journal_(journal) {}

  void format(const spdlog::details::log_msg& msg, spdlog::memory_buf_t& out) override {
    if (journal_) append_text(out, priority_of(msg.level));
    const std::string_view payload(msg.payload.data(), msg.payload.size());
    if (payload.starts_with('"')) {
      append_text(out, R"({"time":")");
      append_text(out, utc(msg.time));
      append_text(out, R"(","level":")");
      append_text(out, word_of(msg.level));
      append_text(out, "\",");
      append_text(out, payload);
      append_text(out, "}\n");
      return;
    }
    if (!journal_) {  // the journal keeps time and priority itself
      append_text(out, utc(msg.time));
      append_text(out, " ");
      append_text(out, word_of(msg.level));
      append_text(out, " ");
    }
    append_text(out, payload);
    append_text(out, "\n");
  }
  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<LineFormatter>(journal_);
  }

 private:
  const bool journal_;
};

struct State {
  std::atomic<LogFormat> format{LogFormat::kText};
  std::shared_ptr<spdlog::details::thread_pool> pool;
  std::shared_ptr<spdlog::logger> logger;
};

std::shared_ptr<spdlog::sinks::sink> make_sink() {
  auto sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  sink->set_formatter(std::make_unique<LineFormatter>(stderr_is_journal()));
  return sink;
}

// Pool and logger are changed by log_start and log_stop only, which run while there is one thread.
State& state() {
  static State instance{LogFormat::kText, nullptr,
                        std::make_shared<spdlog::logger>("kvferry", make_sink())};
  return instance;
}

// Escapes into a JSON string's inside; also what quotes need in text form. Bytes that are not plain
// ASCII are written as \u00XX: names may hold anything, and a line stays a line.
void append_escaped(std::string& out, std::string_view text) {
  static constexpr std::string_view kHex = "0123456789abcdef";
  const bool cut = text.size() > kMaxValueBytes;
  for (const char c : text.substr(0, kMaxValueBytes)) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte >= 0x7f) {
      out += "\\u00";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      out += c;
    }
  }
  if (cut) out += "...";
}

bool needs_quotes(std::string_view text) {
  if (text.empty() || text.size() > kMaxValueBytes) return true;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte <= 0x20 || byte >= 0x7f || c == '"' || c == '\\' || c == '=') return true;
  }
  return false;
}

}  // namespace

LogField field(std::string_view key, double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {key, std::string(text.data(), end), value - value != 0.0};  // "nan" and "inf": quoted
}

LogField field(std::string_view key, Duration value) {
  return field(key, std::chrono::duration<double>(value).count());
}

LogField field(std::string_view key, const Error& error) {
  return {key, error.to_string(), true};
}

LogField field(std::string_view key, const BootId& boot) {
  return {key, to_hex(boot.bytes), true};
}

std::string format_text(std::string_view message, std::span<const LogField> fields) {
  std::string out;
  append_escaped(out, message);
  for (const LogField& field : fields) {
    out.append(" ").append(field.key).append("=");
    const bool quotes = field.quoted && needs_quotes(field.value);
    if (quotes) out += '"';
    append_escaped(out, field.value);
    if (quotes) out += '"';
  }
  return out;
}

std::string format_json(std::string_view message, std::span<const LogField> fields) {
  std::string out = R"("message":")";
  append_escaped(out, message);
  out += '"';
  for (const LogField& field : fields) {
    out.append(",\"").append(field.key).append("\":");
    if (field.quoted) out += '"';
    append_escaped(out, field.value);
    if (field.quoted) out += '"';
  }
  return out;
}

void log_start(LogLevel level, LogFormat format) {
  log_stop();
  State& log = state();
  log.format = format;
  log.pool = std::make_shared<spdlog::details::thread_pool>(kQueueLines, 1);
  log.logger = std::make_shared<spdlog::async_logger>(
      "kvferry", make_sink(), log.pool, spdlog::async_overflow_policy::overrun_oldest);
  log.logger->set_level(level_of(level));
  log.logger->flush_on(spdlog::level::trace);
}

void log_stop() {
  State& log = state();
  if (log.pool == nullptr) return;
  const auto level = log.logger->level();
  log.logger->flush();
  log.logger = std::make_shared<spdlog::logger>("kvferry", make_sink());
  log.logger->set_level(level);
  log.pool.reset();  // writes what is queued, then joins
}

bool log_enabled(LogLevel level) {
  return state().logger->should_log(level_of(level));
}

void log_level(LogLevel level) {
  state().logger->set_level(level_of(level));
}

void log_format(LogFormat format) {
  state().format = format;
}

void log_line(LogLevel level, std::string_view message, std::span<const LogField> fields) {
  State& log = state();
  if (!log.logger->should_log(level_of(level))) return;
  const std::string line =
      log.format == LogFormat::kJson ? format_json(message, fields) : format_text(message, fields);
  log.logger->log(level_of(level), spdlog::string_view_t(line.data(), line.size()));
}

bool LogLimiter::allow(Time now) {
  if (used_ == 0 || now - started_ >= period_) {
    started_ = now;
    used_ = 0;
  }
  if (used_ >= burst_) {
    ++held_;
    return false;
  }
  ++used_;
  suppressed_ = std::exchange(held_, 0);
  return true;
}

}  // namespace kvferry::ops
