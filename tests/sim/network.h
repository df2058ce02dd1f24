// The network between the daemons and their rails processes: handshakes, lanes, messages and UCX
// transfers with the semantics that were measured on the real ones.
//
//  * A control message may be delayed, overtaken, doubled, or vanish while its lane stays up.
//  * When a wire (one epoch of a lane) breaks, some of what is on it still arrives. Each side
//  learns of
//    it by an error, or by nothing at all.
//  * An offer's header arrives; the data are read from the sender's staging memory only after the
//    receiver has accepted, piece by piece, and written some time after they were read. A send that
//    ends says nothing of delivery. A posted receive may be written until it has ended, also after
//    its wire broke; it ends once its data are in, once the side has learnt of the break, once the
//    side closes the lane, or with its rails process.
//
// What would be a mistake of the engine (a descriptor used twice, a lane that is not its link's)
// throws Violation.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <vector>

#include "daemon/engine/commands.h"
#include "daemon/engine/events.h"
#include "tests/sim/world.h"

namespace kvferry::sim {

class Network {
 public:
  explicit Network(World& world);

  // Whether `from`'s engine has been told of a link to the daemon that runs on `to` now.
  bool link_up(uint32_t from, uint32_t to) const;
  // Starts a handshake if none is under way.
  void dial(uint32_t from, uint32_t to);
  // The node that a link of this node leads to.
  std::optional<uint32_t> peer_of(uint32_t node, LinkId link) const;
  // ... and the life of it that had shaken hands.
  std::optional<std::pair<uint32_t, uint64_t>> peer_life_of(uint32_t node, LinkId link) const;

  // Whether that link is up as far as this side has been told.
  bool is_up(uint32_t node, LinkId link) const;

  // Commands.
  void connect_lane(uint32_t node, const engine::LaneRef& lane);
  void reopen_lane(uint32_t node, const engine::LaneRef& lane);
  void close_lane(uint32_t node, const engine::LaneRef& lane);
  void tell_lane_down(uint32_t node, const engine::LaneRef& lane);
  void close_link(uint32_t node, LinkId link);
  void send_message(uint32_t node, const engine::SendMessage& command);
  void send_refuse(uint32_t node, const engine::SendRefuse& command);
  void send_offer(uint32_t node, const engine::SendOffer& command);
  void accept_offer(uint32_t node, const engine::AcceptOffer& command);
  void drop_offer(uint32_t node, const engine::DropOffer& command);

  // What goes wrong.
  void node_died(uint32_t node);
  void rails_died(uint32_t node);
  void break_some_wire(Rng& rng);
  void partition(uint32_t a, uint32_t b, Duration length);

  // Every credit that is LIVE at one end of a link is known at its other end, if nothing is on the
  // way between them and both know of all that was lost. Returns how many.
  uint64_t check_credits() const;

  // Nothing is held or posted on this node's rails any more, as far as the engine is responsible.
  void check_idle(uint32_t node) const;

 private:
  struct End {  // one side of a link
    uint32_t node = 0;
    uint64_t life = 0;
    LinkId id;
    bool up = false;  // its engine was told, and neither it nor the peer has ended it
    bool told = false;
  };
  struct Link {
    std::array<End, 2> ends;
    uint32_t initiator = 0;
    std::array<uint64_t, 2> rails{};  // lives of the rails processes at the handshake
    uint64_t on_the_way = 0;          // control messages and REFUSEs
  };
  using WireKey = std::tuple<uint64_t, uint32_t, uint32_t>;  // link, lane, epoch
  struct Wire {
    std::array<uint64_t, 2> rails{};
    std::array<bool, 2> connecting{};
    std::array<bool, 2> connected{};
    std::array<bool, 2> closed{};
    std::array<bool, 2> failed{};  // that side has had an error
    bool broken = false;
    bool vanished = false;  // a control message of it has
    std::set<uint64_t> flights;
  };
  struct Data {  // a piece of an accepted offer between its read and its write
    uint64_t begin = 0;
    std::vector<uint8_t> bytes;
    bool read = false;
    bool late = false;
    bool written = false;
  };
  struct Flight {  // an offer
    WireKey wire;
    uint32_t side = 0;  // the sender's side of the link
    engine::MsgOffer offer;
    memory::Region staging;
    uint64_t staging_use = 0;
    bool sending = true;      // the sender's request has not ended
    DescriptorId descriptor;  // 0: not (any longer) held by the receiver's rails
    bool accepted = false;
    bool landing_open = false;  // the receiver's request has not ended
    LandingId landing;
    memory::Region region;
    uint64_t region_use = 0;
    std::vector<Data> pieces;
  };

  bool alive(const End& end) const;
  bool quiet(uint64_t index, const Link& link) const;
  bool rails_ok(const Link& link, const Wire& wire, uint32_t side) const;
  // The link and side of an engine's link; nullopt once it is closed or its peer's is another.
  std::optional<std::pair<uint64_t, uint32_t>> find(uint32_t node, LinkId link) const;
  Wire& wire_of(const WireKey& key);
  engine::LaneRef lane_at(const WireKey& key, uint32_t side) const;
  Duration latency();
  // ... of data on that wire.
  Duration data_latency(const WireKey& key);
  void post(const End& end, engine::Event event);
  void handshake(uint32_t from, uint32_t to);
  void establish(uint32_t from, uint32_t to);
  void map_arenas(uint64_t index, uint32_t side);
  void unmap_arenas(uint64_t index, uint32_t side);
  void tell_unmapped(uint64_t index, uint32_t side);
  void end_link(uint64_t index, uint32_t side);
  void break_wire(const WireKey& key);
  void lose_requests(const WireKey& key, uint32_t side);
  void rails_gone(uint32_t node);
  void learn(const WireKey& key, uint32_t side, Duration delay);
  void end_requests(const WireKey& key, uint32_t side, uint64_t most_us);
  // Delivers `event` for the other side's engine after `delay`, unless the wire loses it.
  void carry(const WireKey& key, uint32_t from_side, Duration delay, engine::Event event);
  void carry(const WireKey& key, uint32_t from_side, Duration delay, engine::Event event,
             bool survives);
  bool ambush(const WireKey& key, uint32_t side, const engine::SendMessage& command);
  // How much later what was on a broken wire arrives, if it does.
  Duration lateness() { return world_.rng.micros(0, 25000); }
  bool loses(const WireKey& key, uint32_t to_side, bool survives);
  void arrive(uint64_t flight, bool survives);
  void move_piece(uint64_t flight, std::size_t piece, bool survives);
  void write_piece(uint64_t flight, std::size_t piece, bool survives);
  void end_send(uint64_t flight);
  void end_landing(uint64_t flight, bool ok);
  bool partitioned(uint32_t a, uint32_t b) const;

  World& world_;
  std::map<uint64_t, Link> links_;
  std::map<WireKey, Wire> wires_;
  std::map<uint64_t, Flight> flights_;
  std::map<std::pair<uint32_t, uint64_t>, std::pair<uint64_t, uint32_t>> by_id_;  // node, link id
  std::map<DescriptorId, uint64_t> descriptors_;                                  // held ones
  std::set<DescriptorId> gone_descriptors_;  // that ended with their rails process
  std::set<std::pair<uint32_t, uint32_t>> dialling_;
  std::map<std::pair<uint32_t, uint32_t>, Time> partitions_;
  uint32_t ambushes_left_ = 6;
  uint64_t next_link_ = 1;
  uint64_t next_flight_ = 1;
  uint64_t next_descriptor_ = 1;
};

}  // namespace kvferry::sim
