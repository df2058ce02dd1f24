// A peer that is let in and then lies: it shakes hands as a daemon does, has rails and keys of its
// own, and says what the test tells it to. One daemon at a time, one lane; everything on the test's
// thread but the answers to the daemon's calls.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "daemon/link/envelope.h"
#include "daemon/node/cards.h"
#include "daemon/node/handshake.h"
#include "daemon/rpc/peer_client.h"
#include "daemon/rpc/peer_service.h"
#include "tests/proc/hostile_scene.h"
#include "tests/proc/rails_harness.h"

namespace kvferry::hostile {

using std::chrono::milliseconds;
using testing::kPatience;

class HostilePeer : private rpc::PeerBackend {
 public:
  // `node` must stand in the daemons' [[peers]], `secret` is the cluster's.
  HostilePeer(std::string node, const std::string& secret);
  ~HostilePeer() override;

  using Spoil = std::function<void(rpc::PeerHello&)>;
  // A handshake alone, as a peer that was started again. The reason of a refusal, empty if it is
  // let in. UCX pairs the endpoints of two processes in the order they were made, and the daemon
  // has now made one that this peer has not: it links no more.
  std::string shake_hands(const bench::DaemonProcess& daemon, const Spoil& spoil = {});
  // Handshake and a lane that is up; ends an earlier link of this peer.
  void link(const bench::DaemonProcess& daemon);
  // One call about the link, tagged rightly; the answer's body.
  Result<std::string> call(rpc::LinkMethod method, std::string body);

  // Serves rails and heartbeats until `done` holds; false when it does not in time.
  bool pump(const std::function<bool()>& done,
            std::chrono::steady_clock::duration limit = kPatience);
  bool up() const { return up_; }

  // Sealed rightly, with the next number.
  void say(const engine::ControlMessage& message);
  // A sealed message, to be spoiled; takes no number.
  std::vector<uint8_t> seal(uint64_t sequence, const engine::ControlMessage& message);
  void say_bytes(std::span<const uint8_t> bytes);
  void offer(const engine::MsgOffer& offer, uint64_t data_bytes);
  // Takes the first offer that waits into this peer's arena, once.
  void accept_offer();
  uint64_t next_sequence() const { return next_; }

  // What has come; the test clears it.
  std::vector<engine::ControlMessage> heard;
  uint64_t offers_heard = 0;
  template <typename T>
  const T* find(const std::function<bool(const T&)>& which = [](const T&) { return true; }) const {
    for (const engine::ControlMessage& message : heard)
      if (const T* body = std::get_if<T>(&message); body != nullptr && which(*body)) return body;
    return nullptr;
  }

  const std::string& node() const { return node_; }
  const BootId& boot() const { return boot_; }
  // The other side of the last handshake.
  const rpc::PeerHello& theirs() const { return theirs_; }
  // An instance "default/NAME" of one rank that this peer says it has, shaped as the card's.
  std::shared_ptr<const node::CardSet> invent(const std::string& name, const rpc::RankCard& like);
  // Serves these cards, whosever they are.
  void show(const std::shared_ptr<const node::CardSet>& set);
  // What the daemon says of an instance of its own.
  rpc::CardPage cards_of(const std::string& instance);
  std::string ticket_to(const node::CardSet& set) const;

 private:
  void challenge(const rpc::Caller&, std::function<void(Result<rpc::Random32>)> done) override;
  void handshake(const rpc::Caller&, rpc::SignedHello,
                 std::function<void(Result<rpc::SignedHello>)> done) override;
  void call(const rpc::Caller&, rpc::LinkMethod method, rpc::LinkCall call,
            std::function<void(Result<rpc::LinkReply>)> done) override;
  std::string greet(const bench::DaemonProcess& daemon, const Spoil& spoil);
  Result<std::string> answer(rpc::LinkMethod method, const std::string& body);
  void take();
  rpc::PeerHello make_hello();

  const std::string node_;
  const SecretVector secret_;
  BootId boot_;
  rails::testing::Node rails_;
  std::unique_ptr<rpc::PeerServer> server_;
  std::unique_ptr<rpc::PeerDialer> dialer_;
  std::shared_ptr<rpc::PeerStub> stub_;
  link::LinkTable table_;
  LinkId link_;
  rpc::PeerHello theirs_;
  rails::LaneKey lane_;
  uint64_t last_key_ = 0;
  uint64_t next_ = 0;
  uint64_t last_token_ = 0;
  uint64_t last_offer_ = 0;
  uint64_t calls_ = 0;
  bool up_ = false;
  bool uneven_ = false;  // the daemon has made endpoints that this peer has not
  std::chrono::steady_clock::time_point pinged_{};
  std::mutex mutex_;  // what the daemon's calls look at
  link::LinkKeys keys_;
  std::map<std::string, std::shared_ptr<const node::CardSet>> invented_;
};

}  // namespace kvferry::hostile
