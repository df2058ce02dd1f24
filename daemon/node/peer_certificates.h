// This node's certificate, key and roots, kept as the files of [peer] are: new files are in force
// for connections from then on, bad ones are told of and change nothing.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "daemon/base/result.h"
#include "daemon/ops/config.h"
#include "daemon/ops/log.h"
#include "daemon/ops/peer_files.h"
#include "daemon/rpc/peer_tls.h"

namespace kvferry::node {

// One thread at a time, but for tls(). All but tls() blocks on the files.
class PeerCertificates {
 public:
  // FAILED_PRECONDITION PEER_FILE with the key of the configuration as its field.
  static Result<std::unique_ptr<PeerCertificates>> open(const ops::PeerListenConfig& config);

  std::shared_ptr<const rpc::PeerTls> tls() const { return tls_; }
  // Looks at the files. True if what is believed or shown is another now.
  bool look();
  // Of the certificate in force, in seconds since 1970. As look().
  int64_t not_before() const { return not_before_; }
  int64_t not_after() const { return not_after_; }
  // Of the root that ends last. As look().
  const Validity& last_root() const { return last_root_; }

 private:
  PeerCertificates(ops::PeerListenConfig config, ops::PeerFiles files);
  // A file's identity and age, or that it is not there.
  std::string stamps() const;
  void refuse(const std::string& stamps, const std::vector<Error>& problems);
  void warn_of_end();

  const ops::PeerListenConfig config_;
  std::string identity_;
  int64_t not_before_ = 0;
  int64_t not_after_ = 0;
  Validity last_root_;
  std::string stamps_;                 // of the files in force
  std::optional<std::string> doubts_;  // files that were no good once, or twice and told of
  std::optional<std::string> told_;
  ops::LogLimiter ends_{1, std::chrono::minutes(10)};
  std::shared_ptr<rpc::PeerTls> tls_;
};

}  // namespace kvferry::node
