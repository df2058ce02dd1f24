#include "tests/proc/fault_worker.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sstream>

extern char** environ;

namespace kvferry::testing {

using std::chrono::milliseconds;

WorkerProcess::WorkerProcess(const std::string& binary_directory, bool sends,
                             const std::string& socket, const std::string& instance,
                             const std::string& topology, const bench::Shape& shape,
                             const std::vector<std::string>& more) {
  int to[2];
  int from[2];
  if (::pipe2(to, O_CLOEXEC) != 0) return;
  if (::pipe2(from, O_CLOEXEC) != 0) {
    ::close(to[0]);
    ::close(to[1]);
    return;
  }
  std::vector<std::string> words = {binary_directory + "/kvferry-test-worker",
                                    sends ? "send" : "receive",
                                    socket,
                                    instance,
                                    topology,
                                    std::to_string(shape.layers),
                                    std::to_string(shape.kv_heads),
                                    std::to_string(shape.head_bytes),
                                    std::to_string(shape.tokens)};
  words.insert(words.end(), more.begin(), more.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, to[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, from[1], STDOUT_FILENO);
  if (posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ) != 0) pid_ = -1;
  posix_spawn_file_actions_destroy(&actions);
  ::close(to[0]);
  ::close(from[1]);
  in_ = to[1];
  out_ = from[0];
  // A worker that is dead reads no more; its answers say so.
  ::signal(SIGPIPE, SIG_IGN);
}

WorkerProcess::~WorkerProcess() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  if (in_ >= 0) ::close(in_);
  if (out_ >= 0) ::close(out_);
}

std::string WorkerProcess::wait_until_ready() {
  const std::string line = next();
  return line == "READY" ? std::string() : line;
}

void WorkerProcess::tell(const std::string& command) {
  const std::string line = command + "\n";
  (void)!::write(in_, line.data(), line.size());
}

std::string WorkerProcess::next(milliseconds limit) {
  const auto until = std::chrono::steady_clock::now() + limit;
  for (;;) {
    if (const std::size_t end = read_.find('\n'); end != std::string::npos) {
      std::string line = read_.substr(0, end);
      read_.erase(0, end + 1);
      return line;
    }
    const auto left =
        std::chrono::duration_cast<milliseconds>(until - std::chrono::steady_clock::now());
    pollfd ready{out_, POLLIN, 0};
    if (left.count() <= 0 || ::poll(&ready, 1, static_cast<int>(left.count())) <= 0)
      return "ERROR the worker does not answer";
    char buffer[4096];
    const ssize_t got = ::read(out_, buffer, sizeof buffer);
    if (got <= 0) return "ERROR the worker has ended";
    read_.append(buffer, static_cast<std::size_t>(got));
  }
}

TransferEnd WorkerProcess::next_end() {
  TransferEnd end;
  const std::string line = next(std::chrono::seconds(60));
  std::istringstream words(line);
  std::string word;
  words >> word >> end.seen_ns;
  if (word != "STATE") {
    end.error = line;
    return end;
  }
  while (words >> word) {
    std::istringstream parts(word);
    RankEnd rank;
    std::getline(parts, rank.state, ':');
    std::getline(parts, rank.reason, ':');
    std::getline(parts, rank.released_reason, ':');
    end.ranks.push_back(std::move(rank));
  }
  return end;
}

}  // namespace kvferry::testing
