// What the directory asks of the links to other daemons; the link manager implements it, tests fake
// it. Any thread; nothing blocks. Each `done` is called exactly once, possibly before the call
// returns, never under a lock of the implementation.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "daemon/base/ids.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/engine/events.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

// Where events for the engine go; must only enqueue.
using EventSink = std::function<void(engine::Event)>;

struct PeerTarget {
  std::string node;     // identity that must answer; empty: whoever is allowed at that address
  std::string address;  // host:port
};
struct PeerRef {
  LinkId link;
  std::string node;
  BootId boot;
};

class PeerLinks {
 public:
  virtual ~PeerLinks() = default;

  // A link to that node, dialled if there is none; its LinkUp has been posted when `done` is
  // called. Errors that last: PEER_NOT_ALLOWED, PEER_CERTIFICATE, PEER_MODE,
  // IDENTITY_MISMATCH, UCX_MISMATCH, PROTOCOL_MISMATCH, CHECK_TOO_WEAK. Errors that may pass have
  // code UNAVAILABLE or DEADLINE_EXCEEDED.
  virtual void ensure_link(PeerTarget target, Time deadline,
                           std::function<void(Result<PeerRef>)> done) = 0;
  // Whether ensure_link() to that node would find a link, or needs none.
  virtual bool has_link(const std::string& node) const = 0;
  // Nothing for a link that has ended.
  virtual std::optional<PeerRef> peer_of(LinkId link) const = 0;
  virtual bool may_speak_for(const std::string& node, std::string_view tenant) const = 0;

  // Calls over a link; UNAVAILABLE LINK_DOWN if it has ended.
  virtual void get_cards(LinkId link, rpc::CardQuery query, Time deadline,
                         std::function<void(Result<rpc::CardPage>)> done) = 0;
  virtual void join_forward(LinkId link, rpc::JoinForward forward, Time deadline,
                            std::function<void(Status)> done) = 0;
};

// Arenas of peers, asked for over a link.
class ArenaCalls {
 public:
  virtual ~ArenaCalls() = default;
  // UNAVAILABLE LINK_DOWN if the link has ended; UNIMPLEMENTED from a peer that lends none as it
  // does not know of that. NOT_FOUND UNKNOWN_LINK may come for a moment after the link is up: the
  // peer that dialled has not yet taken our answer.
  virtual void get_arenas(LinkId link, rpc::ArenasQuery query, Time deadline,
                          std::function<void(Result<rpc::ArenasOffer>)> done) = 0;
};

// Who answers GetArenas. Any thread; must not block. For one link and query always the same answer,
// as the sealing of its secrets needs (README.md).
class ArenaOffers {
 public:
  virtual ~ArenaOffers() = default;
  virtual rpc::ArenasOffer offer(const PeerRef& peer, const rpc::ArenasQuery& query) = 0;
};

// What a peer knows of a transfer, asked for over its link.
class TraceCalls {
 public:
  virtual ~TraceCalls() = default;
  // UNAVAILABLE LINK_DOWN without a link to that node; UNIMPLEMENTED from a peer that does not know
  // the call; RESOURCE_EXHAUSTED TRACE_BUSY.
  virtual void get_trace(const std::string& node, rpc::TraceQuery query, Time deadline,
                         std::function<void(Result<rpc::TraceReply>)> done) = 0;
};

// Who answers GetTrace. Any thread; must not block. `done` may be called later, from any thread, or
// be dropped while the daemon stops.
class TraceAnswers {
 public:
  virtual ~TraceAnswers() = default;
  // Only of parts with a leg to that peer.
  virtual void answer_trace(const PeerRef& peer, const rpc::TraceQuery& query,
                            std::function<void(Result<rpc::TraceReply>)> done) = 0;
};

// Who is told of links. Called under the link manager's lock, on any thread: must only take notes.
class LinkWatch {
 public:
  virtual ~LinkWatch() = default;
  // After its LinkUp has been posted.
  virtual void on_link_up(const PeerRef& peer, engine::CheckKind check) = 0;
  // After its LinkEnded has been posted, or by the engine's own CloseLink. Once for each link.
  virtual void on_link_gone(LinkId link) = 0;
};

// What peers ask of the directory, over a link that is up.
class PeerQuestions {
 public:
  virtual ~PeerQuestions() = default;
  // NOT_FOUND INSTANCE_UNKNOWN for what does not exist and for what this peer may not see.
  virtual Result<rpc::CardPage> answer_cards(const PeerRef& peer, const rpc::CardQuery& query) = 0;
  virtual Status answer_join(const PeerRef& peer, const rpc::JoinForward& forward) = 0;
};

}  // namespace kvferry::node
