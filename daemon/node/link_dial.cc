// Dialling: one attempt a node at a time, with back-off between failed ones; everybody who wants
// the link waits for the same attempt.
#include <algorithm>
#include <utility>

#include "daemon/node/link_manager_impl.h"

namespace kvferry::node {
namespace {

constexpr std::size_t kMaxDials = 1024;
// How long a dial that gave way to the peer's own waits for that one.
constexpr Duration kInboundWait = std::chrono::seconds(1);

}  // namespace

void LinkManager::Impl::ensure(PeerTarget target, EnsureDone done) {
  std::optional<Result<PeerRef>> answer;
  {
    MutexLock lock(mutex);
    const bool own =
        target.node == config.node || (target.node.empty() && target.address == config.advertise);
    const std::string key = dial_key(target);
    const auto existing = dials.find(key);
    Dial* dial = existing == dials.end() ? nullptr : &existing->second;
    if (stopped) {
      answer = fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping");
    } else if (own) {
      answer = self();
    } else if (const Link* link = find_target(target)) {
      answer = ref_of(*link);
    } else if (dial != nullptr && dial->under_way) {
      dial->waiters.push_back(std::move(done));
      return;
    } else if (dial != nullptr && monotonic_now() < dial->not_before) {
      answer = tl::unexpected<Error>(dial->last_error);
    } else if (!target.node.empty() && find_peer(peers, target.node) == nullptr) {
      // Before a table entry: any worker may present any ticket.
      answer =
          fail(Code::kPermissionDenied, "PEER_NOT_ALLOWED", "the node is not allowed by [peers]");
    } else {
      if (dial == nullptr && dials.size() >= kMaxDials)
        std::erase_if(dials, [](const auto& entry) { return !entry.second.under_way; });
      if (dial == nullptr && dials.size() >= kMaxDials) {
        answer = fail(Code::kResourceExhausted, "TOO_MANY_DIALS", "too many dials at a time");
      } else {
        Dial& fresh = dials[key];
        const uint64_t number = next_attempt++;
        if (pool.post([self_impl = shared_from_this(), key, number] {
              self_impl->begin_dial(key, number);
            })) {
          fresh.target = std::move(target);
          fresh.under_way = true;
          fresh.attempt = number;
          fresh.waiters.push_back(std::move(done));
          return;
        }
        dials.erase(key);
        answer = fail(Code::kUnavailable, "BUSY", "too much work is waiting");
      }
    }
  }
  done(std::move(*answer));
}

void LinkManager::Impl::begin_dial(const std::string& key, uint64_t number) {
  auto attempt = std::make_shared<Attempt>();
  attempt->key = key;
  attempt->number = number;
  attempt->deadline = monotonic_now() + config.dial_timeout;
  PeerTarget target;
  std::vector<ops::PeerConfig> allowed;
  bool rails_up = false;
  {
    MutexLock lock(mutex);
    attempt->rules = rules;
    const auto dial = dials.find(key);
    if (dial == dials.end() || dial->second.attempt != number) return;
    target = dial->second.target;
    allowed = peers;
    rails_up = !rails.empty();
  }
  Result<Route> route = choose_route(allowed, target.node, target.address, has_secret());
  if (!route) return dial_failed(key, number, std::move(route).error());
  if (!rails_up)
    return dial_failed(key, number,
                       {Code::kUnavailable, "RAILS_DOWN", "this daemon's rails are not up", {}});
  begin_handshake(attempt, std::move(*route));
}

void LinkManager::Impl::begin_handshake(const std::shared_ptr<Attempt>& attempt, Route route) {
  attempt->route = std::move(route);
  attempt->stub = dialer.dial(
      {attempt->route.endpoint.host, attempt->route.endpoint.port, attempt->route.identities});
  attempt->stub->challenge(attempt->deadline,
                           [impl = shared_from_this(), attempt](Result<rpc::Random32> challenge) {
                             if (!challenge)
                               return impl->attempt_failed(*attempt, std::move(challenge).error());
                             impl->send_hello(attempt, *challenge);
                           });
}

void LinkManager::Impl::send_hello(const std::shared_ptr<Attempt>& attempt,
                                   const rpc::Random32& challenge) {
  rpc::SignedHello hello;
  {
    MutexLock lock(mutex);
    attempt->hello = make_hello(challenge);
  }
  if (attempt->renews) attempt->hello.renews = attempt->before.link_name;
  if (attempt->hello.rails.empty())
    return attempt_failed(*attempt,
                          {Code::kUnavailable, "RAILS_DOWN", "this daemon's rails are not up", {}});
  attempt->hello_bytes = rpc::encode_hello(attempt->hello);
  hello.bytes = attempt->hello_bytes;
  hello.tag = request_tag(handshake_key(secret_of(attempt->route.mode)), hello.bytes);
  attempt->stub->handshake(
      std::move(hello), attempt->deadline,
      [impl = shared_from_this(), attempt](Result<rpc::SignedHello> reply) {
        if (reply) {
          // Checking the reply may resolve names.
          auto kept = std::make_shared<rpc::SignedHello>(std::move(*reply));
          if (!impl->post_at(Time{}, [impl, attempt, kept] { impl->take_reply(attempt, *kept); }))
            impl->attempt_failed(*attempt,
                                 {Code::kUnavailable, "BUSY", "too much work is waiting", {}});
          return;
        }
        if (reply.error().reason == "ALREADY_LINKED" && !attempt->renews)
          return impl->await_inbound(attempt->key, attempt->number);
        impl->attempt_failed(*attempt, std::move(reply).error());
      });
}

Status LinkManager::Impl::check_reply(const Attempt& attempt, const std::string& wanted_node,
                                      const rpc::PeerHello& theirs,
                                      const std::vector<ops::PeerConfig>& allowed) {
  if (!wanted_node.empty() && theirs.node != wanted_node)
    return fail(Code::kPermissionDenied, "IDENTITY_MISMATCH",
                "another node answers at that address than the one wanted");
  if (attempt.route.mode == ops::PeerMode::kMtls) {
    const std::optional<rpc::PeerCertificate> shown = attempt.stub->certificate();
    if (!shown || shown->identity != theirs.node)
      return fail(Code::kPermissionDenied, "IDENTITY_MISMATCH",
                  "the peer says that it is another node than its certificate says");
  }
  const ops::PeerConfig* peer = find_peer(allowed, theirs.node);
  // Names were resolved when the endpoint was chosen for this entry; only a dial by address alone
  // has to look again, which may resolve names once more.
  if (peer == nullptr || peer->mode != attempt.route.mode ||
      (wanted_node.empty() && !allows(*peer, attempt.route.endpoint, false)))
    return fail(Code::kPermissionDenied, "PEER_NOT_ALLOWED", "that node is not allowed by [peers]");
  if (theirs.boot == config.boot || theirs.node == config.node)
    return fail(Code::kPermissionDenied, "IDENTITY_MISMATCH",
                "the peer has this node's own identity");
  return {};
}

// The peer has made its end of the link already when it answers: what is refused here is taken
// back.
void LinkManager::Impl::take_back(const Attempt& attempt, const link::LinkKeys& keys) {
  rpc::LinkCall call;
  call.link = keys.link_name;
  call.number = 1;
  call.body = rpc::encode(rpc::CloseLinkNotice{Reason::kPeerLost});
  call.tag = call_tag(keys.out.call, rpc::LinkMethod::kCloseLink, call);
  attempt.stub->call(rpc::LinkMethod::kCloseLink, std::move(call),
                     monotonic_now() + config.call_timeout, [](const Result<rpc::LinkReply>&) {});
}

void LinkManager::Impl::take_reply(const std::shared_ptr<Attempt>& attempt,
                                   const rpc::SignedHello& reply) {
  const SecretVector secret = secret_of(attempt->route.mode);
  if (!equal_constant_time(reply_tag(handshake_key(secret), attempt->hello_bytes, reply.bytes),
                           reply.tag))
    return attempt_failed(*attempt, {Code::kPermissionDenied,
                                     "PEER_NOT_ALLOWED",
                                     "the peer does not know the cluster secret",
                                     {}});
  Result<rpc::PeerHello> theirs = rpc::decode_hello(reply.bytes);
  if (!theirs) return attempt_failed(*attempt, std::move(theirs).error());
  if (attempt->renews) return take_renewal(attempt, *theirs, reply.bytes);
  const link::LinkKeys keys =
      keys_of(attempt->hello, attempt->hello_bytes, *theirs, reply.bytes, secret, true);
  std::string wanted;
  std::vector<ops::PeerConfig> allowed;
  {
    MutexLock lock(mutex);
    const auto dial = dials.find(attempt->key);
    if (dial != dials.end()) wanted = dial->second.target.node;
    allowed = peers;
  }
  Result<Agreed> agreed = agree(attempt->hello, *theirs, config.max_lanes);
  Status status = check_reply(*attempt, wanted, *theirs, allowed);
  if (!status || !agreed) {
    take_back(*attempt, keys);
    return dial_failed(attempt->key, attempt->number,
                       !status ? std::move(status).error() : std::move(agreed).error());
  }

  Link link;
  link.node = theirs->node;
  link.boot = theirs->boot;
  link.host = attempt->route.endpoint.host;
  link.ucx_version = theirs->ucx_version;
  link.initiator = true;
  link.keys = keys;
  link.stub = attempt->stub;
  link.certificate = attempt->stub->certificate();
  for (uint32_t i = 0; i < agreed->lanes; ++i)
    link.lanes.push_back({0, theirs->rails[rail_of(i, theirs->rails.size())]});
  std::vector<EnsureDone> waiters;
  std::optional<PeerRef> ref;
  bool same_rules = true;
  {
    MutexLock lock(mutex);
    same_rules = rules == attempt->rules;
    const auto dial = dials.find(attempt->key);
    // Given up meanwhile: somebody else's link of this node counts, or the daemon stops.
    if (!stopped && same_rules && dial != dials.end() && dial->second.attempt == attempt->number) {
      // Found again under the address as it was asked for.
      link.address = dial->second.target.address;
      ref = open_link(std::move(link), *agreed, waiters);
    }
  }
  if (!ref) {
    take_back(*attempt, keys);
    if (!same_rules)
      dial_failed(
          attempt->key, attempt->number,
          {Code::kUnavailable, "RELOADED", "the rules for peers have changed meanwhile", {}});
    return;
  }
  for (EnsureDone& waiter : waiters) waiter(*ref);
}

void LinkManager::Impl::attempt_failed(const Attempt& attempt, Error error) {
  if (attempt.renews) return renewal_failed(attempt.renews, error);
  dial_failed(attempt.key, attempt.number, std::move(error));
}

void LinkManager::Impl::dial_failed(const std::string& key, uint64_t number, Error error) {
  std::vector<EnsureDone> waiters;
  {
    MutexLock lock(mutex);
    const auto it = dials.find(key);
    if (it == dials.end() || it->second.attempt != number) return;
    Dial& dial = it->second;
    dial.under_way = false;
    dial.backoff = dial.backoff.count() == 0 ? config.backoff_first
                                             : std::min(2 * dial.backoff, config.backoff_most);
    dial.not_before = monotonic_now() + dial.backoff;
    dial.last_error = error;
    count_failure(error);
    waiters.swap(dial.waiters);
    if (!is_daily_life(error) && failed_dials.allow(monotonic_now()))
      ops::log_warning(
          "peer not linked",
          {ops::field("peer", dial.target.node), ops::field("address", dial.target.address),
           ops::field("error", error), ops::field("suppressed", failed_dials.suppressed())});
  }
  for (EnsureDone& waiter : waiters) waiter(tl::unexpected<Error>(error));
}

// The peer dials too and its dial counts: its handshake will answer whoever waits here.
void LinkManager::Impl::await_inbound(const std::string& key, uint64_t number) {
  const Error error{
      Code::kUnavailable, "ALREADY_LINKED", "the peer says that it is linked or dials itself", {}};
  const bool posted = post_at(
      monotonic_now() + kInboundWait,
      [impl = shared_from_this(), key, number, error] { impl->dial_failed(key, number, error); });
  if (!posted) dial_failed(key, number, error);
}

}  // namespace kvferry::node
