#include "tests/proc/books.h"

#include <filesystem>
#include <fstream>

namespace kvferry::testing {
namespace {

std::size_t entries(const std::string& directory) {
  std::size_t count = 0;
  std::error_code error;
  for (std::filesystem::directory_iterator it(directory, error), end; !error && it != end;
       it.increment(error))
    ++count;
  return count;
}

// Mappings with a file behind them: what is shared with workers, rails and peers. Threads' stacks
// and the allocator's arenas come and go on their own account.
std::size_t file_mappings(pid_t pid) {
  std::ifstream maps("/proc/" + std::to_string(pid) + "/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);)
    if (line.find(" /") != std::string::npos) ++count;
  return count;
}

}  // namespace

bool Level::within(const Level& before) const {
  // A lane of UCX has one connection, or two if both ends dialled at the same time.
  return descriptors <= before.descriptors && mappings <= before.mappings &&
         rails_descriptors <= before.rails_descriptors + 1 && workers == before.workers &&
         pool_bytes == before.pool_bytes;
}

std::string Level::text() const {
  return std::to_string(descriptors) + " descriptors, " + std::to_string(mappings) +
         " mappings, rails " + std::to_string(rails_descriptors) + " descriptors, " +
         std::to_string(workers) + " workers, " + std::to_string(pool_bytes) + " bytes of pools";
}

Level level_of(const bench::DaemonProcess& daemon) {
  Level level;
  level.descriptors = entries("/proc/" + std::to_string(daemon.pid()) + "/fd");
  level.mappings = file_mappings(daemon.pid());
  level.rails_descriptors = entries("/proc/" + std::to_string(daemon.rails_pid()) + "/fd");
  level.workers = daemon.sum("kvferry_workers");
  level.pool_bytes = daemon.sum("kvferry_pool_bytes");
  return level;
}

}  // namespace kvferry::testing
