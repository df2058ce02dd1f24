#include "daemon/node/link_manager.h"

#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/node/link_manager_impl.h"

namespace kvferry::node {
namespace {

tl::unexpected<Error> link_down() {
  return fail(Code::kUnavailable, "LINK_DOWN", "the link has ended");
}
tl::unexpected<Error> rails_down() {
  return fail(Code::kUnavailable, "RAILS_DOWN", "this daemon's rails are not up");
}

bool still_allowed(const std::vector<ops::PeerConfig>& peers, const std::string& node,
                   const std::string& host, ops::PeerMode mode) {
  const ops::PeerConfig* peer = find_peer(peers, node);
  if (peer == nullptr || peer->mode != mode) return false;
  for (ops::AddressRule rule : peer->addresses) {
    rule.port = 0;
    // What a name leads to was checked when the link was made.
    if (!rule.numeric || rule.matches(host, 0)) return true;
  }
  return false;
}

}  // namespace

LinkManager::Impl::Impl(LinkManagerConfig config_in, rpc::PeerDialer& dialer_in, TaskPool& pool_in,
                        EventSink sink_in)
    : config(std::move(config_in)),
      dialer(dialer_in),
      pool(pool_in),
      sink(std::move(sink_in)),
      peers(config.peers) {}

LinkManager::Impl::Link* LinkManager::Impl::find(LinkId id) {
  const auto it = links.find(id);
  return it == links.end() ? nullptr : &it->second;
}
const LinkManager::Impl::Link* LinkManager::Impl::find(LinkId id) const {
  const auto it = links.find(id);
  return it == links.end() ? nullptr : &it->second;
}

LinkManager::Impl::Link* LinkManager::Impl::find_target(const PeerTarget& target) {
  if (!target.node.empty()) {
    const auto it = by_node.find(target.node);
    return it == by_node.end() ? nullptr : find(it->second);
  }
  for (auto& [id, link] : links)
    if (link.address == target.address) return &link;
  return nullptr;
}

bool LinkManager::Impl::post_at(Time when, std::function<void()> task) {
  MutexLock lock(mutex);
  return !stopped && pool.post_at(when, std::move(task));
}

rpc::PeerHello LinkManager::Impl::make_hello(const rpc::Random32& challenge) {
  rpc::PeerHello hello;
  hello.node = config.node;
  hello.boot = config.boot;
  hello.address = config.advertise;
  hello.ucx_version = ucx_version;
  random_bytes(hello.random);
  hello.challenge = challenge;
  hello.chunk_bytes = config.chunk_bytes;
  hello.max_credits = config.max_credits;
  hello.checks = {static_cast<uint32_t>(engine::CheckKind::kNone)};
  if (config.can_check)
    for (const auto kind : {engine::CheckKind::kXxh3, engine::CheckKind::kGmac})
      hello.checks.push_back(static_cast<uint32_t>(kind));
  hello.check = static_cast<uint32_t>(config.check);
  hello.min_check = static_cast<uint32_t>(config.min_check);
  hello.rails = rails;
  hello.renew_ms = static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::milliseconds>(config.renew_interval).count());
  return hello;
}

PeerRef LinkManager::Impl::open_link(Link link, const Agreed& agreed,
                                     std::vector<EnsureDone>& waiters) {
  if (const auto old = by_node.find(link.node); old != by_node.end())
    end_link(LinkId(old->second), Reason::kPeerLost);
  link.id = LinkId{next_link++};
  link.renew_interval = agreed.renew_interval;
  link.shook_hands = monotonic_now();
  const PeerRef ref = ref_of(link);
  sink(engine::LinkUp{link.id, link.node, link.boot, link.initiator, agreed.lanes,
                      agreed.chunk_bytes, agreed.max_credits, agreed.check});
  // Whoever waited for this node by name or by address has it now.
  for (const std::string& key : {link.node, "@" + link.address}) {
    const auto dial = dials.find(key);
    if (dial == dials.end()) continue;
    for (EnsureDone& waiter : dial->second.waiters) waiters.push_back(std::move(waiter));
    dials.erase(dial);
  }
  by_name.emplace(link.keys.link_name, link.id);
  by_node[link.node] = link.id;
  links.emplace(link.id, std::move(link));
  for (LinkWatch* watch : watches) watch->on_link_up(ref, agreed.check);
  return ref;
}

void LinkManager::Impl::forget_link(LinkId id) {
  const auto it = links.find(id);
  if (it == links.end()) return;
  for (const auto& keys : {std::optional(it->second.keys), it->second.next, it->second.previous})
    forget_name(keys);
  if (const auto node = by_node.find(it->second.node); node != by_node.end() && node->second == id)
    by_node.erase(node);
  links.erase(it);
  for (LinkWatch* watch : watches) watch->on_link_gone(id);
}

