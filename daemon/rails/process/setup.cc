#include "daemon/rails/process/setup.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <string>

namespace kvferry::rails {
namespace {

constexpr std::size_t kMaxDescriptors = 1 + kMaxRails + kMaxSegments;

tl::unexpected<Error> wrong(std::string what) {
  return fail(Code::kInvalidArgument, "SETUP_INVALID", std::move(what));
}

struct Received {
  Setup setup;
  std::vector<UniqueFd> fds;
};

Result<Received> receive_message(int channel) {
  Received received;
  iovec part = {&received.setup, sizeof received.setup};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = ::recvmsg(channel, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) return fail_errno("SETUP_INVALID", "recvmsg", errno);
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    std::vector<int> numbers(count);
    std::memcpy(numbers.data(), CMSG_DATA(header), count * sizeof(int));
    for (const int fd : numbers) received.fds.emplace_back(fd);
  }
  if ((message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) return wrong("cut short");
  if (static_cast<std::size_t>(got) != sizeof received.setup) return wrong("wrong size");
  return received;
}

template <std::size_t N>
bool ends(const char (&text)[N]) {
  return std::find(std::begin(text), std::end(text), '\0') != std::end(text);
}

Status check_segment(const SetupSegment& segment) {
  if (!is_segment_kind(segment.kind)) return wrong("kind of a segment");
  if (segment.bytes == 0) return wrong("size of a segment");
  if (is_on_device(segment.kind) != (segment.device_uuid != DeviceUuid{}))
    return wrong("device of a segment");
  if (has_handle(segment.kind) != (segment.handle != SegmentHandle{}))
    return wrong("handle of a segment");
  return {};
}

Status check(const Received& received) {
  const Setup& setup = received.setup;
  if (setup.magic != Setup::kMagic || setup.version != Setup::kVersion)
    return wrong("another version of the daemon");
  if (setup.rail_count == 0 || setup.rail_count > kMaxRails || setup.segment_count == 0 ||
      setup.segment_count > kMaxSegments)
    return wrong("counts");
  std::size_t descriptors = 1 + setup.rail_count;
  for (uint32_t i = 0; i < setup.segment_count; ++i) {
    KVFERRY_RETURN_IF_ERROR(check_segment(setup.segments[i]));
    if (has_descriptor(setup.segments[i].kind)) ++descriptors;
  }
  if (received.fds.size() != descriptors) return wrong("number of descriptors");
  for (const SetupRail& rail : setup.rails)
    if (!ends(rail.transport) || !ends(rail.device)) return wrong("names");
  if (!ends(setup.cuda_driver)) return wrong("names");
  return {};
}

}  // namespace

uint32_t device_count(const Setup& setup) {
  std::set<DeviceUuid> uuids;
  for (uint32_t i = 0; i < setup.segment_count; ++i)
    if (is_on_device(setup.segments[i].kind)) uuids.insert(setup.segments[i].device_uuid);
  return static_cast<uint32_t>(uuids.size());
}

Result<ProcessSetup> receive_setup(int channel, Duration limit) {
  pollfd wait = {channel, POLLIN, 0};
  const auto limit_ms = std::chrono::ceil<std::chrono::milliseconds>(limit).count();
  if (::poll(&wait, 1, static_cast<int>(limit_ms)) != 1) return wrong("none came");
  auto received = receive_message(channel);
  if (!received) return tl::unexpected<Error>(received.error());
  KVFERRY_RETURN_IF_ERROR(check(*received));
  const Setup& setup = received->setup;
  const auto layout = SharedLayout::make(setup.limits, setup.rail_count);
  if (!layout) return wrong("limits");
  KVFERRY_RETURN_IF_ERROR(check_sealed(received->fds[0].get(), layout->total_bytes()));
  auto shared = Mapping::map(received->fds[0].get(), layout->total_bytes());
  if (!shared) return tl::unexpected<Error>(shared.error());

  ProcessSetup result{setup, *layout, std::move(*shared), {}, {}, {}, {}};
  auto next_fd = received->fds.begin() + 1;
  for (uint32_t i = 0; i < setup.rail_count; ++i) result.doorbells.push_back(std::move(*next_fd++));
  for (uint32_t i = 0; i < setup.segment_count; ++i) {
    const SetupSegment& told = setup.segments[i];
    SegmentMemory& segment =
        result.segments.emplace_back(SegmentMemory{nullptr, told.bytes, is_on_device(told.kind)});
    UniqueFd& fd = result.device_fds.emplace_back();
    if (has_descriptor(told.kind)) fd = std::move(*next_fd++);
    if (segment.on_device) continue;
    KVFERRY_RETURN_IF_ERROR(check_sealed(fd.get(), told.bytes));
    auto mapped = Mapping::map(fd.get(), told.bytes);
    if (!mapped) return tl::unexpected<Error>(mapped.error());
    segment.base = mapped->base();
    result.host_memory.push_back(std::move(*mapped));
    fd.reset();
  }
  return result;
}

void say(int channel, std::string_view text) {
  const std::string_view cut = text.substr(0, 500);
  (void)::send(channel, cut.data(), cut.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  const std::string line = "kvferry-rails: " + std::string(cut) + "\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace kvferry::rails
