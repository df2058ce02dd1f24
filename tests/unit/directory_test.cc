#include "daemon/node/directory.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <deque>
#include <map>
#include <set>

#include "daemon/base/mutex.h"
#include "daemon/mapping/tokens.h"
#include "daemon/mapping/validate.h"
#include "daemon/node/cards.h"
#include "daemon/node/compile_slice.h"
#include "daemon/node/tickets.h"
#include "tests/unit/link_support.h"

using namespace kvferry;
using namespace kvferry::node;

namespace {

constexpr Duration kPatience = std::chrono::seconds(20);

Incarnation incarnation(uint8_t number) {
  Incarnation out;
  out.bytes.fill(number);
  return out;
}

// Two layers of four heads over `ranks` ranks, blocks of four tokens.
struct Shape {
  uint32_t ranks = 1;
  uint64_t cell_bytes = 32;
  std::string fingerprint = "model";
};

std::shared_ptr<RegisteredLayout> make_layout(const std::string& instance, uint8_t life,
                                              uint32_t rank, const Shape& shape,
                                              uint64_t generation = 1) {
  auto out = std::make_shared<RegisteredLayout>();
  out->worker = {rank + 1};
  out->instance = instance;
  out->incarnation = incarnation(life);
  out->rank = rank;
  out->generation = generation;
  mapping::RankLayout& layout = out->layout;
  layout.topology = {rank, shape.ranks, 0};
  layout.fingerprint = shape.fingerprint;
  mapping::Group group;
  group.tokens_per_block = 4;
  group.block_count = 16;
  const uint32_t heads = 4 / shape.ranks;
  const uint64_t plane_bytes = 16ULL * heads * 4 * shape.cell_bytes;
  uint64_t offset = 0;
  for (uint32_t layer = 0; layer < 2; ++layer) {
    for (const char* role : {"key", "value"}) {
      mapping::Plane plane;
      plane.layer = layer;
      plane.role = role;
      plane.units_total = 4;
      plane.unit_begin = rank * heads;
      plane.unit_count = heads;
      plane.cell_bytes = shape.cell_bytes;
      plane.type = "bf16";
      plane.offset = offset;
      plane.token_stride = shape.cell_bytes;
      plane.unit_stride = 4 * shape.cell_bytes;
      plane.block_stride = heads * 4 * shape.cell_bytes;
      group.planes.push_back(plane);
      offset += plane_bytes;
    }
  }
  layout.groups.push_back(group);
  layout.pools.push_back({"kv", offset});
  const Status status = mapping::validate_layout(layout);
  INFO((status ? "" : status.error().to_string()));
  REQUIRE(status);
  out->holding = mapping::holding_of(layout);
  return out;
}

// Events of one node, in order.
class Events {
 public:
  void put(engine::Event event) {
    {
      MutexLock lock(mutex_);
      events_.push_back(std::move(event));
    }
    changed_.notify_all();
  }
  // The next event of type T that came; nothing at the deadline.
  template <typename T>
  std::optional<T> take(Duration patience = kPatience) {
    const Time deadline = monotonic_now() + patience;
    MutexLock lock(mutex_);
    while (true) {
      for (auto it = events_.begin(); it != events_.end(); ++it) {
        if (!std::holds_alternative<T>(*it)) continue;
        T out = std::get<T>(std::move(*it));
        events_.erase(it);
        return out;
      }
      if (!changed_.wait_until(mutex_, deadline)) return std::nullopt;
    }
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  std::deque<engine::Event> events_ KVFERRY_GUARDED_BY(mutex_);
};

class Net;

// Links that are there at once and carry calls by calling.
class FakeLinks : public PeerLinks {
 public:
  FakeLinks(Net& net, std::string self) : net_(net), self_(std::move(self)) {}

  void ensure_link(PeerTarget target, Time, std::function<void(Result<PeerRef>)> done) override;
  bool has_link(const std::string& node) const override {
    MutexLock lock(mutex_);
    return !refusal_ && !node.empty();
  }
  std::optional<PeerRef> peer_of(LinkId link) const override;
  bool may_speak_for(const std::string&, std::string_view tenant) const override {
    MutexLock lock(mutex_);
    return tenants_.contains(tenant);
  }
  void get_cards(LinkId link, rpc::CardQuery query, Time,
                 std::function<void(Result<rpc::CardPage>)> done) override;
  void join_forward(LinkId link, rpc::JoinForward forward, Time,
                    std::function<void(Status)> done) override;

  void refuse_with(std::optional<Error> error) {
    MutexLock lock(mutex_);
    refusal_ = std::move(error);
  }
  int asked() const {
    MutexLock lock(mutex_);
    return asked_;
  }
  // Those for which this node lets every other one speak.
  void set_tenants(std::set<std::string, std::less<>> tenants) {
    MutexLock lock(mutex_);
    tenants_ = std::move(tenants);
  }
  // The cards that this node shows to others, as it lies.
  void lie_about(std::vector<rpc::SignedCard> cards) {
    MutexLock lock(mutex_);
    lies_ = std::move(cards);
  }
  std::optional<std::vector<rpc::SignedCard>> lies() const {
    MutexLock lock(mutex_);
    return lies_;
  }

