#include "daemon/node/peer_rules.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <memory>
#include <utility>

namespace kvferry::node {
namespace {

constexpr std::size_t kMaxAddresses = 16;

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};

std::vector<std::string> resolve_host(const std::string& host) {
  if (ops::is_numeric_address(host)) return {host};
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* raw = nullptr;
  if (getaddrinfo(host.c_str(), nullptr, &hints, &raw) != 0) return {};
  const std::unique_ptr<addrinfo, FreeAddresses> list(raw);
  std::vector<std::string> out;
  for (const addrinfo* at = list.get(); at != nullptr && out.size() < kMaxAddresses;
       at = at->ai_next) {
    char text[NI_MAXHOST] = {};
    if (getnameinfo(at->ai_addr, at->ai_addrlen, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) ==
        0)
      out.emplace_back(text);
  }
  return out;
}

tl::unexpected<Error> not_allowed(const std::string& what) {
  return fail(Code::kPermissionDenied, "PEER_NOT_ALLOWED", what + " is not allowed by [peers]");
}

// Without mutual TLS only a cluster secret or loopback stands for the peer's identity.
Status check_plain(const ops::PeerConfig& peer, const std::string& host, bool has_cluster_secret) {
  if (peer.mode == ops::PeerMode::kPlain && !has_cluster_secret && !ops::is_loopback(host))
    return fail(Code::kPermissionDenied, "PEER_NOT_ALLOWED",
                "a plain peer off loopback needs peer.cluster_secret_file");
  return {};
}

}  // namespace

Result<std::vector<Endpoint>> resolve_address(const std::string& address) {
  const Result<ops::HostPort> parsed = ops::parse_host_port(address);
  if (!parsed || parsed->port == 0)
    return invalid("address", "BAD_ADDRESS", "a peer's address is host:port");
  std::vector<Endpoint> out;
  for (std::string& host : resolve_host(parsed->host))
    out.push_back({std::move(host), parsed->port});
  if (out.empty())
    return fail(Code::kUnavailable, "NAME_NOT_FOUND", "no address is known for " + parsed->host);
  return out;
}

const ops::PeerConfig* find_peer(const std::vector<ops::PeerConfig>& peers, std::string_view node) {
  const auto it = std::find_if(peers.begin(), peers.end(),
                               [&](const ops::PeerConfig& peer) { return peer.identity == node; });
  return it == peers.end() ? nullptr : &*it;
}

bool allows(const ops::PeerConfig& peer, const Endpoint& endpoint, bool inbound) {
  for (ops::AddressRule rule : peer.addresses) {
    if (inbound) rule.port = 0;
    if (rule.numeric) {
      if (rule.matches(endpoint.host, endpoint.port)) return true;
      continue;
    }
    if (rule.port != 0 && rule.port != endpoint.port) continue;
    for (const std::string& host : resolve_host(rule.host))
      if (ops::same_address(host, endpoint.host)) return true;
  }
  return false;
}

Result<Route> choose_route(const std::vector<ops::PeerConfig>& peers, const std::string& node,
                           const std::string& address, bool has_cluster_secret) {
  std::vector<const ops::PeerConfig*> entries;
  if (node.empty()) {
    for (const ops::PeerConfig& peer : peers) entries.push_back(&peer);
  } else if (const ops::PeerConfig* peer = find_peer(peers, node)) {
    entries.push_back(peer);
  }
  if (entries.empty()) return not_allowed(node.empty() ? address : node);
  const Result<std::vector<Endpoint>> endpoints = resolve_address(address);
  if (!endpoints) return tl::unexpected<Error>(endpoints.error());
  for (const Endpoint& endpoint : *endpoints) {
    Route route{endpoint, {}, {}};
    bool found = false;
    for (const ops::PeerConfig* entry : entries) {
      if (!allows(*entry, endpoint, false)) continue;
      KVFERRY_RETURN_IF_ERROR(check_plain(*entry, endpoint.host, has_cluster_secret));
      // One mode is tried, the first entry's.
      if (!std::exchange(found, true)) route.mode = entry->mode;
      if (route.mode == ops::PeerMode::kMtls && entry->mode == ops::PeerMode::kMtls)
        route.identities.push_back(entry->identity);
    }
    if (found) return route;
  }
  return not_allowed(node.empty() ? address : node + " at " + address);
}

Status check_inbound(const std::vector<ops::PeerConfig>& peers, const std::string& node,
                     const std::string& host, ops::PeerMode mode, bool has_cluster_secret) {
  const ops::PeerConfig* entry = find_peer(peers, node);
  if (entry == nullptr || !allows(*entry, {host, 0}, true)) return not_allowed("this node");
  if (entry->mode != mode)
    return fail(Code::kPermissionDenied, "PEER_MODE",
                "this node's mode in [peers] is not that of the listener it has called");
  return check_plain(*entry, host, has_cluster_secret);
}

}  // namespace kvferry::node
