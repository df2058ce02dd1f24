// The main process's side of the rails: starts `kvferry-rails`, hands it the arena segments, sends
// it commands and turns its records into calls of a RailsEvents. Links no UCX. Everything that
// comes from the process is taken as hostile: an impossible index or record ends it.
//
// Used by exactly one thread, the one that also starts it (the child dies with that thread).
// A command is in its ring when the call returns; a rail that sleeps learns of it by the next
// ring(), prepare_wait() or poll(), so that a batch costs one wake-up.
// Nothing here blocks except start, which waits for nothing but exec, and the destructor, which
// waits for the process's exit for at most a second.
//
// Owns the child process, the shared memory of its rings and slots, and duplicates of the segments'
// descriptors.
#pragma once

#include <poll.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/rails/records.h"
#include "daemon/rails/ucx_environment.h"

namespace kvferry::rails {

// One endpoint to a peer's rail, named by the main process; a key is never used for a second
// endpoint. Not zero.
using LaneKey = Id<struct LaneKeyTag>;
// Names one send. Not zero; free for use again after on_send_ended.
using SendToken = Id<struct SendTokenTag>;

// A piece of one arena segment.
struct Region {
  uint32_t segment = 0;  // index in the list given to RailsClient
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

struct RailSpec {
  std::string transport;  // "tcp" or "shm"
  std::string device;     // network device such as "lo"; empty: whichever UCX takes
  CpuSet cpus{};          // that its thread is bound to, its helpers and memory with it; none: any
};

// Whether the process confines itself to the system calls that rails make.
enum class Seccomp : uint8_t { kOff, kOn };

struct RailsConfig {
  // Empty: `kvferry-rails` beside the running executable, else ../libexec/kvferry/kvferry-rails.
  std::string executable;
  std::vector<RailSpec> rails;
  UcxSettings ucx;
  Duration spin =
      std::chrono::microseconds(20);  // longest spin of a rail's thread before it sleeps
  Limits limits;
  // From start to on_ready. With device segments the process starts the CUDA driver, makes a
  // context on each device and has two self-tests for each rail.
  Duration ready_timeout = std::chrono::seconds(30);
  Duration backoff_first = std::chrono::milliseconds(100);
  Duration backoff_limit = std::chrono::seconds(10);
  // The CUDA driver's library, which the process loads when there are device segments. Empty: the
  // default name.
  std::string cuda_driver;
  // kOn: where the kernel has no such filter the process ends with status 78.
  Seccomp seccomp = Seccomp::kOn;
  // "NAME=value" lines set last, past the deny list; for tests, never from a configuration file.
  std::vector<std::string> unchecked_environment;
};

// An arena segment that the rails map and register. A descriptor is duplicated and keeps the memory
// alive; a handle is a value that does not: the allocation must outlive the client, as each life of
// the process imports it anew.
struct Segment {
  int fd = -1;  // kHost: a memfd sealed against shrinking; kDeviceVmm: what the driver exported
  uint64_t bytes = 0;
  SegmentKind kind = SegmentKind::kHost;
  SegmentHandle handle{};    // kFabricVmm, kCudaMalloc
  DeviceUuid device_uuid{};  // of all but kHost
};

struct RailInfo {
  std::string transport;
  std::string device;
  std::vector<uint8_t> address;  // for the handshake: what a peer's connect() takes
  uint16_t tcp_port = 0;         // listening port; 0 where there is none
  int binding_errno = 0;         // why it is not bound to RailSpec::cpus; 0: it is, or need not be
};

struct RailsReady {
  // UCX's release; peers with another major.minor are refused by the handshake.
  uint32_t ucx_major = 0;
  uint32_t ucx_minor = 0;
  uint32_t ucx_release = 0;
  std::vector<RailInfo> rails;
};

struct RailsExit {
  bool exited = false;  // else killed by `signal`
  int status = 0;       // exit status; 78: a setting did not pass the self-test
  int signal = 0;       // SIGSYS: its filter refused a system call
  std::string why;      // the process's last words or ours; printable, bounded
  Time restart_at;      // when poll() starts it again
};

struct OfferIn {
  uint32_t rail = 0;
  // Zero: nothing is held, as it arrived eagerly, which is a protocol error, or is one too many.
  DescriptorId descriptor;
  bool too_many = false;
  std::span<const uint8_t> header;  // private copy, valid during the call
  uint64_t data_bytes = 0;
};

// What happened. The handler may call the client's connect, close, send_*, accept and drop.
class RailsEvents {
 public:
  virtual ~RailsEvents() = default;
  // All rails have passed their self-test and listen. Once per life of the process.
  virtual void on_ready(const RailsReady& ready) = 0;
  // The endpoint exists and may be sent on; says nothing about the peer.
  virtual void on_connected(LaneKey lane) = 0;
  // No endpoint was made; the key is forgotten.
  virtual void on_connect_failed(LaneKey lane, int status) = 0;
  // UCX has given the endpoint up. close() it; its requests end by themselves or by the close.
  virtual void on_lane_error(LaneKey lane, int status) = 0;
  // The answer to close(): the endpoint is gone and every send on it and every receive accepted
  // under it has been told. The key is forgotten.
  virtual void on_closed(LaneKey lane) = 0;
  // `message` is a private copy, valid during the call. Whose it is only its tag can say.
  virtual void on_control(uint32_t rail, std::span<const uint8_t> message) = 0;
  virtual void on_offer(const OfferIn& offer) = 0;
  // Nobody reads the region (or message) any more. `ok` says nothing about delivery.
  virtual void on_send_ended(SendToken token, bool ok) = 0;
  // Nobody writes the region any more; `ok`: it holds `bytes` of the offer.
  virtual void on_receive_ended(LandingId landing, bool ok, uint64_t bytes) = 0;
  // The process is gone. Every lane, descriptor, send and receive is over by this evidence; no
  // other call is made for them.
  virtual void on_died(const RailsExit& exit) = 0;
};

struct RailStats {
  uint64_t ticks = 0;
  uint64_t sleeps = 0;
  uint64_t spins = 0;
  uint64_t messages_sent = 0;
  uint64_t messages_received = 0;
  uint64_t offers_sent = 0;
  uint64_t offers_received = 0;
  uint64_t bytes_sent = 0;
  uint64_t bytes_received = 0;
  uint64_t dropped = 0;
  uint64_t refused = 0;
  uint64_t held_offers = 0;
  uint64_t operations = 0;
};

struct RailsPlan;
class RailsProcess;

class RailsClient {
 public:
  enum class Phase : uint8_t {
    kStopped,   // never started, or stop() was called
    kStarting,  // runs, not ready
    kReady,
    kWaiting,  // died; poll() starts it again when its back-off is over
  };