void LinkManager::Impl::end_link(LinkId id, Reason reason) {
  if (find(id) == nullptr) return;
  sink(engine::LinkEnded{id, reason});
  forget_link(id);
}

void LinkManager::Impl::begin_new_rules() {
  ++rules;
  for (auto& [key, dial] : dials) dial.not_before = {};
}

void LinkManager::Impl::end_links(const std::vector<LinkId>& ids, Reason reason) {
  for (const LinkId id : ids) {
    // A peer that this does not reach learns it by silence.
    send_call(id, rpc::LinkMethod::kCloseLink, rpc::encode(rpc::CloseLinkNotice{reason}),
              monotonic_now() + config.call_timeout, [](const Result<std::string>&) {});
    MutexLock lock(mutex);
    if (const Link* link = find(id))
      ops::log_warning("link closed",
                       {ops::field("peer", link->node), ops::field("why", name_of(reason))});
    end_link(id, reason);
  }
}

void LinkManager::Impl::send_call(LinkId id, rpc::LinkMethod method, std::string body,
                                  Time deadline, std::function<void(Result<std::string>)> done) {
  send_call_for_answer(id, method, std::move(body), deadline,
                       [done = std::move(done)](Result<Answer> answer) {
                         if (!answer) return done(tl::unexpected<Error>(std::move(answer).error()));
                         done(std::move(answer->body));
                       });
}

void LinkManager::Impl::send_call_for_answer(LinkId id, rpc::LinkMethod method, std::string body,
                                             Time deadline,
                                             std::function<void(Result<Answer>)> done) {
  rpc::LinkCall call;
  std::shared_ptr<rpc::PeerStub> stub;
  link::KeyBytes reply_key;
  {
    MutexLock lock(mutex);
    if (Link* link = find(id)) {
      stub = link->stub;
      call.link = link->keys.link_name;
      call.number = ++link->calls;
      call.body = std::move(body);
      call.tag = call_tag(link->keys.out.call, method, call);
      reply_key = link->keys.in.call;
    }
  }
  if (stub == nullptr) return done(link_down());
  const rpc::Tag16 tag = call.tag;
  stub->call(method, std::move(call), deadline,
             [tag, reply_key, done = std::move(done)](Result<rpc::LinkReply> reply) {
               if (!reply) return done(tl::unexpected<Error>(std::move(reply).error()));
               if (!equal_constant_time(call_reply_tag(reply_key, tag, reply->body), reply->tag))
                 return done(fail(Code::kUnavailable, "BAD_TAG", "the answer's tag is wrong"));
               done(Answer{std::move(reply->body), tag, reply_key});
             });
}

// ---- the public functions ----

LinkManager::LinkManager(LinkManagerConfig config, rpc::PeerDialer& dialer, TaskPool& pool,
                         EventSink sink)
    : impl_(std::make_shared<Impl>(std::move(config), dialer, pool, std::move(sink))) {}

LinkManager::~LinkManager() {
  stop();
  MutexLock lock(impl_->mutex);
  impl_->watches.clear();
  impl_->renewed_keys = nullptr;
}

void LinkManager::set_questions(PeerQuestions* questions) {
  MutexLock lock(impl_->mutex);
  impl_->questions = questions;
}

void LinkManager::set_trace_answers(TraceAnswers* answers) {
  MutexLock lock(impl_->mutex);
  impl_->trace_answers = answers;
}

void LinkManager::set_arena_offers(ArenaOffers* offers) {
  MutexLock lock(impl_->mutex);
  impl_->offers = offers;
}

void LinkManager::set_renewed_keys_sink(RenewedKeysSink sink) {
  MutexLock lock(impl_->mutex);
  impl_->renewed_keys = std::move(sink);
}

void LinkManager::add_watch(LinkWatch& watch) {
  MutexLock lock(impl_->mutex);
  impl_->watches.push_back(&watch);
}

void LinkManager::set_rails(std::string ucx_version, std::vector<rpc::PeerRail> rails) {
  KVFERRY_CHECK(rails.size() <= rpc::kMaxPeerRails, "there are at most 16 rails");
  MutexLock lock(impl_->mutex);
  impl_->ucx_version = std::move(ucx_version);
  impl_->rails = std::move(rails);
}

void LinkManager::set_peers(std::vector<ops::PeerConfig> peers) {
  std::vector<LinkId> ended;
  {
    MutexLock lock(impl_->mutex);
    impl_->peers = std::move(peers);
    impl_->begin_new_rules();
    for (const auto& [id, link] : impl_->links) {
      const ops::PeerMode mode = link.certificate ? ops::PeerMode::kMtls : ops::PeerMode::kPlain;
      if (!still_allowed(impl_->peers, link.node, link.host, mode)) ended.push_back(id);
    }
  }
  impl_->end_links(ended, Reason::kPeerNotAllowed);
}

