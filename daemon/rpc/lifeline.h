// The daemon's end of the lifelines: the Unix sockets where workers attach, hand over memory
// descriptors, and whose closing tells of their death. Message formats: proto/kvferry/lifeline.h.
//
// One thread serves all sockets. Its callbacks come one at a time from that thread, with no lock
// held; they must not block. start, stop, find, sessions, close_session and the functions of
// Session may be called from any thread.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/base/units.h"
#include "daemon/rpc/control_page.h"
#include "proto/kvferry/lifeline.h"

namespace kvferry::rpc {

// [A-Za-z0-9][A-Za-z0-9._:+-]{0,62}: names of workers, instances, pools, tenants, roles, reasons.
bool valid_name(std::string_view name);

// What may be held at a time, by one worker or by all of a socket together.
struct WorkerLimits {
  uint32_t transfers = 4096;  // open ones
  uint32_t pools = 4096;
  uint64_t pool_bytes = uint64_t{1} << 40;
  uint32_t descriptors = 4096;  // waiting ones and claimed ones
  uint32_t calls = 8192;        // without an answer
  // Of a socket alone; a worker's are the engine's.
  uint32_t claims = UINT32_MAX;  // and declines that are remembered
  uint32_t reservations = UINT32_MAX;
};
// Of some workers together.
inline constexpr WorkerLimits kNoLimits{UINT32_MAX, UINT32_MAX, UINT64_MAX, UINT32_MAX, UINT32_MAX};

// RESOURCE_EXHAUSTED SOCKET_LIMIT, which names the key of [[socket]]: "max_calls".
tl::unexpected<Error> socket_limit(const std::string& what, uint64_t most, const std::string& key,
                                   std::string field = {});

// One socket. It alone decides the tenant of those who attach to it.
struct LifelineSocket {
  std::string path;  // at most 107 bytes; a stale socket file there is replaced
  uint32_t mode = 0660;
  std::vector<uint32_t>
      uids;  // who may attach; empty: whoever the mode lets in. 65534 never matches
  std::string tenant = "default";
  std::string grpc_path;            // told to workers; at most 107 bytes
  uint32_t max_workers = 1024;      // attached to this socket
  WorkerLimits worker_limits;       // each; a worker's status table has a slot a transfer
  WorkerLimits limits = kNoLimits;  // all together
};

struct LifelineConfig {
  BootId boot;
  std::vector<LifelineSocket> sockets;
  ControlPageConfig page;  // `slots` is replaced by the transfers that a worker may hold
  Duration attach_timeout = std::chrono::seconds(5);
  uint32_t max_unattached = 64;  // connections of a socket that have not said their name
};

// The descriptors of a pool that a worker sent and nobody has claimed yet. Never empty.
struct PoolDescriptors {
  struct Part {
    uint64_t bytes = 0;  // as the worker says; to be checked against the file
    UniqueFd fd;
  };
  lifeline::PoolKind kind = lifeline::PoolKind::kHostShm;
  std::vector<Part> parts;  // one, but of kCudaVmmFd
};

// One attached worker. Facts never change; kept alive by whoever still uses it after its end.
class Session {
 public:
  struct Facts {
    WorkerId id;
    std::string name;
    std::string tenant;
    lifeline::Role role = lifeline::Role::kRank;
    uint32_t protocol = 0;
    uid_t uid = 0;
    gid_t gid = 0;
    pid_t pid = 0;           // 0: not visible from the daemon's pid namespace
    std::size_t socket = 0;  // index into LifelineConfig::sockets
    WorkerLimits worker_limits;
    WorkerLimits limits = kNoLimits;  // of all workers of the socket together
  };
  // What all workers of a socket hold together, of what this folder counts.
  struct SocketUse {
    std::atomic<uint32_t> descriptors{0};
    std::atomic<uint32_t> calls{0};
  };

  Session(Facts facts, Token token, std::unique_ptr<ControlPage> page,
          std::shared_ptr<SocketUse> socket_use);

  const Facts& facts() const { return facts_; }
  WorkerId id() const { return facts_.id; }
  ControlPage& page() const { return *page_; }
  bool alive() const { return alive_.load(std::memory_order_acquire); }

  // Claims what was sent under this name: each only once. It goes on counting against the worker's
  // limit until release_descriptors(). NOT_FOUND POOL_NOT_SENT.
  Result<PoolDescriptors> take_pool(std::string_view name) KVFERRY_EXCLUDES(mutex_);
  // So many claimed descriptors have been closed. What is claimed at the session's end counts no
  // more.
  void release_descriptors(std::size_t count) KVFERRY_EXCLUDES(mutex_);
  // A call that will be answered later. Each that has begun is ended once. RESOURCE_EXHAUSTED
  // TOO_MANY_CALLS, SOCKET_LIMIT.
  Status begin_call();
  void end_call();
  uint32_t descriptors() const KVFERRY_EXCLUDES(mutex_);