 private:
  Net& net_;
  const std::string self_;
  mutable Mutex mutex_;
  std::optional<Error> refusal_ KVFERRY_GUARDED_BY(mutex_);
  int asked_ KVFERRY_GUARDED_BY(mutex_) = 0;
  std::set<std::string, std::less<>> tenants_ KVFERRY_GUARDED_BY(mutex_){"default"};
  std::optional<std::vector<rpc::SignedCard>> lies_ KVFERRY_GUARDED_BY(mutex_);
};

struct Node {
  Node(Net& net, const std::string& name)
      : links(net, name),
        look_up("look-up", 2, 10000),
        compile("compile", 1, 10000),
        directory({name, address(name)}, links, look_up, compile,
                  [this](engine::Event event) { events.put(std::move(event)); }) {}
  ~Node() { stop(); }
  void stop() {
    look_up.stop();
    compile.stop();
  }
  static std::string address(const std::string& name) { return "10.0.0.1:" + port(name); }
  static std::string port(const std::string& name) {
    return std::to_string(7000 + static_cast<unsigned char>(name.back()));
  }

  Events events;
  FakeLinks links;
  TaskPool look_up;
  TaskPool compile;
  Directory directory;
};

class Net {
 public:
  Net() {
    for (const char* name : {"a", "b", "c"})
      nodes_.emplace(name, std::make_unique<Node>(*this, name));
  }
  ~Net() {
    // Nobody calls a directory that has gone.
    for (auto& [name, node] : nodes_) node->stop();
  }
  Node& operator[](const std::string& name) { return *nodes_.at(name); }
  // Link n leads to the n-th node, on every node.
  PeerRef ref(const std::string& name) const {
    uint64_t number = 1;
    for (const auto& [each, node] : nodes_) {
      if (each == name) break;
      ++number;
    }
    return {LinkId{number}, name, {}};
  }
  std::string name_of(LinkId link) const {
    return std::string(1, static_cast<char>('a' + link.value - 1));
  }
  std::string at(const std::string& address) const {
    for (const auto& [name, node] : nodes_)
      if (Node::address(name) == address) return name;
    return {};
  }

 private:
  std::map<std::string, std::unique_ptr<Node>> nodes_;
};

void FakeLinks::ensure_link(PeerTarget target, Time, std::function<void(Result<PeerRef>)> done) {
  std::optional<Error> refusal;
  {
    MutexLock lock(mutex_);
    ++asked_;
    refusal = refusal_;
  }
  if (refusal) return done(tl::unexpected<Error>(*refusal));
  done(net_.ref(target.node.empty() ? net_.at(target.address) : target.node));
}
std::optional<PeerRef> FakeLinks::peer_of(LinkId link) const {
  return net_.ref(net_.name_of(link));
}
void FakeLinks::get_cards(LinkId link, rpc::CardQuery query, Time,
                          std::function<void(Result<rpc::CardPage>)> done) {
  // Through the bytes, as on the wire.
  Result<rpc::CardPage> page = net_[net_.name_of(link)].directory.answer_cards(
      net_.ref(self_), *rpc::decode_card_query(rpc::encode(query)));
  if (!page) return done(std::move(page));
  if (const auto lies = net_[net_.name_of(link)].links.lies()) page->cards = *lies;
  done(rpc::decode_card_page(rpc::encode(*page)));
}
void FakeLinks::join_forward(LinkId link, rpc::JoinForward forward, Time,
                             std::function<void(Status)> done) {
  done(net_[net_.name_of(link)].directory.answer_join(
      net_.ref(self_), *rpc::decode_join_forward(rpc::encode(forward))));
}

std::shared_ptr<engine::ReceiveOp> receive(std::shared_ptr<const RegisteredLayout> layout,
                                           std::string ticket) {
  auto op = std::make_shared<engine::ReceiveOp>();
  op->layout = layout;
  op->ticket = std::move(ticket);
  op->num_tokens = 8;
  const mapping::GroupReceive wanted{8, 0, {0, 0, {3, 5}}};
  op->blocks = {wanted.blocks};
  op->needs = *mapping::compute_needs(layout->layout, std::vector{wanted});
  return op;
}

std::shared_ptr<engine::MsgPull> pull_of(const engine::ReceiveOp& op,
                                         const engine::Resolved& resolved,
                                         const engine::ReceiverLeg& leg) {
  auto pull = std::make_shared<engine::MsgPull>();
  pull->transfer.instance = "default/prefill";
  pull->transfer.incarnation = resolved.sender_incarnation;
  pull->sender_rank = leg.sender_rank;
  pull->receiver_rank = op.layout->rank;
  pull->receiver_instance = op.layout->instance;
  pull->receiver_incarnation = op.layout->incarnation;
  pull->cards = resolved.cards;
  pull->needs = op.needs;
  return pull;
}

// Node a prefills on two ranks, node b decodes on one.
struct Pair {
  Net net;
  std::vector<std::shared_ptr<RegisteredLayout>> senders{make_layout("default/prefill", 1, 0, {2}),
                                                         make_layout("default/prefill", 1, 1, {2})};
  std::shared_ptr<RegisteredLayout> receiver = make_layout("default/decode", 2, 0, {1});
  Node& a = net["a"];
  Node& b = net["b"];
  bool at_once = false;  // the last question was answered by the call

