// Link managers for tests, and what joins them without sockets.
#pragma once

#include <catch2/catch.hpp>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/node/link_manager.h"
#include "daemon/ops/address_rule.h"

namespace kvferry::testing {

using namespace kvferry::node;

inline constexpr Duration kPatience = std::chrono::seconds(20);

template <typename T>
class Box {
 public:
  void put(T value) {
    {
      MutexLock lock(mutex_);
      values_.push_back(std::move(value));
    }
    changed_.notify_all();
  }
  // The first value for which `pick` holds; nothing at the deadline.
  template <typename Pick>
  std::optional<T> take(Pick pick, Duration patience = kPatience) {
    const Time deadline = monotonic_now() + patience;
    MutexLock lock(mutex_);
    while (true) {
      for (auto it = values_.begin(); it != values_.end(); ++it) {
        if (!pick(*it)) continue;
        T out = std::move(*it);
        values_.erase(it);
        return out;
      }
      if (!changed_.wait_until(mutex_, deadline)) return std::nullopt;
    }
  }
  std::optional<T> take() {
    return take([](const T&) { return true; });
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  std::deque<T> values_ KVFERRY_GUARDED_BY(mutex_);
};

// Dials by looking the port up; a port without a backend is unreachable. Certificates are what
// the test says, and nobody looks at them on the way.
class PlainDialer : public rpc::PeerDialer {
 public:
  std::shared_ptr<rpc::PeerStub> dial(const rpc::PeerEndpoint& endpoint) override {
    return dial(endpoint, {});
  }
  std::shared_ptr<rpc::PeerStub> dial(const rpc::PeerEndpoint& endpoint,
                                      std::optional<Result<rpc::PeerCertificate>> client) {
    return std::make_shared<Stub>(*this, endpoint.port, std::move(client));
  }
  void stop(Time) override {}
  // `certificate`: what the server there shows.
  void serve(uint16_t port, rpc::PeerBackend* backend,
             std::optional<rpc::PeerCertificate> certificate = {}) {
    MutexLock lock(mutex_);
    backends_[port] = {backend, std::move(certificate)};
  }
  // What goes over the wire of this method from now on, to be looked at or changed.
  struct Tap {
    std::function<void(rpc::LinkCall&)> request;
    std::function<void(Result<rpc::LinkReply>&)> reply;
  };
  void tap(rpc::LinkMethod method, Tap tap) {
    MutexLock lock(mutex_);
    taps_[method] = std::make_shared<Tap>(std::move(tap));
  }

 private:
  struct Served {
    rpc::PeerBackend* backend = nullptr;
    std::optional<rpc::PeerCertificate> certificate;
  };
  class Stub : public rpc::PeerStub {
   public:
    Stub(PlainDialer& dialer, uint16_t port, std::optional<Result<rpc::PeerCertificate>> client)
        : dialer_(dialer), port_(port), from_{"127.0.0.1", 40000, std::move(client)} {}
    void challenge(Time, std::function<void(Result<rpc::Random32>)> done) override {
      if (rpc::PeerBackend* backend = dialer_.find(port_).backend)
        return backend->challenge(from_, done);
      done(unreachable());
    }
    void handshake(rpc::SignedHello hello, Time,
                   std::function<void(Result<rpc::SignedHello>)> done) override {
      if (rpc::PeerBackend* backend = dialer_.find(port_).backend)
        return backend->handshake(from_, std::move(hello), done);
      done(unreachable());
    }
    void call(rpc::LinkMethod method, rpc::LinkCall call, Time,
              std::function<void(Result<rpc::LinkReply>)> done) override {
      const auto tap = dialer_.tap_of(method);
      if (tap != nullptr && tap->request) tap->request(call);
      if (tap != nullptr && tap->reply)
        done = [tap, done](Result<rpc::LinkReply> reply) {
          tap->reply(reply);
          done(std::move(reply));
        };
      if (rpc::PeerBackend* backend = dialer_.find(port_).backend)
        return backend->call(from_, method, std::move(call), done);
      done(unreachable());
    }
    std::optional<rpc::PeerCertificate> certificate() const override {
      return from_.certificate ? dialer_.find(port_).certificate : std::nullopt;
    }

   private:
    static tl::unexpected<Error> unreachable() {
      return fail(Code::kUnavailable, "PEER_UNREACHABLE", "nobody is there");
    }
    PlainDialer& dialer_;
    const uint16_t port_;
    const rpc::Caller from_;
  };
  Served find(uint16_t port) {
    MutexLock lock(mutex_);
    const auto it = backends_.find(port);
    return it == backends_.end() ? Served{} : it->second;
  }

