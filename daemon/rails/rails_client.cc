#include "daemon/rails/rails_client.h"

#include <algorithm>
#include <csignal>
#include <utility>

#include "daemon/rails/rails_plan.h"
#include "daemon/rails/rails_process.h"

namespace kvferry::rails {
namespace {

// How often the process is asked whether it lives while nobody sleeps on its descriptor.
constexpr Duration kAliveCheck = std::chrono::milliseconds(5);

std::string ended_by(int signal) {
  // Without last words: the thread that made the call had the signal blocked.
  if (signal == SIGSYS) return "made a system call that its seccomp filter refuses (SIGSYS)";
  return "ended by signal " + std::to_string(signal);
}

uint64_t load(const std::atomic<uint64_t>& counter) {
  return counter.load(std::memory_order_relaxed);
}

}  // namespace

// --- Life of the process.

Result<std::unique_ptr<RailsClient>> RailsClient::make(RailsConfig config,
                                                       std::span<const Segment> segments) {
  auto plan = plan_rails(config, segments);
  if (!plan) return tl::unexpected<Error>(plan.error());
  return std::unique_ptr<RailsClient>(new RailsClient(std::move(config), std::move(*plan)));
}

RailsClient::RailsClient(RailsConfig config, RailsPlan plan)
    : config_(std::move(config)), plan_(std::make_unique<RailsPlan>(std::move(plan))) {}

RailsClient::~RailsClient() {
  stop();
}

Status RailsClient::start(Time now) {
  if (process_)
    return fail(Code::kFailedPrecondition, "RAILS_RUNNING", "the rails process runs already");
  auto process = RailsProcess::spawn(plan_->process);
  if (!process) return tl::unexpected<Error>(process.error());
  process_ = std::move(*process);
  forget_everything();
  phase_ = Phase::kStarting;
  started_at_ = checked_at_ = now;
  restart_at_ = Time::never();
  kill_reason_.clear();
  ++generation_;
  return {};
}

void RailsClient::forget_everything() {
  ready_ = {};
  books_.assign(config_.rails.size(), {});
  ready_.rails.resize(config_.rails.size());
  lanes_.clear();
  sends_.clear();
  landings_.clear();
  held_.clear();
  next_rail_ = 0;
  waited_ = false;
  channel_spoke_ = exit_seen_ = looked_ = false;
}

void RailsClient::stop() {
  if (process_) {
    process_->child().end(std::chrono::seconds(1));
    process_.reset();
    ++generation_;
  }
  forget_everything();
  phase_ = Phase::kStopped;
  restart_at_ = Time::never();
  failures_ = 0;
}

void RailsClient::kill(std::string_view why) {
  if (!process_) return;
  if (kill_reason_.empty()) kill_reason_ = std::string(why.substr(0, 512));
  process_->child().kill();
}

Duration RailsClient::backoff() const {
  Duration delay = config_.backoff_first;
  for (uint32_t i = 1; i < failures_ && delay < config_.backoff_limit; ++i) delay *= 2;
  return std::min(delay, config_.backoff_limit);
}

void RailsClient::restart(Time now) {
  restart_at_ = Time::never();
  ++restarts_;
  if (start(now)) return;
  // No process could be made now (memory, processes): as if it had died at once.
  ++failures_;
  phase_ = Phase::kWaiting;
  restart_at_ = now + backoff();
}

void RailsClient::notice_death(Time now, RailsEvents& events) {
  checked_at_ = now;
  ChildProcess::Exit exit;
  if (!process_->child().reap(exit)) return;
  RailsExit told;
  told.exited = exit.exited;
  told.status = exit.status;
  told.signal = exit.signal;
  const std::string& words = process_->read_last_words();
  told.why = kill_reason_.empty() ? words : kill_reason_;
  if (told.why.empty()) told.why = exit.exited ? "exited" : ended_by(exit.signal);
  const bool lived = phase_ == Phase::kReady && now >= ready_at_ + config_.backoff_limit;
  failures_ = lived ? 1 : failures_ + 1;
  process_.reset();
  ++generation_;
  forget_everything();
  phase_ = Phase::kWaiting;
  restart_at_ = now + backoff();
  told.restart_at = restart_at_;
  events.on_died(told);
}

std::vector<pollfd> RailsClient::pollfds() const {
  std::vector<pollfd> fds;
  if (process_) process_->append_pollfds(fds);
  return fds;
}

void RailsClient::waited(std::span<const pollfd> polled) {
  if (!process_ || !std::exchange(waited_, false)) return;
  const RailsProcess::Seen seen = process_->end_wait(polled);
  channel_spoke_ = seen.channel;
  exit_seen_ = seen.exit;
  looked_ = !polled.empty();
}

Time RailsClient::next_wakeup() const {
  switch (phase_) {
    case Phase::kStopped:
    case Phase::kReady:
      return Time::never();
    case Phase::kStarting:
      return started_at_ + config_.ready_timeout;
    case Phase::kWaiting:
      return restart_at_;
  }
  return Time::never();
}

bool RailsClient::prepare_wait(Wake wake) {
  if (!process_) return true;
  if (!process_->prepare_wait(wake)) return false;
  waited_ = true;
  return true;
}

uint32_t RailsClient::poll(Time now, RailsEvents& events, uint32_t max_records) {
  if (!process_) {
    if (phase_ == Phase::kWaiting && now >= restart_at_) restart(now);
    return 0;
  }
  if (waited_) {
    std::vector<pollfd> all = pollfds();
    for (pollfd& entry : all) entry.revents = POLLIN;
    waited(all);
  }
  const bool exit_seen = std::exchange(exit_seen_, false);
  if (std::exchange(channel_spoke_, false)) process_->read_last_words();
  process_->flush();
  // One record of each rail in turn, until all are empty.
  uint32_t handled = 0;
  uint32_t quiet = 0;
  const uint32_t rails = process_->rail_count();
  while (handled < max_records && quiet < rails) {
    const uint32_t rail = next_rail_;
    next_rail_ = (next_rail_ + 1) % rails;
    Record record;
    const RingState state = process_->pop(rail, record);
    if (state == RingState::kBlocked) {
      ++quiet;
      continue;
    }
    quiet = 0;
    if (state == RingState::kCorrupt || !handle(now, rail, record, events)) {
      kill("impossible record on the ring of rail " + std::to_string(rail));
      break;
    }
    ++handled;
  }
  process_->ring();
  if (phase_ == Phase::kStarting && now >= started_at_ + config_.ready_timeout)
    kill("not ready in time");
  if (std::exchange(looked_, false) && !exit_seen) checked_at_ = now;
  if (exit_seen || !kill_reason_.empty() || now >= checked_at_ + kAliveCheck)
    notice_death(now, events);
  return handled;
}

void RailsClient::ring() {
  if (process_) process_->ring();
}

// --- Records of the process.

bool RailsClient::handle(Time now, uint32_t rail, const Record& record, RailsEvents& events) {
  switch (static_cast<Event>(record.kind)) {
    case Event::kReady:
      return on_ready_record(rail, record, now, events);
    case Event::kConnected:
    case Event::kConnectFailed:
    case Event::kLaneError:
    case Event::kClosed:
      return on_lane_record(rail, record, events);
    case Event::kControlIn:
    case Event::kOfferIn:
      return on_message(rail, record, events);
    case Event::kSendEnded:
      return on_send_ended(rail, record, events);
    case Event::kReceiveEnded:
      return on_receive_ended(rail, record, events);
  }
  return false;
}

bool RailsClient::on_ready_record(uint32_t rail, const Record& record, Time now,
                                  RailsEvents& events) {
  if (books_[rail].ready || record.offset > UINT16_MAX) return false;
  if (!process_->take_slot(rail, record.slot, record.slot_bytes, inbox_) || inbox_.empty())
    return false;
  RailInfo& info = ready_.rails[rail];
  info.transport = config_.rails[rail].transport;
  info.device = config_.rails[rail].device;
  info.address = inbox_;
  info.tcp_port = static_cast<uint16_t>(record.offset);
  info.binding_errno = record.status;
  books_[rail].ready = true;
  ready_.ucx_major = static_cast<uint32_t>(record.token >> 40);
  ready_.ucx_minor = static_cast<uint32_t>(record.token >> 20) & 0xFFFFF;
  ready_.ucx_release = static_cast<uint32_t>(record.token) & 0xFFFFF;
  if (!std::all_of(books_.begin(), books_.end(), [](const RailBook& b) { return b.ready; }))
    return true;
  phase_ = Phase::kReady;
  ready_at_ = now;
  events.on_ready(ready_);
  return true;
}

bool RailsClient::on_lane_record(uint32_t rail, const Record& record, RailsEvents& events) {
  const LaneKey key{record.lane};
  const auto found = lanes_.find(key);
  if (found == lanes_.end() || found->second.rail != rail) {
    ++bogus_;
    return true;
  }
  Lane& lane = found->second;
  const auto kind = static_cast<Event>(record.kind);
  if (kind == Event::kLaneError) {
    if (lane.state != LaneState::kClosing) events.on_lane_error(key, record.status);
    return true;
  }
  if (kind == Event::kClosed) {
    // "Closed" is only believed when everything under the lane has been told.
    if (lane.state != LaneState::kClosing || lane.operations != 0) return false;
    if (lane.address_slot != kNoSlot) process_->free_slot(lane.address_slot);
    lanes_.erase(found);
    events.on_closed(key);
    return true;
  }
  if (lane.address_slot == kNoSlot) return false;  // a second answer
  process_->free_slot(lane.address_slot);
  lane.address_slot = kNoSlot;
  if (lane.state == LaneState::kClosing) return true;  // the answer to close() follows
  if (kind == Event::kConnected) {
    lane.state = LaneState::kUp;
    events.on_connected(key);
  } else {
    lanes_.erase(found);
    events.on_connect_failed(key, record.status);
  }
  return true;
}

bool RailsClient::on_message(uint32_t rail, const Record& record, RailsEvents& events) {
  if (!process_->take_slot(rail, record.slot, record.slot_bytes, inbox_)) return false;
  if (static_cast<Event>(record.kind) == Event::kControlIn) {
    // Nobody knows our address before all rails are ready.
    if (phase_ != Phase::kReady)
      ++bogus_;
    else
      events.on_control(rail, inbox_);
    return true;
  }
  OfferIn offer;
  offer.rail = rail;
  offer.header = inbox_;
  offer.data_bytes = record.bytes;
  offer.too_many = record.descriptor == 0 && record.status == kStatusTooMany;
  if (record.descriptor != 0) {
    if (++books_[rail].held > config_.limits.held_offers) return false;
    offer.descriptor = DescriptorId{next_descriptor_++};
    held_.emplace(offer.descriptor, Held{rail, record.descriptor, record.bytes});
  }
  if (phase_ == Phase::kReady) {
    events.on_offer(offer);
  } else {
    ++bogus_;
    if (offer.descriptor) (void)drop(offer.descriptor);
  }
  return true;
}

void RailsClient::end_operation(LaneKey lane, uint32_t rail) {
  --books_[rail].operations;
  if (const auto found = lanes_.find(lane); found != lanes_.end()) --found->second.operations;
}

bool RailsClient::on_send_ended(uint32_t rail, const Record& record, RailsEvents& events) {
  const SendToken token{record.token};
  const auto found = sends_.find(token);
  if (found == sends_.end() || found->second.rail != rail) {
    ++bogus_;
    return true;
  }
  const Send send = found->second;
  sends_.erase(found);
  process_->free_slot(send.slot);
  end_operation(send.lane, rail);
  events.on_send_ended(token, record.status == kStatusOk);
  return true;
}

bool RailsClient::on_receive_ended(uint32_t rail, const Record& record, RailsEvents& events) {
  const LandingId token{record.token};
  const auto found = landings_.find(token);
  if (found == landings_.end() || found->second.rail != rail) {
    ++bogus_;
    return true;
  }
  const Landing landing = found->second;
  landings_.erase(found);
  end_operation(landing.lane, rail);
  // A receive that holds less or more than was agreed has not ended well.
  const bool ok = record.status == kStatusOk && record.bytes == landing.bytes;
  events.on_receive_ended(token, ok, ok ? landing.bytes : 0);
  return true;
}

// --- Commands.

namespace {

tl::unexpected<Error> down() {
  return fail(Code::kUnavailable, "RAILS_DOWN", "the rails process is not ready");
}
tl::unexpected<Error> busy(const char* what) {
  return fail(Code::kResourceExhausted, "RAILS_BUSY", std::string("no free ") + what);
}
tl::unexpected<Error> no_lane() {
  return fail(Code::kNotFound, "LANE_UNKNOWN", "no such lane, or it closes");
}

}  // namespace

Result<RailsClient::Lane*> RailsClient::usable_lane(LaneKey key) {
  if (phase_ != Phase::kReady) return down();
  const auto found = lanes_.find(key);
  if (found == lanes_.end() || found->second.state == LaneState::kClosing) return no_lane();
  return &found->second;
}

Status RailsClient::check_region(const Region& region) const {
  uint64_t end = 0;
  if (region.segment >= plan_->process.setup.segment_count || region.bytes == 0 ||
      !checked_add(region.offset, region.bytes, end) ||
      end > plan_->process.setup.segments[region.segment].bytes)
    return invalid("region", "REGION_INVALID", "outside its segment");
  return {};
}

Status RailsClient::connect(LaneKey key, uint32_t rail, std::span<const uint8_t> address) {
  if (phase_ != Phase::kReady) return down();
  if (rail >= process_->rail_count()) return invalid("rail", "RAIL_UNKNOWN", "no such rail");
  if (!key) return invalid("lane", "LANE_UNKNOWN", "zero names no lane");
  if (address.empty() || address.size() > kLargeSlotBytes)
    return invalid("address", "ADDRESS_INVALID", std::to_string(address.size()) + " bytes");
  if (lanes_.contains(key)) return fail(Code::kAlreadyExists, "LANE_EXISTS", "the key is in use");
  const auto on_rail = std::count_if(lanes_.begin(), lanes_.end(),
                                     [rail](const auto& e) { return e.second.rail == rail; });
  if (static_cast<uint64_t>(on_rail) >= config_.limits.lanes) return busy("lane");
  const auto slot = process_->write_slot(address);
  if (!slot) return busy("slot");
  Record record;
  record.kind = static_cast<uint16_t>(Command::kConnect);
  record.lane = key.value;
  record.slot = *slot;
  record.slot_bytes = static_cast<uint32_t>(address.size());
  if (!process_->push(rail, record)) {
    process_->free_slot(*slot);
    return busy("record");
  }
  lanes_.emplace(key, Lane{rail, LaneState::kConnecting, *slot, 0});
  return {};
}

Status RailsClient::close(LaneKey key) {
  auto lane = usable_lane(key);
  if (!lane) return tl::unexpected<Error>(lane.error());
  (*lane)->state = LaneState::kClosing;
  Record record;
  record.kind = static_cast<uint16_t>(Command::kClose);
  record.lane = key.value;
  process_->push_later((*lane)->rail, record);
  return {};
}

Status RailsClient::send(Command command, LaneKey key, std::span<const uint8_t> bytes,
                         const Region& region, SendToken token) {
  auto lane = usable_lane(key);
  if (!lane) return tl::unexpected<Error>(lane.error());
  const bool offer = command == Command::kSendOffer;
  if (offer) KVFERRY_RETURN_IF_ERROR(check_region(region));
  if (bytes.empty() || bytes.size() > (offer ? kMaxOfferHeaderBytes : kLargeSlotBytes))
    return invalid(offer ? "header" : "message", "MESSAGE_SIZE_INVALID",
                   std::to_string(bytes.size()) + " bytes");
  if (!token || sends_.contains(token))
    return invalid("token", "TOKEN_IN_USE", "names another send, or none");
  const uint32_t rail = (*lane)->rail;
  if (books_[rail].operations >= config_.limits.operations) return busy("operation");
  const auto slot = process_->write_slot(bytes);
  if (!slot) return busy("slot");
  Record record;
  record.kind = static_cast<uint16_t>(command);
  record.lane = key.value;
  record.slot = *slot;
  record.slot_bytes = static_cast<uint32_t>(bytes.size());
  record.token = token.value;
  record.segment = region.segment;
  record.offset = region.offset;
  record.bytes = region.bytes;
  if (!process_->push(rail, record)) {
    process_->free_slot(*slot);
    return busy("record");
  }
  sends_.emplace(token, Send{key, rail, *slot});
  ++books_[rail].operations;
  ++(*lane)->operations;
  return {};
}

Status RailsClient::send_control(LaneKey lane, std::span<const uint8_t> message, SendToken token) {
  return send(Command::kSendControl, lane, message, {}, token);
}

Status RailsClient::send_offer(LaneKey lane, std::span<const uint8_t> header, Region region,
                               SendToken token) {
  return send(Command::kSendOffer, lane, header, region, token);
}

Status RailsClient::accept(DescriptorId descriptor, LaneKey key, Region region, LandingId landing) {
  auto lane = usable_lane(key);
  if (!lane) return tl::unexpected<Error>(lane.error());
  const auto found = held_.find(descriptor);
  if (found == held_.end()) return fail(Code::kNotFound, "OFFER_UNKNOWN", "no such offer is held");
  const Held held = found->second;
  KVFERRY_RETURN_IF_ERROR(check_region(region));
  if (region.bytes != held.bytes)
    return invalid("region", "REGION_INVALID", "is not as long as the offer");
  if (held.rail != (*lane)->rail)
    return invalid("lane", "LANE_UNKNOWN", "the offer came by another rail");
  if (!landing || landings_.contains(landing))
    return invalid("landing", "TOKEN_IN_USE", "names another receive, or none");
  if (books_[held.rail].operations >= config_.limits.operations) return busy("operation");
  Record record;
  record.kind = static_cast<uint16_t>(Command::kAccept);
  record.lane = key.value;
  record.descriptor = held.remote;
  record.token = landing.value;
  record.segment = region.segment;
  record.offset = region.offset;
  record.bytes = region.bytes;
  if (!process_->push(held.rail, record)) return busy("record");
  held_.erase(found);
  --books_[held.rail].held;
  landings_.emplace(landing, Landing{key, held.rail, region.bytes});
  ++books_[held.rail].operations;
  ++(*lane)->operations;
  return {};
}

Status RailsClient::drop(DescriptorId descriptor) {
  const auto found = held_.find(descriptor);
  if (!process_ || found == held_.end())
    return fail(Code::kNotFound, "OFFER_UNKNOWN", "no such offer is held");
  Record record;
  record.kind = static_cast<uint16_t>(Command::kDrop);
  record.descriptor = found->second.remote;
  const uint32_t rail = found->second.rail;
  held_.erase(found);
  --books_[rail].held;
  process_->push_later(rail, record);
  return {};
}

// --- Looking on.

uint32_t RailsClient::rail_count() const {
  return static_cast<uint32_t>(config_.rails.size());
}

RailStats RailsClient::stats(uint32_t rail) const {
  RailStats stats;
  if (!process_ || rail >= rail_count()) return stats;
  const RailCounters& from = process_->counters(rail);
  stats.ticks = load(from.ticks);
  stats.sleeps = load(from.sleeps);
  stats.spins = load(from.spins);
  stats.messages_sent = load(from.messages_sent);
  stats.messages_received = load(from.messages_received);
  stats.offers_sent = load(from.offers_sent);
  stats.offers_received = load(from.offers_received);
  stats.bytes_sent = load(from.bytes_sent);
  stats.bytes_received = load(from.bytes_received);
  stats.dropped = load(from.dropped);
  stats.refused = load(from.refused);
  stats.held_offers = load(from.held_offers);
  stats.operations = load(from.operations);
  return stats;
}

int RailsClient::pid() const {
  return process_ ? process_->child().pid() : -1;
}

}  // namespace kvferry::rails