  void register_all() {
    for (const auto& sender : senders) REQUIRE(a.directory.add_local(sender));
    REQUIRE(b.directory.add_local(receiver));
  }
  engine::Resolved resolve(const std::shared_ptr<engine::ReceiveOp>& op, uint64_t id = 1) {
    auto resolved = b.directory.resolve({{id}, op});
    at_once = resolved.has_value();
    if (!at_once) resolved = b.events.take<engine::Resolved>();
    REQUIRE(resolved);
    CHECK(resolved->resolve == ResolveId{id});
    return *resolved;
  }
  engine::PullResolved resolve_pull(const std::shared_ptr<engine::MsgPull>& pull,
                                    const std::string& from = "b") {
    auto resolved =
        a.directory.resolve_pull({{9}, net.ref(from).link, pull, senders.at(pull->sender_rank)});
    at_once = resolved.has_value();
    if (!at_once) resolved = a.events.take<engine::PullResolved>();
    REQUIRE(resolved);
    return *resolved;
  }
};

}  // namespace

TEST_CASE("both sides find the same legs and compile the same stream") {
  Pair pair;
  pair.register_all();
  const std::string ticket = *pair.a.directory.ticket("default/prefill");
  const auto op = receive(pair.receiver, ticket);
  const engine::Resolved resolved = pair.resolve(op);
  INFO(resolved.message);
  REQUIRE(resolved.reason == Reason::kNone);
  CHECK(resolved.sender_incarnation == incarnation(1));
  REQUIRE(resolved.legs.size() == 2);
  for (const engine::ReceiverLeg& leg : resolved.legs) {
    CHECK(leg.node == "a");
    CHECK_FALSE(leg.empty);
    // Half the heads of eight tokens, two layers, key and value.
    CHECK(leg.expected_bytes == 8ULL * 2 * 2 * 2 * 32);
    const auto pull = pull_of(*op, resolved, leg);
    const engine::PullResolved pulled = pair.resolve_pull(pull);
    REQUIRE(pulled.reason == Reason::kNone);
    REQUIRE(pulled.legs.size() == 1);
    CHECK(pulled.legs[0].receiver_rank == 0);
    CHECK(pulled.legs[0].carries_aux == leg.carries_aux);
    CHECK(pulled.expected_bytes == leg.expected_bytes);

    auto send = std::make_shared<engine::SendOp>();
    send->layout = pair.senders[leg.sender_rank];
    send->blocks = {{0, 0, {1, 0}}};
    const std::vector<mapping::GroupRanges> offer{{0, {{0, 8}}}};
    const auto gather = pair.a.directory.compile(
        {{1}, engine::Role::kSender, pulled.context, send, nullptr, pull, offer, std::nullopt});
    const auto scatter = pair.b.directory.compile(
        {{2}, engine::Role::kReceiver, leg.context, nullptr, op, nullptr, offer, std::nullopt});
    REQUIRE(gather);
    REQUIRE(scatter);
    INFO(gather->message << scatter->message);
    REQUIRE(gather->reason == Reason::kNone);
    REQUIRE(scatter->reason == Reason::kNone);
    CHECK(gather->plan->digest == scatter->plan->digest);
    CHECK(gather->plan->bytes == leg.expected_bytes);
    const auto plan = std::dynamic_pointer_cast<const CompiledPlan>(gather->plan);
    REQUIRE(plan);
    CHECK(plan->layout == pair.senders[leg.sender_rank]);
    CHECK(plan->plan->bytes() == leg.expected_bytes);
  }
}

TEST_CASE("a receive waits for a sender that is not complete yet") {
  Pair pair;
  REQUIRE(pair.b.directory.add_local(pair.receiver));
  const Result<Registration> first = pair.a.directory.add_local(pair.senders[0]);
  REQUIRE(first);
  CHECK_FALSE(first->complete);
  const Result<std::string> none = pair.a.directory.ticket("default/prefill");
  REQUIRE_FALSE(none);
  CHECK(none.error().reason == "INSTANCE_INCOMPLETE");

  const auto op = receive(pair.receiver, "kvferry:" + Node::address("a") + "/prefill");
  pair.b.directory.resolve({{1}, op});
  CHECK_FALSE(pair.b.events.take<engine::Resolved>(std::chrono::milliseconds(60)));
  const Result<Registration> second = pair.a.directory.add_local(pair.senders[1]);
  REQUIRE(second);
  CHECK(second->complete);
  const auto resolved = pair.b.events.take<engine::Resolved>();
  REQUIRE(resolved);
  CHECK(resolved->reason == Reason::kNone);
  CHECK(resolved->legs.size() == 2);
}

TEST_CASE("a ticket made before a rank registered again is stale") {
  Pair pair;
  pair.register_all();
  const std::string ticket = *pair.a.directory.ticket("default/prefill");
  SECTION("the rank has a new generation") {
    REQUIRE(pair.a.directory.add_local(make_layout("default/prefill", 1, 0, {2}, 2)));
  }
  SECTION("the instance has a new life") {
    for (const auto& sender : pair.senders) pair.a.directory.remove_local(sender);
    REQUIRE(pair.a.directory.add_local(make_layout("default/prefill", 3, 0, {1})));
  }
  CHECK(pair.resolve(receive(pair.receiver, ticket)).reason == Reason::kStaleCards);
}

TEST_CASE("a receive that asks again gets fresh cards, not remembered ones") {
  Pair pair;
  pair.register_all();
  const std::string ticket = *pair.a.directory.ticket("default/prefill");
  const auto op = receive(pair.receiver, ticket);
  REQUIRE(pair.resolve(op).reason == Reason::kNone);
  REQUIRE(pair.a.directory.add_local(make_layout("default/prefill", 1, 0, {2}, 2)));
  // Another receive trusts the ticket's digest; one that was told STALE_CARDS does not.
  CHECK(pair.resolve(receive(pair.receiver, ticket), 2).reason == Reason::kNone);
  CHECK(pair.resolve(op, 3).reason == Reason::kStaleCards);
}

TEST_CASE("instances that do not fit are refused with the reason") {
  Pair pair;
  pair.receiver = make_layout("default/decode", 2, 0, {1, 64});
  SECTION("another cell size") {}
  SECTION("another model") {
    pair.receiver = make_layout("default/decode", 2, 0, {1, 32, "other"});
  }
  pair.register_all();
  const std::string ticket = *pair.a.directory.ticket("default/prefill");
  const engine::Resolved resolved = pair.resolve(receive(pair.receiver, ticket));
  CHECK(resolved.reason == Reason::kIncompatible);
  CHECK_FALSE(resolved.message.empty());
}

TEST_CASE("a peer that is not allowed ends the receive at once, an unreachable one only its wait") {
  Pair pair;
  pair.register_all();
  const std::string ticket = *pair.a.directory.ticket("default/prefill");
  SECTION("not allowed") {
    pair.b.links.refuse_with(Error{Code::kPermissionDenied, "PEER_NOT_ALLOWED", "no", {}});
    CHECK(pair.resolve(receive(pair.receiver, ticket)).reason == Reason::kPeerNotAllowed);
  }
  SECTION("another UCX") {
    pair.b.links.refuse_with(Error{Code::kFailedPrecondition, "UCX_MISMATCH", "no", {}});
    CHECK(pair.resolve(receive(pair.receiver, ticket)).reason == Reason::kUcxMismatch);
  }
  SECTION("unreachable for a while") {
    pair.b.links.refuse_with(Error{Code::kUnavailable, "PEER_UNREACHABLE", "down", {}});
    pair.b.directory.resolve({{1}, receive(pair.receiver, ticket)});
    CHECK_FALSE(pair.b.events.take<engine::Resolved>(std::chrono::milliseconds(60)));
    CHECK(pair.b.links.asked() > 1);
    pair.b.links.refuse_with(std::nullopt);
    const auto resolved = pair.b.events.take<engine::Resolved>();
    REQUIRE(resolved);
    CHECK(resolved->reason == Reason::kNone);
  }
  SECTION("unreachable until nobody waits any more") {
    pair.b.links.refuse_with(Error{Code::kUnavailable, "PEER_UNREACHABLE", "down", {}});
    pair.b.directory.resolve({{1}, receive(pair.receiver, ticket)});
    pair.b.directory.cancel_resolve({{1}});
    pair.b.links.refuse_with(std::nullopt);
    CHECK_FALSE(pair.b.events.take<engine::Resolved>(std::chrono::milliseconds(150)));
  }
}

TEST_CASE("a pull with another digest, from another node or for no leg is refused") {
  Pair pair;
  pair.register_all();
  const auto op = receive(pair.receiver, *pair.a.directory.ticket("default/prefill"));
  const engine::Resolved resolved = pair.resolve(op);
  REQUIRE(resolved.legs.size() == 2);
  const auto pull = pull_of(*op, resolved, resolved.legs[0]);
  SECTION("digest") {
    pull->cards.bytes[0] ^= 1;
    CHECK(pair.resolve_pull(pull).reason == Reason::kStaleCards);
  }
  SECTION("an instance that the asker does not have") {
    CHECK(pair.resolve_pull(pull, "c").reason == Reason::kStaleCards);
  }
  SECTION("a rank that is not there") {
    pull->receiver_rank = 1;
    CHECK(pair.resolve_pull(pull).reason == Reason::kProtocol);
  }
  SECTION("another tenant's instance") {
    pull->receiver_instance = "other/decode";
    CHECK(pair.resolve_pull(pull).reason == Reason::kPeerNotAllowed);
  }
}

TEST_CASE("a pull after the receiver registered again fetches its cards anew") {
  Pair pair;
  pair.register_all();
  const std::string ticket = *pair.a.directory.ticket("default/prefill");
  auto op = receive(pair.receiver, ticket);
  engine::Resolved resolved = pair.resolve(op);
  REQUIRE(pair.resolve_pull(pull_of(*op, resolved, resolved.legs[0])).reason == Reason::kNone);

  const auto again = make_layout("default/decode", 2, 0, {1}, 2);
  REQUIRE(pair.b.directory.add_local(again));
  op = receive(again, ticket);
  resolved = pair.resolve(op, 2);
  REQUIRE(resolved.reason == Reason::kNone);
  // What was fetched a moment ago is not asked for again; the receiver comes back with a new pull.
  const auto deadline = monotonic_now() + kPatience;
  Reason reason = Reason::kStaleCards;
  while (reason == Reason::kStaleCards && monotonic_now() < deadline)
    reason = pair.resolve_pull(pull_of(*op, resolved, resolved.legs[0])).reason;
  CHECK(reason == Reason::kNone);
}

TEST_CASE("an instance that spans nodes is complete on each after one join") {
  Net net;
  InstanceKey key;
  key.bytes.fill(5);
  std::vector<std::string> cards;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const auto layout = make_layout("default/wide", 1, rank, {2});
    layout->instance_key = key;
    const Result<Registration> done = net[rank == 0 ? "a" : "b"].directory.add_local(layout);
    REQUIRE(done);
    CHECK_FALSE(done->complete);
    cards.push_back(done->card);
  }
  Duration patience = kPatience;
  auto join = [&](const std::optional<InstanceKey>& with) {
    auto result = std::make_shared<std::optional<Result<JoinOutcome>>>();
    auto mutex = std::make_shared<Mutex>();
    auto changed = std::make_shared<CondVar>();
    net["a"].directory.join("default/wide", cards, with, monotonic_now() + patience,
                            [=](Result<JoinOutcome> outcome) {
                              {
                                MutexLock lock(*mutex);
                                *result = std::move(outcome);
                              }
                              changed->notify_all();
                            });
    MutexLock lock(*mutex);
    while (!*result) REQUIRE(changed->wait_until(*mutex, monotonic_now() + kPatience));
    return **result;
  };
  SECTION("with the key") {
    const Result<JoinOutcome> outcome = join(key);
    REQUIRE(outcome);
    CHECK(outcome->complete);
    CHECK(outcome->missing_ranks.empty());
    CHECK_FALSE(outcome->existing);
    // The same cards again, in another order.
    std::swap(cards[0], cards[1]);
    const Result<JoinOutcome> again = join(key);
    REQUIRE(again);
    CHECK(again->existing);
    CHECK(again->complete);
    std::swap(cards[0], cards[1]);
    const std::string from_a = *net["a"].directory.ticket("default/wide");
    // The other node collects by itself.
    const Time deadline = monotonic_now() + kPatience;
    while (!net["b"].directory.ticket("default/wide") && monotonic_now() < deadline)
      std::this_thread::yield();
    const Result<std::string> from_b = net["b"].directory.ticket("default/wide");
    REQUIRE(from_b);
    CHECK(std::get<InstanceTicket>(*parse_ticket(from_a)).generations ==
          std::get<InstanceTicket>(*parse_ticket(*from_b)).generations);
  }
  SECTION("after a rank has registered again: other cards") {
    REQUIRE(join(key));
    const auto later = make_layout("default/wide", 1, 1, {2}, 2);
    later->instance_key = key;
    const Result<Registration> done = net["b"].directory.add_local(later);
    REQUIRE(done);
    cards[1] = done->card;
    const Result<JoinOutcome> outcome = join(key);
    REQUIRE(outcome);
    CHECK_FALSE(outcome->existing);
    CHECK(outcome->complete);
    CHECK(join(key)->existing);
  }
  SECTION("while the other node does not answer: existing, and asked again") {
    patience = std::chrono::milliseconds(50);
    net["a"].links.refuse_with(Error{Code::kUnavailable, "PEER_UNREACHABLE", "not there", {}});
    const Result<JoinOutcome> first = join(key);
    REQUIRE(first);
    CHECK_FALSE(first->existing);
    CHECK_FALSE(first->complete);
    CHECK(first->missing_ranks == std::vector<uint32_t>{1});
    net["a"].links.refuse_with(std::nullopt);
    patience = kPatience;
    const Result<JoinOutcome> second = join(key);
    REQUIRE(second);
    CHECK(second->existing);
    CHECK(second->complete);
  }
  SECTION("refused cards were not joined") {
    CHECK_FALSE(join(std::nullopt));
    const Result<JoinOutcome> outcome = join(key);
    REQUIRE(outcome);
    CHECK_FALSE(outcome->existing);
  }
  SECTION("without the key, or with another one") {
    const Result<JoinOutcome> none = join(std::nullopt);
    REQUIRE_FALSE(none);
    CHECK(none.error().reason == "INSTANCE_FOREIGN");
    InstanceKey other;
    const Result<JoinOutcome> wrong = join(other);
    REQUIRE_FALSE(wrong);
    CHECK(wrong.error().reason == "INSTANCE_FOREIGN");
    CHECK_FALSE(net["a"].directory.ticket("default/wide"));
  }
  SECTION("with a card missing or changed") {
    std::vector<std::string> whole = cards;
    cards.pop_back();
    CHECK(join(key).error().reason == "BAD_CARD");
    cards = whole;
    cards[1].back() = static_cast<char>(cards[1].back() ^ 1);
    CHECK_FALSE(join(key));
  }
}

