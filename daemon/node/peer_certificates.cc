#include "daemon/node/peer_certificates.h"

#include <sys/stat.h>

#include <ctime>
#include <utility>

namespace kvferry::node {
namespace {

rpc::TlsMaterial material_of(ops::PeerFiles files) {
  return {std::move(files.certificate), std::move(files.key), std::move(files.roots)};
}

}  // namespace

Result<std::unique_ptr<PeerCertificates>> PeerCertificates::open(
    const ops::PeerListenConfig& config) {
  std::vector<Error> problems;
  ops::PeerFiles files = ops::read_peer_files(config, problems);
  if (!problems.empty()) return tl::unexpected<Error>(std::move(problems.front()));
  return std::unique_ptr<PeerCertificates>(new PeerCertificates(config, std::move(files)));
}

PeerCertificates::PeerCertificates(ops::PeerListenConfig config, ops::PeerFiles files)
    : config_(std::move(config)),
      identity_(files.node.identity),
      not_before_(files.node.not_before),
      not_after_(files.node.not_after),
      last_root_(files.last_root),
      tls_(std::make_shared<rpc::PeerTls>(material_of(std::move(files)))) {
  // stamps_ stays empty: the first look reads once more what may have changed since.
}

bool PeerCertificates::look() {
  warn_of_end();
  // Before the files are read: what is written meanwhile has other stamps at the next look.
  std::string now = stamps();
  if (now == stamps_ || now == told_) return false;
  std::vector<Error> problems;
  ops::PeerFiles files = ops::read_peer_files(config_, problems);
  if (problems.empty() && files.node.identity != identity_)
    problems.push_back({Code::kFailedPrecondition, "PEER_FILE",
                        config_.certificate_file + ": is " + files.node.identity +
                            "'s, and this node is " + identity_ + " until it is restarted",
                        "peer.certificate_file"});
  if (!problems.empty()) {
    refuse(now, problems);
    return false;
  }
  stamps_ = std::move(now);
  doubts_.reset();
  told_.reset();
  const auto before = tls_->material();
  if (before->certificate == files.certificate && before->key == files.key &&
      before->roots == files.roots)
    return false;
  not_before_ = files.node.not_before;
  not_after_ = files.node.not_after;
  last_root_ = files.last_root;
  ops::log_info("certificate loaded", {ops::field("identity", identity_),
                                       ops::field("expires", format_date(not_after_))});
  if (const std::string doubt = ops::doubt_of(files); !doubt.empty())
    ops::log_warning("peer.ca_file does not vouch for this node's own certificate",
                     {ops::field("why", doubt)});
  tls_->replace(material_of(std::move(files)));
  return true;
}

// Files are written one after another, so what does not go together is told of when it still does
// not at the next look.
void PeerCertificates::refuse(const std::string& stamps, const std::vector<Error>& problems) {
  if (doubts_ != stamps) {
    doubts_ = stamps;
    return;
  }
  told_ = stamps;
  for (const Error& problem : problems)
    ops::log_error("certificate not loaded: the one before stays in force",
                   {ops::field("error", problem)});
}

std::string PeerCertificates::stamps() const {
  std::string out;
  for (const std::string* path : {&config_.certificate_file, &config_.key_file, &config_.ca_file}) {
    struct stat info {};
    if (::stat(path->c_str(), &info) == 0) {
      for (const auto number :
           {static_cast<int64_t>(info.st_dev), static_cast<int64_t>(info.st_ino),
            static_cast<int64_t>(info.st_size), static_cast<int64_t>(info.st_mode),
            static_cast<int64_t>(info.st_mtim.tv_sec), static_cast<int64_t>(info.st_mtim.tv_nsec),
            static_cast<int64_t>(info.st_ctim.tv_sec), static_cast<int64_t>(info.st_ctim.tv_nsec)})
        out += std::to_string(number) + ",";
    }
    out += ";";
  }
  return out;
}

void PeerCertificates::warn_of_end() {
  const auto now = static_cast<int64_t>(::time(nullptr));
  const int64_t left = not_after_ - now;
  // Whoever renews them does so earlier than in their last tenth.
  if (left > (not_after_ - not_before_) / 10 || !ends_.allow(monotonic_now())) return;
  if (left >= 0)
    ops::log_warning("this node's certificate ends soon and has not been renewed",
                     {ops::field("expires", format_date(not_after_)),
                      ops::field("file", config_.certificate_file)});
  else
    ops::log_error("this node's certificate has expired: no new links until it is renewed",
                   {ops::field("expired", format_date(not_after_)),
                    ops::field("file", config_.certificate_file)});
}

}  // namespace kvferry::node