  // Fails with RAILS_CONFIG_INVALID, UCX_OVERRIDE_DENIED, UCX_OVERRIDE_INVALID, PORT_RANGE_INVALID,
  // SEGMENT_INVALID (host: not sealed against shrinking, smaller than told; device: no UUID, no
  // bytes, a descriptor or handle that its kind has not, or lacks; too many) or RAILS_NOT_FOUND.
  // What lies behind a device segment is found out by the process: one that cannot import or
  // register it ends with status 78 and says why.
  static Result<std::unique_ptr<RailsClient>> make(RailsConfig config,
                                                   std::span<const Segment> segments);
  ~RailsClient();
  RailsClient(const RailsClient&) = delete;
  RailsClient& operator=(const RailsClient&) = delete;

  // Spawns the process. Fails with RAILS_SPAWN_FAILED; no restart is then planned.
  Status start(Time now);
  // Ends the process and everything under way, without events. Idempotent; waits at most a second.
  void stop();
  // SIGKILL; on_died follows from poll(). For a receive that does not end (last resort).
  void kill(std::string_view why);

  Phase phase() const { return phase_; }
  // The readable ends to poll: doorbells, channel, process. Changes when generation() does.
  std::vector<pollfd> pollfds() const;
  uint64_t generation() const { return generation_; }
  // The moment poll() has something to do without any descriptor being readable.
  Time next_wakeup() const;
  // Before the thread sleeps on pollfds(): true if nothing is waiting and a doorbell will ring;
  // false: call poll() first. With Wake::kWork it does not ring for the end of a control message
  // alone.
  bool prepare_wait(Wake wake = Wake::kAny);
  // After it: what poll(2) answered for pollfds(), in their order, so that the next poll() looks at
  // nothing else. Without it, it looks at all of them.
  void waited(std::span<const pollfd> polled);
  // Wakes rails that sleep, for the commands since the last poll(), prepare_wait() or ring(). To be
  // called after a batch of them.
  void ring();
  // Hands at most `max_records` records to `events`, notices the process's death, restarts it.
  // Returns how many records were handed over.
  uint32_t poll(Time now, RailsEvents& events, uint32_t max_records = 1024);

  // --- Commands. All fail with RAILS_DOWN when the process is not ready, RAILS_BUSY when a ring,
  // the slots or the operations are used up (give the lane up or try later), LANE_UNKNOWN for a
  // lane that is not connecting or connected, or that closes.

