// Answering: handshakes that peers begin, and their calls about links.
#include <algorithm>
#include <utility>

#include "daemon/node/link_manager_impl.h"

namespace kvferry::node {
namespace {

constexpr std::size_t kMaxChallenges = 256;
constexpr Duration kChallengeLife = std::chrono::seconds(10);

tl::unexpected<Error> busy() {
  return fail(Code::kUnavailable, "BUSY", "too much work is waiting");
}
tl::unexpected<Error> unknown_link() {
  return fail(Code::kNotFound, "UNKNOWN_LINK", "there is no such link");
}
bool is_any_address(const std::string& host) {
  return host == "0.0.0.0" || host == "::";
}

}  // namespace

Result<rpc::Random32> LinkManager::Impl::new_challenge() {
  rpc::Random32 challenge{};
  random_bytes(challenge);
  MutexLock lock(mutex);
  if (stopped) return fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping");
  // The oldest goes: a flood of strangers costs honest peers a second try, not memory.
  if (challenges.size() >= kMaxChallenges) challenges.pop_front();
  challenges.emplace_back(challenge, monotonic_now() + kChallengeLife);
  return challenge;
}

bool LinkManager::Impl::use_challenge(const rpc::Random32& challenge) {
  const Time now = monotonic_now();
  MutexLock lock(mutex);
  while (!challenges.empty() && challenges.front().second < now) challenges.pop_front();
  const auto it = std::find_if(challenges.begin(), challenges.end(),
                               [&](const auto& entry) { return entry.first == challenge; });
  if (it == challenges.end()) return false;
  challenges.erase(it);
  return true;
}

std::shared_ptr<rpc::PeerStub> LinkManager::Impl::stub_back(
    const std::vector<ops::PeerConfig>& allowed, const std::string& node, const std::string& host,
    const std::string& address) {
  const Result<ops::HostPort> told = ops::parse_host_port(address);
  if (!told || told->port == 0) return nullptr;
  const std::string target =
      is_any_address(told->host) ? ops::format_host_port(host, told->port) : address;
  const Result<Route> route = choose_route(allowed, node, target, has_secret());
  if (!route) return nullptr;
  return dialer.dial({route->endpoint.host, route->endpoint.port, route->identities});
}

Status LinkManager::Impl::may_link_now(const rpc::PeerHello& theirs) {
  if (stopped) return fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping");
  if (rails.empty()) return fail(Code::kUnavailable, "RAILS_DOWN", "the peer's rails are not up");
  if (const auto node = by_node.find(theirs.node); node != by_node.end()) {
    const Link* link = find(node->second);
    if (link != nullptr && link->boot == theirs.boot)
      return fail(Code::kAlreadyExists, "ALREADY_LINKED", "the two daemons have a link");
  }
  // Both dial: the dial of the smaller node id stays.
  const auto dial = dials.find(theirs.node);
  if (config.node < theirs.node && dial != dials.end() && dial->second.under_way)
    return fail(Code::kAlreadyExists, "ALREADY_LINKED", "this daemon is dialling already");
  if (links.size() >= config.max_links && !by_node.contains(theirs.node))
    return fail(Code::kResourceExhausted, "TOO_MANY_LINKS", "the daemon has no room for a link");
  return {};
}

Result<ops::PeerMode> LinkManager::Impl::check_caller(const rpc::Caller& from) const {
  if (!from.certificate) return ops::PeerMode::kPlain;
  KVFERRY_RETURN_IF_ERROR(*from.certificate);
  if (config.tls == nullptr)
    return fail(Code::kPermissionDenied, "PEER_MODE", "this daemon believes no certificates");
  // The connection may be older than the roots, or than the certificate's end.
  KVFERRY_RETURN_IF_ERROR(config.tls->check(**from.certificate, CertificateUse::kClient, false));
  return ops::PeerMode::kMtls;
}

void LinkManager::Impl::note_refusal(const rpc::Caller& from, const Error& error) {
  const bool known = from.certificate && *from.certificate;
  MutexLock lock(mutex);
  if (error.code != Code::kPermissionDenied && error.code != Code::kFailedPrecondition) return;
  if (!refusals.allow(monotonic_now())) return;
  ops::log_warning("peer refused",
                   {ops::field("from", from.host),
                    ops::field("certificate", known ? (*from.certificate)->identity : ""),
                    ops::field("error", error), ops::field("suppressed", refusals.suppressed())});
}

Result<rpc::PeerHello> LinkManager::Impl::check_hello(const rpc::Caller& from,
                                                      const rpc::SignedHello& request,
                                                      const HandshakeKey& secret_key,
                                                      ops::PeerMode mode,
                                                      const std::vector<ops::PeerConfig>& allowed) {
  if (!equal_constant_time(request_tag(secret_key, request.bytes), request.tag))
    return fail(Code::kPermissionDenied, "PEER_NOT_ALLOWED",
                "the cluster secret is not the same on both nodes");
  Result<rpc::PeerHello> theirs = rpc::decode_hello(request.bytes);
  if (!theirs) return theirs;
  if (!use_challenge(theirs->challenge))
    return fail(Code::kUnavailable, "CHALLENGE_UNKNOWN", "the challenge is too old: try again");
  // The certificate says who it is; the hello may only repeat it.
  if (from.certificate && (*from.certificate)->identity != theirs->node)
    return fail(Code::kPermissionDenied, "IDENTITY_MISMATCH",
                "this node says that it is another than its certificate says");
  KVFERRY_RETURN_IF_ERROR(check_inbound(allowed, theirs->node, from.host, mode, has_secret()));
  // Of other peers' boot ids nothing is asked: a refusal would let who says one first keep its
  // owner out.
  if (theirs->node == config.node || theirs->boot == config.boot)
    return fail(Code::kPermissionDenied, "IDENTITY_MISMATCH",
                "two daemons have the same node id: set node.id");
  return theirs;
}

Result<rpc::SignedHello> LinkManager::Impl::answer_hello(const rpc::Caller& from,
                                                         const rpc::SignedHello& request) {
  std::vector<ops::PeerConfig> allowed;
  uint64_t allowed_by = 0;  // before anything is checked
  {
    MutexLock lock(mutex);
    allowed = peers;
    allowed_by = rules;
  }
  const Result<ops::PeerMode> mode = check_caller(from);
  if (!mode) return tl::unexpected<Error>(mode.error());
  const SecretVector secret = secret_of(*mode);
  const HandshakeKey secret_key = handshake_key(secret);
  const Result<rpc::PeerHello> theirs = check_hello(from, request, secret_key, *mode, allowed);
  if (!theirs) return tl::unexpected<Error>(theirs.error());
  if (theirs->renews != rpc::LinkName{})
    return answer_renewal(from, *theirs, request.bytes, *mode, allowed_by);
  // May resolve a name, so before the lock.
  std::shared_ptr<rpc::PeerStub> stub =
      stub_back(allowed, theirs->node, from.host, theirs->address);

  rpc::SignedHello reply;
  std::vector<EnsureDone> waiters;
  PeerRef ref;
  {
    MutexLock lock(mutex);
    KVFERRY_RETURN_IF_ERROR(may_link_now(*theirs));
    if (rules != allowed_by)
      return fail(Code::kUnavailable, "RELOADED", "the rules for peers have changed meanwhile");
    const rpc::PeerHello mine = make_hello({});
    Result<Agreed> agreed = agree(mine, *theirs, config.max_lanes);
    if (!agreed) return tl::unexpected<Error>(std::move(agreed).error());
    reply.bytes = rpc::encode_hello(mine);
    reply.tag = reply_tag(secret_key, request.bytes, reply.bytes);
    Link link;
    link.node = theirs->node;
    link.boot = theirs->boot;
    link.host = from.host;
    link.address = theirs->address;
    link.ucx_version = theirs->ucx_version;
    link.keys = keys_of(*theirs, request.bytes, mine, reply.bytes, secret, false);
    if (from.certificate) link.certificate = **from.certificate;
    link.stub = std::move(stub);
    for (uint32_t i = 0; i < agreed->lanes; ++i)
      link.lanes.push_back({0, theirs->rails[rail_of(i, theirs->rails.size())]});
    // Before the reply leaves: the peer's first message must find the link.
    ref = open_link(std::move(link), *agreed, waiters);
  }
  for (EnsureDone& waiter : waiters) waiter(ref);
  return reply;
}

Result<std::string> LinkManager::Impl::answer_reopen(LinkId id, const std::string& body) {
  Result<rpc::ReopenLaneRequest> request = rpc::decode_reopen_request(body);
  if (!request) return tl::unexpected<Error>(std::move(request).error());
  MutexLock lock(mutex);
  Link* link = find(id);
  if (link == nullptr) return unknown_link();
  if (link->initiator || request->lane >= link->lanes.size())
    return invalid("lane", "BAD_MESSAGE", "only the side that dialled reopens lanes");
  if (rails.empty()) return fail(Code::kUnavailable, "RAILS_DOWN", "the peer's rails are not up");
  KVFERRY_RETURN_IF_ERROR(check_ucx(ucx_version, request->ucx_version));
  Lane& lane = link->lanes[request->lane];
  if (request->epoch <= lane.epoch)
    return fail(Code::kFailedPrecondition, "OLD_EPOCH", "the lane has been reopened since");
  lane = {request->epoch, std::move(request->rail)};
  sink(engine::LaneReopened{{id, request->lane, request->epoch}});
  return rpc::encode(rpc::ReopenLaneReply{rails[rail_of(request->lane, rails.size())]});
}

Result<std::string> LinkManager::Impl::answer_arenas(const PeerRef& peer, const rpc::LinkCall& call,
                                                     const link::KeyBytes& out_key) {
  Result<rpc::ArenasQuery> query = rpc::decode_arenas_query(call.body);
  if (!query) return tl::unexpected<Error>(std::move(query).error());
  ArenaOffers* lender = nullptr;
  {
    MutexLock lock(mutex);
    lender = offers;
  }
  rpc::ArenasOffer offer;
  query->proof = welcome_proof(out_key);
  if (lender != nullptr) offer = lender->offer(peer, *query);
  seal_offer(out_key, call.tag, offer);
  return rpc::encode(offer);
}

void LinkManager::Impl::answer_trace(const PeerRef& peer, const std::string& body,
                                     std::function<void(Result<std::string>)> done) {
  TraceAnswers* answers = nullptr;
  {
    MutexLock lock(mutex);
    if (!stopped) answers = trace_answers;
  }
  if (answers == nullptr)
    return done(fail(Code::kUnimplemented, "UNKNOWN_METHOD", "no trace is served"));
  Result<rpc::TraceQuery> query = rpc::decode_trace_query(body);
  if (!query) return done(tl::unexpected<Error>(std::move(query).error()));
  answers->answer_trace(peer, *query, [done = std::move(done)](Result<rpc::TraceReply> reply) {
    if (!reply) return done(tl::unexpected<Error>(std::move(reply).error()));
    done(rpc::encode(*reply));
  });
}

Result<std::string> LinkManager::Impl::answer_call(LinkId id, const PeerRef& peer,
                                                   rpc::LinkMethod method,
                                                   const rpc::LinkCall& call,
                                                   const link::KeyBytes& out_key) {
  const std::string& body = call.body;
  PeerQuestions* answers = nullptr;
  {
    MutexLock lock(mutex);
    if (stopped || questions == nullptr)
      return fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping");
    answers = questions;
  }
  switch (method) {
    case rpc::LinkMethod::kGetCards: {
      Result<rpc::CardQuery> query = rpc::decode_card_query(body);
      if (!query) return tl::unexpected<Error>(std::move(query).error());
      Result<rpc::CardPage> page = answers->answer_cards(peer, *query);
      if (!page) return tl::unexpected<Error>(std::move(page).error());
      return rpc::encode(*page);
    }
    case rpc::LinkMethod::kJoinForward: {
      Result<rpc::JoinForward> forward = rpc::decode_join_forward(body);
      if (!forward) return tl::unexpected<Error>(std::move(forward).error());
      KVFERRY_RETURN_IF_ERROR(answers->answer_join(peer, *forward));
      return std::string();
    }
    case rpc::LinkMethod::kReopenLane:
      return answer_reopen(id, body);
    case rpc::LinkMethod::kGetArenas:
      return answer_arenas(peer, call, out_key);
    case rpc::LinkMethod::kGetTrace:
      break;  // answer_trace()
    case rpc::LinkMethod::kLaneDown: {
      Result<rpc::LaneDownNotice> notice = rpc::decode_lane_down(body);
      if (!notice) return tl::unexpected<Error>(std::move(notice).error());
      MutexLock lock(mutex);
      const Link* link = find(id);
      if (link == nullptr || notice->lane >= link->lanes.size()) return unknown_link();
      sink(engine::PeerLaneDown{{id, notice->lane, notice->epoch}});
      return std::string();
    }
    case rpc::LinkMethod::kCloseLink: {
      Result<rpc::CloseLinkNotice> notice = rpc::decode_close_link(body);
      if (!notice) return tl::unexpected<Error>(std::move(notice).error());
      MutexLock lock(mutex);
      end_link(id, notice->reason);
      return std::string();
    }
  }
  return fail(Code::kUnimplemented, "UNKNOWN_METHOD", "no such call");
}

void LinkManager::challenge(const rpc::Caller& from,
                            std::function<void(Result<rpc::Random32>)> done) {
  // Whether it may be believed now is asked where it counts, in the handshake.
  if (from.certificate && !*from.certificate) {
    impl_->count_failure(from.certificate->error());
    impl_->note_refusal(from, from.certificate->error());
    return done(tl::unexpected<Error>(from.certificate->error()));
  }
  done(impl_->new_challenge());
}

void LinkManager::handshake(const rpc::Caller& from, rpc::SignedHello hello,
                            std::function<void(Result<rpc::SignedHello>)> done) {
  auto work = std::make_shared<std::pair<rpc::SignedHello, decltype(done)>>(std::move(hello),
                                                                            std::move(done));
  if (!impl_->post_at(Time{}, [impl = impl_, from, work] {
        Result<rpc::SignedHello> answer = impl->answer_hello(from, work->first);
        if (!answer) {
          impl->count_failure(answer.error());
          impl->note_refusal(from, answer.error());
        }
        work->second(std::move(answer));
      }))
    work->second(busy());
}

void LinkManager::call(const rpc::Caller& from, rpc::LinkMethod method, rpc::LinkCall call,
                       std::function<void(Result<rpc::LinkReply>)> done) {
  PeerRef peer;
  link::KeyBytes in_key;
  link::KeyBytes out_key;
  {
    MutexLock lock(impl_->mutex);
    const auto name = impl_->by_name.find(call.link);
    const Impl::Link* link = name == impl_->by_name.end() ? nullptr : impl_->find(name->second);
    // A link of mode mtls is spoken of over TLS, by its own peer.
    const bool shown = from.certificate && *from.certificate;
    if (link != nullptr && link->certificate.has_value() == from.certificate.has_value() &&
        (!link->certificate || (shown && (*from.certificate)->identity == link->node))) {
      peer = impl_->ref_of(*link);
      const link::LinkKeys& keys = link->next && link->next->link_name == call.link ? *link->next
                                   : link->previous && link->previous->link_name == call.link
                                       ? *link->previous
                                       : link->keys;
      in_key = keys.in.call;
      out_key = keys.out.call;
    }
  }
  // An unknown link, another's and a wrong tag are one answer.
  if (!peer.link || !equal_constant_time(call_tag(in_key, method, call), call.tag))
    return done(unknown_link());
  auto work =
      std::make_shared<std::pair<rpc::LinkCall, decltype(done)>>(std::move(call), std::move(done));
  if (!impl_->post_at(Time{}, [impl = impl_, peer, out_key, method, work] {
        const auto finish = [out_key, work](Result<std::string> body) {
          if (!body) return work->second(tl::unexpected<Error>(std::move(body).error()));
          rpc::LinkReply reply{std::move(*body), {}};
          reply.tag = call_reply_tag(out_key, work->first.tag, reply.body);
          work->second(std::move(reply));
        };
        if (method == rpc::LinkMethod::kGetTrace)
          impl->answer_trace(peer, work->first.body, finish);
        else
          finish(impl->answer_call(peer.link, peer, method, work->first, out_key));
      }))
    work->second(busy());
}

}  // namespace kvferry::node
