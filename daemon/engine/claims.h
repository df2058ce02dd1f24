// A receiver's word before its Receive: CLAIM ("I shall come", renewed until Receive, Decline or
// the worker's death) and DECLINE ("I shall not"). Part of Core.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "daemon/engine/state.h"
#include "daemon/engine/timers.h"

namespace kvferry::engine {

class Core;

class Claims {
 public:
  explicit Claims(Core& core) : core_(core) {}

  void claim(const ClaimOp& op);
  void decline(const DeclineOp& op);
  bool resolved(Resolved& event);
  // The rank's Receive has come: nothing more to claim.
  void received(WorkerId worker, const RankKey& key);
  // A Receive has ended before any PULL of it went out: its sender's pages wait for nobody.
  void decline_unheard(const Receive& receive);
  void worker_gone(WorkerId worker);
  void layout_gone(const LayoutHandle* layout);
  void resync(Link& link);
  void timer(TimerKey key);
  void check_invariants() const;

 private:
  // One word of one receiver rank about one transfer.
  struct Word {
    uint64_t id = 0;
    bool declines = false;
    WorkerId worker;
    uint32_t socket = 0;
    uint64_t client_handle = 0;  // of a Claim
    TransferKey key;
    TransferName name;
    const LayoutHandle* registered = nullptr;    // of a claim: to know it by; not followed
    std::shared_ptr<const LayoutHandle> layout;  // what it says, without its memory
    std::shared_ptr<const ReceiveOp> question;
    Duration ttl{};
    ResolveId resolve;
    Incarnation sender_incarnation;
    std::vector<std::pair<std::string, uint32_t>> legs;  // node, sender rank
  };

  Word& add(const OpRef& op, uint32_t socket, const TransferKey& key, const std::string& ticket,
            const std::shared_ptr<const LayoutHandle>& registered, bool declines);
  void take_back(uint64_t id);
  void remember_decline(const Word& word);
  void tell(const Word& word);
  void tell(const Word& word, Link& link, uint32_t sender_rank);
  void forget(uint64_t id);
  bool full(WorkerId worker, bool declines) const;
  bool full(uint32_t socket) const;
  // These have answered the call if they are true.
  // `replaces`: a word of the same socket goes for it.
  bool refused(const OpRef& op, const LayoutHandle* layout, bool declines, bool replaces);
  bool closed(const OpRef& op, const RankKey& name);

  Core& core_;
  std::map<uint64_t, Word> words_;
  std::map<RankKey, uint64_t> by_name_;
  std::map<ResolveId, uint64_t> resolves_;
  std::map<std::pair<WorkerId, bool>, uint64_t> per_worker_;  // how many; true: of declines
  std::map<uint32_t, uint64_t> per_socket_;                   // of both, also of workers that went
};

}  // namespace kvferry::engine
