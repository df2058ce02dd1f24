// The client's view of its transfers: which handle is which, what the control page said last, what
// has been reported. Turns changes of records into events, so that each is reported once and
// progress that nobody asked for in between is folded together. Any thread; knows nothing of gRPC.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "client/cpp/src/attachment.h"
#include "daemon/base/mutex.h"
#include "kvferry/types.h"
#include "proto/kvferry/control_page.h"

namespace kvferry::client {

// Of one operation.
struct OperationAnswer {
  bool accepted = false;  // or existing
  bool claim = false;     // what it answers
  bool decline = false;
  std::optional<Error> error;  // rejected
};

class Transfers {
 public:
  // `max_unread`: rejections that may wait to be polled before no more operations are taken.
  explicit Transfers(std::size_t max_unread) : max_unread_(max_unread) {}

  // The transfer under this key, made if there is none, with one more operation under way.
  // RESOURCE_EXHAUSTED EVENTS_UNREAD.
  struct Opened {
    TransferHandle handle = 0;
    bool created = false;
  };
  Result<Opened> begin(Side side, std::string key) KVFERRY_EXCLUDES(mutex_);
  // One more operation on a known transfer. NOT_FOUND TRANSFER_UNKNOWN.
  Status begin(TransferHandle handle) KVFERRY_EXCLUDES(mutex_);
  // The operation was never queued.
  void undo(TransferHandle handle, bool created) KVFERRY_EXCLUDES(mutex_);
  // An answer has come; handle 0 for operations without a transfer. True if there is an event. A
  // refused decline leaves its claim as it was.
  bool answer(TransferHandle handle, OperationAnswer answer) KVFERRY_EXCLUDES(mutex_);

  // What a decline under this key takes back; 0: nothing of this client. Once the daemon has
  // accepted both, the claim is forgotten; one that it has refused is told and stays.
  TransferHandle handle_of(const std::string& key) const KVFERRY_EXCLUDES(mutex_);

  // Waits until no operation of the transfer is without an answer, it is forgotten or its daemon
  // lost, or until the deadline: a call about it must not overtake the operation that opened it.
  void settle(TransferHandle handle, Time deadline) KVFERRY_EXCLUDES(mutex_);

  // A fresh page is read from now on.
  void attach(std::shared_ptr<Attachment> attachment) KVFERRY_EXCLUDES(mutex_);
  // The daemon is lost: after a last look at its page all open transfers have failed. Their memory
  // is released by exited().
  void lose() KVFERRY_EXCLUDES(mutex_);
  // That daemon's process has ended: it touches no memory any more.
  void exited(const Attachment* attachment) KVFERRY_EXCLUDES(mutex_);
  // An event without a transfer.
  void announce(EventKind kind, std::optional<Error> error = {}) KVFERRY_EXCLUDES(mutex_);

  // Takes events, reading the page if need be. Does not block.
  std::size_t take(std::span<Event> out) KVFERRY_EXCLUDES(mutex_);
  // For wait(): what is known if the transfer has come to its end (consuming its events) or was
  // refused; nothing while it goes on. NOT_FOUND for an unknown one.
  std::optional<Result<TransferStatus>> ended(TransferHandle handle) KVFERRY_EXCLUDES(mutex_);
  // Whether there is something to take.
  bool pending() const KVFERRY_EXCLUDES(mutex_);
  // Whether a slot could not be read as its writer was at work: nothing has to ring for it again.
  bool unsettled() const KVFERRY_EXCLUDES(mutex_);
  Result<TransferStatus> status(TransferHandle handle) KVFERRY_EXCLUDES(mutex_);
  // The aux if it is in the page; nothing if it must be fetched. FAILED_PRECONDITION AUX_NOT_READY.
  Result<std::optional<std::string>> aux(TransferHandle handle) KVFERRY_EXCLUDES(mutex_);

  enum class Closing : uint8_t { kTellDaemon, kLocalOnly };
  // Whether it may be forgotten. FAILED_PRECONDITION TRANSFER_OPEN while its memory or end is
  // outstanding.
  Result<Closing> may_close(TransferHandle handle) KVFERRY_EXCLUDES(mutex_);
  void forget(TransferHandle handle) KVFERRY_EXCLUDES(mutex_);

  bool draining() const KVFERRY_EXCLUDES(mutex_);
  struct Counts {
    uint64_t events = 0;
    uint64_t overflows = 0;
    uint64_t accepted = 0;
    uint64_t rejected = 0;
    uint64_t open = 0;
  };
  Counts counts() const KVFERRY_EXCLUDES(mutex_);

 private:
  struct Transfer {
    TransferHandle handle = 0;
    Side side = Side::kSender;
    std::string key;
    std::shared_ptr<Attachment> home;  // whose daemon has it
    std::optional<uint32_t> slot;
    control_page::Record seen;  // what the page said last, or what the loss of the daemon made
    control_page::Record told;  // what has been reported
    uint32_t operations = 0;    // without an answer yet
    bool accepted = false;      // the daemon has it; it has none for a claim alone
    bool declined = false;
    bool lost = false;             // its daemon is
    bool dirty = false;            // in dirty_
    std::deque<Error> rejections;  // not reported yet
    std::optional<Error> refusal;  // the last rejection, for wait()
  };

  void look() KVFERRY_REQUIRES(mutex_);
  void look_at(uint32_t slot) KVFERRY_REQUIRES(mutex_);
  void refresh(Transfer& transfer) KVFERRY_REQUIRES(mutex_);
  void mark(Transfer& transfer) KVFERRY_REQUIRES(mutex_);
  bool next_event(Transfer& transfer, Event& out) KVFERRY_REQUIRES(mutex_);
  Transfer* find(TransferHandle handle) KVFERRY_REQUIRES(mutex_);
  void remove(const Transfer& transfer) KVFERRY_REQUIRES(mutex_);
  void remove_if_declined(const Transfer& transfer) KVFERRY_REQUIRES(mutex_);
  static TransferStatus status_of(const Transfer& transfer);
  static bool over(const Transfer& transfer);
  static bool refused(const Transfer& transfer);

  const std::size_t max_unread_;
  mutable Mutex mutex_;
  CondVar answered_;
  std::unordered_map<TransferHandle, std::unique_ptr<Transfer>> transfers_
      KVFERRY_GUARDED_BY(mutex_);
  std::unordered_map<std::string, TransferHandle> by_key_ KVFERRY_GUARDED_BY(mutex_);
  std::deque<TransferHandle> dirty_ KVFERRY_GUARDED_BY(mutex_);
  std::deque<Event> global_ KVFERRY_GUARDED_BY(mutex_);
  std::shared_ptr<Attachment> attachment_ KVFERRY_GUARDED_BY(mutex_);
  uint64_t tail_ KVFERRY_GUARDED_BY(mutex_) = 0;
  std::vector<uint32_t> retry_ KVFERRY_GUARDED_BY(mutex_);    // slots that could not be read
  std::vector<uint32_t> changed_ KVFERRY_GUARDED_BY(mutex_);  // kept to save allocating
  bool draining_ KVFERRY_GUARDED_BY(mutex_) = false;
  TransferHandle next_ KVFERRY_GUARDED_BY(mutex_) = 1;
  std::size_t unread_ KVFERRY_GUARDED_BY(mutex_) = 0;
  Counts counts_ KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::client
