// The two steps by which an arena of a peer comes here: its descriptors, over the peer's socket,
// and its mapping. For the borrower's threads: all functions wait, within the deadlines they are
// given.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/base/units.h"
#include "daemon/gpu/device.h"
#include "daemon/gpu/device_arena_view.h"
#include "daemon/gpu/pinned_memory.h"
#include "daemon/memory/host_pool.h"
#include "daemon/node/segments.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

// How many descriptors are kept for one link: a lender of as many arenas and segments as there can
// be would leave none for workers. The arenas that come first have them.
inline constexpr std::size_t kMaxLinkDescriptors = 64;

// Descriptors of arenas by the arena's number, in the order of its segments; none for one that was
// too many.
using ArenaDescriptors = std::map<uint32_t, std::vector<UniqueFd>>;

// The connection to a lender, as long as anything of its link is mapped here. It ends by telling
// the lender that nothing is, unless that is not so.
class LenderSession {
 public:
  // Connects, shows the token and gets the descriptors of all arenas of the offer that have some,
  // kMaxLinkDescriptors at most.
  // `stop` (an eventfd) becoming readable ends the wait. PERMISSION_DENIED SOCKET_FOREIGN where the
  // socket is neither this user's nor root's; UNAVAILABLE SOCKET_FAILED, with the call; UNAVAILABLE
  // SOCKET_CLOSED when the lender turns us away; PERMISSION_DENIED LENDER_FOREIGN when it is not
  // the link's peer; DEADLINE_EXCEEDED SOCKET_SILENT; INTERNAL SOCKET_PROTOCOL for what no lender
  // sends.
  static Result<std::shared_ptr<LenderSession>> open(const rpc::ArenasOffer& offer, Time deadline,
                                                     int stop, ArenaDescriptors& descriptors);
  ~LenderSession();
  LenderSession(const LenderSession&) = delete;
  LenderSession& operator=(const LenderSession&) = delete;

  // Something could not be unmapped: the lender is told nothing, ever.
  void keep_silent() { silent_.store(true, std::memory_order_release); }

 private:
  explicit LenderSession(UniqueFd socket) : socket_(std::move(socket)) {}
  Status get_descriptors(const rpc::ArenasOffer& offer, Time deadline, int stop,
                         ArenaDescriptors& descriptors);

  const UniqueFd socket_;
  std::atomic<bool> silent_{true};  // until there is something to tell
};

// What one arena is mapped by. Its destructor unmaps, which may take long.
struct BorrowedMemory {
  BorrowedMemory() = default;
  ~BorrowedMemory();
  BorrowedMemory(const BorrowedMemory&) = delete;
  BorrowedMemory& operator=(const BorrowedMemory&) = delete;

  struct Gauges {
    std::atomic<uint32_t> arenas{0};
    std::atomic<uint64_t> bytes{0};
    std::atomic<uint64_t> stuck{0};
  };

  std::vector<std::shared_ptr<memory::HostPool>> pools;
  std::vector<std::shared_ptr<const gpu::PinnedMemory>> pins;
  // Of the pins: those that the driver would not take back.
  std::shared_ptr<std::atomic<uint32_t>> refused = std::make_shared<std::atomic<uint32_t>>(0);
  std::shared_ptr<const gpu::Device> device;
  std::unique_ptr<gpu::DeviceArenaView> view;
  uint64_t bytes = 0;
  std::shared_ptr<Gauges> gauges;  // null until it counts
  std::shared_ptr<LenderSession> session;
};

// Maps all segments or none. `descriptors` are the arena's, `devices` may be null.
// RESOURCE_EXHAUSTED TOO_MANY_DESCRIPTORS where there are none though it needs some; the errors of
// HostPool::import, PinnedMemory::pin and DeviceArenaView::open; UNAVAILABLE PIN_FAILED where a GPU
// does not see host memory; NOT_FOUND DEVICE_NOT_VISIBLE; FAILED_PRECONDITION NO_PEER_ACCESS where
// not all GPUs that are up here reach the arena's.
Result<std::unique_ptr<BorrowedMemory>> map_arena(const rpc::OfferedArena& arena, bool same_host,
                                                  std::vector<UniqueFd> descriptors,
                                                  const gpu::Devices* devices);

// Where its segments lie. Whatever it hands out to be held holds `memory`.
std::shared_ptr<const Segments> segments_of(const rpc::OfferedArena& arena,
                                            const std::shared_ptr<const BorrowedMemory>& memory);

}  // namespace kvferry::node
