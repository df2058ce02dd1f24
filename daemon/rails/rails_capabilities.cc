#include "daemon/rails/rails_capabilities.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <iterator>
#include <nlohmann/json.hpp>

#include "daemon/rails/child_process.h"
#include "daemon/rails/ucx_environment.h"

namespace kvferry::rails {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxAnswerBytes = 64 * 1024;
constexpr std::size_t kMaxEntries = 1024;
constexpr std::size_t kMaxTextBytes = 512;

tl::unexpected<Error> bad(std::string what) {
  return fail(Code::kInternal, "CAPABILITIES_INVALID",
              "kvferry-rails --capabilities: " + std::move(what));
}

bool is_text(const Json& value) {
  if (!value.is_string()) return false;
  const auto& text = value.get_ref<const std::string&>();
  return text.size() <= kMaxTextBytes &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

bool is_list(const Json& value) {
  return value.is_array() && value.size() <= kMaxEntries &&
         std::all_of(value.begin(), value.end(), is_text);
}

// All that comes until the pipe's end; nothing when it is too much or too late.
Result<std::string> read_answer(int fd, Time deadline) {
  std::string text;
  char buffer[4096];
  for (;;) {
    const Duration left = deadline - monotonic_now();
    if (left <= Duration::zero()) break;
    pollfd wait = {fd, POLLIN, 0};
    const auto left_ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
    const int ready = ::poll(&wait, 1, static_cast<int>(std::min<int64_t>(left_ms, 60'000)));
    if (ready < 0 && errno != EINTR) return fail_errno("CAPABILITIES_INVALID", "poll", errno);
    if (ready <= 0) continue;
    const ssize_t got = ::read(fd, buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno("CAPABILITIES_INVALID", "read", errno);
    if (got == 0) return text;
    text.append(buffer, static_cast<std::size_t>(got));
    if (text.size() > kMaxAnswerBytes) return bad("says too much");
  }
  return fail(Code::kDeadlineExceeded, "CAPABILITIES_TIMEOUT",
              "kvferry-rails --capabilities does not end in time");
}

}  // namespace

bool RailsCapabilities::has_cuda() const {
  return std::find(memory_types.begin(), memory_types.end(), "cuda") != memory_types.end();
}

Result<std::string> find_rails_executable(const std::string& configured) {
  std::vector<std::string> candidates;
  if (!configured.empty()) {
    candidates.push_back(configured);
  } else {
    std::error_code error;
    const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
    if (!error) {
      const auto folder = self.parent_path();
      candidates.push_back((folder / "kvferry-rails").string());
      candidates.push_back((folder / "../libexec/kvferry/kvferry-rails").string());
    }
  }
  std::string tried;
  for (const std::string& path : candidates) {
    if (::access(path.c_str(), X_OK) == 0) return path;
    tried += (tried.empty() ? "" : ", ") + path;
  }
  return invalid("rails.executable", "RAILS_NOT_FOUND", "no executable at " + tried);
}

Result<RailsCapabilities> query_capabilities(const std::string& executable,
                                             const std::string& cuda_driver, Duration timeout,
                                             const std::vector<std::string>& more_environment) {
  const Time deadline = monotonic_now() + timeout;
  auto path = find_rails_executable(executable);
  if (!path) return tl::unexpected<Error>(path.error());
  auto environment = make_rails_environment({});
  if (!environment) return tl::unexpected<Error>(environment.error());
  auto more = inherited_driver_environment();
  more.insert(more.end(), more_environment.begin(), more_environment.end());
  std::move(more.begin(), more.end(), std::back_inserter(*environment));
  std::vector<std::string> arguments = {"--capabilities"};
  if (!cuda_driver.empty()) {
    arguments.push_back("--cuda-driver");
    arguments.push_back(cuda_driver);
  }

  int ends[2] = {-1, -1};
  if (::pipe2(ends, O_CLOEXEC) != 0) return fail_errno("RAILS_SPAWN_FAILED", "pipe2", errno);
  const UniqueFd ours(ends[0]);
  UniqueFd theirs(ends[1]);
  auto child = ChildProcess::spawn(*path, arguments, *environment, {-1, theirs.get()});
  if (!child) return tl::unexpected<Error>(child.error());
  theirs.reset();
  auto answer = read_answer(ours.get(), deadline);
  // It has said all; its end is a matter of microseconds, unless it hangs.
  ChildProcess::Exit exit;
  bool ended = child->reap(exit);
  while (answer && !ended && monotonic_now() < deadline) {
    pollfd wait = {child->pidfd(), POLLIN, 0};
    ::poll(&wait, 1, 10);
    ended = child->reap(exit);
  }
  if (!ended) child->end(std::chrono::seconds(1));
  if (!answer) return tl::unexpected<Error>(answer.error());
  if (!ended || !exit.exited || exit.status != 0)
    return bad(ended && exit.exited ? "ended with status " + std::to_string(exit.status)
               : ended              ? "was ended by signal " + std::to_string(exit.signal)
                                    : std::string("does not end"));
  auto parsed = parse_capabilities(*answer);
  if (parsed) parsed->executable = std::move(*path);
  return parsed;
}

Result<RailsCapabilities> parse_capabilities(std::string_view text) {
  const Json json = Json::parse(text, nullptr, false);
  if (!json.is_object()) return bad("its answer is no JSON object");
  RailsCapabilities out;
  // Keys that are not known are a newer program's.
  const auto take_text = [&](const char* key, std::string& to) {
    const auto found = json.find(key);
    if (found == json.end() || !is_text(*found)) return false;
    to = found->get<std::string>();
    return true;
  };
  const auto take_list = [&](const char* key, std::vector<std::string>& to) {
    const auto found = json.find(key);
    if (found == json.end() || !is_list(*found)) return false;
    to = found->get<std::vector<std::string>>();
    return true;
  };
  const bool good =
      take_text("ucx_version", out.ucx_version) && take_text("ucx_built_for", out.ucx_built_for) &&
      take_text("cuda_missing", out.cuda_missing) && take_list("memory_types", out.memory_types) &&
      take_list("transports", out.transports);
  if (!good) return bad("a value is missing or is not what it should be");
  if (out.ucx_version.empty() || out.memory_types.empty()) return bad("a value is empty");
  if (out.has_cuda() != out.cuda_missing.empty()) return bad("it contradicts itself");
  return out;
}

}  // namespace kvferry::rails
