// From a ticket to legs (receivers), and from a pull to legs (senders): which cards count, which
// links have to be there, and the leg table of the two instances.
#include <algorithm>
#include <utility>

#include "daemon/mapping/limits.h"
#include "daemon/mapping/needs.h"
#include "daemon/mapping/stream.h"
#include "daemon/node/directory_impl.h"

namespace kvferry::node {
namespace {

// A set fetched less than this ago is not asked for again because a digest does not match.
constexpr Duration kJustFetched = std::chrono::milliseconds(50);

tl::unexpected<Error> stale(std::string message) {
  return fail(Code::kFailedPrecondition, "STALE_CARDS", std::move(message));
}

// Worth another try while the receive waits: the peer is away, has no room, or does not know the
// instance or (after a restart) the link yet.
bool may_pass(const Error& error) {
  if (error.reason == "TOO_FRAGMENTED") return false;
  return error.code == Code::kUnavailable || error.code == Code::kDeadlineExceeded ||
         error.code == Code::kResourceExhausted || error.reason == "INSTANCE_UNKNOWN" ||
         error.reason == "UNKNOWN_LINK";
}

// A full ticket is good for the very set that it names.
Status check_ticket(const Ticket& ticket, const CardSet& set) {
  const auto* full = std::get_if<InstanceTicket>(&ticket);
  if (full != nullptr && full->generations != set.digest)
    return stale("ranks of the instance have registered again since the ticket was made");
  return {};
}

}  // namespace

Result<std::vector<engine::ReceiverLeg>> receiver_legs(const LegTablePtr& table,
                                                       const CardSet& sender,
                                                       const engine::ReceiveOp& receive) {
  std::vector<uint32_t> groups;
  if (receive.sender_dp_group)
    groups.push_back(*receive.sender_dp_group);
  else
    groups.assign(table->sender_dp_groups().begin(), table->sender_dp_groups().end());
  const uint32_t rank = receive.layout->rank;
  std::vector<engine::ReceiverLeg> out;
  for (uint32_t group : groups) {
    const Result<std::vector<mapping::Leg>> legs = table->legs_of_receiver(group, rank);
    if (!legs) return tl::unexpected<Error>(legs.error());
    if (out.size() + legs->size() > mapping::kMaxLegs)
      return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", "the transfer has too many legs");
    for (const mapping::Leg& leg : *legs) {
      Result<uint64_t> bytes =
          mapping::expected_bytes(*table, leg.sender_rank, rank, receive.needs);
      if (!bytes) return tl::unexpected<Error>(std::move(bytes).error());
      auto context = std::make_shared<CompileContext>();
      context->table = table;
      context->sender_rank = leg.sender_rank;
      context->receiver_rank = rank;
      out.push_back({leg.sender_rank, group, sender.places[leg.sender_rank].node, leg.empty,
                     leg.carries_aux, *bytes, std::move(context)});
    }
  }
  return out;
}

// ---- card sets ----

Result<CardSetPtr> Directory::Impl::local_set(const std::string& instance,
                                              const Incarnation& incarnation) {
  MutexLock lock(mutex);
  const Local* local = find_local(instance, incarnation);
  if (local == nullptr) {
    if (find_local(instance, {}) != nullptr)
      return stale("the instance has been started again since the ticket was made");
    return fail(Code::kNotFound, "INSTANCE_UNKNOWN", "no such instance is registered here");
  }
  if (local->set == nullptr)
    return fail(Code::kUnavailable, "INSTANCE_INCOMPLETE", "not all ranks are known yet");
  return local->set;
}

CardSetPtr Directory::Impl::known_remote(const RemoteKey& key, Duration max_age) {
  const Time now = monotonic_now();
  MutexLock lock(mutex);
  const auto it = remotes.find(key);
  if (it == remotes.end() || it->second.fetched + max_age < now) return nullptr;
  it->second.used = now;
  return it->second.set;
}

void Directory::Impl::find_set(const Ticket& ticket, bool fresh, SetDone done) {
  PeerTarget target;
  bool here = false;
  if (const auto* full = std::get_if<InstanceTicket>(&ticket)) {
    target = {full->node, full->address};
    here = full->node == config.node;
  } else {
    target.address = std::get<NamedTicket>(ticket).address;
    here = target.address == config.advertise;
  }
  if (!here) return find_remote(target, ticket, fresh, std::move(done));
  Result<CardSetPtr> set = local_set(instance_of(ticket), incarnation_of(ticket));
  if (set)
    if (Status status = check_ticket(ticket, **set); !status)
      set = tl::unexpected<Error>(std::move(status).error());
  done(std::move(set));
}

void Directory::Impl::find_remote(const PeerTarget& target, const Ticket& ticket, bool fresh,
                                  SetDone done) {
  if (!fresh && !target.node.empty()) {
    // The digest says that this is the set, however old it is.
    CardSetPtr set =
        known_remote({target.node, instance_of(ticket), incarnation_of(ticket)}, kHoweverOld);
    if (set != nullptr && check_ticket(ticket, *set)) return done(std::move(set));
  }
  links.ensure_link(
      target, monotonic_now() + config.fetch_timeout,
      [impl = shared_from_this(), ticket, fresh, done = std::move(done)](Result<PeerRef> peer) {
        if (!peer) return done(tl::unexpected<Error>(std::move(peer).error()));
        const std::string instance = instance_of(ticket);
        const Incarnation incarnation = incarnation_of(ticket);
        if (!fresh && incarnation.is_zero())
          if (CardSetPtr set = impl->known_remote({peer->node, instance, incarnation},
                                                  impl->config.named_freshness))
            return done(std::move(set));
        impl->fetch_set(*peer, instance, incarnation, [ticket, done](Result<CardSetPtr> set) {
          if (set)
            if (Status status = check_ticket(ticket, **set); !status)
              set = tl::unexpected<Error>(std::move(status).error());
          done(std::move(set));
        });
      });
}

void Directory::Impl::fetch_set(const PeerRef& peer, const std::string& instance,
                                const Incarnation& incarnation, SetDone done) {
  const std::pair<LinkId, RemoteKey> key{peer.link, {peer.node, instance, incarnation}};
  std::shared_ptr<Fetch> fetch;
  {
    MutexLock lock(mutex);
    std::shared_ptr<Fetch>& slot = fetches[key];
    if (slot != nullptr) {
      slot->waiters.push_back(std::move(done));
      return;
    }
    slot = std::make_shared<Fetch>();
    slot->query = {instance, incarnation, 0, false};
    slot->deadline = monotonic_now() + config.fetch_timeout;
    slot->waiters.push_back(std::move(done));
    fetch = slot;
  }
  fetch_page(key, fetch);
}

void Directory::Impl::fetch_page(const std::pair<LinkId, RemoteKey>& key,
                                 const std::shared_ptr<Fetch>& fetch) {
  links.get_cards(
      key.first, fetch->query, fetch->deadline,
      [impl = shared_from_this(), key, fetch](Result<rpc::CardPage> page) {
        auto kept = std::make_shared<Result<rpc::CardPage>>(std::move(page));
        if (!impl->soon(
                [impl, key, fetch, kept] { impl->take_page(key, fetch, std::move(*kept)); }))
          impl->end_fetch(key, fetch, fail(Code::kUnavailable, "BUSY", "too much work is waiting"));
      });
}

void Directory::Impl::take_page(const std::pair<LinkId, RemoteKey>& key,
                                const std::shared_ptr<Fetch>& fetch, Result<rpc::CardPage> page) {
  if (!page) return end_fetch(key, fetch, tl::unexpected<Error>(std::move(page).error()));
  const RemoteKey& wanted = key.second;
  const bool first = !fetch->first.has_value();
  if (page->incarnation.is_zero() ||
      (!wanted.incarnation.is_zero() && page->incarnation != wanted.incarnation) ||
      page->rank_count == 0 || page->rank_count > mapping::kMaxRanks || page->cards.empty())
    return end_fetch(key, fetch, invalid("cards", "BAD_CARD", "the peer's cards make no instance"));
  if (!first && (page->set != fetch->first->set || page->rank_count != fetch->first->rank_count))
    return end_fetch(key, fetch,
                     fail(Code::kUnavailable, "CARDS_CHANGED",
                          "ranks registered again while the cards were fetched"));
  for (rpc::SignedCard& card : page->cards) fetch->cards.push_back(std::move(card));
  if (fetch->cards.size() > page->rank_count ||
      (page->more && page->next_rank != fetch->cards.size()))
    return end_fetch(key, fetch, invalid("cards", "BAD_CARD", "the peer's cards make no instance"));
  const bool more = page->more;
  if (first) {
    page->cards.clear();
    fetch->first = std::move(*page);
  }
  if (more) {
    fetch->query.first_rank = static_cast<uint32_t>(fetch->cards.size());
    // By incarnation from now on, so that all pages are of one life.
    fetch->query.incarnation = fetch->first->incarnation;
    return fetch_page(key, fetch);
  }
  Result<CardSetPtr> set =
      make_card_set(wanted.instance, fetch->first->incarnation, std::move(fetch->cards));
  if (set && (*set)->cards.size() != fetch->first->rank_count)
    set = invalid("cards", "BAD_CARD", "the peer's cards make no instance");
  if (set)
    if (Status status = check_tenants(**set); !status)
      set = tl::unexpected<Error>(std::move(status).error());
  end_fetch(key, fetch, std::move(set));
}

void Directory::Impl::end_fetch(const std::pair<LinkId, RemoteKey>& key,
                                const std::shared_ptr<Fetch>& fetch, Result<CardSetPtr> set) {
  std::vector<SetDone> waiters;
  {
    MutexLock lock(mutex);
    fetches.erase(key);
    waiters.swap(fetch->waiters);
    if (set) {
      const Time now = monotonic_now();
      remotes[key.second] = {*set, now, now};
      if (remotes.size() > config.max_remote_instances)
        remotes.erase(std::min_element(remotes.begin(), remotes.end(), [](auto& a, auto& b) {
          return a.second.used < b.second.used;
        }));
    }
  }
  for (const SetDone& waiter : waiters) waiter(set);
}

// Every node that the cards name must be one that may speak for the instance's tenant.
Status Directory::Impl::check_tenants(const CardSet& set) {
  const std::string_view tenant = tenant_of(set.instance->name);
  std::set<std::string> seen;
  for (const rpc::NodeAddress& place : set.places)
    if (seen.insert(place.node).second && !links.may_speak_for(place.node, tenant))
      return fail(Code::kPermissionDenied, "PEER_NOT_ALLOWED",
                  "a node of the instance may not speak for its tenant");
  return {};
}

Result<LegTablePtr> Directory::Impl::table_of(const CardSetPtr& sender,
                                              const CardSetPtr& receiver) {
  std::shared_ptr<TableSlot> slot;
  {
    MutexLock lock(mutex);
    std::shared_ptr<TableSlot>& found = tables[{sender->digest, receiver->digest}];
    if (found == nullptr) found = std::make_shared<TableSlot>();
    found->used = monotonic_now();
    slot = found;
    if (tables.size() > config.max_leg_tables)
      tables.erase(std::min_element(tables.begin(), tables.end(), [](auto& a, auto& b) {
        return a.second->used < b.second->used;
      }));
  }
  Result<LegTablePtr> table = nullptr;
  {
    MutexLock lock(slot->mutex);
    if (!slot->table) slot->table = mapping::LegTable::make(sender->instance, receiver->instance);
    table = *slot->table;
  }
  MutexLock lock(mutex);
  if (table) slot->ready = *table;
  return table;
}

void Directory::Impl::link_all(std::set<rpc::NodeAddress> nodes, std::function<void(Status)> done) {
  struct Waiting {
    Mutex mutex;
    std::size_t left KVFERRY_GUARDED_BY(mutex) = 0;
    bool told KVFERRY_GUARDED_BY(mutex) = false;
    std::function<void(Status)> done;
  };
  if (nodes.empty()) return done({});
  auto waiting = std::make_shared<Waiting>();
  {
    MutexLock lock(waiting->mutex);
    waiting->left = nodes.size();
  }
  waiting->done = std::move(done);
  for (const rpc::NodeAddress& node : nodes)
    links.ensure_link({node.node, node.address}, monotonic_now() + config.fetch_timeout,
                      [waiting](Result<PeerRef> peer) {
                        {
                          MutexLock lock(waiting->mutex);
                          --waiting->left;
                          if (waiting->told || (peer && waiting->left > 0)) return;
                          waiting->told = true;
                        }
                        if (!peer)
                          return waiting->done(tl::unexpected<Error>(std::move(peer).error()));
                        waiting->done({});
                      });
}

// ---- receives ----

bool Directory::Impl::alive(ResolveId id) {
  MutexLock lock(mutex);
  return !stopped && pending.contains(id);
}

std::optional<engine::Resolved> Directory::resolve(const engine::Resolve& command) {
  auto task = std::make_shared<Impl::Pending>();
  task->command = command;
  task->limit = monotonic_now() + impl_->config.resolve_limit;
  task->backoff = impl_->config.retry_first;
  bool accepted = false;
  {
    MutexLock lock(impl_->mutex);
    if (impl_->resolved.size() > impl_->prune_resolved_at) {
      std::erase_if(impl_->resolved, [](const auto& entry) { return entry.second.expired(); });
      impl_->prune_resolved_at = 1024 + 2 * impl_->resolved.size();
    }
    std::weak_ptr<const engine::ReceiveOp>& before = impl_->resolved[command.receive.get()];
    task->fresh = !before.expired();
    before = command.receive;
  }
  if (!task->fresh) {
    if (auto known = impl_->resolved_at_once(*command.receive)) {
      known->resolve = command.resolve;
      return known;
    }
  }
  {
    MutexLock lock(impl_->mutex);
    if (!impl_->stopped && impl_->pending.size() < impl_->config.max_resolves)
      accepted = impl_->pending.emplace(command.resolve, task).second;
  }
  if (accepted && impl_->soon([impl = impl_, task] { impl->resolve_step(task); }))
    return std::nullopt;
  {
    MutexLock lock(impl_->mutex);
    impl_->pending.erase(command.resolve);
  }
  engine::Resolved answer;
  answer.resolve = command.resolve;
  answer.reason = Reason::kInternal;
  answer.message = "too many transfers are being resolved";
  return answer;
}

void Directory::cancel_resolve(const engine::CancelResolve& command) {
  MutexLock lock(impl_->mutex);
  impl_->pending.erase(command.resolve);
}

void Directory::Impl::answer(const PendingPtr& task, engine::Resolved answer) {
  {
    MutexLock lock(mutex);
    if (stopped || pending.erase(task->command.resolve) == 0) return;
  }
  answer.resolve = task->command.resolve;
  sink(std::move(answer));
}

void Directory::Impl::resolve_failed(const PendingPtr& task, Error error) {
  const Time again = monotonic_now() + task->backoff;
  if (may_pass(error) && again < task->limit) {
    task->backoff = std::min(2 * task->backoff, config.retry_most);
    if (later(again, [impl = shared_from_this(), task] { impl->resolve_step(task); })) return;
  }
  engine::Resolved failed;
  failed.reason = reason_of(error);
  failed.message = error.to_string();
  answer(task, std::move(failed));
}

void Directory::Impl::resolve_step(const PendingPtr& task) {
  if (!alive(task->command.resolve)) return;
  const engine::ReceiveOp& receive = *task->command.receive;
  Result<Ticket> ticket = parse_ticket(receive.ticket);
  if (!ticket) return resolve_failed(task, std::move(ticket).error());
  const bool of_controller = receive.layout->incarnation.is_zero();  // see worker_service.cc
  Result<CardSetPtr> own;
  if (!of_controller) own = local_set(receive.layout->instance, receive.layout->incarnation);
  if (of_controller || (!own && task->command.declines)) {
    find_set(*ticket, task->fresh, [impl = shared_from_this(), task](Result<CardSetPtr> sender) {
      if (!sender) return impl->resolve_failed(task, std::move(sender).error());
      impl->resolve_ranks(task, *sender);
    });
    return;
  }
  if (!own) return resolve_failed(task, std::move(own).error());
  find_set(*ticket, task->fresh,
           [impl = shared_from_this(), task, own = *own](Result<CardSetPtr> sender) {
             if (!sender) return impl->resolve_failed(task, std::move(sender).error());
             if (!impl->soon([impl, task, own, sender = *sender] {
                   impl->resolve_legs(task, sender, own);
                 }))
               impl->resolve_failed(task, {Code::kInternal, "BUSY", "too much work waits", {}});
           });
}

void Directory::Impl::resolve_ranks(const PendingPtr& task, const CardSetPtr& sender) {
  auto found = std::make_shared<engine::Resolved>();
  found->sender_incarnation = sender->instance->incarnation;
  std::set<rpc::NodeAddress> nodes(sender->places.begin(), sender->places.end());
  for (uint32_t rank = 0; rank < sender->places.size(); ++rank) {
    engine::ReceiverLeg leg;
    leg.sender_rank = rank;
    leg.node = sender->places[rank].node;
    found->legs.push_back(std::move(leg));
  }
  link_all(std::move(nodes), [impl = shared_from_this(), task, found](Status status) {
    if (!status) return impl->resolve_failed(task, std::move(status).error());
    impl->answer(task, std::move(*found));
  });
}

void Directory::Impl::resolve_legs(const PendingPtr& task, const CardSetPtr& sender,
                                   const CardSetPtr& receiver) {
  if (!alive(task->command.resolve)) return;
  const engine::ReceiveOp& receive = *task->command.receive;
  Result<LegTablePtr> table = table_of(sender, receiver);
  if (!table) return resolve_failed(task, std::move(table).error());
  Result<std::vector<engine::ReceiverLeg>> legs = receiver_legs(*table, *sender, receive);
  if (!legs) return resolve_failed(task, std::move(legs).error());
  std::set<rpc::NodeAddress> nodes;
  for (const engine::ReceiverLeg& leg : *legs) nodes.insert(sender->places[leg.sender_rank]);
  auto legs_found = std::make_shared<engine::Resolved>();
  legs_found->sender_incarnation = sender->instance->incarnation;
  legs_found->cards = digest_of_pair(sender->digest, receiver->digest);
  legs_found->legs = std::move(*legs);
  link_all(std::move(nodes), [impl = shared_from_this(), task, legs_found](Status status) {
    if (!status) return impl->resolve_failed(task, std::move(status).error());
    impl->answer(task, std::move(*legs_found));
  });
}

// ---- pulls ----

void Directory::Impl::pull_failed(const engine::ResolvePull& command, const Error& error) {
  engine::PullResolved answer;
  answer.resolve = command.resolve;
  answer.reason =
      error.code == Code::kNotFound || may_pass(error) ? Reason::kStaleCards : reason_of(error);
  sink(std::move(answer));
}

std::optional<engine::PullResolved> Directory::resolve_pull(const engine::ResolvePull& command) {
  if (auto known = impl_->pull_at_once(command)) return known;
  if (!impl_->soon([impl = impl_, command] { impl->pull_step(command); }))
    impl_->pull_failed(command, {Code::kInternal, "BUSY", "too much work waits", {}});
  return std::nullopt;
}

bool Directory::Impl::may_pull(const PeerRef& peer, const engine::MsgPull& pull) const {
  return links.may_speak_for(peer.node, tenant_of(pull.receiver_instance)) &&
         links.may_speak_for(peer.node, tenant_of(pull.transfer.instance));
}

void Directory::Impl::pull_step(const engine::ResolvePull& command) {
  const engine::MsgPull& pull = *command.pull;
  const std::optional<PeerRef> peer = links.peer_of(command.link);
  if (!peer)
    return pull_failed(command, {Code::kUnavailable, "LINK_DOWN", "the link has ended", {}});
  if (!may_pull(*peer, pull))
    return pull_failed(command, {Code::kPermissionDenied,
                                 "PEER_NOT_ALLOWED",
                                 "the peer may not speak for that tenant",
                                 {}});
  Result<CardSetPtr> sender = local_set(command.layout->instance, command.layout->incarnation);
  if (!sender) return pull_failed(command, sender.error());

  if (peer->node == config.node) {
    Result<CardSetPtr> receiver = local_set(pull.receiver_instance, pull.receiver_incarnation);
    if (!receiver) return pull_failed(command, receiver.error());
    return pull_with(command, *sender, *receiver, *peer);
  }
  const RemoteKey key{peer->node, pull.receiver_instance, pull.receiver_incarnation};
  if (pull.receiver_incarnation.is_zero())
    return pull_failed(command, {Code::kInvalidArgument, "BAD_MESSAGE", "no incarnation", {}});
  if (CardSetPtr known = known_remote(key, kHoweverOld);
      known != nullptr && digest_of_pair((*sender)->digest, known->digest) == pull.cards)
    return pull_with(command, *sender, known, *peer);
  if (CardSetPtr recent = known_remote(key, kJustFetched))
    return pull_failed(command, {Code::kFailedPrecondition, "STALE_CARDS", "another set", {}});
  fetch_set(*peer, pull.receiver_instance, pull.receiver_incarnation,
            [impl = shared_from_this(), command, sender = *sender,
             peer = *peer](Result<CardSetPtr> receiver) {
              if (!receiver) return impl->pull_failed(command, receiver.error());
              if (!impl->soon([impl, command, sender, peer, receiver = *receiver] {
                    impl->pull_with(command, sender, receiver, peer);
                  }))
                impl->pull_failed(command, {Code::kInternal, "BUSY", "too much work waits", {}});
            });
}

void Directory::Impl::pull_with(const engine::ResolvePull& command, const CardSetPtr& sender,
                                const CardSetPtr& receiver, const PeerRef& peer) {
  if (const Status right = check_pull(command, sender, receiver, peer); !right)
    return pull_failed(command, right.error());
  Result<LegTablePtr> table = table_of(sender, receiver);
  if (!table) return pull_failed(command, table.error());
  Result<engine::PullResolved> answer = pull_answer(command, *table);
  if (!answer) return pull_failed(command, answer.error());
  sink(std::move(*answer));
}

Status Directory::Impl::check_pull(const engine::ResolvePull& command, const CardSetPtr& sender,
                                   const CardSetPtr& receiver, const PeerRef& peer) const {
  const engine::MsgPull& pull = *command.pull;
  if (digest_of_pair(sender->digest, receiver->digest) != pull.cards)
    return stale("the two sides know different cards");
  // A rank's messages are good only on the link to the node that made its card.
  if (pull.receiver_rank >= receiver->places.size() ||
      receiver->places[pull.receiver_rank].node != peer.node ||
      pull.sender_rank != command.layout->rank)
    return fail(Code::kPermissionDenied, "WRONG_NODE", "the pull names a rank of another node");
  return {};
}

// Of a pull that is right.
Result<engine::PullResolved> Directory::Impl::pull_answer(const engine::ResolvePull& command,
                                                          const LegTablePtr& table) {
  const engine::MsgPull& pull = *command.pull;
  engine::PullResolved answer;
  answer.resolve = command.resolve;
  answer.receiver_dp_group = table->receiver().ranks[pull.receiver_rank].topology.dp_group;
  Result<std::vector<mapping::Leg>> legs =
      table->legs_of_sender(pull.sender_rank, answer.receiver_dp_group);
  if (!legs) return tl::unexpected<Error>(std::move(legs).error());
  for (const mapping::Leg& leg : *legs) {
    answer.legs.push_back({leg.receiver_rank, leg.empty, leg.carries_aux});
    if (leg.receiver_rank != pull.receiver_rank) continue;
    auto context = std::make_shared<CompileContext>();
    context->table = table;
    context->sender_rank = pull.sender_rank;
    context->receiver_rank = pull.receiver_rank;
    answer.context = std::move(context);
  }
  if (answer.context == nullptr)
    return fail(Code::kPermissionDenied, "BAD_MESSAGE", "there is no leg between the two ranks");
  Result<std::vector<mapping::GroupRanges>> needs =
      mapping::needs_by_sender_group(*table, pull.sender_rank, pull.receiver_rank, pull.needs);
  // The needs are the peer's word; what is wrong with them is the peer's fault.
  if (!needs)
    return fail(Code::kInvalidArgument, "BAD_MESSAGE", needs.error().message, needs.error().field);
  answer.needs = std::move(*needs);
  const Result<uint64_t> bytes =
      mapping::expected_bytes(*table, pull.sender_rank, pull.receiver_rank, pull.needs);
  if (!bytes)
    return fail(Code::kInvalidArgument, "BAD_MESSAGE", bytes.error().message, bytes.error().field);
  answer.expected_bytes = *bytes;
  return answer;
}

// ---- workers' Resolve ----

void Directory::probe(const std::string& ticket_text,
                      std::shared_ptr<const RegisteredLayout> layout, Time deadline,
                      std::function<void(Result<ProbeOutcome>)> done) {
  const Result<Ticket> ticket = parse_ticket(ticket_text);
  if (!ticket) return done(tl::unexpected<Error>(ticket.error()));
  struct Probe {
    Mutex mutex;
    bool told KVFERRY_GUARDED_BY(mutex) = false;
    std::function<void(Result<ProbeOutcome>)> done;
    ProbeOutcome outcome;

    void tell(std::optional<Error> problem) {
      {
        MutexLock lock(mutex);
        if (told) return;
        told = true;
      }
      outcome.problem = std::move(problem);
      done(outcome);
    }
  };
  auto probe = std::make_shared<Probe>();
  probe->done = std::move(done);
  probe->outcome.instance = instance_of(*ticket);
  probe->outcome.incarnation = incarnation_of(*ticket);
  // Whatever the look-up is doing then, the caller is answered.
  if (!impl_->later(deadline, [probe] {
        probe->tell(Error{Code::kDeadlineExceeded, "PEER_TIMEOUT", "no answer in time", {}});
      }))
    return probe->tell(Error{Code::kUnavailable, "BUSY", "too much work is waiting", {}});
  impl_->find_set(*ticket, true, [impl = impl_, probe, layout](Result<CardSetPtr> sender) {
    if (!sender) return probe->tell(std::move(sender).error());
    std::set<rpc::NodeAddress> nodes((*sender)->places.begin(), (*sender)->places.end());
    ProbeOutcome outcome = probe->outcome;
    outcome.incarnation = (*sender)->instance->incarnation;
    outcome.rank_count = static_cast<uint32_t>((*sender)->places.size());
    outcome.local = std::all_of(nodes.begin(), nodes.end(), [&](const rpc::NodeAddress& node) {
      return node.node == impl->config.node;
    });
    std::optional<Error> problem;
    if (layout != nullptr) {
      const Result<CardSetPtr> own = impl->local_set(layout->instance, layout->incarnation);
      if (!own) {
        problem = own.error();
      } else if (const Result<LegTablePtr> table = impl->table_of(*sender, *own); !table) {
        problem = table.error();
      } else {
        outcome.compatible = true;
      }
    }
    impl->link_all(std::move(nodes), [probe, outcome, problem](Status status) mutable {
      outcome.reachable = status.has_value();
      {
        MutexLock lock(probe->mutex);
        if (probe->told) return;
        probe->outcome = outcome;
      }
      if (!status) problem = std::move(status).error();
      probe->tell(std::move(problem));
    });
  });
}

}  // namespace kvferry::node