TEST_CASE("a card counts only from the node that made it, and under the instance's key") {
  Net net;
  InstanceKey key;
  key.bytes.fill(5);
  InstanceKey other_key;
  other_key.bytes.fill(6);
  // Rank 1 is node b's; whatever b says of it is what counts, if anything.
  std::vector<std::string> cards;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const auto layout = make_layout("default/wide", 1, rank, {2});
    layout->instance_key = key;
    const Result<Registration> done = net[rank == 0 ? "a" : "b"].directory.add_local(layout);
    REQUIRE(done);
    cards.push_back(done->card);
  }
  const auto card_of = [&](const std::string& node, uint32_t rank, uint8_t life,
                           const InstanceKey& with) {
    const auto layout = make_layout("default/wide", life, rank, {2});
    rpc::RankCard card{node, Node::address(node), "default/wide", incarnation(life),
                       9,    layout->holding};
    return *make_card(card, with);
  };
  rpc::SignedCard right = card_of("b", 1, 1, key);
  SECTION("as it should be") {
    net["b"].links.lie_about({right});
  }
  SECTION("another node's") {
    net["b"].links.lie_about({card_of("c", 1, 1, key)});
    right = {};
  }
  SECTION("under another key") {
    net["b"].links.lie_about({card_of("b", 1, 1, other_key)});
    right = {};
  }
  SECTION("without a tag") {
    right.tag.clear();
    net["b"].links.lie_about({right});
    right = {};
  }
  SECTION("of another life") {
    net["b"].links.lie_about({card_of("b", 1, 2, key)});
    right = {};
  }
  SECTION("of a rank that is registered here") {
    net["b"].links.lie_about({card_of("b", 0, 1, key), right});
  }
  kvferry::testing::Box<JoinOutcome> outcomes;
  const bool whole = !right.card.empty();
  net["a"].directory.join("default/wide", cards, key,
                          monotonic_now() + (whole ? kPatience : std::chrono::milliseconds(200)),
                          [&](Result<JoinOutcome> outcome) {
                            if (outcome) outcomes.put(std::move(*outcome));
                          });
  const auto outcome = outcomes.take();
  REQUIRE(outcome);
  CHECK(outcome->complete == whole);
  CHECK(net["a"].directory.ticket("default/wide").has_value() == whole);
  if (!whole) return;
  // Node a's own rank is still its own.
  const Result<rpc::CardPage> page =
      net["a"].directory.answer_cards(net.ref("b"), {"default/wide", incarnation(1), 0, false});
  REQUIRE(page);
  CHECK(rpc::decode_card(page->cards.at(0).card)->node == "a");
  CHECK(rpc::decode_card(page->cards.at(1).card)->generation == 9);
}

