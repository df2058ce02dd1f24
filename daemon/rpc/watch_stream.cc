#include "daemon/rpc/watch_stream.h"

#include <string>
#include <utility>

#include "daemon/base/reason.h"

namespace kvferry::rpc {
namespace {

namespace cp = control_page;

constexpr int kSlotsPerMessage = 512;

class Refusal final : public grpc::ServerWriteReactor<v1::WatchResponse> {
 public:
  explicit Refusal(grpc::Status status) { Finish(std::move(status)); }
  void OnDone() override { delete this; }
};

std::string reason_name(uint16_t number) {
  return std::string(name_of(static_cast<Reason>(number)));
}

}  // namespace

void to_proto(uint32_t slot, const cp::Record& record, v1::TransferStatus& out) {
  out.set_slot(slot);
  out.set_client_handle(record.client_handle);
  out.set_role(static_cast<v1::TransferRole>(record.role));
  out.set_state(static_cast<v1::TransferState>(record.state));
  out.set_reason(reason_name(record.reason));
  out.set_released((record.flags & (cp::kSourceReleased | cp::kDestReleased)) != 0);
  out.set_released_reason(reason_name(record.released_reason));
  out.set_receiver_ready((record.flags & cp::kReceiverReady) != 0);
  out.set_memory_in_use((record.flags & cp::kMemoryInUse) != 0);
  out.set_aux_ready((record.flags & cp::kAuxReady) != 0);
  out.set_delivery(static_cast<v1::Delivery>(record.delivery));
  out.set_slices(record.slices);
  out.set_bytes_done(record.bytes_done);
  out.set_bytes_total(record.bytes_total);
}

Result<WatchStream*> WatchStream::start(const std::shared_ptr<Session>& session) {
  auto* const stream = new WatchStream(session);
  // Slots that change from now on are told of; what was there before is looked at in begin().
  if (Status observed = session->page().observe(stream->news_); !observed) {
    delete stream;
    return tl::unexpected<Error>(observed.error());
  }
  stream->news_->begin();
  return stream;
}

grpc::ServerWriteReactor<v1::WatchResponse>* WatchStream::refuse(grpc::Status status) {
  return new Refusal(std::move(status));
}

WatchStream::WatchStream(std::shared_ptr<Session> session)
    : news_(std::make_shared<News>(this, std::move(session))) {}

void WatchStream::OnWriteDone(bool ok) {
  news_->write_ended(ok);
}

void WatchStream::OnCancel() {
  news_->finish(grpc::Status::CANCELLED);
}

void WatchStream::OnDone() {
  news_->detach();
  delete this;
}

// ---- News --------------------------------------------------------------------------------------

WatchStream::News::News(WatchStream* stream, std::shared_ptr<Session> session)
    : session_(std::move(session)), stream_(stream) {}

void WatchStream::News::slot_changed(uint32_t slot) {
  MutexLock lock(mutex_);
  if (stream_ == nullptr || ending_) return;
  changed_.insert(slot);
  pump();
}

void WatchStream::News::draining_changed() {
  MutexLock lock(mutex_);
  whole_ = true;
  pump();
}

void WatchStream::News::worker_gone() {
  finish({grpc::StatusCode::ABORTED, "the worker is not attached any more"});
}

void WatchStream::News::begin() {
  MutexLock lock(mutex_);
  cp::Record record;
  for (uint32_t slot = 0; slot < session_->page().config().slots; ++slot)
    if (!session_->page().read(slot, record) || record.client_handle != 0) changed_.insert(slot);
  pump();
}

void WatchStream::News::write_ended(bool ok) {
  MutexLock lock(mutex_);
  writing_ = false;
  if (!ok && !ending_) {
    ending_ = true;
    status_ = grpc::Status::CANCELLED;
  }
  pump();
}

void WatchStream::News::finish(grpc::Status status) {
  MutexLock lock(mutex_);
  if (ending_) return;
  ending_ = true;
  status_ = std::move(status);
  pump();
}

void WatchStream::News::detach() {
  MutexLock lock(mutex_);
  stream_ = nullptr;
}

bool WatchStream::News::compose(uint32_t slot) {
  cp::Record record;
  if (!session_->page().read(slot, record)) return false;
  const auto told = told_.find(slot);
  if (told != told_.end() && told->second != record.client_handle) {
    v1::TransferStatus* closed = out_.add_transfers();
    closed->set_slot(slot);
    closed->set_client_handle(told->second);
    closed->set_closed(true);
    told_.erase(told);
  }
  if (record.client_handle == 0) return true;
  told_[slot] = record.client_handle;
  to_proto(slot, record, *out_.add_transfers());
  return true;
}

void WatchStream::News::compose() {
  out_.Clear();
  out_.set_draining(session_->page().draining());
  for (auto it = changed_.begin();
       it != changed_.end() && out_.transfers_size() < kSlotsPerMessage;)
    it = compose(*it) ? changed_.erase(it) : std::next(it);
}

// StartWrite and Finish only queue work, so they may be called under the lock.
void WatchStream::News::pump() {
  if (stream_ == nullptr || writing_ || finished_) return;
  if (ending_) {
    finished_ = true;
    stream_->Finish(status_);
    return;
  }
  if (changed_.empty() && !whole_) return;
  compose();
  if (out_.transfers_size() == 0 && !whole_) return;
  whole_ = false;
  writing_ = true;
  stream_->StartWrite(&out_);
}

}  // namespace kvferry::rpc
