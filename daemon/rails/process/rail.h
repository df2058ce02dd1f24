// One rail: a UCX worker, its lanes (endpoints), the offers it holds and the operations under way.
// Obeys commands and turns what UCX tells into records. Knows nothing of links or tags: a lane is a
// number, a message is bytes. Made, used and destroyed by one thread.
//
// A command that names what is not there, or memory outside the segments, is answered with one of
// our own statuses; it never touches memory.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "daemon/rails/process/outbox.h"
#include "daemon/rails/process/setup.h"
#include "daemon/rails/process/ucx_worker.h"

namespace kvferry::rails {

class Rail {
 public:
  // Makes the worker and its handlers. `setup` outlives the rail; `device` is of UcxWorker::Tuning.
  static Result<std::unique_ptr<Rail>> make(const ProcessSetup& setup, uint32_t index,
                                            const gpu::Device* device);
  Rail(const Rail&) = delete;
  Rail& operator=(const Rail&) = delete;

  // Tells main our address; `port` is the listener's, 0 for none. `binding_errno` as in kReady.
  Status announce(uint16_t port, int binding_errno);
  void obey(const Record& command);
  // Progress of UCX and of closing lanes, unless main does not keep up. True if anything happened.
  bool progress();
  bool flush() { return outbox_.flush(); }

  // Something is under way whose end UCX's wake-up might miss.
  bool busy() const { return operations_ != 0 || !closing_.empty(); }
  bool congested() const { return outbox_.congested(); }
  UcxWorker& worker() { return *worker_; }
  RailCounters& counters() { return counters_; }

 private:
  struct Lane {
    uint64_t key = 0;
    ucp_ep_h endpoint = nullptr;
    int32_t error = kStatusOk;  // told by kLaneError; nothing is sent any more
    bool closing = false;
    void* close_request = nullptr;  // until UCX has closed
    uint64_t operations = 0;
  };
  struct Operation {
    Rail* rail = nullptr;
    Lane* lane = nullptr;  // outlives its operations
    uint64_t token = 0;
    uint64_t bytes = 0;
    bool offer = false;
  };
  struct Held {
    void* descriptor = nullptr;
    uint64_t bytes = 0;
  };

  Rail(const ProcessSetup& setup, uint32_t index);

  void connect(const Record& command);
  void close(const Record& command);
  void send(const Record& command, bool offer);
  void accept(const Record& command);
  void drop(const Record& command);
  bool settle_closing();
  void refuse_send(const Record& command, int32_t status);
  void refuse_receive(const Record& command, int32_t status);

  // Nothing unless the record's slot, or region, is what main may name.
  std::span<const uint8_t> outbound_bytes(const Record& command) const;
  std::byte* region(const Record& command) const;
  Lane* open_lane(uint64_t key);
  Operation* begin(Lane& lane, const Record& command, bool offer);
  void end_send(Operation* operation, ucs_status_t status);
  void end_receive(Operation* operation, ucs_status_t status, uint64_t bytes);
  void release(Operation* operation);
  void lane_failed(uint64_t key, ucs_status_t status);

  ucs_status_t take_control(std::span<const uint8_t> message, bool well_formed);
  ucs_status_t take_offer(std::span<const uint8_t> header, void* data, uint64_t bytes,
                          bool rendezvous);

  // UCX's callbacks; all run inside calls that this object makes.
  static void on_sent(void* request, ucs_status_t status, void* operation);
  static void on_received(void* request, ucs_status_t status, std::size_t bytes, void* operation);
  static void on_endpoint_error(void* argument, ucp_ep_h endpoint, ucs_status_t status);
  static ucs_status_t on_control(void* argument, const void* header, std::size_t header_bytes,
                                 void* data, std::size_t bytes, const ucp_am_recv_param_t* param);
  static ucs_status_t on_offer(void* argument, const void* header, std::size_t header_bytes,
                               void* data, std::size_t bytes, const ucp_am_recv_param_t* param);

  const ProcessSetup& setup_;
  const Limits& limits_;
  std::byte* shared_;
  RailCounters& counters_;
  Outbox outbox_;
  std::unique_ptr<UcxWorker> worker_;
  std::unordered_map<uint64_t, std::unique_ptr<Lane>> lanes_;
  std::vector<Lane*> closing_;
  std::unordered_map<uint64_t, Held> held_;
  uint64_t next_descriptor_ = 1;
  std::vector<std::unique_ptr<Operation>> operation_store_;
  std::vector<Operation*> free_operations_;
  uint64_t operations_ = 0;
};

}  // namespace kvferry::rails
