// libkvferry: a worker's connection to the kvferry daemon of its node.
//
// A Client may be used from any number of threads; poll, wait and wait_any are for one consumer at
// a time. open_send, send, receive, claim, decline, close, commit_reuse, poll, status and signal
// never block: operations are queued to a thread of the client, which encodes and sends them in
// order and reports refusals as events. The others are calls that block, at most for the call's
// timeout (AttachOptions::call_timeout).
//
// Who may touch which memory follows from the events alone: source pages belong to the transfer
// from send until kSourceReleased, destination pages from receive until kDestReleased, whatever
// else is reported in between. Each comes exactly once for a transfer that was accepted, also when
// the daemon dies: then once its process has ended. A transfer whose operations were all refused
// ends with kRejected and holds no memory.
//
// In a child after fork() the client is dead: descriptors are closed, calls fail.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvferry/export.h"
#include "kvferry/layout.h"
#include "kvferry/result.h"
#include "kvferry/types.h"

namespace kvferry::client {

class KVFERRY_API Client {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  // Connects, attaches and opens the stream. Errors: INVALID_ARGUMENT NAME_INVALID,
  // ALREADY_EXISTS NAME_IN_USE, PERMISSION_DENIED (DAEMON_USER: of another user), UNAVAILABLE
  // DAEMON_UNREACHABLE, FAILED_PRECONDITION PROTOCOL_MISMATCH, RESOURCE_EXHAUSTED.
  static Result<std::unique_ptr<Client>> attach(AttachOptions options);
  // Detaches: open transfers fail on the daemon's side with WORKER_LOST. Pools are unmapped.
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // ---- pools -----------------------------------------------------------------------------------

  // Shared memory of `bytes`, allocated and sealed, handed to the daemon under `name` and
  // registered. The memory is zeroed and lives as long as the client.
  Result<PoolMemory> alloc_pool(std::string_view name, uint64_t bytes);
  // The same for a file that the caller owns: tmpfs or hugetlbfs, sealed against shrinking, its
  // blocks allocated. The descriptor is duplicated.
  Status export_pool(std::string_view name, int fd, uint64_t bytes);
  // Registers several at once, all or nothing.
  struct PoolFile {
    std::string name;
    int fd = -1;
    uint64_t bytes = 0;
  };
  Status register_pools(std::span<const PoolFile> pools);
  // Waits until nothing reads or writes them any more; their transfers fail with UNREGISTERED.
  // Memory of alloc_pool is unmapped.
  Status unregister_pools(std::span<const std::string> names);

  // ---- pools on a GPU --------------------------------------------------------------------------

  // These load the CUDA driver when one of them is called first: the library that the environment
  // variable KVFERRY_CUDA_DRIVER names, or libcuda.so.1. FAILED_PRECONDITION NO_CUDA_DRIVER. They
  // work in the device's primary context, that of CUDA's runtime, and leave the caller's current
  // context alone. Errors of the driver have its name as reason: CUDA_OUT_OF_MEMORY.

  // Hands [pointer, pointer + bytes) of a GPU over and registers it. What kind of pool it becomes
  // follows from how the memory was allocated:
  //   cudaMalloc                          its CUDA IPC handle, with the pool's place in it
  //   cuMemMap (PyTorch's expandable      file descriptors of all allocations in the range, where
  //   segments, sleep modes)              they allow it, else the fabric handle of the one
  // Other memory is refused with what to do about it: POINTER_NOT_DEVICE, POINTER_MANAGED,
  // POINTER_STREAM_ORDERED (cudaMallocAsync), POINTER_NOT_EXPORTABLE, POOL_TOO_SMALL, POOL_PARTS.
  //
  // IPC and fabric handles come with a proof: the client writes 16 bytes that the daemon drew into
  // the pool, at scratch_offset or anywhere, and puts back what was there. Without scratch_offset
  // call this before the pool's pages are in use; see restore_pools for what follows later.
  // The memory must not be freed or unmapped before unregister_pools has returned.
  Status export_pool(std::string_view name, const void* device_pointer, uint64_t bytes,
                     const DevicePoolOptions& options = {});
  // Memory of the device with this number in this process, cleared, handed over as a file
  // descriptor and registered. UNIMPLEMENTED VMM_UNSUPPORTED where the device has none of the kind.
  Result<DevicePoolMemory> alloc_device_pool(std::string_view name, uint64_t bytes, int device);
  // After a daemon's restart pools are registered again by the client, also those on a GPU whose
  // memory is asked for anew by the same pointer. A pool whose proof would have to be written into
  // pages in use is left out, as its bytes might be read or written meanwhile, and so are the
  // layouts on it: kReattached then has the error POOLS_LEFT_OUT. This registers what was left out;
  // call it when nothing uses those pools, such as between two steps. Nothing to do is no error.
  Status restore_pools();

