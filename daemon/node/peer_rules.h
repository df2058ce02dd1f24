// Who may be linked: the [peers] of the configuration, and where names lead. Functions that resolve
// names block as long as the system's resolver does: for task pools only.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/ops/config.h"

namespace kvferry::node {

// A numeric address with its port.
struct Endpoint {
  std::string host;
  uint16_t port = 0;
};

// Blocks unless the host is numeric. INVALID_ARGUMENT BAD_ADDRESS, UNAVAILABLE NAME_NOT_FOUND.
Result<std::vector<Endpoint>> resolve_address(const std::string& address);

// Null for a node that is not listed.
const ops::PeerConfig* find_peer(const std::vector<ops::PeerConfig>& peers, std::string_view node);

// Whether the entry lets this peer be at `endpoint`; inbound the peer's port says nothing. Blocks
// if the entry has names.
bool allows(const ops::PeerConfig& peer, const Endpoint& endpoint, bool inbound);

// Where and how to dial a node.
struct Route {
  Endpoint endpoint;
  ops::PeerMode mode = ops::PeerMode::kPlain;
  std::vector<std::string> identities;  // mode mtls: whose certificate may answer
};

// Where to dial `node` (empty: whoever is allowed there), checked before any packet leaves.
// PERMISSION_DENIED PEER_NOT_ALLOWED; those of resolve_address. In mode plain only loopback is
// taken without a cluster secret.
Result<Route> choose_route(const std::vector<ops::PeerConfig>& peers, const std::string& node,
                           const std::string& address, bool has_cluster_secret);

// PERMISSION_DENIED PEER_NOT_ALLOWED unless `node` may come from there, PEER_MODE unless in that
// mode.
Status check_inbound(const std::vector<ops::PeerConfig>& peers, const std::string& node,
                     const std::string& host, ops::PeerMode mode, bool has_cluster_secret);

}  // namespace kvferry::node
