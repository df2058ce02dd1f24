// The insides of the link manager, shared by the three files that implement it: state and commands
// (link_manager.cc), dialling (link_dial.cc), answering (link_answer.cc).
#pragma once

#include <algorithm>
#include <atomic>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/node/handshake.h"
#include "daemon/node/link_manager.h"
#include "daemon/node/peer_rules.h"
#include "daemon/ops/log.h"

namespace kvferry::node {

// For how long a link may go on whose renewal does not succeed. The peer that is not who it was,
// or whose certificate has expired, is kept no longer than that.
constexpr Duration renewal_slack(Duration interval) {
  return std::max<Duration>(interval / 4, std::chrono::seconds(10));
}

// Handshakes that end so are no failures.
inline bool is_daily_life(const Error& error) {
  return error.reason == "ALREADY_LINKED" || error.reason == "RAILS_DOWN";
}

struct LinkManager::Impl : std::enable_shared_from_this<LinkManager::Impl> {
  using EnsureDone = std::function<void(Result<PeerRef>)>;

  struct Lane {
    uint32_t epoch = 0;
    rpc::PeerRail peer_rail;  // where it leads, as last told
  };
  struct Link {
    LinkId id;
    std::string node;
    BootId boot;
    std::string host;     // numeric, where the peer was when it shook hands
    std::string address;  // where it takes handshakes
    std::string ucx_version;
    bool initiator = false;
    // Mode mtls: what the peer showed for the handshake; absent: mode plain.
    std::optional<rpc::PeerCertificate> certificate;
    link::LinkKeys keys;  // this side's calls are tagged under them
    std::vector<Lane> lanes;
    std::shared_ptr<rpc::PeerStub> stub;  // null where the peer cannot be called
    uint64_t calls = 0;
    // Renewal: README.md. Calls of the peer may come under any of the three.
    std::optional<link::LinkKeys> next;
    std::optional<link::LinkKeys> previous;
    Time previous_until = Time::never();
    Duration renew_interval{};
    Time shook_hands;                // when `keys` were agreed
    Time next_shook_hands;           // ... and `next`
    bool keys_seen = false;          // the peer uses `keys`
    bool renewing = false;           // a handshake of this side's is under way
    uint32_t renewals_answered = 0;  // since the last renew_links()
    Time renew_not_before;           // after one that failed
    Duration renew_backoff{};
  };
  // A dial of a node, or of whoever is at an address: waiting, under way, or in back-off.
  struct Dial {
    PeerTarget target;
    bool under_way = false;
    std::vector<EnsureDone> waiters;
    uint64_t attempt = 0;
    Time not_before;
    Duration backoff{};
    Error last_error;
  };
  // A handshake that this side began.
  struct Attempt {
    std::string key;  // of its Dial
    uint64_t number = 0;
    Route route;
    uint64_t rules = 0;  // by which it was allowed
    Time deadline;
    std::shared_ptr<rpc::PeerStub> stub;
    rpc::PeerHello hello;
    std::string hello_bytes;
    // Of a link that is up: which, and its keys before. There is no Dial then.
    LinkId renews;
    link::LinkKeys before;
  };

  Impl(LinkManagerConfig config_in, rpc::PeerDialer& dialer_in, TaskPool& pool_in,
       EventSink sink_in);

  const LinkManagerConfig config;
  rpc::PeerDialer& dialer;
  TaskPool& pool;
  const EventSink sink;

