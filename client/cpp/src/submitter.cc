#include "client/cpp/src/submitter.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

namespace kvferry::client {
namespace {

constexpr std::size_t kBatchOperations = 256;
constexpr std::size_t kBatchBytes = std::size_t{1} << 20;
constexpr Duration kFirstBackoff = std::chrono::milliseconds(10);
constexpr Duration kLastBackoff = std::chrono::seconds(1);

// What an operation holds in memory; cheap, unlike its encoded size.
std::size_t size_of(const pb::Operation& operation) {
  std::size_t bytes = 256;
  const auto add = [&bytes](const auto& groups) {
    for (const auto& group : groups) bytes += group.block_ids().size() + 64;
  };
  if (operation.has_send()) {
    add(operation.send().groups());
    bytes += operation.send().aux().size();
  } else if (operation.has_receive()) {
    add(operation.receive().groups());
  } else if (operation.has_commit_reuse()) {
    for (const auto& group : operation.commit_reuse().groups())
      for (const auto& hash : group.hashes()) bytes += hash.size() + 32;
  }
  return bytes;
}

}  // namespace

Submitter::Submitter(Limits limits, OnResult on_result)
    : limits_(limits), on_result_(std::move(on_result)), thread_([this] { run(); }) {}

Status Submitter::enqueue(pb::Operation operation, TransferHandle handle) {
  const std::size_t bytes = size_of(operation);
  if (bytes > kMaxOperationBytes)
    return Error{
        Code::kInvalidArgument, "OPERATION_TOO_LARGE", "too much for one operation", {}, {}};
  {
    MutexLock lock(mutex_);
    if (!connection_)
      return Error{Code::kUnavailable, "NOT_ATTACHED", "not attached to a daemon", {}, {}};
    if (items_.size() >= limits_.operations || bytes_ + bytes > limits_.bytes)
      return Error{Code::kResourceExhausted,
                   "QUEUE_FULL",
                   "too many operations wait to be sent or answered",
                   {},
                   milliseconds(1)};
    const uint64_t op_id = next_op_++;
    operation.set_op_id(op_id);
    items_.emplace_hint(items_.end(), op_id,
                        Item{std::make_shared<pb::Operation>(std::move(operation)), handle, bytes});
    bytes_ += bytes;
  }
  // Not under the lock, on which the thread would only sleep again.
  changed_.notify_one();
  return {};
}

void Submitter::set_connection(std::shared_ptr<Connection> connection) {
  std::map<uint64_t, Item> dropped;  // freed after the lock
  MutexLock lock(mutex_);
  connection_ = std::move(connection);
  items_.swap(dropped);
  bytes_ = 0;
  next_to_write_ = next_op_;
  broken_ = true;
  if (context_ != nullptr) context_->TryCancel();
  changed_.notify_all();
}

void Submitter::stop() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    if (context_ != nullptr) context_->TryCancel();
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

std::size_t Submitter::unanswered() const {
  MutexLock lock(mutex_);
  return items_.size();
}

void Submitter::run() {
  Duration backoff = kFirstBackoff;
  for (;;) {
    std::shared_ptr<Connection> connection;
    {
      MutexLock lock(mutex_);
      while (!stopping_ && !connection_) changed_.wait(mutex_);
      if (stopping_) return;
      connection = connection_;
    }
    if (serve(connection)) backoff = kFirstBackoff;
    // A stream that ends at once, time after time, must not become a busy loop.
    MutexLock lock(mutex_);
    const Time until = monotonic_now() + backoff;
    while (!stopping_ && connection_ == connection && changed_.wait_until(mutex_, until)) {
    }
    backoff = std::min(backoff * 2, kLastBackoff);
    if (connection_ != connection) backoff = kFirstBackoff;
  }
}

bool Submitter::serve(const std::shared_ptr<Connection>& connection) {
  grpc::ClientContext context;
  connection->authenticate(context);
  {
    MutexLock lock(mutex_);
    if (stopping_ || connection_ != connection) return false;
    context_ = &context;
    broken_ = false;
    // What the former stream carried without an answer goes first, in its order.
    if (!items_.empty()) next_to_write_ = std::min(next_to_write_, items_.begin()->first);
  }
  std::atomic<bool> answered{false};
  {
    const std::unique_ptr<Stream> stream = connection->stub->Submit(&context);
    std::thread reader([&] { read_all(*stream, answered); });
    write_all(*stream, connection);
    context.TryCancel();
    reader.join();
    stream->Finish();
  }
  MutexLock lock(mutex_);
  context_ = nullptr;
  return answered.load();
}

void Submitter::write_all(Stream& stream, const std::shared_ptr<Connection>& connection) {
  for (;;) {
    std::vector<std::shared_ptr<pb::Operation>> batch;
    {
      MutexLock lock(mutex_);
      while (!stopping_ && !broken_ && next_to_write_ >= next_op_) changed_.wait(mutex_);
      if (stopping_ || broken_ || connection_ != connection) return;
      batch = take_batch();
    }
    if (batch.empty()) continue;
    // Lent, not copied: the operations stay until their answer, to be sent again should the stream
    // break.
    pb::SubmitRequest request;
    for (const auto& operation : batch)
      request.mutable_operations()->UnsafeArenaAddAllocated(operation.get());
    const bool written = stream.Write(request);
    while (request.operations_size() > 0) request.mutable_operations()->UnsafeArenaReleaseLast();
    if (!written) return;
    sent_.fetch_add(batch.size(), std::memory_order_relaxed);
  }
}

std::vector<std::shared_ptr<pb::Operation>> Submitter::take_batch() {
  std::vector<std::shared_ptr<pb::Operation>> batch;
  std::size_t bytes = 0;
  auto it = items_.lower_bound(next_to_write_);
  for (; it != items_.end() && batch.size() < kBatchOperations; ++it) {
    if (!batch.empty() && bytes + it->second.bytes > kBatchBytes) break;
    batch.push_back(it->second.operation);
    bytes += it->second.bytes;
  }
  next_to_write_ = it == items_.end() ? next_op_ : it->first;
  return batch;
}

void Submitter::read_all(Stream& stream, std::atomic<bool>& answered) {
  pb::SubmitResponse response;
  while (stream.Read(&response)) {
    answered.store(true);
    for (const pb::OperationResult& result : response.results()) answer(result);
  }
  MutexLock lock(mutex_);
  broken_ = true;
  changed_.notify_all();
}

void Submitter::answer(const pb::OperationResult& result) {
  Item item;
  {
    MutexLock lock(mutex_);
    const auto it = items_.find(result.op_id());
    // Dropped with a former connection, or answered twice.
    if (it == items_.end()) return;
    item = std::move(it->second);
    bytes_ -= item.bytes;
    items_.erase(it);
  }
  on_result_(*item.operation, item.handle, result);
}

}  // namespace kvferry::client
