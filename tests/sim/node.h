// A daemon of the simulated world: an engine, its arena, and the executor of its commands. It dies
// and comes back as another life with another boot id and an empty engine.
//
// The arena is real memory. Who may be writing or reading which bytes of it right now (posted
// receives, sends, copies) is kept beside it, and every command that would collide with that throws
// Violation.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "daemon/engine/engine.h"
#include "tests/sim/mapping.h"
#include "tests/sim/world.h"

namespace kvferry::sim {

// What is going on with a stretch of the arena.
enum class Use : uint8_t { kReceive, kSend, kGather, kScatter, kPeer };

class Node {
 public:
  Node(World& world, uint32_t index);

  void start();  // a new life
  void die();
  void rails_die(Duration back_after);
  bool alive() const { return engine_ != nullptr; }
  bool rails_up() const { return rails_up_; }
  uint64_t life() const { return life_; }
  uint64_t rails_life() const { return rails_life_; }
  uint32_t index() const { return index_; }
  BootId boot() const { return boot_; }
  const std::string& name() const { return name_; }
  engine::EngineSnapshot snapshot() const;
  const engine::Engine& engine() const { return *engine_; }

  // Something for the engine; handled soon, in order.
  void post(engine::Event event);
  bool idle() const { return inbox_.empty(); }  // it has handled all that has come
  void stall(Duration length);
  // Its clock alone is that much later from one moment to the next; what the engine is told of it
  // comes behind what has waited in its inbox.
  void leap(Duration length);
  void drain(Duration limit);
  bool draining() const { return draining_; }
  LinkId new_link_id() { return {++last_link_}; }

  // Arena bytes for the network.
  uint8_t* arena(const memory::Region& region, uint64_t offset, uint64_t bytes);
  uint32_t arena_of(const memory::Region& region) const { return arena_of_.at(region.segment); }
  uint64_t begin_use(Use use, const memory::Region& region, const char* command);
  void end_use(uint64_t use);

  // No copy of this side of a transfer runs (checked where its pages are said to be released).
  bool copying(uint64_t side) const;
  bool copying_layout(const engine::LayoutHandle* layout) const;
  std::size_t uses() const { return uses_.size(); }
  // Whether a gather into a region of that link's peer runs.
  bool writes_over(LinkId link) const;
  std::size_t watches() const { return watches_.size(); }
  // A worker's word has moved, or a worker is gone.
  void words_changed();

 private:
  struct Occupied {
    Use use;
    memory::Region region;
  };
  struct Copy {
    CopyId id;
    std::shared_ptr<const SimPlan> plan;
    uint64_t offset = 0;
    uint64_t bytes = 0;
    memory::Region region;
    engine::CheckKind kind = engine::CheckKind::kNone;
    bool gather = true;
    uint64_t use = 0;
    uint64_t done = 0;
    // Of a gather into the region of a peer: that life of it, and what its engine has granted.
    std::optional<std::pair<uint32_t, uint64_t>> peer;
    LinkId link;
    uint64_t grant = 0;
    std::optional<uint64_t> enemys;              // of one into the enemy's: as he counts it
    std::shared_ptr<const SimPlan> destination;  // of a local copy: `plan` is its source
    bool clears = false;                         // writes zeros: `plan` is a tail
    std::shared_ptr<const SimLayout> packed;     // makes a packed copy: its answer says this ...
    std::vector<engine::GroupBlocks> packed_blocks;  // ... and this

    const SimPlan* written() const {
      return destination != nullptr ? destination.get() : gather ? nullptr : plan.get();
    }
    bool reads() const { return destination != nullptr || gather; }
  };

  Time clock() const;  // the engine's time
  void schedule(Duration delay);
  void tick();
  void arm_timer();
  void check_now() const;
  void check_peers_word() const;
  void carry_out(engine::Command& command);
  void compile(const engine::Compile& command);
  void compile_copy(const engine::CompileCopy& command);
  void resolve_pull(const engine::ResolvePull& command);
  template <typename Command>
  static Copy between_region_and_pages(const Command& command);
  void start_gather(const engine::Gather& command);
  void start_mapped_gather(const engine::Gather& command);
  void check_link(LinkId link) const;
  void run_mapped(uint64_t key);
  Node* peer_of(const Copy& copy) const;
  engine::Lent check_lent(const Copy& copy, const char* when) const;
  void tell_of_death();
  void start_scatter(const engine::Scatter& command);
  void start_clear_tail(const engine::ClearTail& command);
  void start_local_copy(const engine::LocalCopy& command);
  void make_packed(const engine::MakePacked& command);
  void check_writes(const Copy& copy);
  static void check_apart(const SimPlan& a, const Copy& one, const SimPlan& b, const Copy& two,
                          const char* name, const char* what);
  void run_copy(uint64_t key);
  void check_copy(const Copy& copy) const;
  uint32_t check_arena(const Copy& copy) const;
  void continue_copy(uint64_t key, uint32_t steps_left, Duration pause, bool fails);
  void end_copy(uint64_t key, engine::CopyOutcome outcome, engine::Check check);
  void resolve(const engine::Resolve& command);
  void try_resolve(const engine::Resolve& command, uint32_t tries);
  engine::Check check_of(const Copy& copy);
  engine::Check checksum(const memory::Region& region, uint64_t bytes, engine::CheckKind kind);

  World& world_;
  uint32_t index_;
  std::string name_;
  Rng rng_;
  uint64_t life_ = 0;
  uint64_t rails_life_ = 0;
  uint64_t last_link_ = 0;
  bool rails_up_ = false;
  bool draining_ = false;
  BootId boot_;
  std::unique_ptr<engine::Engine> engine_;
  std::deque<engine::Event> inbox_;
  bool scheduled_ = false;
  Time stalled_until_{};
  Duration ahead_{};  // of the world's time, for ever: each leap's length
  Time timer_at_ = Time::never();
  std::vector<std::vector<uint8_t>> segments_;  // of all arenas
  std::vector<uint32_t> arena_of_;              // by segment
  std::map<uint64_t, Occupied> uses_;
  uint64_t next_use_ = 1;
  std::map<uint64_t, Copy> copies_;
  std::set<CopyId> copy_ids_;
  std::map<ConditionId, engine::WatchCondition> watches_;
  std::set<ResolveId> cancelled_resolves_;
  uint64_t next_plan_ = 1;
  std::set<std::pair<uint64_t, uint64_t>> scattered_;  // plan, offset
  std::map<uint64_t, uint64_t> scattered_bytes_;       // by plan, of copies that have ended well
};

}  // namespace kvferry::sim