TEST_CASE("what is known is answered by the call") {
  Pair pair;
  pair.register_all();
  const std::string ticket = *pair.a.directory.ticket("default/prefill");
  const engine::Resolved first = pair.resolve(receive(pair.receiver, ticket), 1);
  REQUIRE(first.reason == Reason::kNone);
  CHECK_FALSE(pair.at_once);

  const auto op = receive(pair.receiver, ticket);
  const engine::Resolved known = pair.resolve(op, 2);
  CHECK(pair.at_once);
  CHECK(known.reason == Reason::kNone);
  CHECK(known.cards == first.cards);
  CHECK(known.sender_incarnation == first.sender_incarnation);
  REQUIRE(known.legs.size() == first.legs.size());
  for (std::size_t i = 0; i < known.legs.size(); ++i) {
    CHECK(known.legs[i].sender_rank == first.legs[i].sender_rank);
    CHECK(known.legs[i].node == first.legs[i].node);
    CHECK(known.legs[i].expected_bytes == first.legs[i].expected_bytes);
    CHECK(known.legs[i].carries_aux == first.legs[i].carries_aux);
  }

  const auto pull = pull_of(*op, known, known.legs[0]);
  const engine::PullResolved asked = pair.resolve_pull(pull);
  REQUIRE(asked.reason == Reason::kNone);
  CHECK_FALSE(pair.at_once);
  const engine::PullResolved pulled = pair.resolve_pull(pull);
  CHECK(pair.at_once);
  CHECK(pulled.reason == Reason::kNone);
  CHECK(pulled.context != nullptr);
  CHECK(pulled.needs == asked.needs);
  CHECK(pulled.receiver_dp_group == asked.receiver_dp_group);
  REQUIRE(pulled.legs.size() == 1);
  CHECK(pulled.legs[0].receiver_rank == asked.legs[0].receiver_rank);

  SECTION("not to who asks again, whom the peer has told that the cards are stale") {
    CHECK(pair.resolve(op, 3).reason == Reason::kNone);
    CHECK_FALSE(pair.at_once);
  }
  SECTION("not without a link") {
    pair.b.links.refuse_with(Error{Code::kPermissionDenied, "PEER_NOT_ALLOWED", "no", {}});
    CHECK(pair.resolve(receive(pair.receiver, ticket), 3).reason == Reason::kPeerNotAllowed);
    CHECK_FALSE(pair.at_once);
  }
  SECTION("not a pull that is wrong") {
    pull->receiver_rank = 7;
    CHECK(pair.resolve_pull(pull).reason == Reason::kProtocol);
    CHECK_FALSE(pair.at_once);
  }
  SECTION("not a pull of other cards") {
    ++pull->cards.bytes[0];
    CHECK(pair.resolve_pull(pull).reason == Reason::kStaleCards);
    CHECK_FALSE(pair.at_once);
  }
  SECTION("not of an instance that has lost a rank") {
    pair.b.directory.remove_local(pair.receiver);
    CHECK_FALSE(pair.b.directory.resolve({ResolveId{3}, receive(pair.receiver, ticket)}));
    pair.b.directory.cancel_resolve({ResolveId{3}});
  }
}