  // `rail` is the one the endpoint is made on; `address` is the peer's RailInfo::address. Answered
  // by on_connected or on_connect_failed. LANE_EXISTS for a key in use, ADDRESS_INVALID for its
  // size.
  Status connect(LaneKey lane, uint32_t rail, std::span<const uint8_t> address);
  // Answered by on_closed. Never fails for want of room.
  Status close(LaneKey lane);
  // Copies `message` (at most kLargeSlotBytes). Answered by on_send_ended.
  Status send_control(LaneKey lane, std::span<const uint8_t> message, SendToken token);
  // Offers the region's bytes under `header` (1 to kMaxOfferHeaderBytes, copied). The region must
  // not change until on_send_ended.
  Status send_offer(LaneKey lane, std::span<const uint8_t> header, Region region, SendToken token);
  // Posts a receive of exactly the offer's data_bytes into the region; `lane` is the one that the
  // offer came by, whose close ends the receive. The descriptor is used up, also on an error answer
  // by on_receive_ended. OFFER_UNKNOWN if it is not held.
  Status accept(DescriptorId descriptor, LaneKey lane, Region region, LandingId landing);
  // Never fails for want of room. OFFER_UNKNOWN if it is not held.
  Status drop(DescriptorId descriptor);

  // --- Looking on.
  uint32_t rail_count() const;
  RailStats stats(uint32_t rail) const;  // zeros while no process runs
  // Records that named what does not exist; each is ignored.
  uint64_t bogus_records() const { return bogus_; }
  uint64_t restarts() const { return restarts_; }
  int pid() const;  // -1 while no process runs

 private:
  enum class LaneState : uint8_t { kConnecting, kUp, kClosing };
  struct Lane {
    uint32_t rail = 0;
    LaneState state = LaneState::kConnecting;
    uint32_t address_slot = kNoSlot;  // until the answer to kConnect
    uint64_t operations = 0;          // sends and receives not yet told
  };
  struct Send {
    LaneKey lane;
    uint32_t rail = 0;
    uint32_t slot = kNoSlot;
  };
  struct Landing {
    LaneKey lane;
    uint32_t rail = 0;
    uint64_t bytes = 0;
  };
  struct Held {
    uint32_t rail = 0;
    uint64_t remote = 0;  // the process's own number; means nothing here
    uint64_t bytes = 0;
  };
  struct RailBook {
    uint64_t operations = 0;
    uint64_t held = 0;
    bool ready = false;
  };

  RailsClient(RailsConfig config, RailsPlan plan);
  void forget_everything();
  void notice_death(Time now, RailsEvents& events);
  void restart(Time now);
  Duration backoff() const;
  Result<Lane*> usable_lane(LaneKey key);
  Status send(Command command, LaneKey lane, std::span<const uint8_t> bytes, const Region& region,
              SendToken token);
  Status check_region(const Region& region) const;

  // One record of the process; false: it lies.
  bool handle(Time now, uint32_t rail, const Record& record, RailsEvents& events);
  bool on_ready_record(uint32_t rail, const Record& record, Time now, RailsEvents& events);
  bool on_lane_record(uint32_t rail, const Record& record, RailsEvents& events);
  bool on_message(uint32_t rail, const Record& record, RailsEvents& events);
  bool on_send_ended(uint32_t rail, const Record& record, RailsEvents& events);
  bool on_receive_ended(uint32_t rail, const Record& record, RailsEvents& events);
  void end_operation(LaneKey lane, uint32_t rail);

  RailsConfig config_;
  std::unique_ptr<const RailsPlan> plan_;
  std::unique_ptr<RailsProcess> process_;
  Phase phase_ = Phase::kStopped;
  uint64_t generation_ = 0;
  uint64_t restarts_ = 0;
  uint64_t bogus_ = 0;
  uint32_t failures_ = 0;  // lives in a row that ended early
  uint32_t next_rail_ = 0;
  bool waited_ = false;  // and nobody has said what poll(2) saw
  // What was seen while this thread slept; looked_: since the last poll().
  bool channel_spoke_ = false;
  bool exit_seen_ = false;
  bool looked_ = false;
  Time started_at_;
  Time ready_at_;
  Time restart_at_ = Time::never();
  Time checked_at_;
  std::string kill_reason_;

  RailsReady ready_;
  std::vector<RailBook> books_;
  std::unordered_map<LaneKey, Lane, IdHash> lanes_;
  std::unordered_map<SendToken, Send, IdHash> sends_;
  std::unordered_map<LandingId, Landing, IdHash> landings_;
  std::unordered_map<DescriptorId, Held, IdHash> held_;
  uint64_t next_descriptor_ = 1;  // never starts anew: an id of a dead process is met by nobody
  std::vector<uint8_t> inbox_;
};

}  // namespace kvferry::rails
