#include "daemon/ops/process_stats.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace kvferry::ops {
namespace {

// The words of /proc/PROCESS/stat behind the process's name, which may hold blanks and brackets.
// The first one is field 3 of proc(5).
std::vector<std::string> stat_words(const std::string& process) {
  std::ifstream in("/proc/" + process + "/stat");
  std::string line;
  std::getline(in, line);
  const std::size_t close = line.rfind(')');
  std::vector<std::string> out;
  if (close == std::string::npos) return out;
  std::istringstream words(line.substr(close + 1));
  for (std::string word; words >> word;) out.push_back(word);
  return out;
}

uint64_t number(const std::vector<std::string>& words, std::size_t proc_field) {
  const std::size_t index = proc_field - 3;
  return index < words.size() ? std::strtoull(words[index].c_str(), nullptr, 10) : 0;
}

double boot_time_seconds() {
  std::ifstream in("/proc/stat");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("btime ", 0) == 0) return std::strtod(line.c_str() + 6, nullptr);
  return 0;
}

// Nothing but zeros of a process that is gone.
ProcessStats read_stat(const std::string& process) {
  ProcessStats out;
  const auto ticks = static_cast<double>(::sysconf(_SC_CLK_TCK));
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::vector<std::string> words = stat_words(process);
  if (words.empty()) return out;
  static const double kBootTime = boot_time_seconds();
  out.cpu_seconds = static_cast<double>(number(words, 14) + number(words, 15)) / ticks;
  out.threads = number(words, 20);
  out.start_time_seconds = kBootTime + static_cast<double>(number(words, 22)) / ticks;
  out.virtual_bytes = number(words, 23);
  out.resident_bytes = number(words, 24) * page;
  return out;
}

}  // namespace

ProcessStats read_process_stats(int pid) {
  return read_stat(std::to_string(pid));
}

ProcessStats read_process_stats() {
  ProcessStats out = read_stat("self");
  rusage usage{};
  // Finer than the clock ticks of /proc.
  if (::getrusage(RUSAGE_SELF, &usage) == 0) {
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
    };
    out.cpu_seconds = seconds(usage.ru_utime) + seconds(usage.ru_stime);
  }
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0) out.max_fds = limit.rlim_cur;
  std::error_code error;
  for (std::filesystem::directory_iterator it("/proc/self/fd", error), end; !error && it != end;
       it.increment(error))
    ++out.open_fds;
  if (out.open_fds > 0) --out.open_fds;  // the one that lists them
  return out;
}

}  // namespace kvferry::ops
