// The machine that kvferryctl runs on.
#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "client/ctl/doctor.h"
#include "daemon/base/unique_fd.h"

namespace kvferry::ctl {
namespace {

constexpr std::size_t kMaxFileBytes = 1 << 20;

class ThisSystem final : public System {
 public:
  std::optional<std::string> read(const std::string& path) const override {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd) return std::nullopt;
    std::string text;
    char buffer[4096];
    for (ssize_t got = 0; (got = ::read(fd.get(), buffer, sizeof buffer)) != 0;) {
      if (got < 0) return std::nullopt;
      text.append(buffer, static_cast<std::size_t>(got));
      if (text.size() > kMaxFileBytes) break;
    }
    return text;
  }

  std::optional<File> stat(const std::string& path) const override {
    struct ::stat found {};
    if (::stat(path.c_str(), &found) != 0) return std::nullopt;
    return File{found.st_mode, found.st_uid, found.st_gid, ::access(path.c_str(), W_OK) == 0};
  }

  std::vector<std::string> list(const std::string& directory) const override {
    std::vector<std::string> names;
    DIR* open = ::opendir(directory.c_str());
    if (open == nullptr) return names;
    while (const dirent* entry = ::readdir(open))
      if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
    ::closedir(open);
    std::sort(names.begin(), names.end());
    return names;
  }

  std::optional<uint64_t> file_system_bytes(const std::string& path) const override {
    struct ::statvfs found {};
    if (::statvfs(path.c_str(), &found) != 0) return std::nullopt;
    return uint64_t{found.f_blocks} * found.f_frsize;
  }

  std::optional<uint64_t> memlock_bytes() const override {
    rlimit limit{};
    if (::getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
      return std::nullopt;
    return limit.rlim_cur;
  }

  // The kernel keeps who called listen(). The daemon sees a connection that ends without a word.
  std::optional<int> listener_pid(const std::string& socket) const override {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (socket.size() >= sizeof address.sun_path) return std::nullopt;
    std::memcpy(address.sun_path, socket.data(), socket.size());
    const UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd ||
        ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
      return std::nullopt;
    ucred peer{};
    socklen_t bytes = sizeof peer;
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) return std::nullopt;
    return peer.pid;
  }
};

}  // namespace

std::unique_ptr<System> this_system() {
  return std::make_unique<ThisSystem>();
}

}  // namespace kvferry::ctl
