// One engine between a worker that calls anything, two peers that say anything, and an executor
// that answers in any order, well or badly. The executor is honest (the engine may count on that):
// each command is answered once, and never after the rails process has died. Every command is
// looked at: which bytes of the arena are being read or written is kept here, and what collides
// ends the run.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "daemon/engine/engine.h"
#include "daemon/engine/proofs.h"
#include "daemon/link/codec.h"
#include "tests/fuzz/input.h"

namespace kvferry::fuzz {

inline constexpr uint64_t kChunk = 64;
inline constexpr uint64_t kTokenBytes = 10;
inline constexpr uint32_t kLanes = 2;
inline constexpr uint32_t kMappedArena = 1;

struct FuzzLayout : engine::LayoutHandle {
  bool serves(uint32_t group, const LayoutHandle&, uint32_t other) const override {
    return group == other;
  }
};
struct FuzzPlan : engine::Plan {
  FuzzPlan() { ++alive; }
  ~FuzzPlan() override { --alive; }
  FuzzPlan(const FuzzPlan&) = delete;
  FuzzPlan& operator=(const FuzzPlan&) = delete;
  bool same_source(const engine::Plan& other) const override {
    return source != 0 && source == static_cast<const FuzzPlan&>(other).source;
  }
  uint64_t source = 0;
  inline static uint64_t alive = 0;
};

inline BootId boot_of(uint8_t n) {
  BootId boot;
  boot.bytes[0] = n;
  return boot;
}
inline Incarnation incarnation_of(uint8_t n) {
  Incarnation incarnation;
  incarnation.bytes[0] = n;
  return incarnation;
}

// A peer's daemon, and what it has heard.
struct Peer {
  std::string node;
  BootId boot;
  LinkId link;
  bool up = false;
  bool ever_up = false;
  bool initiator = false;  // this side dialled
  std::array<uint64_t, kLanes> next{};
  std::array<uint32_t, kLanes> epoch{};
  uint64_t next_pull = 1;
  std::vector<engine::MsgPull> pulls;    // what it could send to
  std::vector<engine::MsgSlice> slices;  // what it could receive
  std::vector<engine::SendOffer> offers;
  std::vector<std::pair<PullId, engine::CreditGrant>> credits;
};

class EngineWorld {
 public:
  explicit EngineWorld(Input& in);
  void step();
  // Everybody goes; nothing may stay.
  void finish();

 private:
  // --- workers (engine_calls.cc)
  void call();
  engine::OpRef new_op(WorkerId worker);
  engine::TransferKey some_key();
  std::vector<Range> some_ranges();
  void call_send(engine::OpRef op);
  void call_receive(engine::OpRef op);
  void call_reuse(engine::OpRef op);
  std::shared_ptr<const FuzzLayout> some_layout();
  void worker_comes_or_goes();

  // --- peers (engine_peers.cc)
  void peer_says();
  void say(Peer& peer, engine::ControlMessage message);
  engine::ControlMessage some_message(Peer& peer);
  engine::MsgPull make_pull(Peer& peer);
  engine::MsgUpdate make_update(Peer& peer);
  engine::MsgSlice make_slice(Peer& peer);
  void offer(Peer& peer);
  void link_changes();
  void bring_up(Peer& peer);
  PullId some_pull(Peer& peer);
  engine::LaneRef some_lane(Peer& peer);

  // --- the executor (engine_world.cc)
  void post(engine::Event event);
  void settle();
  void pass(Duration time);
  void look_at(const engine::Command& command);
  void answer(std::size_t which, bool well);
  void rails_die();
  Peer* peer_of(LinkId link);

  enum class Use : uint8_t { kGather, kScatter, kSend, kReceive };
  void begin_use(Use use, uint64_t id, const memory::Region& region, uint64_t bytes);
  void end_use(Use use, uint64_t id);

  struct Answers;  // visits a command and answers it
  friend struct Answers;

  Input& in_;
  Time now_{1'000'000'000};
  std::array<Peer, 2> peers_;
  std::vector<std::shared_ptr<const FuzzLayout>> layouts_;
  std::set<uint64_t> workers_;
  uint64_t next_worker_ = 3;
  uint64_t next_op_ = 1;
  uint64_t next_link_ = 1;
  uint64_t next_descriptor_ = 1;
  uint64_t next_credit_ = 1;
  bool rails_up_ = true;
  bool drained_ = false;
  std::set<std::pair<uint64_t, uint64_t>> waiting_;  // calls without an answer: worker, op
  std::set<DescriptorId> held_;
  std::set<DescriptorId> lost_;  // were held when the rails process died
  std::map<std::pair<Use, uint64_t>, std::pair<memory::Region, uint64_t>> uses_;
  std::deque<engine::Command> open_;  // commands that want an answer
  engine::Commands commands_;
  engine::Engine engine_;
};

}  // namespace kvferry::fuzz
