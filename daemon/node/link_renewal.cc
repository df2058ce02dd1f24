// Renewing links: each is shaken hands for anew by the side that dialled it, when its keys have
// become old. README.md says how the keys take over.
#include <algorithm>
#include <utility>

#include "daemon/node/link_manager_impl.h"

namespace kvferry::node {

// Of one link until the next renew_links(), which comes each second: an honest peer asks once, and
// again only if the answer was lost.
constexpr uint32_t kMostRenewalsAnswered = 4;

void LinkManager::Impl::forget_name(const std::optional<link::LinkKeys>& keys) {
  if (keys) by_name.erase(keys->link_name);
}

void LinkManager::Impl::use_keys(Link& link, const link::LinkKeys& keys, Time shook_hands) {
  forget_name(link.previous);
  link.previous = link.keys;
  link.previous_until = Time::never();
  link.keys = keys;
  link.keys_seen = false;
  link.shook_hands = shook_hands;
  renewed.fetch_add(1, std::memory_order_relaxed);
  ops::log_debug("link renewed",
                 {ops::field("peer", link.node), ops::field("renewal", keys.renewal)});
}

void LinkManager::renew_links(Time now) {
  std::vector<LinkId> too_old;
  std::vector<LinkId> due;
  {
    MutexLock lock(impl_->mutex);
    if (impl_->stopped || impl_->renewed_keys == nullptr) return;
    for (auto& [id, link] : impl_->links) {
      link.renewals_answered = 0;
      if (link.previous_until < now) {
        impl_->forget_name(link.previous);
        link.previous.reset();
        link.previous_until = Time::never();
      }
      const Time old = link.shook_hands + link.renew_interval;
      if (old + renewal_slack(link.renew_interval) <= now) {
        too_old.push_back(id);
        ops::log_warning("the link was not renewed in time", {ops::field("peer", link.node)});
      } else if (old <= now && link.initiator && link.keys_seen && !link.renewing &&
                 link.renew_not_before <= now) {
        link.renewing = true;
        due.push_back(id);
      }
    }
  }
  impl_->end_links(too_old, Reason::kPeerLost);
  for (const LinkId id : due)
    if (!impl_->post_at(Time{}, [impl = impl_, id] { impl->begin_renewal(id); }))
      impl_->renewal_failed(id, {Code::kUnavailable, "BUSY", "too much work is waiting", {}});
}

void LinkManager::keys_seen(LinkId id, uint64_t selector, Time now) {
  MutexLock lock(impl_->mutex);
  Impl::Link* link = impl_->find(id);
  if (link == nullptr) return;
  if (link->next && link->next->in.selector == selector) {
    const link::LinkKeys next = *std::exchange(link->next, std::nullopt);
    impl_->use_keys(*link, next, link->next_shook_hands);
  }
  if (link->keys.in.selector != selector) return;
  link->keys_seen = true;
  if (link->previous) link->previous_until = now + link::kOldKeysGrace;
}

uint64_t LinkManager::links_renewed() const {
  return impl_->renewed.load(std::memory_order_relaxed);
}

void LinkManager::Impl::begin_renewal(LinkId id) {
  auto attempt = std::make_shared<Attempt>();
  attempt->renews = id;
  attempt->deadline = monotonic_now() + config.dial_timeout;
  std::string node;
  std::string address;
  bool certificate = false;
  std::vector<ops::PeerConfig> allowed;
  {
    MutexLock lock(mutex);
    const Link* link = find(id);
    if (link == nullptr) return;
    attempt->rules = rules;
    attempt->before = link->keys;
    node = link->node;
    address = link->address;
    certificate = link->certificate.has_value();
    allowed = peers;
  }
  Result<Route> route = choose_route(allowed, node, address, has_secret());
  if (!route) return renewal_failed(id, route.error());
  if ((route->mode == ops::PeerMode::kMtls) != certificate)
    return renewal_failed(id, {Code::kPermissionDenied,
                               "PEER_MODE",
                               "the link was made in another mode than the peer's is now",
                               {}});
  // By a connection of its own, in which the peer shows its certificate anew.
  begin_handshake(attempt, std::move(*route));
}

void LinkManager::Impl::take_renewal(const std::shared_ptr<Attempt>& attempt,
                                     const rpc::PeerHello& theirs, const std::string& reply_bytes) {
  const link::LinkKeys keys = keys_of(attempt->hello, attempt->hello_bytes, theirs, reply_bytes,
                                      secret_of(attempt->route.mode), true, &attempt->before);
  std::string node;
  std::vector<ops::PeerConfig> allowed;
  {
    MutexLock lock(mutex);
    const Link* link = find(attempt->renews);
    if (link == nullptr) return;
    node = link->node;
    allowed = peers;
  }
  Status status = check_reply(*attempt, node, theirs, allowed);
  if (status) {
    MutexLock lock(mutex);
    Link* link = find(attempt->renews);
    if (link == nullptr || stopped) return;
    if (theirs.boot != link->boot) {
      status = fail(Code::kUnavailable, "UNKNOWN_LINK", "the peer's daemon has been restarted");
    } else if (rules != attempt->rules) {
      status = fail(Code::kUnavailable, "RELOADED", "the rules for peers have changed meanwhile");
    } else {
      use_keys(*link, keys, monotonic_now());
      by_name.emplace(keys.link_name, link->id);
      link->stub = attempt->stub;
      link->certificate = attempt->stub->certificate();
      link->renewing = false;
      link->renew_backoff = {};
      renewed_keys(link->id, keys, true);
    }
  }
  if (!status) renewal_failed(attempt->renews, status.error());
}

void LinkManager::Impl::renewal_failed(LinkId id, const Error& error) {
  MutexLock lock(mutex);
  Link* link = find(id);
  if (link == nullptr) return;
  link->renewing = false;
  link->renew_backoff =
      link->renew_backoff == Duration{}
          ? config.backoff_first
          : std::min(2 * link->renew_backoff, renewal_slack(link->renew_interval) / 8);
  link->renew_not_before = monotonic_now() + link->renew_backoff;
  count_failure(error);
  if (!is_daily_life(error) && failed_dials.allow(monotonic_now()))
    ops::log_warning(
        "link not renewed",
        {ops::field("peer", link->node), ops::field("address", link->address),
         ops::field("error", error), ops::field("suppressed", failed_dials.suppressed())});
}

Result<rpc::SignedHello> LinkManager::Impl::answer_renewal(const rpc::Caller& from,
                                                           const rpc::PeerHello& theirs,
                                                           const std::string& request_bytes,
                                                           ops::PeerMode mode,
                                                           uint64_t allowed_by) {
  const SecretVector secret = secret_of(mode);
  MutexLock lock(mutex);
  if (stopped) return fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping");
  if (rails.empty()) return fail(Code::kUnavailable, "RAILS_DOWN", "the peer's rails are not up");
  if (rules != allowed_by)
    return fail(Code::kUnavailable, "RELOADED", "the rules for peers have changed meanwhile");
  const auto name = by_name.find(theirs.renews);
  Link* link = name == by_name.end() ? nullptr : find(name->second);
  // Of the same two lives, in the same mode, begun by the side that dialled, and of the keys that
  // are in use: a peer that has not seen those used begins no renewal.
  if (link == nullptr || link->node != theirs.node || link->boot != theirs.boot ||
      link->initiator || link->certificate.has_value() != from.certificate.has_value() ||
      link->keys.link_name != theirs.renews || renewed_keys == nullptr)
    return fail(Code::kNotFound, "UNKNOWN_LINK", "there is no such link to renew");
  if (link->renewals_answered >= kMostRenewalsAnswered)
    return fail(Code::kResourceExhausted, "TOO_MANY_RENEWALS", "the link is renewed too often");
  ++link->renewals_answered;
  const rpc::PeerHello mine = make_hello({});
  rpc::SignedHello reply;
  reply.bytes = rpc::encode_hello(mine);
  reply.tag = reply_tag(handshake_key(secret), request_bytes, reply.bytes);
  forget_name(link->next);
  link->next = keys_of(theirs, request_bytes, mine, reply.bytes, secret, false, &link->keys);
  link->next_shook_hands = monotonic_now();
  by_name.emplace(link->next->link_name, link->id);
  if (from.certificate) link->certificate = **from.certificate;
  link->host = from.host;
  // Before the reply leaves: the peer's first message under these keys must be opened.
  renewed_keys(link->id, *link->next, false);
  return reply;
}

}  // namespace kvferry::node
