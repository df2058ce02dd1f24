#include "daemon/ops/config_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <optional>

#include "daemon/base/unique_fd.h"

namespace kvferry::ops {
namespace {

constexpr uint64_t kMaxFileBytes = 1 * kMiB;
constexpr std::size_t kMaxParts = 1000;  // files of conf.d

Result<std::string> read_all(int fd, uint64_t max_bytes) {
  std::string text;
  std::array<char, 4096> block{};
  while (true) {
    const ssize_t got = ::read(fd, block.data(), block.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      return fail(Code::kFailedPrecondition, "CONFIG_FILE",
                  std::string("cannot be read: ") + std::strerror(errno));
    if (got == 0) return text;
    text.append(block.data(), static_cast<std::size_t>(got));
    if (text.size() > max_bytes)
      return fail(Code::kInvalidArgument, "CONFIG_FILE",
                  "is longer than " + format_size(max_bytes));
  }
}

// Reads the folder beside the main file. Nobody has named its files one by one, so none counts that
// a stranger can have put there.
class Parts {
 public:
  Parts(const std::string& main, std::vector<ConfigProblem>& problems)
      : folder_((std::filesystem::path(main).parent_path() / "conf.d").string()),
        problems_(problems) {
    struct stat info {};
    if (::stat(main.c_str(), &info) == 0) owner_ = info.st_uid;
  }

  void read(std::vector<ConfigFile>& out) {
    struct stat info {};
    if (::stat(folder_.c_str(), &info) != 0) {
      if (errno != ENOENT && errno != ENOTDIR) problem(folder_, std::strerror(errno));
      return;
    }
    if (!S_ISDIR(info.st_mode)) return problem(folder_, "is not a folder");
    if (!is_trusted(info)) return problem(folder_, untrusted(info));
    for (const std::string& path : list()) {
      auto text = read_part(path);
      if (text)
        out.push_back({path, std::move(*text), false});
      else
        problem(path, text.error().message);
    }
  }

 private:
  void problem(const std::string& where, std::string message) {
    problems_.push_back({where, "", std::move(message)});
  }
  bool is_trusted(const struct stat& info) const {
    return info.st_uid == 0 || info.st_uid == ::geteuid() || info.st_uid == owner_;
  }
  static std::string untrusted(const struct stat& info) {
    return "belongs to user " + std::to_string(info.st_uid) +
           ", who is neither root nor the daemon's user nor the main file's owner";
  }

  // *.toml but hidden ones; other names are what editors and packages leave behind.
  std::vector<std::string> list() {
    std::vector<std::string> out;
    std::error_code error;
    for (std::filesystem::directory_iterator entry(folder_, error), end; !error && entry != end;
         entry.increment(error)) {
      const std::string name = entry->path().filename().string();
      if (name.front() != '.' && name.ends_with(".toml")) out.push_back(folder_ + "/" + name);
    }
    if (error) problem(folder_, error.message());
    if (out.size() > kMaxParts) {
      problem(folder_, "holds more than " + std::to_string(kMaxParts) + " files");
      out.clear();
    }
    std::sort(out.begin(), out.end());
    return out;
  }

  Result<std::string> read_part(const std::string& path) const {
    const auto refuse = [](std::string message) {
      return fail(Code::kFailedPrecondition, "CONFIG_FILE", std::move(message));
    };
    struct stat info {};
    // A link first as itself: a stranger's may lead to a file of ours that was never meant.
    if (::lstat(path.c_str(), &info) != 0)
      return refuse(std::string("cannot be opened: ") + std::strerror(errno));
    if (S_ISLNK(info.st_mode) && !is_trusted(info))
      return refuse("is a link that " + untrusted(info));
    // O_NONBLOCK: a FIFO would wait for its writer.
    const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!file) return refuse(std::string("cannot be opened: ") + std::strerror(errno));
    if (::fstat(file.get(), &info) != 0) return refuse(std::strerror(errno));
    if (!S_ISREG(info.st_mode)) return refuse("is not a regular file");
    if (!is_trusted(info)) return refuse(untrusted(info));
    if ((info.st_mode & 02U) != 0) return refuse("may be written by everybody; chmod it to 0644");
    return read_all(file.get(), kMaxFileBytes);
  }

  const std::string folder_;
  std::vector<ConfigProblem>& problems_;
  std::optional<uid_t> owner_;  // of the main file
};

}  // namespace

Result<std::string> read_whole_file(const std::string& path, uint64_t max_bytes) {
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return fail_errno("CONFIG_FILE", "open(" + path + ")", errno);
  return read_all(file.get(), max_bytes);
}

std::vector<ConfigFile> read_config_files(const std::string& main,
                                          std::vector<ConfigProblem>& problems) {
  std::vector<ConfigFile> out;
  auto text = read_whole_file(main, kMaxFileBytes);
  if (text)
    out.push_back({main, std::move(*text), true});
  else
    problems.push_back({main, "", text.error().message});
  Parts(main, problems).read(out);
  return out;
}

}  // namespace kvferry::ops
