#include "tests/proc/hostile_peer.h"

#include <future>

#include "daemon/base/crypto.h"
#include "daemon/node/tickets.h"

namespace kvferry::hostile {
namespace {

constexpr milliseconds kPingEvery{100};

template <typename T>
Result<T> wait_for(std::future<Result<T>> answer) {
  if (answer.wait_for(kPatience) != std::future_status::ready) FAIL("a call has no answer");
  return answer.get();
}
Time deadline() {
  return monotonic_now() + std::chrono::seconds(20);
}

}  // namespace

HostilePeer::HostilePeer(std::string node, const std::string& secret)
    : node_(std::move(node)),
      secret_(secret.begin(), secret.end()),
      rails_(rails::testing::loopback()),
      dialer_(rpc::grpc_peer_dialer()) {
  random_bytes(boot_.bytes);
  auto server = rpc::PeerServer::start({"127.0.0.1:0"}, *this);
  if (!server) FAIL(server.error().to_string());
  server_ = std::move(*server);
  rails::testing::start({&rails_});
}

HostilePeer::~HostilePeer() {
  dialer_->stop(monotonic_now());
  server_->shutdown(monotonic_now() + std::chrono::seconds(1));
}

rpc::PeerHello HostilePeer::make_hello() {
  rpc::PeerHello hello;
  hello.node = node_;
  hello.boot = boot_;
  hello.address = "127.0.0.1:" + std::to_string(server_->port());
  const rails::RailsReady& ready = rails_.ready;
  hello.ucx_version = std::to_string(ready.ucx_major) + "." + std::to_string(ready.ucx_minor) +
                      "." + std::to_string(ready.ucx_release);
  random_bytes(hello.random);
  hello.chunk_bytes = 64 << 10;
  hello.max_credits = 16;
  hello.checks = {0};
  hello.rails = {{"tcp", "lo", ready.rails[0].address}};
  return hello;
}

std::string HostilePeer::shake_hands(const bench::DaemonProcess& daemon, const Spoil& spoil) {
  std::string reason = greet(daemon, spoil);
  if (reason.empty()) uneven_ = true;
  return reason;
}

std::string HostilePeer::greet(const bench::DaemonProcess& daemon, const Spoil& spoil) {
  stub_ = dialer_->dial({"127.0.0.1", daemon.peer_port(), {}});
  std::promise<Result<rpc::Random32>> challenged;
  stub_->challenge(deadline(), [&](Result<rpc::Random32> random) { challenged.set_value(random); });
  const Result<rpc::Random32> challenge = wait_for(challenged.get_future());
  if (!challenge) return challenge.error().reason;
  random_bytes(boot_.bytes);
  rpc::PeerHello mine = make_hello();
  mine.challenge = *challenge;
  if (spoil) spoil(mine);
  const node::HandshakeKey key = node::handshake_key(secret_);
  rpc::SignedHello request{rpc::encode_hello(mine), {}};
  request.tag = node::request_tag(key, request.bytes);
  std::promise<Result<rpc::SignedHello>> answered;
  stub_->handshake(request, deadline(),
                   [&](Result<rpc::SignedHello> reply) { answered.set_value(std::move(reply)); });
  const Result<rpc::SignedHello> reply = wait_for(answered.get_future());
  if (!reply) return reply.error().reason;
  auto theirs = rpc::decode_hello(reply->bytes);
  REQUIRE(theirs);
  theirs_ = *theirs;
  const link::LinkKeys keys =
      node::keys_of(mine, request.bytes, theirs_, reply->bytes, secret_, true);
  if (link_) table_.remove(link_);
  link_ = LinkId{link_.value + 1};
  table_.add(link_, keys);
  const std::lock_guard<std::mutex> lock(mutex_);
  keys_ = keys;
  return "";
}

void HostilePeer::link(const bench::DaemonProcess& daemon) {
  REQUIRE_FALSE(uneven_);
  if (lane_) (void)rails_.client->close(lane_);
  lane_ = rails::LaneKey{++last_key_};
  next_ = 0;
  up_ = false;
  heard.clear();
  offers_heard = 0;
  rails_.offers.clear();
  REQUIRE(greet(daemon, {}) == "");
  REQUIRE(rails_.client->connect(lane_, 0, theirs_.rails.at(0).address));
  REQUIRE(pump([&] {
    return std::find(rails_.connected.begin(), rails_.connected.end(), lane_.value) !=
           rails_.connected.end();
  }));
  say(engine::MsgHello{false});
  REQUIRE(pump([&] { return up_; }));
}

Result<std::string> HostilePeer::call(rpc::LinkMethod method, std::string body) {
  rpc::LinkCall call;
  call.link = keys_.link_name;
  call.number = ++calls_;
  call.body = std::move(body);
  call.tag = node::call_tag(keys_.out.call, method, call);
  std::promise<Result<rpc::LinkReply>> answered;
  stub_->call(method, call, deadline(),
              [&](Result<rpc::LinkReply> reply) { answered.set_value(std::move(reply)); });
  Result<rpc::LinkReply> reply = wait_for(answered.get_future());
  if (!reply) return tl::unexpected<Error>(std::move(reply).error());
  return std::move(reply->body);
}

// ---- rails -------------------------------------------------------------------------------------

bool HostilePeer::pump(const std::function<bool()>& done,
                       std::chrono::steady_clock::duration limit) {
  return rails::testing::pump(
      {&rails_},
      [&] {
        take();
        const auto now = std::chrono::steady_clock::now();
        if (up_ && now - pinged_ > kPingEvery) {
          pinged_ = now;
          say(engine::MsgPing{});
        }
        return done();
      },
      limit);
}

void HostilePeer::take() {
  for (const std::string& bytes : std::exchange(rails_.controls, {})) {
    auto opened = table_.open(bytes_of(bytes), Time{});
    if (!opened) continue;
    auto* message = std::get_if<engine::ControlMessage>(&opened->message);
    if (message == nullptr) continue;
    if (const auto* hello = std::get_if<engine::MsgHello>(message)) {
      if (!hello->answer) say(engine::MsgHello{true});
      up_ = true;
    } else if (!std::holds_alternative<engine::MsgPing>(*message)) {
      heard.push_back(std::move(*message));
    }
  }
  offers_heard = rails_.offers.size();
}

void HostilePeer::say(const engine::ControlMessage& message) {
  say_bytes(seal(next_++, message));
}

std::vector<uint8_t> HostilePeer::seal(uint64_t sequence, const engine::ControlMessage& message) {
  std::vector<uint8_t> sealed;
  REQUIRE(table_.seal({link_, 0, 0}, sequence, message, sealed));
  return sealed;
}

// A lane that the daemon has given up takes nothing more, which is an answer too.
void HostilePeer::say_bytes(std::span<const uint8_t> bytes) {
  const rails::SendToken token{++last_token_};
  Status sent = rails_.client->send_control(lane_, bytes, token);
  while (!sent && sent.error().reason == "RAILS_BUSY") {
    rails_.client->poll(monotonic_now(), rails_);
    sent = rails_.client->send_control(lane_, bytes, token);
  }
  if (!sent) CHECK(sent.error().reason == "LANE_UNKNOWN");
}

void HostilePeer::offer(const engine::MsgOffer& offer, uint64_t data_bytes) {
  std::vector<uint8_t> sealed;
  REQUIRE(table_.seal({link_, 0, 0}, offer, sealed));
  const Status sent =
      rails_.client->send_offer(lane_, sealed, {0, 0, data_bytes}, rails::SendToken{++last_token_});
  if (!sent) CHECK(sent.error().reason == "LANE_UNKNOWN");
}

void HostilePeer::accept_offer() {
  REQUIRE_FALSE(rails_.offers.empty());
  const auto offer = rails_.offers.front();
  rails_.offers.erase(rails_.offers.begin());
  REQUIRE(rails_.client->accept(offer.descriptor, lane_, {0, 0, offer.bytes},
                                LandingId{++last_offer_}));
}

// ---- cards -------------------------------------------------------------------------------------

rpc::CardPage HostilePeer::cards_of(const std::string& instance) {
  rpc::CardQuery query;
  query.instance = instance;
  const auto body = call(rpc::LinkMethod::kGetCards, rpc::encode(query));
  if (!body) FAIL(body.error().to_string());
  auto page = rpc::decode_card_page(*body);
  REQUIRE(page);
  return *page;
}

std::shared_ptr<const node::CardSet> HostilePeer::invent(const std::string& name,
                                                         const rpc::RankCard& like) {
  rpc::RankCard card = like;
  card.node = node_;
  card.address = "127.0.0.1:" + std::to_string(server_->port());
  card.instance = "default/" + name;
  random_bytes(card.incarnation.bytes);
  const auto made = node::make_card(card, std::nullopt);
  REQUIRE(made);
  const auto set = node::make_card_set(card.instance, card.incarnation, {*made});
  if (!set) FAIL(set.error().to_string());
  show(*set);
  return *set;
}

void HostilePeer::show(const std::shared_ptr<const node::CardSet>& set) {
  const std::lock_guard<std::mutex> lock(mutex_);
  invented_[set->instance->name] = set;
}

std::string HostilePeer::ticket_to(const node::CardSet& set) const {
  const auto ticket =
      node::format_ticket({node_, "127.0.0.1:" + std::to_string(server_->port()),
                           set.instance->name, set.instance->incarnation, set.digest});
  REQUIRE(ticket);
  return *ticket;
}

// ---- what the daemon asks ----------------------------------------------------------------------

void HostilePeer::challenge(const rpc::Caller&, std::function<void(Result<rpc::Random32>)> done) {
  done(fail(Code::kUnavailable, "SHUTDOWN", "dials, and is not dialled"));
}

void HostilePeer::handshake(const rpc::Caller&, rpc::SignedHello,
                            std::function<void(Result<rpc::SignedHello>)> done) {
  done(fail(Code::kUnavailable, "SHUTDOWN", "dials, and is not dialled"));
}

void HostilePeer::call(const rpc::Caller&, rpc::LinkMethod method, rpc::LinkCall call,
                       std::function<void(Result<rpc::LinkReply>)> done) {
  Result<std::string> body = answer(method, call.body);
  if (!body) return done(tl::unexpected<Error>(std::move(body).error()));
  rpc::LinkReply reply{std::move(*body), {}};
  const std::lock_guard<std::mutex> lock(mutex_);
  reply.tag = node::call_reply_tag(keys_.out.call, call.tag, reply.body);
  done(std::move(reply));
}

Result<std::string> HostilePeer::answer(rpc::LinkMethod method, const std::string& body) {
  if (method != rpc::LinkMethod::kGetCards)
    return fail(Code::kUnimplemented, "UNKNOWN_METHOD", "no such call");
  const auto query = rpc::decode_card_query(body);
  if (!query) return tl::unexpected<Error>(query.error());
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = invented_.find(query->instance);
  if (it == invented_.end()) return fail(Code::kNotFound, "INSTANCE_UNKNOWN", "none", "instance");
  const node::CardSet& set = *it->second;
  rpc::CardPage page;
  page.incarnation = set.instance->incarnation;
  page.rank_count = 1;
  page.set = set.digest;
  page.cards = set.cards;
  return rpc::encode(page);
}

}  // namespace kvferry::hostile