  std::atomic<uint64_t> failed_handshakes{0};
  std::atomic<uint64_t> renewed{0};
  mutable Mutex mutex;
  PeerQuestions* questions KVFERRY_GUARDED_BY(mutex) = nullptr;
  ArenaOffers* offers KVFERRY_GUARDED_BY(mutex) = nullptr;
  TraceAnswers* trace_answers KVFERRY_GUARDED_BY(mutex) = nullptr;
  std::vector<LinkWatch*> watches KVFERRY_GUARDED_BY(mutex);
  RenewedKeysSink renewed_keys KVFERRY_GUARDED_BY(mutex);
  bool stopped KVFERRY_GUARDED_BY(mutex) = false;
  std::vector<ops::PeerConfig> peers KVFERRY_GUARDED_BY(mutex);
  // Counts changes of whom we link: a handshake that began under other rules makes no link.
  uint64_t rules KVFERRY_GUARDED_BY(mutex) = 0;
  // In the log. Two, so that strangers at the door do not hide what our own dials meet.
  ops::LogLimiter refusals KVFERRY_GUARDED_BY(mutex){8, std::chrono::minutes(1)};
  ops::LogLimiter failed_dials KVFERRY_GUARDED_BY(mutex){8, std::chrono::minutes(1)};
  std::string ucx_version KVFERRY_GUARDED_BY(mutex);
  std::vector<rpc::PeerRail> rails KVFERRY_GUARDED_BY(mutex);
  uint64_t next_link KVFERRY_GUARDED_BY(mutex) = 1;
  uint64_t next_attempt KVFERRY_GUARDED_BY(mutex) = 1;
  std::unordered_map<LinkId, Link, IdHash> links KVFERRY_GUARDED_BY(mutex);
  std::map<rpc::LinkName, LinkId> by_name KVFERRY_GUARDED_BY(mutex);
  std::map<std::string, LinkId> by_node KVFERRY_GUARDED_BY(mutex);
  std::map<std::string, Dial> dials KVFERRY_GUARDED_BY(mutex);
  std::list<std::pair<rpc::Random32, Time>> challenges KVFERRY_GUARDED_BY(mutex);

  bool has_secret() const { return !config.cluster_secret.empty(); }
  // The cluster secret is mode plain's; with certificates none is needed, and one side may lack it.
  SecretVector secret_of(ops::PeerMode mode) const {
    return mode == ops::PeerMode::kPlain ? config.cluster_secret : SecretVector();
  }
  static std::string dial_key(const PeerTarget& target) {
    return target.node.empty() ? "@" + target.address : target.node;
  }
  PeerRef self() const { return {kLoopedLink, config.node, config.boot}; }
  PeerRef ref_of(const Link& link) const { return {link.id, link.node, link.boot}; }
  Link* find(LinkId id) KVFERRY_REQUIRES(mutex);
  const Link* find(LinkId id) const KVFERRY_REQUIRES(mutex);
  Link* find_target(const PeerTarget& target) KVFERRY_REQUIRES(mutex);

  // --- link_manager.cc
  // Whom we link has changed: no handshake under way makes a link, and no failed dial sits out its
  // back-off.
  void begin_new_rules() KVFERRY_REQUIRES(mutex);
  // Counts a handshake that made no link.
  void count_failure(const Error& error) {
    if (!is_daily_life(error)) failed_handshakes.fetch_add(1, std::memory_order_relaxed);
  }
  // To the pool, unless stop() was called: callbacks of transports may come later than that.
  bool post_at(Time when, std::function<void()> task) KVFERRY_EXCLUDES(mutex);
  rpc::PeerHello make_hello(const rpc::Random32& challenge) KVFERRY_REQUIRES(mutex);
  // Ends an older link of the node, tells the engine of both, and hands back who waited for it.
  PeerRef open_link(Link link, const Agreed& agreed, std::vector<EnsureDone>& waiters)
      KVFERRY_REQUIRES(mutex);
  void end_link(LinkId id, Reason reason) KVFERRY_REQUIRES(mutex);
  // The same, and the peers are told.
  void end_links(const std::vector<LinkId>& ids, Reason reason) KVFERRY_EXCLUDES(mutex);
  void forget_link(LinkId id) KVFERRY_REQUIRES(mutex);
  // A tagged call to the peer; `done` gets the body of a reply whose tag is right.
  void send_call(LinkId link, rpc::LinkMethod method, std::string body, Time deadline,
                 std::function<void(Result<std::string>)> done) KVFERRY_EXCLUDES(mutex);
  // The same with what opens secrets in the reply.
  struct Answer {
    std::string body;
    rpc::Tag16 call_tag{};
    link::KeyBytes key;  // of the peer's direction
  };
  void send_call_for_answer(LinkId link, rpc::LinkMethod method, std::string body, Time deadline,
                            std::function<void(Result<Answer>)> done) KVFERRY_EXCLUDES(mutex);