  std::shared_ptr<const Tap> tap_of(rpc::LinkMethod method) {
    MutexLock lock(mutex_);
    const auto it = taps_.find(method);
    return it == taps_.end() ? nullptr : it->second;
  }

  Mutex mutex_;
  std::map<uint16_t, Served> backends_ KVFERRY_GUARDED_BY(mutex_);
  std::map<rpc::LinkMethod, std::shared_ptr<Tap>> taps_ KVFERRY_GUARDED_BY(mutex_);
};

// One daemon's way to dial: over "TLS", where it shows `client`, if [peers] wants it so.
class CertificateDialer : public rpc::PeerDialer {
 public:
  CertificateDialer(PlainDialer& dialer, Result<rpc::PeerCertificate> client)
      : dialer_(dialer), client_(std::move(client)) {}
  std::shared_ptr<rpc::PeerStub> dial(const rpc::PeerEndpoint& endpoint) override {
    if (endpoint.identities.empty()) return dialer_.dial(endpoint);
    return dialer_.dial(endpoint, client_);
  }
  void stop(Time) override {}

 private:
  PlainDialer& dialer_;
  const Result<rpc::PeerCertificate> client_;
};

class Questions : public PeerQuestions {
 public:
  Result<rpc::CardPage> answer_cards(const PeerRef& peer, const rpc::CardQuery& query) override {
    if (query.instance != "default/x")
      return fail(Code::kNotFound, "INSTANCE_UNKNOWN", "none", "instance");
    rpc::CardPage page;
    page.incarnation.bytes.fill(1);
    page.rank_count = 1;
    page.cards.push_back({"card of " + peer.node, {}});
    return page;
  }
  Status answer_join(const PeerRef&, const rpc::JoinForward&) override { return {}; }
};

// Lends one arena of each kind with handles, always the same to a link.
class Offers : public ArenaOffers {
 public:
  rpc::ArenasOffer offer(const PeerRef& peer, const rpc::ArenasQuery& query) override {
    {
      MutexLock lock(mutex_);
      proof_ = query.proof;
    }
    rpc::ArenasOffer out;
    out.host = query.host;
    out.socket_path = "/run/" + peer.node + ".sock";
    out.token.bytes.fill(0x77);
    for (uint32_t i = 0; i < 2; ++i) {
      rpc::OfferedArena& arena = out.arenas.emplace_back();
      arena.number = 4 + i;
      arena.kind = i == 0 ? rpc::LentKind::kFabricVmm : rpc::LentKind::kCudaMalloc;
      arena.device_uuid.fill(3);
      for (uint32_t s = 0; s < rpc::kMaxLentSegments; ++s) {
        arena.segments.push_back({64 * i + s, 1 + s, {}});
        arena.segments.back().handle.fill(0x55);
      }
    }
    return out;
  }
  // Of the last question.
  rpc::WelcomeProof proof() {
    MutexLock lock(mutex_);
    return proof_;
  }

 private:
  Mutex mutex_;
  rpc::WelcomeProof proof_ KVFERRY_GUARDED_BY(mutex_);
};

// Knows one part of each transfer whose hash begins with 0, for whoever asks.
class TraceAnswerer : public TraceAnswers {
 public:
  void answer_trace(const PeerRef& peer, const rpc::TraceQuery& query,
                    std::function<void(Result<rpc::TraceReply>)> done) override {
    if (query.hash.front() != '0')
      return done(fail(Code::kResourceExhausted, "TRACE_BUSY", "ask again"));
    rpc::TraceReply reply;
    rpc::TraceReplyPart& part = reply.parts.emplace_back();
    part.role = "send";
    part.rank = static_cast<uint32_t>(peer.node.size());
    part.state = "ACTIVE";
    part.steps = {{"asked", Duration(5), Duration(-3), 2}};
    done(std::move(reply));
  }
};

// Notes of what it is told, in order: "+1", "-1".
class Watch : public LinkWatch {
 public:
  void on_link_up(const PeerRef& peer, engine::CheckKind) override {
    note("+" + peer.node + std::to_string(peer.link.value));
  }
  void on_link_gone(LinkId link) override { note("-" + std::to_string(link.value)); }
  std::vector<std::string> notes() {
    MutexLock lock(mutex_);
    return notes_;
  }