TEST_CASE("a small slice is compiled by the call, a large one elsewhere, to the same plan") {
  Pair pair;
  pair.register_all();
  const auto op = receive(pair.receiver, *pair.a.directory.ticket("default/prefill"));
  const engine::Resolved resolved = pair.resolve(op);
  REQUIRE(resolved.reason == Reason::kNone);
  engine::Compile command{{1},
                          engine::Role::kReceiver,
                          resolved.legs[0].context,
                          nullptr,
                          op,
                          nullptr,
                          {{0, {{0, 8}}}},
                          std::nullopt};
  REQUIRE(is_small(command));
  const auto small = pair.b.directory.compile(command);
  REQUIRE(small);
  REQUIRE(small->reason == Reason::kNone);
  // An offer of what the receiver does not need changes nothing but what is to be looked at.
  command.compile = {2};
  command.offer[0].ranges[0].end = 4ULL * 10'000;
  REQUIRE_FALSE(is_small(command));
  CHECK_FALSE(pair.b.directory.compile(command));
  const auto large = pair.b.events.take<engine::Compiled>();
  REQUIRE(large);
  INFO(large->message);
  REQUIRE(large->reason == Reason::kNone);
  CHECK(large->compile == CompileId{2});
  CHECK(large->plan->digest == small->plan->digest);
  // Ranges cost, too, however short they are.
  command.offer[0].ranges.clear();
  for (uint64_t i = 0; i < 1000; ++i) command.offer[0].ranges.push_back({8 * i, 8 * i + 4});
  CHECK_FALSE(is_small(command));
}

