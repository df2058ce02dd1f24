// One worker's ordered stream of operations. The reactor belongs to gRPC and deletes itself; the
// engine's answers come from another thread and may outlive it, so they go to a shared part.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>

#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "kvferry/v1/worker.grpc.pb.h"

namespace kvferry::rpc {

class SubmitStream final : public grpc::ServerBidiReactor<v1::SubmitRequest, v1::SubmitResponse> {
 public:
  // What answers hold on to: collects results and writes them, one message at a time, many results
  // a message.
  class Results {
   public:
    explicit Results(SubmitStream* stream, std::size_t limit) : stream_(stream), limit_(limit) {}
    // Any thread. Results after the stream's end are dropped: the status table is the truth.
    void push(v1::OperationResult result) KVFERRY_EXCLUDES(mutex_);
    // Ends the stream with `status` as soon as no write is under way; the first call counts.
    void finish(grpc::Status status) KVFERRY_EXCLUDES(mutex_);

   private:
    friend class SubmitStream;
    void write_ended(bool ok) KVFERRY_EXCLUDES(mutex_);
    void detach() KVFERRY_EXCLUDES(mutex_);
    void pump() KVFERRY_REQUIRES(mutex_);

    Mutex mutex_;
    SubmitStream* stream_ KVFERRY_GUARDED_BY(mutex_);  // null once gRPC is done with it
    std::deque<v1::OperationResult> waiting_ KVFERRY_GUARDED_BY(mutex_);
    const std::size_t limit_;
    v1::SubmitResponse out_;  // of the write under way
    bool writing_ KVFERRY_GUARDED_BY(mutex_) = false;
    bool ending_ KVFERRY_GUARDED_BY(mutex_) = false;
    bool finished_ KVFERRY_GUARDED_BY(mutex_) = false;
    grpc::Status status_ KVFERRY_GUARDED_BY(mutex_);
  };

  // `submit` carries out one operation; its answer goes to the Results it is given. `done` is
  // called when gRPC has let go of the stream.
  using SubmitFn = std::function<void(const v1::Operation&, const std::shared_ptr<Results>&)>;
  SubmitStream(std::size_t result_limit, SubmitFn submit, std::function<void()> done);

  void start() { StartRead(&in_); }
  const std::shared_ptr<Results>& results() const { return results_; }

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override { results_->write_ended(ok); }
  void OnCancel() override;
  void OnDone() override;

 private:
  const SubmitFn submit_;
  const std::function<void()> done_;
  v1::SubmitRequest in_;
  std::shared_ptr<Results> results_;
};

}  // namespace kvferry::rpc
