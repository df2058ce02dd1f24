// The parts of a Client and the thread that watches over its attachment. See kvferry/client.h for
// what the functions promise.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "client/cpp/src/connection.h"
#include "client/cpp/src/device_export.h"
#include "client/cpp/src/device_memory.h"
#include "client/cpp/src/device_words.h"
#include "client/cpp/src/fork_guard.h"
#include "client/cpp/src/gpu.h"
#include "client/cpp/src/submitter.h"
#include "client/cpp/src/transfers.h"
#include "daemon/base/mutex.h"
#include "daemon/base/unique_fd.h"
#include "kvferry/client.h"

namespace kvferry::client {

class Client::Impl {
 public:
  explicit Impl(AttachOptions options);
  ~Impl();

  Status start();
  // False in a forked child.
  bool usable() const { return fork_generation() == fork_at_; }

  Result<PoolMemory> alloc_pool(std::string_view name, uint64_t bytes);
  Status register_pools(std::span<const PoolFile> pools);
  Status unregister_pools(std::span<const std::string> names);
  // impl_devices.cc
  Status export_device_pool(std::string_view name, uint64_t pointer, uint64_t bytes,
                            const DevicePoolOptions& options);
  Result<DevicePoolMemory> alloc_device_pool(std::string_view name, uint64_t bytes, int device);
  Status restore_pools();
  Status register_words_with_device(int device);
  Result<std::string> export_event(const void* event);
  // Of the present attachment; null without one, or where they are not registered.
  std::shared_ptr<const DeviceWords> device_words() const KVFERRY_EXCLUDES(mutex_);
  static Error words_not_registered() {
    return {Code::kFailedPrecondition,
            "WORDS_NOT_REGISTERED",
            "register_words_with_device has not been called, or there is no attachment",
            {},
            {}};
  }
  Result<RegisteredLayout> register_layout(const LayoutRegistration& registration);
  Status unregister_layout(const LayoutRef& layout);

  static Error not_attached() {
    return {Code::kUnavailable, "NOT_ATTACHED", "not attached to a daemon", {}, {}};
  }
  // A unary call on the present connection.
  template <typename Request, typename Response>
  Result<Response> call(grpc::Status (pb::WorkerService::Stub::*method)(grpc::ClientContext*,
                                                                        const Request&, Response*),
                        const Request& request) {
    const std::shared_ptr<Connection> connection = current();
    if (!connection) return not_attached();
    return connection->call(method, request, options_.call_timeout);
  }

  // A unary call about one transfer: behind the operations that are queued for it.
  template <typename Request, typename Response>
  Result<Response> call_about(TransferHandle transfer,
                              grpc::Status (pb::WorkerService::Stub::*method)(grpc::ClientContext*,
                                                                              const Request&,
                                                                              Response*),
                              const Request& request) {
    transfers_.settle(transfer, monotonic_now() + options_.call_timeout);
    return call(method, request);
  }

  // Queues the operation that `encode(handle)` makes for the transfer under this key.
  template <typename Encode>
  Result<TransferHandle> submit(Side side, const TransferKey& key, const LayoutRef& layout,
                                Encode&& encode) {
    if (!usable()) return not_attached();
    auto opened = transfers_.begin(side, transfer_key(side, key, layout));
    if (!opened) return opened.error();
    Result<pb::Operation> operation = encode(opened->handle);
    Status queued = operation ? submitter_.enqueue(std::move(*operation), opened->handle)
                              : Status(operation.error());
    if (queued) return opened->handle;
    transfers_.undo(opened->handle, opened->created);
    return queued.error();
  }
  Status submit_known(TransferHandle handle, pb::Operation operation);
  Status submit_without_transfer(pb::Operation operation);
  Status decline(const std::string& key, pb::Operation operation);

  std::size_t poll(std::span<Event> events);
  std::size_t wait_any(std::span<Event> events, Deadline deadline);
  Result<TransferStatus> wait(TransferHandle transfer, Deadline deadline);
  Result<std::string> aux(TransferHandle transfer);
  int event_fd();

  Result<uint32_t> alloc_word(bool timeline);
  void free_word(bool timeline, uint32_t word);
  Status signal(uint32_t word, uint64_t value);
  uint64_t* word_address(uint32_t word);
  uint64_t done_value(uint32_t word);

  std::shared_ptr<Connection> current() const KVFERRY_EXCLUDES(mutex_);
  Bytes16 boot_id() const;
  ClientStats stats() const;
  Transfers& transfers() { return transfers_; }

