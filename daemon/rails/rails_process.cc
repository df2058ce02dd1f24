#include "daemon/rails/rails_process.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace kvferry::rails {
namespace {

constexpr std::size_t kMaxDescriptors = 1 + kMaxRails + kMaxSegments;
static_assert(kMaxDescriptors <= 253, "SCM_MAX_FD of the kernel");

// A batch that is longer shall not keep a sleeping rail waiting.
constexpr uint32_t kMostUnrung = 16;

Wake wake_for(const Record& command) {
  return command.kind == static_cast<uint16_t>(Command::kReturnSlot) ? Wake::kAny : Wake::kWork;
}

}  // namespace

Result<std::unique_ptr<RailsProcess>> RailsProcess::spawn(const Plan& plan) {
  const auto layout = SharedLayout::make(plan.setup.limits, plan.setup.rail_count);
  if (!layout)
    return invalid("rails.limits", "RAILS_CONFIG_INVALID", "a count is zero or too large");
  std::unique_ptr<RailsProcess> process(new RailsProcess(*layout));

  auto memory = make_sealed_memfd("kvferry-rails", layout->total_bytes());
  if (!memory) return tl::unexpected<Error>(memory.error());
  auto shared = Mapping::map(memory->get(), layout->total_bytes());
  if (!shared) return tl::unexpected<Error>(shared.error());
  process->shared_ = std::move(*shared);

  std::byte* const base = process->shared_.base();
  std::vector<UniqueFd> their_doorbells;
  for (uint32_t rail = 0; rail < layout->rail_count(); ++rail) {
    auto pair = make_socket_pair(SOCK_STREAM);
    if (!pair) return tl::unexpected<Error>(pair.error());
    RailEnds& ends = process->rails_.emplace_back();
    ends.doorbell = std::move(pair->ours);
    ends.commands = RingProducer<Record>(layout->command_ring(base, rail));
    ends.events = RingConsumer<Record>(layout->event_ring(base, rail));
    their_doorbells.push_back(std::move(pair->theirs));
  }
  const auto fill = [](std::vector<uint32_t>& free, SharedLayout::SlotRange range) {
    // Lowest numbers are taken first and so stay in the cache.
    for (uint32_t i = range.count; i > 0; --i) free.push_back(range.first + i - 1);
  };
  fill(process->free_small_, layout->outbound_small());
  fill(process->free_large_, layout->outbound_large());

  auto channel = make_socket_pair(SOCK_SEQPACKET);
  if (!channel) return tl::unexpected<Error>(channel.error());
  process->channel_ = std::move(channel->ours);
  // Before the child exists: what lies in the channel when it looks is complete.
  KVFERRY_RETURN_IF_ERROR(process->send_setup(plan, memory->get(), their_doorbells));
  auto child =
      ChildProcess::spawn(plan.executable, {}, plan.environment, {channel->theirs.get(), -1});
  if (!child) return tl::unexpected<Error>(child.error());
  process->child_ = std::move(*child);
  return process;
}

Status RailsProcess::send_setup(const Plan& plan, int memory,
                                std::span<const UniqueFd> their_doorbells) {
  std::vector<int> fds = {memory};
  for (const UniqueFd& doorbell : their_doorbells) fds.push_back(doorbell.get());
  fds.insert(fds.end(), plan.segment_fds.begin(), plan.segment_fds.end());
  if (fds.size() > kMaxDescriptors)
    return fail(Code::kInvalidArgument, "RAILS_CONFIG_INVALID", "too many descriptors");

  Setup setup = plan.setup;
  iovec part = {&setup, sizeof setup};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
  std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
  if (::sendmsg(channel_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL) !=
      static_cast<ssize_t>(sizeof setup))
    return fail_errno("RAILS_SPAWN_FAILED", "sendmsg of the set-up", errno);
  return {};
}

void RailsProcess::append_pollfds(std::vector<pollfd>& out) const {
  for (const RailEnds& rail : rails_) out.push_back({rail.doorbell.get(), POLLIN, 0});
  out.push_back({channel_.get(), POLLIN, 0});
  out.push_back({child_.pidfd(), POLLIN, 0});
}

bool RailsProcess::push_now(RailEnds& rail, const Record& record) {
  if (rail.commands.push(record) != RingState::kOk) return false;
  const Wake wake = wake_for(record);
  rail.unrung = std::min(rail.unrung.value_or(wake), wake);
  if (++rail.unrung_records >= kMostUnrung) ring(rail);
  return true;
}

