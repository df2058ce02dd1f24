// The borrower's side of mapped arenas: for each link asks the peer what it lends, maps what can be
// mapped here, and tells the engine of each arena (ArenaMapped). After the link's end an arena is
// unmapped when the last copy has let it go, and when all of a link are, the peer is told so over
// the socket (README.md has the rules of evidence).
//
// Nothing is promised to anybody: whatever fails, chunks go by the rails, and one line in the log
// says why. Work is done by two threads of its own, `kvf-borrow`: imports wait for peers and for
// pages to be pinned (0.2 s a GiB).
#pragma once

#include <cstdint>
#include <memory>

#include "daemon/base/ids.h"
#include "daemon/base/units.h"
#include "daemon/gpu/device.h"
#include "daemon/node/peer_links.h"
#include "daemon/node/segments.h"
#include "daemon/rpc/peer_messages.h"

namespace kvferry::node {

struct ArenaBorrowerConfig {
  rpc::HostId host;  // this_host()
  // Null: no GPU is used here, so no device arenas are borrowed and host arenas are not pinned.
  std::shared_ptr<const gpu::Devices> devices;
  Duration call_timeout = std::chrono::seconds(3);
  // A peer that does not answer, or does not know the link yet, is asked again so long.
  Duration ask_limit = std::chrono::seconds(10);
  Duration socket_timeout = std::chrono::seconds(5);  // from connecting to the last descriptor
  // Arenas into which a gather failed that are remembered; of more the oldest is forgotten.
  uint32_t max_distrusted = 1024;
};

class ArenaBorrower final : public LinkWatch {
 public:
  struct Stats {
    uint32_t arenas = 0;         // mapped now, those of ended links that a copy still uses included
    uint64_t bytes = 0;          // ... and their bytes
    uint64_t mapped = 0;         // arenas told to the engine
    uint64_t failed_ask = 0;     // links whose peer did not answer
    uint64_t failed_socket = 0;  // links whose socket gave no descriptors
    uint64_t failed_device = 0;  // arenas on a device that is not visible here, or is down
    uint64_t failed_import = 0;  // arenas that the kernel or the driver refused
    uint64_t skipped_check = 0;  // device arenas, since the link checks its chunks
    uint64_t failed_gather = 0;  // arenas that distrust() was called of
    uint64_t stuck = 0;          // arenas that the driver would not unmap: the peer is not told
  };

  // `calls` and what `sink` leads to outlive it, or at least stop().
  ArenaBorrower(ArenaBorrowerConfig config, ArenaCalls& calls, EventSink sink);
  // Stops.
  ~ArenaBorrower() override;
  ArenaBorrower(const ArenaBorrower&) = delete;
  ArenaBorrower& operator=(const ArenaBorrower&) = delete;
  // No import any more, no arena is found any more; waits for what runs, some milliseconds unless
  // pages are being pinned. What copies still hold is unmapped by the last of them, on its thread.
  // Lenders are told of what is unmapped, as ever. Idempotent.
  void stop();

  void on_link_up(const PeerRef& peer, engine::CheckKind check) override;
  void on_link_gone(LinkId link) override;

  // A gather into that arena failed: it is found no more from now on, and not borrowed again from
  // that life of the peer (bounded: see ArenaBorrowerConfig::max_distrusted). Nothing happens
  // for an arena that is not found anyway, as after the link's end. Any thread.
  void distrust(LinkId link, uint32_t arena);

  // The arena as it is mapped here, with the peer's segment numbers; null: it is not. Holding it
  // (or a keep or pin or pool of it) keeps all of it mapped. Any thread; one look-up under a lock.
  std::shared_ptr<const Segments> segments(LinkId link, uint32_t arena) const;
  Stats stats() const;

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry::node
