// The files of mode mtls: this node's certificate, its key, and whom it believes ([peer]). Blocks
// on the files; any thread.
#pragma once

#include <string>
#include <vector>

#include "daemon/base/certificate.h"
#include "daemon/base/result.h"
#include "daemon/ops/config.h"

namespace kvferry::ops {

struct PeerFiles {
  std::string certificate;  // PEM: the node's, then those that lead to a root
  std::string key;          // PEM; a secret
  std::string roots;        // PEM
  Certificate node;         // what the node's certificate says
  Validity last_root;       // of the root that ends last
};

// Whether anything is configured as mtls, so that the files are needed.
bool wants_mtls(const Config& config);

// Reads and checks all three: there, the key private and the certificate's, in date, one identity,
// fit for both ends of a connection. Every problem is put into `problems` with the key of the
// configuration as its field and without a word of the key itself; the files count only without.
// Reason PEER_FILE.
PeerFiles read_peer_files(const PeerListenConfig& peer, std::vector<Error>& problems);

// Why the node's own roots do not vouch for its own certificate; empty if they do. Allowed, since
// peers may have other roots, but mostly a mistake.
std::string doubt_of(const PeerFiles& files);

}  // namespace kvferry::ops