  // ---- layouts and instances -------------------------------------------------------------------

  Result<RegisteredLayout> register_layout(const LayoutRegistration& registration);
  Status unregister_layout(const LayoutRef& layout);
  // `key`: that of the registrations, if they had one.
  Result<JoinedInstance> join_instance(std::string_view instance,
                                       std::span<const std::string> cards,
                                       const std::optional<Bytes16>& key = {});
  Result<std::string> ticket(std::string_view instance);
  Result<Resolution> resolve(std::string_view ticket, const std::optional<LayoutRef>& layout = {});

  // ---- transfers -------------------------------------------------------------------------------

  // These queue and return the transfer's handle. Errors found at once: INVALID_ARGUMENT,
  // RESOURCE_EXHAUSTED QUEUE_FULL, UNAVAILABLE NOT_ATTACHED.
  Result<TransferHandle> open_send(const OpenSendRequest& request);
  Result<TransferHandle> send(const SendRequest& request);
  Result<TransferHandle> receive(const ReceiveRequest& request);
  // Extends the sender's lease until the receive, a decline or the end of this worker. Another ttl
  // or ticket than before is rejected (CLAIM_EXISTS), and so are too many (TOO_MANY_CLAIMS).
  Result<TransferHandle> claim(const ClaimRequest& request);
  // Frees the sender's pages. Takes a claim back, whose handle is closed once the daemon has
  // accepted this; a refusal is a kRejected without a transfer, and the claim stays. A receive is
  // given up by cancel().
  Status decline(const ClaimRequest& request);
  Status commit_reuse(TransferHandle transfer, std::vector<GroupCommit> groups);
  // The caller has seen the end and forgets the transfer: no event of it follows.
  Status close(TransferHandle transfer);

  // These block.
  Result<CancelResult> cancel(TransferHandle transfer);
  // Returns the indices of the slices that were dropped.
  Result<std::vector<uint32_t>> revoke(TransferHandle transfer, uint64_t from_token);
  // After kReceiverReady, or at any time before the send's end: what the receivers that have come
  // need of it. TRANSFER_UNKNOWN, TRANSFER_ENDED.
  Result<std::vector<ReceiverNeeds>> receiver_needs(TransferHandle transfer);
  // Promises room in the daemon's arena to a receive before it is called, until its lease is over
  // or that receive has ended. Waits in line, unless told to fail, for the daemon's default wait at
  // most. Returns the bytes promised; the same request again starts nothing. Errors:
  // RESERVATION_TOO_LARGE (bytes), ARENA_EXHAUSTED, RESERVATION_EXISTS (with another field),
  // ALREADY_RECEIVING, TRANSFER_CLOSED.
  Result<uint64_t> reserve(const ReserveRequest& request);
  // How much of a prompt workers of this node have committed, of each group. `pin`, at most a
  // second: what was found stays so long, or until a receive names the pin.
  // A controller names the layout of any worker of its tenant, and its reuse key.
  Result<ReuseLookup> lookup_reuse(const LayoutRef& layout, std::span<const PromptHashes> hashes,
                                   milliseconds pin, const std::optional<Bytes16>& reuse_key = {});
  // Before the memory of committed blocks is used for something else: returns when nobody reads
  // them. How many of them could still be found. Only ids and group of `blocks` count.
  Result<uint32_t> withdraw_reuse(const LayoutRef& layout, std::span<const GroupBlocks> blocks);
  // Aux of a completed receive; blocks only when it is longer than the control page carries.
  Result<std::string> aux(TransferHandle transfer);