void LinkManager::check_certificates() {
  if (impl_->config.tls == nullptr) return;
  struct Shown {
    LinkId link;
    rpc::PeerCertificate certificate;
    CertificateUse use;
  };
  std::vector<Shown> shown;
  {
    MutexLock lock(impl_->mutex);
    impl_->begin_new_rules();
    for (const auto& [id, link] : impl_->links)
      if (link.certificate)
        shown.push_back({id, *link.certificate,
                         link.initiator ? CertificateUse::kServer : CertificateUse::kClient});
  }
  std::vector<LinkId> ended;
  for (const Shown& one : shown)
    if (!impl_->config.tls->check(one.certificate, one.use, true)) ended.push_back(one.link);
  impl_->end_links(ended, Reason::kPeerNotAllowed);
}

void LinkManager::stop() {
  std::vector<Impl::EnsureDone> waiters;
  {
    MutexLock lock(impl_->mutex);
    impl_->stopped = true;
    impl_->questions = nullptr;
    impl_->offers = nullptr;
    for (auto& [key, dial] : impl_->dials)
      for (Impl::EnsureDone& waiter : dial.waiters) waiters.push_back(std::move(waiter));
    impl_->dials.clear();
  }
  for (Impl::EnsureDone& waiter : waiters)
    waiter(fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping"));
}

Result<LanePath> LinkManager::lane_path(const engine::LaneRef& lane) const {
  MutexLock lock(impl_->mutex);
  const Impl::Link* link = impl_->find(lane.link);
  if (link == nullptr || lane.lane >= link->lanes.size())
    return fail(Code::kNotFound, "LINK_DOWN", "the link has ended");
  if (impl_->rails.empty()) return rails_down();
  const uint32_t rail = rail_of(lane.lane, impl_->rails.size());
  const rpc::PeerRail& peer = link->lanes[lane.lane].peer_rail;
  return LanePath{rail, peer.transport, peer.address};
}

std::optional<link::LinkKeys> LinkManager::keys(LinkId id) const {
  MutexLock lock(impl_->mutex);
  const Impl::Link* link = impl_->find(id);
  return link == nullptr ? std::nullopt : std::optional(link->keys);
}

uint64_t LinkManager::handshakes_failed() const {
  return impl_->failed_handshakes.load(std::memory_order_relaxed);
}

std::vector<LinkInfo> LinkManager::links() const {
  MutexLock lock(impl_->mutex);
  std::vector<LinkInfo> out;
  for (const auto& [id, link] : impl_->links)
    out.push_back({link.node,
                   link.address,
                   true,
                   false,
                   id,
                   link.boot,
                   link.initiator,
                   static_cast<uint32_t>(link.lanes.size()),
                   link.ucx_version,
                   {}});
  for (const auto& [key, dial] : impl_->dials)
    out.push_back({dial.target.node,
                   dial.target.address,
                   false,
                   dial.under_way,
                   {},
                   {},
                   false,
                   0,
                   {},
                   dial.last_error.reason.empty() ? "" : dial.last_error.to_string()});
  std::sort(out.begin(), out.end(), [](const LinkInfo& a, const LinkInfo& b) {
    return std::tie(a.node, a.address, a.link) < std::tie(b.node, b.address, b.link);
  });
  return out;
}

void LinkManager::reopen_lane(const engine::ReopenLane& command) {
  const engine::LaneRef lane = command.lane;
  rpc::ReopenLaneRequest request{lane.lane, lane.epoch, {}, {}};
  bool asks_peer = false;
  {
    MutexLock lock(impl_->mutex);
    Impl::Link* link = impl_->find(lane.link);
    if (link != nullptr && lane.lane < link->lanes.size() && !impl_->rails.empty()) {
      request.ucx_version = impl_->ucx_version;
      request.rail = impl_->rails[rail_of(lane.lane, impl_->rails.size())];
      asks_peer = true;
    }
  }
  if (!asks_peer) return impl_->sink(engine::LaneReopenFailed{lane});
  impl_->send_call(lane.link, rpc::LinkMethod::kReopenLane, rpc::encode(request),
                   monotonic_now() + impl_->config.call_timeout,
                   [impl = impl_, lane](Result<std::string> body) {
                     Result<rpc::ReopenLaneReply> reply =
                         body ? rpc::decode_reopen_reply(*body)
                              : Result<rpc::ReopenLaneReply>(tl::unexpected<Error>(body.error()));
                     MutexLock lock(impl->mutex);
                     if (impl->stopped) return;
                     Impl::Link* link = impl->find(lane.link);
                     if (!reply || link == nullptr)
                       return impl->sink(engine::LaneReopenFailed{lane});
                     link->lanes[lane.lane] = {lane.epoch, std::move(reply->rail)};
                     impl->sink(engine::LaneReopened{lane});
                   });
}

void LinkManager::tell_lane_down(const engine::TellLaneDown& command) {
  const engine::LaneRef lane = command.lane;
  impl_->send_call(lane.link, rpc::LinkMethod::kLaneDown,
                   rpc::encode(rpc::LaneDownNotice{lane.lane, lane.epoch}),
                   monotonic_now() + impl_->config.call_timeout, [](const Result<std::string>&) {
                     // A peer that is not told notices by silence.
                   });
}

void LinkManager::close_link(const engine::CloseLink& command) {
  // The peer learns it by this call, or by silence.
  impl_->send_call(command.link, rpc::LinkMethod::kCloseLink,
                   rpc::encode(rpc::CloseLinkNotice{command.reason}),
                   monotonic_now() + impl_->config.call_timeout, [](const Result<std::string>&) {});
  MutexLock lock(impl_->mutex);
  impl_->forget_link(command.link);
}

void LinkManager::end_link(LinkId link) {
  impl_->end_links({link}, Reason::kPeerLost);
}

void LinkManager::ensure_link(PeerTarget target, Time /*deadline: a dial's own is shorter*/,
                              std::function<void(Result<PeerRef>)> done) {
  impl_->ensure(std::move(target), std::move(done));
}

bool LinkManager::has_link(const std::string& node) const {
  if (node == impl_->config.node) return true;
  MutexLock lock(impl_->mutex);
  return !impl_->stopped && impl_->by_node.contains(node);
}

std::optional<PeerRef> LinkManager::peer_of(LinkId id) const {
  if (id == kLoopedLink) return impl_->self();
  MutexLock lock(impl_->mutex);
  const Impl::Link* link = impl_->find(id);
  return link == nullptr ? std::nullopt : std::optional(impl_->ref_of(*link));
}

bool LinkManager::may_speak_for(const std::string& node, std::string_view tenant) const {
  if (node == impl_->config.node) return true;
  MutexLock lock(impl_->mutex);
  const ops::PeerConfig* peer = find_peer(impl_->peers, node);
  return peer != nullptr &&
         std::find(peer->tenants.begin(), peer->tenants.end(), tenant) != peer->tenants.end();
}

void LinkManager::get_cards(LinkId id, rpc::CardQuery query, Time deadline,
                            std::function<void(Result<rpc::CardPage>)> done) {
  impl_->send_call(id, rpc::LinkMethod::kGetCards, rpc::encode(query), deadline,
                   [done = std::move(done)](Result<std::string> body) {
                     if (!body) return done(tl::unexpected<Error>(std::move(body).error()));
                     done(rpc::decode_card_page(*body));
                   });
}

void LinkManager::join_forward(LinkId id, rpc::JoinForward forward, Time deadline,
                               std::function<void(Status)> done) {
  impl_->send_call(id, rpc::LinkMethod::kJoinForward, rpc::encode(forward), deadline,
                   [done = std::move(done)](Result<std::string> body) {
                     if (!body) return done(tl::unexpected<Error>(std::move(body).error()));
                     done({});
                   });
}

void LinkManager::get_arenas(LinkId id, rpc::ArenasQuery query, Time deadline,
                             std::function<void(Result<rpc::ArenasOffer>)> done) {
  impl_->send_call_for_answer(id, rpc::LinkMethod::kGetArenas, rpc::encode(query), deadline,
                              [done = std::move(done)](Result<Impl::Answer> answer) {
                                if (!answer)
                                  return done(tl::unexpected<Error>(std::move(answer).error()));
                                Result<rpc::ArenasOffer> offer =
                                    rpc::decode_arenas_offer(answer->body);
                                if (offer) {
                                  seal_offer(answer->key, answer->call_tag, *offer);
                                  offer->proof = welcome_proof(answer->key);
                                }
                                done(std::move(offer));
                              });
}

void LinkManager::get_trace(const std::string& node, rpc::TraceQuery query, Time deadline,
                            std::function<void(Result<rpc::TraceReply>)> done) {
  LinkId id;
  {
    MutexLock lock(impl_->mutex);
    const auto it = impl_->by_node.find(node);
    if (it != impl_->by_node.end()) id = it->second;
  }
  if (!id) return done(fail(Code::kUnavailable, "LINK_DOWN", "there is no link to that node"));
  impl_->send_call(id, rpc::LinkMethod::kGetTrace, rpc::encode(query), deadline,
                   [done = std::move(done)](Result<std::string> body) {
                     if (!body) return done(tl::unexpected<Error>(std::move(body).error()));
                     done(rpc::decode_trace_reply(*body));
                   });
}

}  // namespace kvferry::node
