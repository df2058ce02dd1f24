// Sends operations in order over one bidirectional stream: a bounded queue, the thread that encodes
// and writes, and a reader for the answers. enqueue never blocks beyond its lock. When the stream
// breaks but the attachment lives, a new one is opened and what has no answer yet is sent again
// (the daemon knows repeated operations by their key); without an attachment everything is dropped.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "client/cpp/src/connection.h"
#include "daemon/base/mutex.h"

namespace kvferry::client {

class Submitter {
 public:
  struct Limits {
    std::size_t operations = 16384;
    std::size_t bytes = std::size_t{64} << 20;
  };
  // On the reader's thread, no lock held: the operation and the handle given to enqueue, and the
  // answer.
  using OnResult =
      std::function<void(const pb::Operation&, TransferHandle, const pb::OperationResult&)>;

  Submitter(Limits limits, OnResult on_result);
  ~Submitter() { stop(); }
  Submitter(const Submitter&) = delete;
  Submitter& operator=(const Submitter&) = delete;

  // RESOURCE_EXHAUSTED QUEUE_FULL, UNAVAILABLE NOT_ATTACHED.
  Status enqueue(pb::Operation operation, TransferHandle handle) KVFERRY_EXCLUDES(mutex_);
  // What is waiting or unanswered belonged to the former connection and is dropped. Null: none.
  void set_connection(std::shared_ptr<Connection> connection) KVFERRY_EXCLUDES(mutex_);
  void stop() KVFERRY_EXCLUDES(mutex_);

  uint64_t sent() const { return sent_.load(std::memory_order_relaxed); }
  std::size_t unanswered() const KVFERRY_EXCLUDES(mutex_);

 private:
  using Stream = grpc::ClientReaderWriter<pb::SubmitRequest, pb::SubmitResponse>;
  struct Item {
    // Shared with a write under way.
    std::shared_ptr<pb::Operation> operation;
    TransferHandle handle = 0;
    std::size_t bytes = 0;
  };

  void run();
  // One stream, until it breaks or the connection changes. True if it carried an answer.
  bool serve(const std::shared_ptr<Connection>& connection);
  void write_all(Stream& stream, const std::shared_ptr<Connection>& connection)
      KVFERRY_EXCLUDES(mutex_);
  void read_all(Stream& stream, std::atomic<bool>& answered) KVFERRY_EXCLUDES(mutex_);
  void answer(const pb::OperationResult& result) KVFERRY_EXCLUDES(mutex_);
  std::vector<std::shared_ptr<pb::Operation>> take_batch() KVFERRY_REQUIRES(mutex_);

  const Limits limits_;
  const OnResult on_result_;
  std::atomic<uint64_t> sent_{0};

  mutable Mutex mutex_;
  CondVar changed_;
  std::shared_ptr<Connection> connection_ KVFERRY_GUARDED_BY(mutex_);
  bool stopping_ KVFERRY_GUARDED_BY(mutex_) = false;
  bool broken_ KVFERRY_GUARDED_BY(mutex_) = false;  // the present stream
  grpc::ClientContext* context_ KVFERRY_GUARDED_BY(mutex_) = nullptr;
  // Not yet answered, by op_id, which is their order.
  std::map<uint64_t, Item> items_ KVFERRY_GUARDED_BY(mutex_);
  uint64_t next_to_write_ KVFERRY_GUARDED_BY(mutex_) = 1;  // lowest op_id not on the stream yet
  uint64_t next_op_ KVFERRY_GUARDED_BY(mutex_) = 1;
  std::size_t bytes_ KVFERRY_GUARDED_BY(mutex_) = 0;
  std::thread thread_;
};

}  // namespace kvferry::client