  // ---- events ----------------------------------------------------------------------------------

  // Takes up to events.size() events without waiting; returns how many.
  std::size_t poll(std::span<Event> events);
  // Waits until there are events or the deadline has passed; returns how many were taken.
  std::size_t wait_any(std::span<Event> events, Deadline deadline);
  // Waits until this transfer's memory is the caller's again (RELEASED) and its state is terminal,
  // or until it was refused. Events of other transfers are kept for poll; this one's are consumed.
  // DEADLINE_EXCEEDED WAIT_TIMEOUT; the rejection's error if it was refused.
  Result<TransferStatus> wait(TransferHandle transfer, Deadline deadline);
  // What the control page says now. NOT_FOUND TRANSFER_UNKNOWN.
  Result<TransferStatus> status(TransferHandle transfer) const;
  // Readable when poll has something to take, for event loops; call poll until it returns 0 after.
  int event_fd() const;

  // ---- timeline --------------------------------------------------------------------------------

  // A word of the control page for ready conditions, starting at 0, until given back.
  // RESOURCE_EXHAUSTED NO_WORD.
  Result<uint32_t> alloc_word();
  void free_word(uint32_t word);
  // Advances a word from the CPU: stores, never goes back by itself.
  Status signal(uint32_t word, uint64_t value);
  // Where a word lies, to register it with a device. Null for a word out of range. Valid until
  // kDaemonRestarted.
  uint64_t* word_address(uint32_t word);
  // A word that the daemon sets (DoneWord), and its value.
  Result<uint32_t> alloc_done_word();
  void free_done_word(uint32_t word);
  uint64_t done_value(uint32_t word) const;

  // ---- timeline on a GPU -----------------------------------------------------------------------

  // Registers the words with CUDA, for streams of one device, also after later restarts. May be
  // repeated. FAILED_PRECONDITION WORDS_REGISTERED for another device; errors of the driver.
  // Before the client ends, nothing on the device may use the words any more.
  Status register_words_with_device(int device = 0);
  // Where the device finds a word: for cuStreamWriteValue64 on a timeline word, for
  // cuStreamWaitValue64 on a done word, or for kernels. 0: out of range, not registered or not
  // attached. Valid until kDaemonRestarted; writes to older addresses do no harm and have no
  // effect, and waits on older done words end when that daemon's process has ended.
  uint64_t device_word_address(uint32_t word) const;
  uint64_t device_done_address(uint32_t word) const;
  // The same, done: `stream` (a CUstream or cudaStream_t) sets the timeline word when it gets
  // there, or waits there until the done word has reached the value (below 2^63: streams compare
  // the signed difference). FAILED_PRECONDITION WORDS_NOT_REGISTERED, UNIMPLEMENTED
  // STREAM_WORDS_UNSUPPORTED.
  Status signal_on_stream(void* stream, uint32_t word, uint64_t value);
  Status wait_on_stream(void* stream, uint32_t done_word, uint64_t value);
  // The 64 bytes of an event for ReadyCondition::cuda_event. `event`: a CUevent or cudaEvent_t made
  // with the flags interprocess and disable-timing, on a device of this process. INVALID_ARGUMENT
  // EVENT_NOT_SHAREABLE; needs /dev/shm in common with the daemon.
  Result<std::string> export_event(const void* event);

  // ---- state -----------------------------------------------------------------------------------

  // Attached to a living daemon.
  bool attached() const;
  bool draining() const;
  // The daemon's life; changes when it is restarted.
  Bytes16 boot_id() const;
  ClientStats stats() const;

 private:
  class Impl;
  explicit Client(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Random ids and secrets for transfers.
KVFERRY_API Bytes16 random_bytes16();
// 22 characters of base64url, for HTTP fields.
KVFERRY_API std::string to_text(const Bytes16& bytes);
KVFERRY_API std::optional<Bytes16> bytes16_from_text(std::string_view text);

}  // namespace kvferry::client
