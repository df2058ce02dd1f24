// What a worker's control page says, as a stream: first all open transfers, then what changes. The
// page is the truth: a stream keeps numbers of slots that have changed since they were read, so a
// reader that is slow misses states between, never the last one, and costs no memory.
//
// The reactor belongs to gRPC and deletes itself. The page's news come from other threads and may
// outlive it, so they go to a shared part.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <map>
#include <memory>
#include <set>

#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/rpc/lifeline.h"
#include "kvferry/v1/worker.grpc.pb.h"

namespace kvferry::rpc {

class WatchStream final : public grpc::ServerWriteReactor<v1::WatchResponse> {
 public:
  // Errors: those of ControlPage::observe. The stream ends with ABORTED when the worker is gone.
  static Result<WatchStream*> start(const std::shared_ptr<Session>& session);
  // A stream that ends at once.
  static grpc::ServerWriteReactor<v1::WatchResponse>* refuse(grpc::Status status);

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  // What is to be told, and the write under way.
  class News final : public StatusObserver {
   public:
    News(WatchStream* stream, std::shared_ptr<Session> session);
    void slot_changed(uint32_t slot) override KVFERRY_EXCLUDES(mutex_);
    void draining_changed() override KVFERRY_EXCLUDES(mutex_);
    void worker_gone() override KVFERRY_EXCLUDES(mutex_);
    void begin() KVFERRY_EXCLUDES(mutex_);
    void write_ended(bool ok) KVFERRY_EXCLUDES(mutex_);
    void finish(grpc::Status status) KVFERRY_EXCLUDES(mutex_);
    void detach() KVFERRY_EXCLUDES(mutex_);

   private:
    void pump() KVFERRY_REQUIRES(mutex_);
    void compose() KVFERRY_REQUIRES(mutex_);
    // False: it is being written just now, and will be told of again.
    bool compose(uint32_t slot) KVFERRY_REQUIRES(mutex_);

    const std::shared_ptr<Session> session_;
    Mutex mutex_;
    WatchStream* stream_ KVFERRY_GUARDED_BY(mutex_);         // null once gRPC is done with it
    std::set<uint32_t> changed_ KVFERRY_GUARDED_BY(mutex_);  // slots not told of since
    std::map<uint32_t, uint64_t> told_ KVFERRY_GUARDED_BY(mutex_);  // slot -> handle shown last
    bool whole_ KVFERRY_GUARDED_BY(mutex_) = true;  // something has to be said even without slots
    v1::WatchResponse out_;                         // of the write under way
    bool writing_ KVFERRY_GUARDED_BY(mutex_) = false;
    bool ending_ KVFERRY_GUARDED_BY(mutex_) = false;
    bool finished_ KVFERRY_GUARDED_BY(mutex_) = false;
    grpc::Status status_ KVFERRY_GUARDED_BY(mutex_);
  };

  explicit WatchStream(std::shared_ptr<Session> session);

  std::shared_ptr<News> news_;
};

// One slot as the stream tells it.
void to_proto(uint32_t slot, const control_page::Record& record, v1::TransferStatus& out);

}  // namespace kvferry::rpc
