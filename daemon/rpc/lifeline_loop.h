// The lifeline's thread: one epoll loop over listeners, connections, process descriptors and
// doorbells. Private to lifeline.cc; everything but wake() and the constructor runs on the thread.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/base/units.h"
#include "daemon/rpc/lifeline.h"

namespace kvferry::rpc {

class Lifeline::Loop {
 public:
  Loop(Lifeline& owner, LifelineEvents& events) : owner_(owner), events_(events) {}
  ~Loop() { stop(); }

  Status start();  // binds and starts the thread
  void stop();     // idempotent; joins
  void wake();     // any thread

 private:
  struct Connection {
    UniqueFd fd;
    UniqueFd pidfd;  // empty where the kernel cannot say
    std::size_t socket = 0;
    ucred credentials{};
    Time attach_by;
    std::shared_ptr<Session> session;  // null until attached
  };
  struct Listener {
    UniqueFd fd;
    std::set<uint64_t> unattached;  // connections by age
    uint32_t attached = 0;
    std::shared_ptr<Session::SocketUse> use = std::make_shared<Session::SocketUse>();
  };
  // What an epoll event is about, beside the connection's key.
  enum Source : uint64_t { kWake = 0, kListener = 1, kLifeline = 2, kProcess = 3, kDoorbell = 4 };
  static constexpr uint64_t kSourceBits = 3;

  bool watch(int fd, uint64_t key, Source source);
  void run();
  void handle(uint64_t key, Source source);
  void accept_some(std::size_t socket);
  void admit(std::size_t socket, UniqueFd fd);
  // Turns away the oldest that has not attached, of the process that has most of them.
  void make_room(std::size_t socket);
  // Reads what has come; at most a few messages, so that one worker does not hold up the others.
  void read_some(uint64_t key);
  // False: the connection has been ended.
  bool on_message(uint64_t key, std::span<const std::byte> bytes, std::vector<UniqueFd> fds);
  bool on_attach(uint64_t key, const lifeline::AttachRequest& request);
  bool on_pools(uint64_t key, const lifeline::PoolsMessage& message, std::vector<UniqueFd> fds);
  Result<std::shared_ptr<Session>> make_session(Connection& connection,
                                                const lifeline::AttachRequest& request);
  // A live holder of the name in this tenant, after those that have died unnoticed were ended.
  bool name_taken(const std::string& tenant, const std::string& name);
  Status check_former_uid(const std::string& tenant, const std::string& name, uid_t uid) const;
  void remember_name(const Session& session);
  bool send_reply(Connection& connection, const Session& session);
  void send_refusal(const Connection& connection, const Error& error);
  void end(uint64_t key, GoneReason reason);
  void expire_unattached(Time now);
  void end_evicted();
  int next_timeout_ms(Time now) const;
  const LifelineSocket& socket_config(std::size_t index) const {
    return owner_.config_.sockets[index];
  }

  Lifeline& owner_;
  LifelineEvents& events_;
  UniqueFd epoll_;
  UniqueFd wake_;
  UniqueFd self_pidfd_;
  UniqueFd spare_;  // given up for a moment when the process has no descriptor left
  std::vector<Listener> listeners_;
  std::map<uint64_t, Connection> connections_;
  uint64_t next_key_ = 1;
  // Names of the dead and who had them: only the same uid may take one again. Bounded; the oldest
  // is forgotten first.
  std::map<std::pair<std::string, std::string>, uid_t> former_;
  std::vector<std::pair<std::string, std::string>> former_order_;
  std::size_t former_next_ = 0;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace kvferry::rpc
