// Instances that span nodes. Every daemon that has a rank of the instance asks every other one,
// over its own link to it, for the cards that this one made; nobody's word about a third one
// counts. The daemon where the engine calls JoinInstance tells the others which nodes there are.
#include <algorithm>
#include <utility>

#include "daemon/base/crypto.h"
#include "daemon/node/directory_impl.h"

namespace kvferry::node {
namespace {

constexpr Duration kAskFor = std::chrono::minutes(10);
constexpr Duration kRetryFirst = std::chrono::milliseconds(100);
constexpr Duration kRetryMost = std::chrono::seconds(2);

tl::unexpected<Error> bad_card(std::size_t index, std::string message) {
  return invalid("cards[" + std::to_string(index) + "]", "BAD_CARD", std::move(message));
}
tl::unexpected<Error> foreign() {
  return fail(Code::kPermissionDenied, "INSTANCE_FOREIGN",
              "a card or call was made with another instance key", "instance_key");
}

// The nodes that made the cards, after checking that these are a whole instance of one key.
Result<std::vector<rpc::NodeAddress>> nodes_of(const std::string& instance,
                                               const std::vector<std::string>& cards,
                                               const std::optional<InstanceKey>& key,
                                               Incarnation& incarnation) {
  std::set<uint32_t> ranks;
  std::map<std::string, std::string> nodes;
  for (std::size_t i = 0; i < cards.size(); ++i) {
    Result<rpc::SignedCard> signed_card = rpc::decode_signed_card(cards[i]);
    if (!signed_card) return bad_card(i, "the card cannot be read");
    Result<rpc::RankCard> card = rpc::decode_card(signed_card->card);
    if (!card) return bad_card(i, card.error().to_string());
    if (card->instance != instance) return bad_card(i, "the card is of another instance");
    if (i == 0) incarnation = card->incarnation;
    const mapping::Topology& topology = card->holding.topology;
    if (card->incarnation != incarnation || topology.rank_count != cards.size() ||
        topology.rank >= topology.rank_count || !ranks.insert(topology.rank).second)
      return bad_card(i, "the cards are not one of each rank of one life of the instance");
    if (key && !card_tag_right(*signed_card, key)) return foreign();
    nodes[card->node] = card->address;
  }
  if (cards.empty()) return invalid("cards", "BAD_CARD", "there is no card");
  std::vector<rpc::NodeAddress> out;
  for (const auto& [node, address] : nodes) out.push_back({node, address});
  return out;
}

// In any order they are the same cards.
Digest16 digest_of_cards(const std::vector<std::string>& cards) {
  std::vector<Sha256> hashes;
  for (const std::string& card : cards) hashes.push_back(sha256({bytes_of(card)}));
  std::sort(hashes.begin(), hashes.end());
  std::string all;
  for (const Sha256& hash : hashes) all.append(hash.begin(), hash.end());
  return {cut<16>(sha256({bytes_of("kvferry joined cards 1"), bytes_of(all)}))};
}

}  // namespace

JoinOutcome Directory::Impl::outcome_of(const Local& local) const {
  JoinOutcome out{false, local.incarnation, local.set != nullptr, missing_ranks(local)};
  // A node that has not confirmed in this round may have registered again.
  if (local.join)
    for (const auto& [name, node] : local.join->nodes)
      out.complete = out.complete && node.confirmed;
  return out;
}

void Directory::Impl::take_waiters(Local& local, std::vector<Join::Waiter>& out) {
  if (outcome_of(local).complete && local.join) out.swap(local.join->waiters);
}

Status Directory::Impl::start_join(Local& local, const std::vector<rpc::NodeAddress>& nodes,
                                   bool forward) {
  if (!local.join) local.join = std::make_shared<Join>();
  Join& join = *local.join;
  join.nodes.clear();
  for (const rpc::NodeAddress& node : nodes)
    if (node.node != config.node) join.nodes[node.node] = {node.address, forward, false};
  ++join.round;
  join.limit = monotonic_now() + kAskFor;
  join.backoff = kRetryFirst;
  const LocalKey key{local.name, local.incarnation};
  if (!look_up.post(
          [impl = shared_from_this(), key, round = join.round] { impl->join_step(key, round); }))
    return fail(Code::kResourceExhausted, "BUSY", "too much work is waiting");
  return {};
}

// Asks every node that has not answered in this round, and comes back until all have.
void Directory::Impl::join_step(const LocalKey& key, uint64_t round) {
  std::map<std::string, Join::Node> open;
  Time again;
  {
    MutexLock lock(mutex);
    const auto it = locals.find(key);
    if (it == locals.end() || !it->second.join || it->second.join->round != round) return;
    Join& join = *it->second.join;
    // All have answered and a rank is still missing: one of them has registered late.
    const bool all = std::all_of(join.nodes.begin(), join.nodes.end(),
                                 [](const auto& node) { return node.second.confirmed; });
    if (all && it->second.set != nullptr) return;
    if (all)
      for (auto& [name, node] : join.nodes) node.confirmed = false;
    for (const auto& [name, node] : join.nodes)
      if (!node.confirmed) open.emplace(name, node);
    again = monotonic_now() + join.backoff;
    join.backoff = std::min(2 * join.backoff, kRetryMost);
    if (again > join.limit) return;
  }
  for (const auto& [name, node] : open) ask_node(key, round, name, node);
  // Without room for the timer the engine's next JoinInstance starts it again.
  (void)later(again, [impl = shared_from_this(), key, round] { impl->join_step(key, round); });
}

void Directory::Impl::ask_node(const LocalKey& key, uint64_t round, const std::string& node,
                               Join::Node state) {
  links.ensure_link(
      {node, state.address}, monotonic_now() + config.fetch_timeout,
      [impl = shared_from_this(), key, round, state](Result<PeerRef> peer) {
        if (!peer) return;  // asked again by the next step
        if (!state.forward) return impl->collect(key, round, *peer, 0);
        rpc::JoinForward forward{
            key.first, key.second, {{impl->config.node, impl->config.advertise}}};
        {
          MutexLock lock(impl->mutex);
          const auto it = impl->locals.find(key);
          if (it == impl->locals.end() || !it->second.join || it->second.join->round != round)
            return;
          for (const auto& [name, other] : it->second.join->nodes)
            forward.nodes.push_back({name, other.address});
        }
        impl->links.join_forward(peer->link, std::move(forward),
                                 monotonic_now() + impl->config.fetch_timeout,
                                 [impl, key, round, peer = *peer](const Status& status) {
                                   if (!status) return;
                                   {
                                     MutexLock lock(impl->mutex);
                                     const auto it = impl->locals.find(key);
                                     if (it == impl->locals.end() || !it->second.join) return;
                                     const auto node_state = it->second.join->nodes.find(peer.node);
                                     if (node_state != it->second.join->nodes.end())
                                       node_state->second.forward = false;
                                   }
                                   impl->collect(key, round, peer, 0);
                                 });
      });
}

void Directory::Impl::collect(const LocalKey& key, uint64_t round, const PeerRef& peer,
                              uint32_t first_rank) {
  rpc::CardQuery query{key.first, key.second, first_rank, true};
  links.get_cards(peer.link, std::move(query), monotonic_now() + config.fetch_timeout,
                  [impl = shared_from_this(), key, round, peer](Result<rpc::CardPage> page) {
                    auto kept = std::make_shared<Result<rpc::CardPage>>(std::move(page));
                    (void)impl->soon([impl, key, round, peer, kept] {
                      impl->take_own_cards(key, round, peer, std::move(*kept));
                    });
                  });
}

void Directory::Impl::take_own_cards(const LocalKey& key, uint64_t round, const PeerRef& peer,
                                     Result<rpc::CardPage> page) {
  if (!page) return;
  std::vector<Join::Waiter> done;
  JoinOutcome outcome;
  {
    MutexLock lock(mutex);
    const auto it = locals.find(key);
    if (it == locals.end() || !it->second.join || it->second.join->round != round) return;
    Local& local = it->second;
    for (const rpc::SignedCard& signed_card : page->cards) {
      const Result<rpc::RankCard> card = rpc::decode_card(signed_card.card);
      // Only its own cards, made with our key; own ranks are never taken from others.
      if (!card || !card_tag_right(signed_card, local.key) || card->node != peer.node ||
          card->instance != local.name || card->incarnation != local.incarnation ||
          card->holding.topology.rank_count != local.rank_count ||
          card->holding.topology.rank >= local.rank_count ||
          local.own.contains(card->holding.topology.rank))
        continue;
      local.joined[card->holding.topology.rank] = signed_card;
    }
    const auto node = local.join->nodes.find(peer.node);
    if (node != local.join->nodes.end() && !page->more) node->second.confirmed = true;
    // Cards that do not fit together leave the instance incomplete; the engine sees it as missing.
    if (Status status = complete(local); !status) local.set = nullptr;
    take_waiters(local, done);
    outcome = outcome_of(local);
  }
  if (page->more) collect(key, round, peer, page->next_rank);
  for (const Join::Waiter& waiter : done) waiter.done(outcome);
}

void Directory::join(const std::string& instance, const std::vector<std::string>& cards,
                     const std::optional<InstanceKey>& key, Time deadline,
                     std::function<void(Result<JoinOutcome>)> done) {
  Incarnation incarnation;
  Result<std::vector<rpc::NodeAddress>> nodes = nodes_of(instance, cards, key, incarnation);
  if (!nodes) return done(tl::unexpected<Error>(std::move(nodes).error()));
  const Digest16 digest = digest_of_cards(cards);
  std::optional<Result<JoinOutcome>> answer;
  uint64_t waiter = 0;
  {
    MutexLock lock(impl_->mutex);
    Impl::Local* local = impl_->find_local(instance, incarnation);
    if (impl_->stopped) {
      answer = fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping");
    } else if (local == nullptr) {
      answer = fail(Code::kNotFound, "INSTANCE_UNKNOWN",
                    "no rank of the instance is registered here", "instance");
    } else if (key != local->key) {
      answer = foreign();
    } else if (const bool elsewhere = nodes->size() > 1 || (*nodes)[0].node != impl_->config.node;
               elsewhere && !local->key) {
      answer = invalid("instance_key", "INSTANCE_KEY_MISSING",
                       "ranks on several nodes have to share an instance key");
    } else if (Status status = impl_->start_join(*local, *nodes, true); !status) {
      answer = tl::unexpected<Error>(std::move(status).error());
    } else {
      const bool existing = local->asked == digest;
      local->asked = digest;
      if (impl_->outcome_of(*local).complete) {
        answer = impl_->outcome_of(*local);
        (*answer)->existing = existing;
      } else {
        waiter = impl_->next_waiter++;
        local->join->waiters.push_back(
            {waiter, [existing, done = std::move(done)](Result<JoinOutcome> outcome) {
               if (outcome) outcome->existing = existing;
               done(std::move(outcome));
             }});
      }
    }
  }
  if (answer) return done(std::move(*answer));
  // At the deadline the waiter learns what there is.
  auto expire = [impl = impl_, instance, incarnation, waiter] {
    Impl::Join::Waiter found;
    JoinOutcome outcome;
    {
      MutexLock lock(impl->mutex);
      Impl::Local* local = impl->find_local(instance, incarnation);
      if (local == nullptr || !local->join) return;
      auto& waiters = local->join->waiters;
      const auto it = std::find_if(waiters.begin(), waiters.end(),
                                   [&](const auto& each) { return each.id == waiter; });
      if (it == waiters.end()) return;
      found = std::move(*it);
      waiters.erase(it);
      outcome = impl->outcome_of(*local);
    }
    found.done(std::move(outcome));
  };
  if (!impl_->later(deadline, expire)) expire();
}

Status Directory::answer_join(const PeerRef& peer, const rpc::JoinForward& forward) {
  auto unknown = fail(Code::kNotFound, "INSTANCE_UNKNOWN", "no such instance is known here");
  if (!impl_->links.may_speak_for(peer.node, tenant_of(forward.instance))) return unknown;
  MutexLock lock(impl_->mutex);
  Impl::Local* local = impl_->find_local(forward.instance, forward.incarnation);
  if (local == nullptr || forward.incarnation.is_zero()) return unknown;
  if (!local->key)
    return fail(Code::kPermissionDenied, "INSTANCE_FOREIGN", "the instance has no key here");
  return impl_->start_join(*local, forward.nodes, false);
}

}  // namespace kvferry::node