TEST_CASE("a controller's question leads to every rank of the sender, wherever they are") {
  Net net;
  InstanceKey key;
  key.bytes.fill(5);
  std::vector<std::string> cards;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const auto layout = make_layout("default/wide", 1, rank, {2});
    layout->instance_key = key;
    const Result<Registration> done = net[rank == 0 ? "a" : "b"].directory.add_local(layout);
    REQUIRE(done);
    cards.push_back(done->card);
  }
  net["a"].directory.join("default/wide", cards, key, monotonic_now() + kPatience,
                          [](Result<JoinOutcome>) {});
  const Time deadline = monotonic_now() + kPatience;
  while (!net["a"].directory.ticket("default/wide") && monotonic_now() < deadline)
    std::this_thread::yield();
  const Result<std::string> ticket = net["a"].directory.ticket("default/wide");
  REQUIRE(ticket);
  auto controller = std::make_shared<engine::LayoutHandle>();
  controller->instance = "default/scheduler";
  auto question = std::make_shared<engine::ReceiveOp>();
  question->ticket = *ticket;
  question->layout = controller;
  for (const char* node : {"a", "c"}) {
    net[node].directory.resolve({ResolveId{1}, question});
    const auto resolved = net[node].events.take<engine::Resolved>();
    REQUIRE(resolved);
    INFO(resolved->message);
    REQUIRE(resolved->reason == Reason::kNone);
    CHECK(resolved->sender_incarnation == incarnation(1));
    REQUIRE(resolved->legs.size() == 2);
    for (uint32_t rank = 0; rank < 2; ++rank) {
      CHECK(resolved->legs[rank].sender_rank == rank);
      CHECK(resolved->legs[rank].node == (rank == 0 ? "a" : "b"));
    }
  }
}

TEST_CASE("a decline finds the sender's ranks also when its own layout is gone") {
  Pair pair;
  pair.register_all();
  const std::string ticket = *pair.a.directory.ticket("default/prefill");
  const auto op = receive(pair.receiver, ticket);
  pair.b.directory.remove_local(pair.receiver);
  pair.b.directory.resolve({ResolveId{2}, op, true});
  const auto resolved = pair.b.events.take<engine::Resolved>();
  REQUIRE(resolved);
  INFO(resolved->message);
  REQUIRE(resolved->reason == Reason::kNone);
  REQUIRE(resolved->legs.size() == 2);
  for (const engine::ReceiverLeg& leg : resolved->legs) CHECK(leg.node == "a");
}