 private:
  friend class Lifeline;
  // Part 0 replaces what still waits under the name. RESOURCE_EXHAUSTED DESCRIPTOR_LIMIT,
  // SOCKET_LIMIT, INVALID_ARGUMENT POOL_PART_INVALID. By the lifelines' thread alone: nobody else
  // makes the socket's count go up.
  Status add_pool_part(const std::string& name, lifeline::PoolKind kind, uint32_t part,
                       PoolDescriptors::Part descriptor) KVFERRY_EXCLUDES(mutex_);
  void end() KVFERRY_EXCLUDES(mutex_);

  const Facts facts_;
  const Token token_;
  const std::unique_ptr<ControlPage> page_;
  const std::shared_ptr<SocketUse> socket_use_;
  std::atomic<uint32_t> calls_{0};
  std::atomic<bool> alive_{true};
  mutable Mutex mutex_;
  std::map<std::string, PoolDescriptors, std::less<>> waiting_ KVFERRY_GUARDED_BY(mutex_);
  std::size_t waiting_parts_ KVFERRY_GUARDED_BY(mutex_) = 0;
  std::size_t claimed_ KVFERRY_GUARDED_BY(mutex_) = 0;
};

enum class GoneReason : uint8_t {
  kClosed,         // the worker closed its lifeline
  kProcessExited,  // its process ended (a child may still hold the socket)
  kProtocol,       // a message that breaks the protocol
  kEvicted,        // close_session()
  kStopped,        // the daemon stops
};
std::string_view name_of(GoneReason reason);

class LifelineEvents {
 public:
  virtual ~LifelineEvents() = default;
  // Before the worker learns its token: whatever it calls afterwards finds the session known.
  virtual void on_attached(const std::shared_ptr<Session>& session) = 0;
  // Exactly once per on_attached. The name may be taken again from now on.
  virtual void on_gone(const std::shared_ptr<Session>& session, GoneReason reason) = 0;
  // The worker has advanced timeline words.
  virtual void on_doorbell(const std::shared_ptr<Session>& session) = 0;
  // Somebody was turned away, or a connection ended before it was attached. For logs and counters.
  virtual void on_refused(std::size_t /*socket*/, const Error& /*error*/) {}
};

class Lifeline {
 public:
  // Binds all sockets and starts the thread; `events` must outlive the object. Errors:
  // INVALID_ARGUMENT LIFELINE_CONFIG naming the field, ALREADY_EXISTS SOCKET_IN_USE when another
  // process listens there, INTERNAL LIFELINE_FAILED (the call is named).
  static Result<std::unique_ptr<Lifeline>> start(LifelineConfig config, LifelineEvents& events);
  // Stops. Waits for the thread, which calls on_gone(kStopped) for all sessions before it ends.
  ~Lifeline();
  Lifeline(const Lifeline&) = delete;
  Lifeline& operator=(const Lifeline&) = delete;
  void stop();

  // By token, in time that does not depend on where a wrong one differs. Null if none is attached
  // under it.
  std::shared_ptr<Session> find(std::span<const uint8_t> token) const KVFERRY_EXCLUDES(mutex_);
  std::shared_ptr<Session> find(WorkerId id) const KVFERRY_EXCLUDES(mutex_);
  // In order of attachment.
  std::vector<std::shared_ptr<Session>> sessions() const KVFERRY_EXCLUDES(mutex_);
  // Ends an attachment; on_gone follows from the thread. Nothing happens for an unknown id.
  void close_session(WorkerId id) KVFERRY_EXCLUDES(mutex_);

 private:
  class Loop;
  explicit Lifeline(LifelineConfig config);
  void add(const std::shared_ptr<Session>& session) KVFERRY_EXCLUDES(mutex_);
  void remove(const Session& session) KVFERRY_EXCLUDES(mutex_);

  const LifelineConfig config_;
  mutable Mutex mutex_;
  std::map<uint64_t, std::shared_ptr<Session>> sessions_ KVFERRY_GUARDED_BY(mutex_);
  std::vector<WorkerId> evicted_ KVFERRY_GUARDED_BY(mutex_);
  std::unique_ptr<Loop> loop_;
};

}  // namespace kvferry::rpc
