#include "daemon/ops/peer_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "daemon/base/unique_fd.h"

namespace kvferry::ops {
namespace {

constexpr std::size_t kMaxBytes = 1 * kMiB;

enum class Privacy : uint8_t { kPublic, kPrivate };

// Only the owner may touch a private one; of root's the daemon's group may read it, which is how
// secrets are mounted into containers.
bool is_private(const struct stat& info) {
  return (info.st_mode & 077U) == 0 || (info.st_uid == 0 && (info.st_mode & 037U) == 0);
}

// The whole file. The message names the path, never the content.
Result<std::string> read_whole(const std::string& path, Privacy privacy) {
  const auto refuse = [&](const std::string& message) {
    return fail(Code::kFailedPrecondition, "PEER_FILE", path + ": " + message);
  };
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file) return refuse(std::strerror(errno));
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) return refuse(std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return refuse("is not a regular file");
  if (privacy == Privacy::kPrivate && !is_private(info))
    return refuse("may be read or written by others than its owner; chmod it to 0600");
  std::string text;
  std::array<char, 4096> block{};
  while (true) {
    const ssize_t got = ::read(file.get(), block.data(), block.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return refuse(std::strerror(errno));
    if (got == 0) return text;
    text.append(block.data(), static_cast<std::size_t>(got));
    if (text.size() > kMaxBytes) return refuse("is longer than " + format_size(kMaxBytes));
  }
}

class Reader {
 public:
  Reader(const PeerListenConfig& peer, std::vector<Error>& problems)
      : peer_(peer), problems_(problems) {}

  PeerFiles read() {
    PeerFiles files;
    const bool has_certificate =
        load("peer.certificate_file", peer_.certificate_file, Privacy::kPublic, files.certificate);
    const bool has_key = load("peer.key_file", peer_.key_file, Privacy::kPrivate, files.key);
    const bool has_roots = load("peer.ca_file", peer_.ca_file, Privacy::kPublic, files.roots);
    if (has_roots) {
      const Result<Validity> last = last_validity(files.roots);
      if (last)
        files.last_root = *last;
      else
        problem("peer.ca_file", peer_.ca_file, last.error().message);
    }
    if (!has_certificate) return files;
    Result<Certificate> node = read_certificate(files.certificate);
    if (!node) {
      problem("peer.certificate_file", peer_.certificate_file, node.error().message);
      return files;
    }
    files.node = std::move(*node);
    check_dates(files.node);
    check_uses(files.certificate);
    if (has_key)
      keep(check_private_key(files.certificate, files.key), "peer.key_file", peer_.key_file);
    return files;
  }

 private:
  void problem(const char* key, const std::string& path, const std::string& message) {
    problems_.push_back({Code::kFailedPrecondition, "PEER_FILE", path + ": " + message, key});
  }
  void keep(const Status& status, const char* key, const std::string& path) {
    if (!status) problem(key, path, status.error().message);
  }
  bool load(const char* key, const std::string& path, Privacy privacy, std::string& out) {
    if (path.empty()) {
      problems_.push_back(
          {Code::kFailedPrecondition, "PEER_FILE", "must be given for mode mtls", key});
      return false;
    }
    Result<std::string> text = read_whole(path, privacy);
    if (!text) {
      problems_.push_back(std::move(text).error());
      problems_.back().field = key;
      return false;
    }
    out = std::move(*text);
    return true;
  }
  void check_dates(const Certificate& node) {
    const auto now = static_cast<int64_t>(::time(nullptr));
    if (now > node.not_after)
      problem("peer.certificate_file", peer_.certificate_file,
              "has expired, on " + format_date(node.not_after));
    else if (now < node.not_before)
      problem("peer.certificate_file", peer_.certificate_file,
              "is not valid before " + format_date(node.not_before) +
                  "; is this machine's clock right?");
  }
  // The node is server to some peers and client to others.
  void check_uses(const std::string& certificate) {
    for (const auto& [use, name] : {std::pair(CertificateUse::kClient, "client"),
                                    std::pair(CertificateUse::kServer, "server")})
      if (!may_be_used(certificate, use))
        problem("peer.certificate_file", peer_.certificate_file,
                std::string("may not be used by a TLS ") + name +
                    " (its key usage or extended key usage)");
  }

  const PeerListenConfig& peer_;
  std::vector<Error>& problems_;
};

}  // namespace

bool wants_mtls(const Config& config) {
  return config.peer.mode == PeerMode::kMtls ||
         std::any_of(config.peers.begin(), config.peers.end(),
                     [](const PeerConfig& peer) { return peer.mode == PeerMode::kMtls; });
}

PeerFiles read_peer_files(const PeerListenConfig& peer, std::vector<Error>& problems) {
  return Reader(peer, problems).read();
}

std::string doubt_of(const PeerFiles& files) {
  // What follows the node's own certificate leads to the root.
  const Status vouched = verify_certificate(files.certificate, files.certificate, files.roots,
                                            CertificateUse::kServer, false);
  return vouched ? "" : vouched.error().message;
}

}  // namespace kvferry::ops