  // --- link_dial.cc
  void ensure(PeerTarget target, EnsureDone done) KVFERRY_EXCLUDES(mutex);
  void begin_dial(const std::string& key, uint64_t number) KVFERRY_EXCLUDES(mutex);
  void begin_handshake(const std::shared_ptr<Attempt>& attempt, Route route);
  void send_hello(const std::shared_ptr<Attempt>& attempt, const rpc::Random32& challenge)
      KVFERRY_EXCLUDES(mutex);
  void take_reply(const std::shared_ptr<Attempt>& attempt, const rpc::SignedHello& reply)
      KVFERRY_EXCLUDES(mutex);
  void take_back(const Attempt& attempt, const link::LinkKeys& keys);
  Status check_reply(const Attempt& attempt, const std::string& wanted_node,
                     const rpc::PeerHello& theirs, const std::vector<ops::PeerConfig>& allowed);
  void dial_failed(const std::string& key, uint64_t number, Error error) KVFERRY_EXCLUDES(mutex);
  // Of a dial or of a renewal.
  void attempt_failed(const Attempt& attempt, Error error) KVFERRY_EXCLUDES(mutex);
  void await_inbound(const std::string& key, uint64_t number) KVFERRY_EXCLUDES(mutex);

  // --- link_renewal.cc
  void begin_renewal(LinkId id) KVFERRY_EXCLUDES(mutex);
  void take_renewal(const std::shared_ptr<Attempt>& attempt, const rpc::PeerHello& theirs,
                    const std::string& reply_bytes) KVFERRY_EXCLUDES(mutex);
  void renewal_failed(LinkId id, const Error& error) KVFERRY_EXCLUDES(mutex);
  // From now on this side's calls are made under `keys`.
  void use_keys(Link& link, const link::LinkKeys& keys, Time shook_hands) KVFERRY_REQUIRES(mutex);
  // The peer renews a link that it dialled.
  Result<rpc::SignedHello> answer_renewal(const rpc::Caller& from, const rpc::PeerHello& theirs,
                                          const std::string& request_bytes, ops::PeerMode mode,
                                          uint64_t allowed_by) KVFERRY_EXCLUDES(mutex);
  void forget_name(const std::optional<link::LinkKeys>& keys) KVFERRY_REQUIRES(mutex);

  // --- link_answer.cc
  Result<rpc::Random32> new_challenge() KVFERRY_EXCLUDES(mutex);
  bool use_challenge(const rpc::Random32& challenge) KVFERRY_EXCLUDES(mutex);
  // The caller's mode; PERMISSION_DENIED for a certificate that is no good any more.
  Result<ops::PeerMode> check_caller(const rpc::Caller& from) const;
  // Says so in the log, as the operator of this node may be the one at fault.
  void note_refusal(const rpc::Caller& from, const Error& error) KVFERRY_EXCLUDES(mutex);
  // Who says hello, if that is to be believed and is allowed; uses its challenge up. Blocks if
  // [peers] has names.
  Result<rpc::PeerHello> check_hello(const rpc::Caller& from, const rpc::SignedHello& request,
                                     const HandshakeKey& secret_key, ops::PeerMode mode,
                                     const std::vector<ops::PeerConfig>& allowed)
      KVFERRY_EXCLUDES(mutex);
  Result<rpc::SignedHello> answer_hello(const rpc::Caller& from, const rpc::SignedHello& hello)
      KVFERRY_EXCLUDES(mutex);
  Status may_link_now(const rpc::PeerHello& theirs) KVFERRY_REQUIRES(mutex);
  // How to call a peer that dialled us; null if it is nowhere that [peers] allows.
  std::shared_ptr<rpc::PeerStub> stub_back(const std::vector<ops::PeerConfig>& allowed,
                                           const std::string& node, const std::string& host,
                                           const std::string& address);
  // `out_key`: of calls, in our direction.
  Result<std::string> answer_call(LinkId link, const PeerRef& peer, rpc::LinkMethod method,
                                  const rpc::LinkCall& call, const link::KeyBytes& out_key)
      KVFERRY_EXCLUDES(mutex);
  Result<std::string> answer_arenas(const PeerRef& peer, const rpc::LinkCall& call,
                                    const link::KeyBytes& out_key) KVFERRY_EXCLUDES(mutex);
  // The only call whose answer comes later.
  void answer_trace(const PeerRef& peer, const std::string& body,
                    std::function<void(Result<std::string>)> done) KVFERRY_EXCLUDES(mutex);
  Result<std::string> answer_reopen(LinkId link, const std::string& body) KVFERRY_EXCLUDES(mutex);
};

}  // namespace kvferry::node
