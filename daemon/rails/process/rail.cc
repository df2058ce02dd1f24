#include "daemon/rails/process/rail.h"

#include <algorithm>

#include "daemon/base/units.h"

namespace kvferry::rails {
namespace {

// Rounds of UCX progress before commands are looked at again.
constexpr int kProgressRounds = 16;

// An endpoint's error callback names its lane by key, not by pointer: it may come after the lane
// has been forgotten. The rail is the one of the thread, as UCX calls back only inside its
// progress.
thread_local Rail* t_rail = nullptr;

void count(std::atomic<uint64_t>& counter, uint64_t by = 1) {
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

Record answer(Event event) {
  Record record;
  record.kind = static_cast<uint16_t>(event);
  return record;
}

std::span<const uint8_t> as_bytes(const void* at, std::size_t bytes) {
  return {static_cast<const uint8_t*>(at), bytes};
}

ucp_request_param_t request_param(void* user_data) {
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.user_data = user_data;
  return param;
}

}  // namespace

Rail::Rail(const ProcessSetup& setup, uint32_t index)
    : setup_(setup),
      limits_(setup.setup.limits),
      shared_(setup.shared.base()),
      counters_(*setup.layout.counters(setup.shared.base(), index)),
      outbox_(setup.layout, setup.shared.base(), index, setup.doorbells[index].get()) {}

Result<std::unique_ptr<Rail>> Rail::make(const ProcessSetup& setup, uint32_t index,
                                         const gpu::Device* device) {
  std::unique_ptr<Rail> rail(new Rail(setup, index));
  t_rail = rail.get();
  auto worker = UcxWorker::make(setup.setup.rails[index], setup.segments, {nullptr, device});
  if (!worker) return tl::unexpected<Error>(worker.error());
  rail->worker_ = std::move(*worker);
  KVFERRY_RETURN_IF_ERROR(
      rail->worker_->set_handler(kControlMessageId, &Rail::on_control, rail.get()));
  KVFERRY_RETURN_IF_ERROR(rail->worker_->set_handler(kOfferMessageId, &Rail::on_offer, rail.get()));
  return rail;
}

Status Rail::announce(uint16_t port, int binding_errno) {
  auto address = worker_->address();
  if (!address) return tl::unexpected<Error>(address.error());
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release_number = 0;
  ucp_get_version(&major, &minor, &release_number);
  Record record = answer(Event::kReady);
  record.token = (uint64_t{major} << 40) | (uint64_t{minor} << 20) | release_number;
  record.offset = port;
  record.status = binding_errno;
  if (!outbox_.emit_message(record, *address))
    return fail(Code::kInternal, "ADDRESS_TOO_LARGE", std::to_string(address->size()) + " bytes");
  outbox_.flush();
  return {};
}

void Rail::obey(const Record& command) {
  switch (static_cast<Command>(command.kind)) {
    case Command::kConnect:
      return connect(command);
    case Command::kClose:
      return close(command);
    case Command::kSendControl:
      return send(command, false);
    case Command::kSendOffer:
      return send(command, true);
    case Command::kAccept:
      return accept(command);
    case Command::kDrop:
      return drop(command);
    case Command::kReturnSlot:
      if (!outbox_.take_back(command.slot)) count(counters_.refused);
      return;
  }
  count(counters_.refused);
}

bool Rail::progress() {
  // Main does not keep up: leave it to the network to slow the peers down.
  if (outbox_.congested()) return settle_closing();
  bool moved = false;
  for (int round = 0; round < kProgressRounds && worker_->progress() != 0; ++round) {
    moved = true;
    // Main acts on what came while the next round copies.
    outbox_.ring();
  }
  return settle_closing() || moved;
}

// --- Lanes.

std::span<const uint8_t> Rail::outbound_bytes(const Record& command) const {
  const auto slot = setup_.layout.slot(command.slot);
  if (!slot || slot->inbound || command.slot_bytes == 0 || command.slot_bytes > slot->capacity)
    return {};
  return as_bytes(shared_ + slot->offset, command.slot_bytes);
}

std::byte* Rail::region(const Record& command) const {
  uint64_t end = 0;
  if (command.segment >= setup_.segments.size() || command.bytes == 0 ||
      !checked_add(command.offset, command.bytes, end) ||
      end > setup_.segments[command.segment].bytes)
    return nullptr;
  return setup_.segments[command.segment].base + command.offset;
}

Rail::Lane* Rail::open_lane(uint64_t key) {
  const auto found = lanes_.find(key);
  return found == lanes_.end() || found->second->closing ? nullptr : found->second.get();
}

void Rail::connect(const Record& command) {
  Record record = answer(Event::kConnectFailed);
  record.lane = command.lane;
  const auto address = outbound_bytes(command);
  if (address.empty() || command.lane == 0) {
    record.status = kStatusBadRecord;
  } else if (lanes_.contains(command.lane)) {
    record.status = kStatusLaneExists;
  } else if (lanes_.size() >= limits_.lanes) {
    record.status = kStatusTooMany;
  } else {
    auto lane = std::make_unique<Lane>();
    lane->key = command.lane;
    // Known before the endpoint is: its error callback may come at once.
    Lane& known = *lanes_.emplace(command.lane, std::move(lane)).first->second;
    void* const argument = reinterpret_cast<void*>(static_cast<uintptr_t>(command.lane));
    static_assert(sizeof(uintptr_t) == sizeof(uint64_t));
    auto endpoint = worker_->connect(address, &Rail::on_endpoint_error, argument);
    if (endpoint) {
      known.endpoint = *endpoint;
      record.kind = static_cast<uint16_t>(Event::kConnected);
      outbox_.emit(record);
      if (known.error != kStatusOk) lane_failed(known.key, static_cast<ucs_status_t>(known.error));
      return;
    }
    lanes_.erase(command.lane);
    record.status = UCS_ERR_UNREACHABLE;
  }
  if (record.status <= kStatusBadRecord) count(counters_.refused);
  outbox_.emit(record);
}

void Rail::lane_failed(uint64_t key, ucs_status_t status) {
  const auto found = lanes_.find(key);
  if (found == lanes_.end()) return;
  found->second->error = status;
  if (found->second->endpoint == nullptr || found->second->closing) return;
  Record record = answer(Event::kLaneError);
  record.lane = key;
  record.status = status;
  outbox_.emit(record);
}

void Rail::close(const Record& command) {
  Lane* const lane = open_lane(command.lane);
  if (lane == nullptr) {
    count(counters_.refused);
    // Closing already: its answer comes. Unknown: closed is the truth.
    if (!lanes_.contains(command.lane)) {
      Record record = answer(Event::kClosed);
      record.lane = command.lane;
      outbox_.emit(record);
    }
    return;
  }
  lane->closing = true;
  closing_.push_back(lane);
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  void* const request = ucp_ep_close_nbx(lane->endpoint, &param);
  lane->endpoint = nullptr;
  if (UCS_PTR_IS_PTR(request)) lane->close_request = request;
}

bool Rail::settle_closing() {
  bool moved = false;
  for (std::size_t i = 0; i < closing_.size();) {
    Lane* const lane = closing_[i];
    if (lane->close_request != nullptr &&
        ucp_request_check_status(lane->close_request) != UCS_INPROGRESS) {
      ucp_request_free(lane->close_request);
      lane->close_request = nullptr;
    }
    if (lane->close_request != nullptr || lane->operations != 0) {
      ++i;
      continue;
    }
    Record record = answer(Event::kClosed);
    record.lane = lane->key;
    outbox_.emit(record);
    closing_[i] = closing_.back();
    closing_.pop_back();
    lanes_.erase(record.lane);
    moved = true;
  }
  return moved;
}

// --- Operations.

Rail::Operation* Rail::begin(Lane& lane, const Record& command, bool offer) {
  if (operations_ >= limits_.operations) return nullptr;
  if (free_operations_.empty())
    free_operations_.push_back(operation_store_.emplace_back(std::make_unique<Operation>()).get());
  Operation* const operation = free_operations_.back();
  free_operations_.pop_back();
  *operation = {this, &lane, command.token, command.bytes, offer};
  ++operations_;
  ++lane.operations;
  counters_.operations.store(operations_, std::memory_order_relaxed);
  return operation;
}

void Rail::release(Operation* operation) {
  --operation->lane->operations;
  --operations_;
  counters_.operations.store(operations_, std::memory_order_relaxed);
  free_operations_.push_back(operation);
}

void Rail::refuse_send(const Record& command, int32_t status) {
  if (status <= kStatusBadRecord) count(counters_.refused);
  Record record = answer(Event::kSendEnded);
  record.token = command.token;
  record.status = status;
  outbox_.emit(record);
}

void Rail::send(const Record& command, bool offer) {
  const auto bytes = outbound_bytes(command);
  std::byte* const data = offer ? region(command) : nullptr;
  if (bytes.empty() || (offer && (data == nullptr || bytes.size() > kMaxOfferHeaderBytes)))
    return refuse_send(command, kStatusBadRecord);
  Lane* const lane = open_lane(command.lane);
  if (lane == nullptr) return refuse_send(command, kStatusUnknownLane);
  // Nothing is submitted on a failed endpoint: UCX has crashed on it.
  if (lane->error != kStatusOk) return refuse_send(command, lane->error);
  Operation* const operation = begin(*lane, command, offer);
  if (operation == nullptr) return refuse_send(command, kStatusTooMany);

  ucp_request_param_t param = request_param(operation);
  param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
  param.cb.send = &Rail::on_sent;
  void* request = nullptr;
  if (offer) {
    worker_->name_memory(param, command.segment);
    param.flags = UCP_AM_SEND_FLAG_RNDV;
    request = ucp_am_send_nbx(lane->endpoint, kOfferMessageId, bytes.data(), bytes.size(), data,
                              command.bytes, &param);
    count(counters_.offers_sent);
  } else {
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    param.memory_type = UCS_MEMORY_TYPE_HOST;
    param.flags = UCP_AM_SEND_FLAG_EAGER;
    request = ucp_am_send_nbx(lane->endpoint, kControlMessageId, nullptr, 0, bytes.data(),
                              bytes.size(), &param);
    count(counters_.messages_sent);
  }
  if (!UCS_PTR_IS_PTR(request)) end_send(operation, UCS_PTR_RAW_STATUS(request));
}

void Rail::end_send(Operation* operation, ucs_status_t status) {
  Record record = answer(Event::kSendEnded);
  record.token = operation->token;
  record.status = status;
  if (operation->offer && status == UCS_OK) count(counters_.bytes_sent, operation->bytes);
  // A control message that has gone out only gives its slot back.
  const bool nobody_waits = !operation->offer && status == UCS_OK;
  release(operation);
  outbox_.emit(record, nobody_waits ? Wake::kAny : Wake::kWork);
}

void Rail::refuse_receive(const Record& command, int32_t status) {
  count(counters_.refused);
  Record record = answer(Event::kReceiveEnded);
  record.token = command.token;
  record.status = status;
  outbox_.emit(record);
}

void Rail::accept(const Record& command) {
  const auto found = held_.find(command.descriptor);
  if (found == held_.end()) return refuse_receive(command, kStatusUnknownOffer);
  const Held held = found->second;
  held_.erase(found);
  counters_.held_offers.store(held_.size(), std::memory_order_relaxed);
  std::byte* const data = region(command);
  Lane* const lane = open_lane(command.lane);
  int32_t status = kStatusOk;
  Operation* operation = nullptr;
  if (data == nullptr)
    status = kStatusBadRecord;
  else if (command.bytes != held.bytes)
    status = kStatusLengthMismatch;
  else if (lane == nullptr)
    status = kStatusUnknownLane;
  else if ((operation = begin(*lane, command, true)) == nullptr)
    status = kStatusTooMany;
  if (operation == nullptr) {
    ucp_am_data_release(worker_->handle(), held.descriptor);
    return refuse_receive(command, status);
  }
  ucp_request_param_t param = request_param(operation);
  worker_->name_memory(param, command.segment);
  param.cb.recv_am = &Rail::on_received;
  void* const request =
      ucp_am_recv_data_nbx(worker_->handle(), held.descriptor, data, command.bytes, &param);
  if (!UCS_PTR_IS_PTR(request)) end_receive(operation, UCS_PTR_RAW_STATUS(request), command.bytes);
}

void Rail::end_receive(Operation* operation, ucs_status_t status, uint64_t bytes) {
  Record record = answer(Event::kReceiveEnded);
  record.token = operation->token;
  record.status = status;
  if (status == UCS_OK) {
    record.bytes = bytes;
    count(counters_.bytes_received, bytes);
  }
  release(operation);
  outbox_.emit(record);
}

void Rail::drop(const Record& command) {
  const auto found = held_.find(command.descriptor);
  if (found == held_.end()) {
    count(counters_.refused);
    return;
  }
  void* const descriptor = found->second.descriptor;
  held_.erase(found);
  counters_.held_offers.store(held_.size(), std::memory_order_relaxed);
  ucp_am_data_release(worker_->handle(), descriptor);
}

// --- What UCX tells.

ucs_status_t Rail::take_control(std::span<const uint8_t> message, bool well_formed) {
  if (well_formed && !message.empty() && outbox_.emit_message(answer(Event::kControlIn), message)) {
    count(counters_.messages_received);
  } else {
    count(counters_.dropped);
  }
  return UCS_OK;
}

ucs_status_t Rail::take_offer(std::span<const uint8_t> header, void* data, uint64_t bytes,
                              bool rendezvous) {
  Record record = answer(Event::kOfferIn);
  record.bytes = bytes;
  const bool too_many = rendezvous && held_.size() >= limits_.held_offers;
  if (too_many)
    record.status = kStatusTooMany;
  else if (rendezvous)
    record.descriptor = next_descriptor_;
  const bool good = !header.empty() && header.size() <= kMaxOfferHeaderBytes;
  // OK tells UCX to drop the offer, which the sender takes as sent: so main is told even of those
  // that are not held, as far as there is room.
  if (!good || !outbox_.emit_message(record, header) || too_many) {
    count(counters_.dropped);
    return UCS_OK;
  }
  count(counters_.offers_received);
  if (!rendezvous) return UCS_OK;
  held_.emplace(next_descriptor_++, Held{data, bytes});
  counters_.held_offers.store(held_.size(), std::memory_order_relaxed);
  return UCS_INPROGRESS;
}

void Rail::on_sent(void* request, ucs_status_t status, void* operation) {
  auto* const mine = static_cast<Operation*>(operation);
  mine->rail->end_send(mine, status);
  ucp_request_free(request);
}

void Rail::on_received(void* request, ucs_status_t status, std::size_t bytes, void* operation) {
  auto* const mine = static_cast<Operation*>(operation);
  mine->rail->end_receive(mine, status, bytes);
  ucp_request_free(request);
}

void Rail::on_endpoint_error(void* argument, ucp_ep_h, ucs_status_t status) {
  if (t_rail != nullptr) t_rail->lane_failed(reinterpret_cast<uintptr_t>(argument), status);
}

ucs_status_t Rail::on_control(void* argument, const void*, std::size_t header_bytes, void* data,
                              std::size_t bytes, const ucp_am_recv_param_t* param) {
  const bool rendezvous = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  const bool well_formed = !rendezvous && header_bytes == 0;
  return static_cast<Rail*>(argument)->take_control(
      well_formed ? as_bytes(data, bytes) : std::span<const uint8_t>(), well_formed);
}

ucs_status_t Rail::on_offer(void* argument, const void* header, std::size_t header_bytes,
                            void* data, std::size_t bytes, const ucp_am_recv_param_t* param) {
  const bool rendezvous = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  return static_cast<Rail*>(argument)->take_offer(as_bytes(header, header_bytes), data, bytes,
                                                  rendezvous);
}

}  // namespace kvferry::rails