void RailsProcess::ring(RailEnds& rail) {
  if (!rail.unrung) return;
  if (rail.commands.take_wake(*rail.unrung)) ring_doorbell(rail.doorbell.get());
  rail.unrung.reset();
  rail.unrung_records = 0;
}

void RailsProcess::ring() {
  for (RailEnds& rail : rails_) ring(rail);
}

bool RailsProcess::push(uint32_t rail, const Record& record) {
  RailEnds& ends = rails_[rail];
  // Never past what waits: order is kept.
  return ends.later.empty() && push_now(ends, record);
}

void RailsProcess::push_later(uint32_t rail, const Record& record) {
  RailEnds& ends = rails_[rail];
  if (!ends.later.empty() || !push_now(ends, record)) ends.later.push_back(record);
}

bool RailsProcess::overrun(uint32_t rail) const {
  // Each inbound slot given back, each lane closed and each offer dropped, once.
  const Limits& limits = layout_.limits();
  return rails_[rail].later.size() >
         uint64_t{limits.inbound_small} + limits.inbound_large + limits.lanes + limits.held_offers;
}

void RailsProcess::flush() {
  for (RailEnds& rail : rails_)
    while (!rail.later.empty() && push_now(rail, rail.later.front())) rail.later.pop_front();
}

RingState RailsProcess::pop(uint32_t rail, Record& record) {
  return rails_[rail].events.pop(record);
}

bool RailsProcess::prepare_wait(Wake wake) {
  ring();
  for (std::size_t i = 0; i < rails_.size(); ++i) {
    if (rails_[i].events.prepare_sleep(wake)) continue;
    for (std::size_t k = 0; k < i; ++k) rails_[k].events.end_sleep();
    return false;
  }
  return true;
}

RailsProcess::Seen RailsProcess::end_wait(std::span<const pollfd> polled) {
  Seen seen;
  for (RailEnds& rail : rails_) rail.events.end_sleep();
  for (std::size_t i = 0; i < polled.size(); ++i) {
    if (polled[i].revents == 0) continue;
    if (i < rails_.size())
      quiet_doorbell(rails_[i].doorbell.get());
    else
      (polled[i].fd == channel_.get() ? seen.channel : seen.exit) = true;
  }
  return seen;
}

const std::string& RailsProcess::read_last_words() {
  char text[512];
  for (int round = 0; round < 4; ++round) {
    const ssize_t got = ::recv(channel_.get(), text, sizeof text, MSG_DONTWAIT);
    if (got <= 0) break;
    last_words_.assign(text, static_cast<std::size_t>(got));
    for (char& c : last_words_)
      if (c < ' ' || c > '~') c = '?';
  }
  return last_words_;
}

std::optional<uint32_t> RailsProcess::write_slot(std::span<const uint8_t> bytes) {
  if (bytes.size() > kLargeSlotBytes) return std::nullopt;
  std::vector<uint32_t>* free = &free_small_;
  if (bytes.size() > kSmallSlotBytes || free->empty()) free = &free_large_;
  if (free->empty()) return std::nullopt;
  const uint32_t number = free->back();
  free->pop_back();
  if (!bytes.empty())
    std::memcpy(shared_.base() + layout_.slot(number)->offset, bytes.data(), bytes.size());
  return number;
}

void RailsProcess::free_slot(uint32_t slot) {
  (slot < layout_.outbound_large().first ? free_small_ : free_large_).push_back(slot);
}

bool RailsProcess::take_slot(uint32_t rail, uint32_t slot, uint32_t bytes,
                             std::vector<uint8_t>& out) {
  const auto place = layout_.slot(slot);
  if (!place || !place->inbound || place->rail != rail || bytes > place->capacity) return false;
  const auto* const at = reinterpret_cast<const uint8_t*>(shared_.base() + place->offset);
  out.assign(at, at + bytes);
  Record back;
  back.kind = static_cast<uint16_t>(Command::kReturnSlot);
  back.slot = slot;
  push_later(rail, back);
  return !overrun(rail);
}

const RailCounters& RailsProcess::counters(uint32_t rail) const {
  return *layout_.counters(shared_.base(), rail);
}

}  // namespace kvferry::rails
