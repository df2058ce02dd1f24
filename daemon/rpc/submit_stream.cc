#include "daemon/rpc/submit_stream.h"

#include <utility>

namespace kvferry::rpc {
namespace {

constexpr int kResultsPerMessage = 512;

}  // namespace

SubmitStream::SubmitStream(std::size_t result_limit, SubmitFn submit, std::function<void()> done)
    : submit_(std::move(submit)),
      done_(std::move(done)),
      results_(std::make_shared<Results>(this, result_limit)) {}

void SubmitStream::OnReadDone(bool ok) {
  if (!ok) {
    results_->finish(grpc::Status::OK);
    return;
  }
  for (const v1::Operation& operation : in_.operations()) submit_(operation, results_);
  StartRead(&in_);
}

void SubmitStream::OnCancel() {
  results_->finish(grpc::Status::CANCELLED);
}

void SubmitStream::OnDone() {
  results_->detach();
  done_();
  delete this;
}

void SubmitStream::Results::push(v1::OperationResult result) {
  MutexLock lock(mutex_);
  if (stream_ == nullptr || ending_) return;
  if (waiting_.size() >= limit_) {
    ending_ = true;
    status_ = {grpc::StatusCode::RESOURCE_EXHAUSTED, "the worker does not read its answers"};
  } else {
    waiting_.push_back(std::move(result));
  }
  pump();
}

void SubmitStream::Results::finish(grpc::Status status) {
  MutexLock lock(mutex_);
  if (ending_) return;
  ending_ = true;
  status_ = std::move(status);
  pump();
}

void SubmitStream::Results::write_ended(bool ok) {
  MutexLock lock(mutex_);
  writing_ = false;
  if (!ok) waiting_.clear();
  pump();
}

void SubmitStream::Results::detach() {
  MutexLock lock(mutex_);
  stream_ = nullptr;
  waiting_.clear();
}

// StartWrite and Finish only queue work, so they may be called under the lock.
void SubmitStream::Results::pump() {
  if (stream_ == nullptr || writing_ || finished_) return;
  if (!waiting_.empty()) {
    out_.Clear();
    while (!waiting_.empty() && out_.results_size() < kResultsPerMessage) {
      *out_.add_results() = std::move(waiting_.front());
      waiting_.pop_front();
    }
    writing_ = true;
    stream_->StartWrite(&out_);
    return;
  }
  if (ending_) {
    finished_ = true;
    stream_->Finish(status_);
  }
}

}  // namespace kvferry::rpc
