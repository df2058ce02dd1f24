#include "daemon/node/handshake.h"

#include <algorithm>
#include <charconv>

#include "daemon/base/check.h"

namespace kvferry::node {
namespace {

// A peer's word is not to keep this node at handshakes.
constexpr uint64_t kLeastRenewMs = 1000;

// The first two numbers of "1.13.1"; false if there are none.
bool major_minor(std::string_view version, unsigned& major, unsigned& minor) {
  const char* end = version.data() + version.size();
  auto first = std::from_chars(version.data(), end, major);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != '.') return false;
  return std::from_chars(first.ptr + 1, end, minor).ec == std::errc();
}

bool can(const rpc::PeerHello& hello, uint32_t check) {
  return std::find(hello.checks.begin(), hello.checks.end(), check) != hello.checks.end();
}

std::array<uint8_t, 4> length_of(std::string_view text) {
  const auto size = static_cast<uint32_t>(text.size());
  return {static_cast<uint8_t>(size), static_cast<uint8_t>(size >> 8),
          static_cast<uint8_t>(size >> 16), static_cast<uint8_t>(size >> 24)};
}

}  // namespace

Status check_ucx(std::string_view mine, std::string_view theirs) {
  unsigned my_major = 0, my_minor = 0, their_major = 0, their_minor = 0;
  if (major_minor(mine, my_major, my_minor) && major_minor(theirs, their_major, their_minor) &&
      my_major == their_major && my_minor == their_minor)
    return {};
  return fail(Code::kFailedPrecondition, "UCX_MISMATCH",
              "the two daemons run UCX " + std::string(mine) + " and " +
                  std::string(theirs.substr(0, 32)) +
                  ", which cannot talk to each other: install the same release on both nodes");
}

Result<Agreed> agree(const rpc::PeerHello& mine, const rpc::PeerHello& theirs, uint32_t max_lanes) {
  Agreed agreed;
  agreed.protocol = std::min(mine.protocol_max, theirs.protocol_max);
  if (agreed.protocol < mine.protocol_min || agreed.protocol < theirs.protocol_min)
    return fail(Code::kFailedPrecondition, "PROTOCOL_MISMATCH",
                "the two daemons speak no common version of the protocol");
  KVFERRY_RETURN_IF_ERROR(check_ucx(mine.ucx_version, theirs.ucx_version));
  // The stronger wish counts where both can do it, else the weaker one.
  uint32_t check = std::max(mine.check, theirs.check);
  if (!can(mine, check) || !can(theirs, check)) check = std::min(mine.check, theirs.check);
  if (check < mine.min_check || check < theirs.min_check || !can(mine, check) ||
      !can(theirs, check))
    return fail(Code::kFailedPrecondition, "CHECK_TOO_WEAK",
                "no check of chunks that both daemons can do is as strong as one of them demands");
  agreed.check = static_cast<engine::CheckKind>(check);
  agreed.chunk_bytes = std::min(mine.chunk_bytes, theirs.chunk_bytes);
  agreed.max_credits = std::min(mine.max_credits, theirs.max_credits);
  const std::size_t lanes = std::max(mine.rails.size(), theirs.rails.size());
  agreed.lanes = std::min(static_cast<uint32_t>(lanes), max_lanes);
  const uint64_t renew_ms = theirs.renew_ms == 0 ? mine.renew_ms : theirs.renew_ms;
  agreed.renew_interval =
      std::chrono::milliseconds(std::max(std::min(mine.renew_ms, renew_ms), kLeastRenewMs));
  return agreed;
}

HandshakeKey handshake_key(const SecretVector& cluster_secret) {
  return HandshakeKey(hmac_sha256(bytes_of("kvferry handshake key 1"), {Bytes(cluster_secret)}));
}

rpc::Tag16 request_tag(const HandshakeKey& key, std::string_view request) {
  return cut<16>(
      hmac_sha256(key.span(), {bytes_of("kvferry handshake request"), bytes_of(request)}));
}

rpc::Tag16 reply_tag(const HandshakeKey& key, std::string_view request, std::string_view reply) {
  return cut<16>(hmac_sha256(key.span(), {bytes_of("kvferry handshake reply"), length_of(request),
                                          bytes_of(request), bytes_of(reply)}));
}

link::LinkKeys keys_of(const rpc::PeerHello& request, const std::string& request_bytes,
                       const rpc::PeerHello& reply, const std::string& reply_bytes,
                       const SecretVector& cluster_secret, bool initiator,
                       const link::LinkKeys* before) {
  link::KeyMaterial material;
  material.initiator_random = request.random;
  material.responder_random = reply.random;
  material.initiator_node = request.node;
  material.responder_node = reply.node;
  material.initiator_boot = request.boot;
  material.responder_boot = reply.boot;
  material.transcript =
      sha256({length_of(request_bytes), bytes_of(request_bytes), bytes_of(reply_bytes)});
  material.cluster_secret = cluster_secret;
  if (before != nullptr) {
    material.renewal = before->renewal + 1;
    material.before = before->chain;
  }
  return link::derive_keys(material, initiator);
}

rpc::Tag16 call_tag(const link::KeyBytes& key, rpc::LinkMethod method, const rpc::LinkCall& call) {
  const std::array<uint8_t, 1> kind{static_cast<uint8_t>(method)};
  std::array<uint8_t, 8> number{};
  for (unsigned i = 0; i < 8; ++i) number[i] = static_cast<uint8_t>(call.number >> (8 * i));
  return cut<16>(hmac_sha256(
      key.span(), {bytes_of("kvferry link call"), kind, call.link, number, bytes_of(call.body)}));
}

rpc::Tag16 call_reply_tag(const link::KeyBytes& key, const rpc::Tag16& tag, std::string_view body) {
  return cut<16>(hmac_sha256(key.span(), {bytes_of("kvferry link reply"), tag, bytes_of(body)}));
}

rpc::WelcomeProof welcome_proof(const link::KeyBytes& key) {
  return {cut<16>(hmac_sha256(key.span(), {bytes_of("kvferry arenas welcome 1")}))};
}

void seal_offer(const link::KeyBytes& key, const rpc::Tag16& tag, rpc::ArenasOffer& offer) {
  std::array<uint8_t, 64 * rpc::kMaxLentSegments> stream{};
  const auto make_stream = [&](uint64_t number, std::size_t bytes) {
    std::vector<uint8_t> info;
    const Bytes label = bytes_of("kvferry arenas 1");
    info.insert(info.end(), label.begin(), label.end());
    info.insert(info.end(), tag.begin(), tag.end());
    for (unsigned shift = 0; shift < 64; shift += 8)
      info.push_back(static_cast<uint8_t>(number >> shift));
    hkdf_sha256(key.span(), {}, info, std::span(stream).first(bytes));
  };
  const auto add = [](std::span<uint8_t> to, const uint8_t* from) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] ^= from[i];
  };
  if (!offer.socket_path.empty()) {
    make_stream(0, offer.token.bytes.size());
    add(offer.token.bytes, stream.data());
  }
  for (rpc::OfferedArena& arena : offer.arenas) {
    if (rpc::has_descriptors(arena.kind)) continue;
    KVFERRY_CHECK(arena.segments.size() <= rpc::kMaxLentSegments, "an offer is within its limits");
    make_stream(uint64_t{1} + arena.number, 64 * arena.segments.size());
    for (std::size_t i = 0; i < arena.segments.size(); ++i)
      add(arena.segments[i].handle, stream.data() + 64 * i);
  }
}

}  // namespace kvferry::node