TEST_CASE("a registration that does not fit its instance changes nothing") {
  Net net;
  Directory& directory = net["a"].directory;
  const auto first = make_layout("default/prefill", 1, 0, {2});
  REQUIRE(directory.add_local(first));
  auto reason = [&](const std::shared_ptr<RegisteredLayout>& layout) {
    const Result<Registration> done = directory.add_local(layout);
    return done ? std::string() : done.error().reason;
  };
  CHECK(reason(make_layout("default/prefill", 1, 1, {4})) == "RANK_COUNT_MISMATCH");
  CHECK(reason(make_layout("default/prefill", 1, 0, {2})) == "RANK_IN_USE");
  const auto keyed = make_layout("default/prefill", 1, 1, {2});
  keyed->instance_key = InstanceKey({1});
  CHECK(reason(keyed) == "INSTANCE_FOREIGN");
  CHECK_FALSE(reason(make_layout("default/prefill", 1, 1, {2, 64})).empty());
  CHECK(reason(make_layout("default/prefill", 1, 1, {2})).empty());
  CHECK(directory.ticket("default/prefill"));
  directory.remove_local(first);
  CHECK(directory.ticket("default/prefill").error().reason == "INSTANCE_INCOMPLETE");
}

TEST_CASE(
    "cards are told only to peers that may speak for the tenant, unknown and forbidden alike") {
  Net net;
  Directory& directory = net["a"].directory;
  REQUIRE(directory.add_local(make_layout("other/prefill", 1, 0, {1})));
  const Result<rpc::CardPage> forbidden =
      directory.answer_cards(net.ref("b"), {"other/prefill", incarnation(1), 0, false});
  const Result<rpc::CardPage> unknown =
      directory.answer_cards(net.ref("b"), {"default/nothing", incarnation(1), 0, false});
  REQUIRE_FALSE(forbidden);
  REQUIRE_FALSE(unknown);
  CHECK(forbidden.error().to_string() == unknown.error().to_string());
  const auto joined = [&](const std::string& instance) {
    const Status status = directory.answer_join(
        net.ref("b"), {instance, incarnation(1), {{"b", Node::address("b")}}});
    REQUIRE_FALSE(status);
    return status.error().to_string();
  };
  CHECK(joined("other/prefill") == joined("default/nothing"));
}

TEST_CASE("an instance with a node that may not speak for its tenant is not received from") {
  Net net;
  const auto sender = make_layout("other/prefill", 1, 0, {1});
  const auto receiver = make_layout("other/decode", 2, 0, {1});
  REQUIRE(net["a"].directory.add_local(sender));
  REQUIRE(net["b"].directory.add_local(receiver));
  // Node a tells whoever asks; node b lets a speak for the default tenant alone.
  net["a"].links.set_tenants({"default", "other"});
  const std::string ticket = *net["a"].directory.ticket("other/prefill");
  const auto reason = [&](uint64_t id) {
    net["b"].directory.resolve({{id}, receive(receiver, ticket)});
    const auto resolved = net["b"].events.take<engine::Resolved>();
    REQUIRE(resolved);
    return resolved->reason;
  };
  CHECK(reason(1) == Reason::kPeerNotAllowed);
  net["b"].links.set_tenants({"default", "other"});
  CHECK(reason(2) == Reason::kNone);
}

TEST_CASE("a card says what the holding says, whatever its planes' pattern") {
  const auto layout = make_layout("default/prefill", 1, 1, {2});
  mapping::Holding holding = layout->holding;
  SECTION("as it is") {}
  SECTION("all keys, then all values") {
    auto& planes = holding.groups[0].planes;
    std::stable_sort(planes.begin(), planes.end(),
                     [](const auto& a, const auto& b) { return a.role < b.role; });
  }
  SECTION("layers going down") {
    auto& planes = holding.groups[0].planes;
    std::reverse(planes.begin(), planes.end());
  }
  SECTION("no two planes alike") {
    for (uint32_t i = 0; i < holding.groups[0].planes.size(); ++i)
      holding.groups[0].planes[i].role = "role" + std::to_string(i);
  }
  rpc::RankCard card{"a", "10.0.0.1:1", "default/prefill", incarnation(1), 3, holding};
  const Result<std::string> bytes = rpc::encode_card(card);
  REQUIRE(bytes);
  const Result<rpc::RankCard> back = rpc::decode_card(*bytes);
  REQUIRE(back);
  CHECK(back->generation == 3);
  const auto& planes = back->holding.groups.at(0).planes;
  REQUIRE(planes.size() == holding.groups[0].planes.size());
  for (std::size_t i = 0; i < planes.size(); ++i) {
    CHECK(planes[i].layer == holding.groups[0].planes[i].layer);
    CHECK(planes[i].role == holding.groups[0].planes[i].role);
    CHECK(planes[i].unit_begin == holding.groups[0].planes[i].unit_begin);
    CHECK(planes[i].order == holding.groups[0].planes[i].order);
  }
  CHECK(mapping::validate_holding(back->holding));
}