 private:
  void note(std::string text) {
    MutexLock lock(mutex_);
    notes_.push_back(std::move(text));
  }
  Mutex mutex_;
  std::vector<std::string> notes_ KVFERRY_GUARDED_BY(mutex_);
};

inline std::string text_of(std::size_t count, uint8_t byte) {
  return std::string(count, static_cast<char>(byte));
}

inline ops::PeerConfig allow(const std::string& node, ops::PeerMode mode = ops::PeerMode::kPlain) {
  ops::PeerConfig peer;
  peer.identity = node;
  peer.mode = mode;
  peer.addresses.push_back(*ops::parse_address_rule("127.0.0.0/8"));
  return peer;
}

struct Daemon {
  Daemon(std::string name, uint16_t port, rpc::PeerDialer& dialer,
         std::vector<ops::PeerConfig> peers, std::string secret = {}, std::string ucx = "1.13.1",
         uint32_t rails = 1, std::shared_ptr<const rpc::PeerTls> tls = nullptr,
         std::optional<BootId> said_boot = {}, Duration renew_interval = std::chrono::hours(1))
      : pool("links", 2, 1000) {
    LinkManagerConfig config;
    config.node = name;
    if (said_boot)
      config.boot = *said_boot;
    else
      random_bytes(config.boot.bytes);
    config.advertise = "127.0.0.1:" + std::to_string(port);
    config.peers = std::move(peers);
    config.cluster_secret.assign(secret.begin(), secret.end());
    config.tls = std::move(tls);
    config.renew_interval = renew_interval;
    boot = config.boot;
    manager = std::make_unique<LinkManager>(
        std::move(config), dialer, pool,
        [this](engine::Event event) { events.put(std::move(event)); });
    manager->set_questions(&questions);
    manager->add_watch(watch);
    manager->set_renewed_keys_sink([this](LinkId link, const link::LinkKeys& keys, bool seal_now) {
      renewed.put({link, keys, seal_now});
    });
    set_rails(rails, ucx);
  }
  ~Daemon() {
    manager->stop();
    pool.stop();
  }

  void set_rails(uint32_t count, const std::string& ucx = "1.13.1", uint8_t first_byte = 1) {
    std::vector<rpc::PeerRail> rails;
    for (uint32_t i = 0; i < count; ++i)
      rails.push_back({"tcp", "lo", {first_byte, static_cast<uint8_t>(i)}});
    manager->set_rails(ucx, std::move(rails));
  }
  Result<PeerRef> link(const std::string& node, uint16_t port) {
    auto box = std::make_shared<Box<Result<PeerRef>>>();
    manager->ensure_link({node, "127.0.0.1:" + std::to_string(port)}, monotonic_now() + kPatience,
                         [box](Result<PeerRef> ref) { box->put(std::move(ref)); });
    auto ref = box->take();
    REQUIRE(ref);
    return std::move(*ref);
  }
  Result<rpc::ArenasOffer> arenas(LinkId link, uint8_t host = 1) {
    auto box = std::make_shared<Box<Result<rpc::ArenasOffer>>>();
    rpc::ArenasQuery query;
    query.host.bytes.fill(host);
    manager->get_arenas(link, query, monotonic_now() + kPatience,
                        [box](Result<rpc::ArenasOffer> offer) { box->put(std::move(offer)); });
    auto offer = box->take();
    REQUIRE(offer);
    return std::move(*offer);
  }
  Result<rpc::TraceReply> trace(const std::string& node, const std::string& hash) {
    auto box = std::make_shared<Box<Result<rpc::TraceReply>>>();
    manager->get_trace(node, {hash}, monotonic_now() + kPatience,
                       [box](Result<rpc::TraceReply> reply) { box->put(std::move(reply)); });
    auto reply = box->take();
    REQUIRE(reply);
    return std::move(*reply);
  }
  template <typename T>
  std::optional<T> event(Duration patience = kPatience) {
    auto found = events.take(
        [](const engine::Event& event) { return std::holds_alternative<T>(event); }, patience);
    return found ? std::optional(std::get<T>(std::move(*found))) : std::nullopt;
  }

  TaskPool pool;
  Questions questions;
  Offers offers;
  Watch watch;
  Box<engine::Event> events;
  struct Renewed {
    LinkId link;
    link::LinkKeys keys;
    bool seal_now = false;
  };
  Box<Renewed> renewed;
  BootId boot;
  std::unique_ptr<LinkManager> manager;
};

inline std::string reason(const Result<PeerRef>& ref) {
  return ref ? "" : ref.error().reason;
}

}  // namespace kvferry::testing
