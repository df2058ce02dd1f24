#include "daemon/node/directory.h"

#include <algorithm>
#include <utility>

#include "daemon/base/crypto.h"
#include "daemon/node/directory_impl.h"

namespace kvferry::node {
namespace {

// Of the cards in an answer; they are at most 64 KiB each.
constexpr std::size_t kPageBytes = std::size_t{1} << 20;

tl::unexpected<Error> unknown_instance() {
  return fail(Code::kNotFound, "INSTANCE_UNKNOWN", "no such instance is known here", "instance");
}

}  // namespace

bool Directory::Impl::later(Time when, std::function<void()> task) {
  MutexLock lock(mutex);
  return !stopped && look_up.post_at(when, std::move(task));
}

Directory::Impl::Local* Directory::Impl::find_local(const std::string& instance,
                                                    const Incarnation& incarnation) {
  LocalKey key{instance, incarnation};
  if (incarnation.is_zero()) {
    const auto it = in_force.find(instance);
    if (it == in_force.end()) return nullptr;
    key.second = it->second;
  }
  const auto it = locals.find(key);
  return it == locals.end() ? nullptr : &it->second;
}

Status Directory::Impl::complete(Local& local) {
  local.set = nullptr;
  std::vector<rpc::SignedCard> cards;
  for (uint32_t rank = 0; rank < local.rank_count; ++rank) {
    const auto own = local.own.find(rank);
    const auto joined = local.joined.find(rank);
    if (own != local.own.end())
      cards.push_back(own->second);
    else if (joined != local.joined.end())
      cards.push_back(joined->second);
    else
      return {};
  }
  Result<CardSetPtr> set = make_card_set(local.name, local.incarnation, std::move(cards));
  if (!set) return tl::unexpected<Error>(std::move(set).error());
  local.set = std::move(*set);
  return {};
}

std::vector<uint32_t> Directory::Impl::missing_ranks(const Local& local) const {
  std::vector<uint32_t> out;
  for (uint32_t rank = 0; rank < local.rank_count; ++rank)
    if (!local.own.contains(rank) && !local.joined.contains(rank)) out.push_back(rank);
  return out;
}

Directory::Directory(DirectoryConfig config, PeerLinks& links, TaskPool& look_up, TaskPool& compile,
                     EventSink sink)
    : impl_(std::make_shared<Impl>(std::move(config), links, look_up, compile, std::move(sink))) {}

Directory::~Directory() {
  std::vector<Impl::Join::Waiter> waiters;
  {
    MutexLock lock(impl_->mutex);
    impl_->stopped = true;
    impl_->pending.clear();
    for (auto& [key, local] : impl_->locals)
      if (local.join) std::swap(waiters, local.join->waiters);
  }
  for (const Impl::Join::Waiter& waiter : waiters)
    waiter.done(fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping"));
}

Result<Registration> Directory::add_local(std::shared_ptr<const RegisteredLayout> layout) {
  rpc::RankCard card;
  card.node = impl_->config.node;
  card.address = impl_->config.advertise;
  card.instance = layout->instance;
  card.incarnation = layout->incarnation;
  card.generation = layout->generation;
  card.holding = layout->holding;
  Result<rpc::SignedCard> made = make_card(card, layout->instance_key);
  if (!made) return tl::unexpected<Error>(std::move(made).error());

  const uint32_t rank_count = layout->layout.topology.rank_count;
  MutexLock lock(impl_->mutex);
  const Impl::LocalKey key{layout->instance, layout->incarnation};
  const auto found = impl_->locals.find(key);
  if (found != impl_->locals.end()) {
    const Impl::Local& local = found->second;
    if (local.key != layout->instance_key)
      return fail(Code::kPermissionDenied, "INSTANCE_FOREIGN",
                  "the instance has ranks here with another instance key", "instance_key");
    if (local.rank_count != rank_count)
      return invalid("layout.topology.rank_count", "RANK_COUNT_MISMATCH",
                     "the instance's other ranks say " + std::to_string(local.rank_count));
    const auto there = local.ranks.find(layout->rank);
    if (there != local.ranks.end() && there->second->generation >= layout->generation)
      return fail(Code::kAlreadyExists, "RANK_IN_USE", "the rank is registered already",
                  "layout.topology.rank");
  }
  Impl::Local& local = impl_->locals[key];
  local.name = layout->instance;
  local.incarnation = layout->incarnation;
  local.rank_count = rank_count;
  local.key = layout->instance_key;
  local.own[layout->rank] = *made;
  if (Status status = Impl::complete(local); !status) {
    // Neither this registration nor the one it was to replace stays.
    local.own.erase(layout->rank);
    local.ranks.erase(layout->rank);
    if (local.ranks.empty()) impl_->locals.erase(key);
    return tl::unexpected<Error>(std::move(status).error());
  }
  local.joined.erase(layout->rank);
  local.ranks[layout->rank] = layout;
  impl_->in_force[layout->instance] = layout->incarnation;
  return Registration{rpc::encode_signed_card(*made), local.set != nullptr};
}

void Directory::remove_local(const std::shared_ptr<const RegisteredLayout>& layout) {
  std::vector<Impl::Join::Waiter> waiters;
  {
    MutexLock lock(impl_->mutex);
    const Impl::LocalKey key{layout->instance, layout->incarnation};
    const auto it = impl_->locals.find(key);
    if (it == impl_->locals.end()) return;
    Impl::Local& local = it->second;
    const auto rank = local.ranks.find(layout->rank);
    if (rank == local.ranks.end() || rank->second != layout) return;
    local.ranks.erase(rank);
    local.own.erase(layout->rank);
    local.set = nullptr;
    if (!local.ranks.empty()) return;
    if (local.join) std::swap(waiters, local.join->waiters);
    impl_->locals.erase(it);
    const auto current = impl_->in_force.find(layout->instance);
    if (current != impl_->in_force.end() && current->second == layout->incarnation) {
      impl_->in_force.erase(current);
      // An older life of the instance that still has ranks is the one in force again.
      for (const auto& [other, unused] : impl_->locals)
        if (other.first == layout->instance) impl_->in_force[other.first] = other.second;
    }
  }
  for (const Impl::Join::Waiter& waiter : waiters)
    waiter.done(fail(Code::kAborted, "UNREGISTERED", "the instance's ranks here are gone"));
}

Result<std::string> Directory::ticket(const std::string& instance) const {
  InstanceTicket ticket;
  {
    MutexLock lock(impl_->mutex);
    const Impl::Local* local = impl_->find_local(instance, {});
    if (local == nullptr) return unknown_instance();
    if (local->set == nullptr)
      return fail(Code::kFailedPrecondition, "INSTANCE_INCOMPLETE",
                  std::to_string(impl_->missing_ranks(*local).size()) +
                      " ranks of the instance are not known yet",
                  "instance");
    ticket = {impl_->config.node, impl_->config.advertise, instance, local->incarnation,
              local->set->digest};
  }
  return format_ticket(ticket);
}

template <typename Command>
bool Directory::Impl::compile_later(const Command& command) {
  auto work = std::make_shared<const Command>(command);
  MutexLock lock(mutex);
  return !stopped &&
         compile_pool.post([impl = shared_from_this(), work] { impl->sink(compile_now(*work)); });
}

std::optional<engine::Compiled> Directory::compile(const engine::Compile& command) {
  if (is_small(command)) return compile_now(command);
  if (impl_->compile_later(command)) return std::nullopt;
  return engine::Compiled{command.compile, Reason::kInternal, "too many slices wait to be compiled",
                          nullptr};
}

std::optional<engine::CopyCompiled> Directory::compile(const engine::CompileCopy& command) {
  if (impl_->compile_later(command)) return std::nullopt;
  return engine::CopyCompiled{command.compile, Reason::kInternal,
                              "too many copies wait to be compiled", nullptr, nullptr};
}

Result<rpc::CardPage> Directory::answer_cards(const PeerRef& peer, const rpc::CardQuery& query) {
  if (!impl_->links.may_speak_for(peer.node, tenant_of(query.instance))) return unknown_instance();
  MutexLock lock(impl_->mutex);
  const Impl::Local* local = impl_->find_local(query.instance, query.incarnation);
  if (local == nullptr) {
    if (impl_->find_local(query.instance, {}) != nullptr)
      return fail(Code::kFailedPrecondition, "STALE_CARDS",
                  "the instance has been started again since");
    return unknown_instance();
  }
  rpc::CardPage page;
  page.incarnation = local->incarnation;
  page.rank_count = local->rank_count;
  std::size_t bytes = 0;
  auto add = [&](uint32_t rank, const rpc::SignedCard& card) {
    if (rank < query.first_rank || page.more) return;
    bytes += card.card.size() + 64;
    if (!page.cards.empty() && bytes > kPageBytes) {
      page.more = true;
      page.next_rank = rank;
      return;
    }
    page.cards.push_back(card);
  };
  if (query.own_only) {
    for (const auto& [rank, card] : local->own) add(rank, card);
    return page;
  }
  if (local->set == nullptr)
    return fail(Code::kUnavailable, "INSTANCE_INCOMPLETE", "not all ranks are known yet");
  page.set = local->set->digest;
  for (uint32_t rank = 0; rank < local->rank_count; ++rank) add(rank, local->set->cards[rank]);
  return page;
}

Digest16 digest_of_pair(const Digest16& sender_set, const Digest16& receiver_set) {
  return {
      cut<16>(sha256({bytes_of("kvferry card sets 1"), sender_set.span(), receiver_set.span()}))};
}

}  // namespace kvferry::node
