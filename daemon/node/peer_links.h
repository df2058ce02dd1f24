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
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

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
  // called. Errors that last: PEER_NOT_ALLOWED, UCX_MISMATCH, PROTOCOL_MISMATCH, CHECK_TOO_WEAK,
  // IDENTITY_MISMATCH. Errors that may pass have code UNAVAILABLE or DEADLINE_EXCEEDED.
  virtual void ensure_link(PeerTarget target, Time deadline,
                           std::function<void(Result<PeerRef>)> done) = 0;
  // Nothing for a link that has ended.
  virtual std::optional<PeerRef> peer_of(LinkId link) const = 0;
  virtual bool may_speak_for(const std::string& node, std::string_view tenant) const = 0;

  // Calls over a link; UNAVAILABLE LINK_DOWN if it has ended.
  virtual void get_cards(LinkId link, rpc::CardQuery query, Time deadline,
                         std::function<void(Result<rpc::CardPage>)> done) = 0;
  virtual void join_forward(LinkId link, rpc::JoinForward forward, Time deadline,
                            std::function<void(Status)> done) = 0;
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