 private:
  // A pool on a GPU, by where it is: what else the daemon is told is asked of the driver each time.
  struct DevicePool {
    uint64_t pointer = 0;
    uint64_t bytes = 0;
    std::optional<uint64_t> scratch_offset;
  };
  // A registered pool: what is needed to register it again.
  struct Pool {
    GuardedFd fd;
    uint64_t bytes = 0;
    std::byte* data = nullptr;             // mapped by alloc_pool
    std::optional<DevicePool> device;      // then without fd
    std::shared_ptr<DeviceMemory> memory;  // of alloc_device_pool
    bool left_out = false;                 // by the last registration after a restart
  };
  using LayoutKey = std::pair<std::string, uint32_t>;

  void on_result(const pb::Operation& operation, TransferHandle handle,
                 const pb::OperationResult& result);
  void notify();         // wakes whoever waits for events
  void take_wake_ups();  // before looking
  bool block(Deadline deadline);

  Status send_pools(const Connection& connection, std::span<const PoolFile> pools);
  // What could not be registered again is left out and told by `problem`; an error is the daemon's
  // that has gone again.
  Status register_again(const Connection& connection, std::optional<Error>& problem);
  Status register_devices_again(const Connection& connection, std::optional<Error>& problem);
  Status register_layouts_again(const Connection& connection, std::optional<Error>& problem);
  Result<std::shared_ptr<Gpus>> gpus();
  // In use: a proof may only be written where the pool says.
  enum class Pages : uint8_t { kUnused, kInUse };
  Status register_device(const Connection& connection, const std::string& name,
                         const DevicePool& pool, Pages pages);
  Status send_parts(const Connection& connection, const std::string& name,
                    const DeviceExport& exported, Deadline deadline);
  Status prove(const Connection& connection, const pb::PoolChallenge& challenge,
               const DeviceExport& exported, const DevicePool& pool, Deadline deadline);
  Status add_device_pool(std::string_view name, const DevicePool& pool,
                         std::shared_ptr<DeviceMemory> memory);
  Status register_words(const std::shared_ptr<Attachment>& attachment, int device);
  void use(std::shared_ptr<Connection> connection);
  void watch();
  void on_lost(const std::shared_ptr<Connection>& connection);
  std::shared_ptr<Connection> reattach(std::optional<Error>& problem);
  // Waits until something happens to the attachment or one of the ghosts, or for `timeout_ms`.
  void watch_once(const std::shared_ptr<Connection>& connection, int timeout_ms, bool& lost);

  const AttachOptions options_;
  const uint64_t fork_at_;  // the fork generation it was made in
  Transfers transfers_;
  Submitter submitter_;
  GuardedFd wake_;    // eventfd: an event that is not in the page
  GuardedFd stop_;    // eventfd: the watcher ends
  GuardedFd events_;  // epoll of wake_ and the doorbell
  std::atomic<bool> woken_{false};
  std::atomic<bool> event_fd_used_{false};
  std::atomic<uint64_t> reconnects_{0};

  mutable Mutex mutex_;
  std::shared_ptr<Connection> connection_ KVFERRY_GUARDED_BY(mutex_);
  std::map<std::string, Pool, std::less<>> pools_ KVFERRY_GUARDED_BY(mutex_);
  std::map<LayoutKey, pb::RegisterLayoutRequest> layouts_ KVFERRY_GUARDED_BY(mutex_);
  std::set<LayoutKey> layouts_left_out_ KVFERRY_GUARDED_BY(mutex_);
  std::shared_ptr<Gpus> gpus_ KVFERRY_GUARDED_BY(mutex_);  // null until a device function is called
  std::optional<int> words_device_ KVFERRY_GUARDED_BY(mutex_);
  // The last is the present one. Earlier ones stay: streams may still write to them.
  std::vector<std::shared_ptr<const DeviceWords>> device_words_ KVFERRY_GUARDED_BY(mutex_);
  std::shared_ptr<const WordsFile> last_words_ KVFERRY_GUARDED_BY(mutex_);  // of a lost attachment
  std::vector<bool> timeline_used_ KVFERRY_GUARDED_BY(mutex_);
  std::vector<bool> done_used_ KVFERRY_GUARDED_BY(mutex_);
  std::vector<uint64_t> timeline_values_ KVFERRY_GUARDED_BY(mutex_);  // as signalled here
  Bytes16 boot_id_ KVFERRY_GUARDED_BY(mutex_){};

  // The watcher's own: lost attachments whose daemon has not exited yet.
  std::vector<std::shared_ptr<Connection>> ghosts_;
  std::thread watcher_;
};

}  // namespace kvferry::client
