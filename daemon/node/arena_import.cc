#include "daemon/node/arena_import.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/base/crypto.h"
#include "daemon/base/seqpacket.h"
#include "daemon/node/arena_wire.h"

namespace kvferry::node {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr Duration kConnectAgain = std::chrono::milliseconds(20);

tl::unexpected<Error> broken(const char* what) {
  return fail(Code::kInternal, "SOCKET_PROTOCOL", what);
}

// Whether `stop` became readable within that time, which `socket` being readable ends too.
bool stopped(int stop, Duration most, int socket = -1) {
  std::array<pollfd, 2> polled{{{stop, POLLIN, 0}, {socket, POLLIN | POLLRDHUP, 0}}};
  (void)::poll(polled.data(), polled.size(), static_cast<int>(most.count() / 1000000 + 1));
  return polled[0].revents != 0;
}

tl::unexpected<Error> stopping() {
  return fail(Code::kUnavailable, "SHUTDOWN", "the daemon is stopping");
}

// Without blocking: connect() itself would not be ended by `stop`. Where the lender's backlog is
// full the kernel says so at once and does not tell when it is not any more.
Status connect_by(int fd, const std::string& path, Time deadline, int stop) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, kMaxSocketPathBytes);
  while (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    const int error = errno;
    const Duration left = deadline - monotonic_now();
    if ((error != EAGAIN && error != EINTR) || left.count() <= 0) {
      Error failed = fail_errno("SOCKET_FAILED", "connect(" + path + ")", error).value();
      failed.code = Code::kUnavailable;
      return tl::unexpected<Error>(std::move(failed));
    }
    if (stopped(stop, std::min(left, kConnectAgain))) return stopping();
  }
  return {};
}

Result<UniqueFd> connect_to(const std::string& path, Time deadline, int stop) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return fail_errno("SOCKET_FAILED", "socket", errno);
  KVFERRY_RETURN_IF_ERROR(connect_by(fd.get(), path, deadline, stop));
  // Who listens, not who made the file: pages will be written into what he hands over.
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0)
    return fail_errno("SOCKET_FAILED", "getsockopt(SO_PEERCRED)", errno);
  if (credentials.uid != 0 && credentials.uid != ::geteuid())
    return fail(Code::kPermissionDenied, "SOCKET_FOREIGN",
                "uid " + std::to_string(credentials.uid) + " listens at " + path);
  return fd;
}

// The next message of exactly this kind.
template <typename T>
Status receive(int socket, Time deadline, int stop, wire::Type type, T& out,
               std::vector<UniqueFd>& fds) {
  std::byte buffer[wire::kReadBytes];
  std::size_t bytes = 0;
  while (true) {
    switch (receive_message(socket, buffer, bytes, fds)) {
      case Received::kMessage:
        if (bytes != sizeof out) return broken("a message of another size");
        std::memcpy(&out, buffer, sizeof out);
        if (out.magic != wire::kMagic || out.type != type) return broken("another message");
        return {};
      case Received::kBroken:
        return broken("a message that is too long");
      case Received::kClosed:
        return fail(Code::kUnavailable, "SOCKET_CLOSED", "the lender has turned us away");
      case Received::kNothing:
        break;
    }
    const Duration left = deadline - monotonic_now();
    if (left.count() <= 0)
      return fail(Code::kDeadlineExceeded, "SOCKET_SILENT", "the lender says nothing");
    if (stopped(stop, left, socket)) return stopping();
  }
}

}  // namespace

// ---- the lender's socket -----------------------------------------------------------------------

Result<std::shared_ptr<LenderSession>> LenderSession::open(const rpc::ArenasOffer& offer,
                                                           Time deadline, int stop,
                                                           ArenaDescriptors& descriptors) {
  auto socket = connect_to(offer.socket_path, deadline, stop);
  KVFERRY_RETURN_IF_ERROR(socket);
  std::shared_ptr<LenderSession> session(new LenderSession(std::move(*socket)));
  KVFERRY_RETURN_IF_ERROR(session->get_descriptors(offer, deadline, stop, descriptors));
  session->silent_.store(false, std::memory_order_release);
  return session;
}

Status LenderSession::get_descriptors(const rpc::ArenasOffer& offer, Time deadline, int stop,
                                      ArenaDescriptors& descriptors) {
  wire::Show show;
  std::memcpy(show.token, offer.token.bytes.data(), sizeof show.token);
  if (!send_message(socket_.get(), &show, sizeof show))
    return fail(Code::kUnavailable, "SOCKET_CLOSED", "the lender has turned us away");
  wire::Welcome welcome;
  std::vector<UniqueFd> none;
  KVFERRY_RETURN_IF_ERROR(
      receive(socket_.get(), deadline, stop, wire::Type::kWelcome, welcome, none));
  if (!none.empty() || welcome.arenas > rpc::kMaxLentArenas) return broken("no such welcome");
  if (!equal_constant_time(welcome.proof, offer.proof.bytes))
    return fail(Code::kPermissionDenied, "LENDER_FOREIGN",
                "another daemon than the link's peer lends at " + offer.socket_path);
  std::size_t kept = 0;
  std::map<uint32_t, std::size_t> counts;  // of what has come
  for (uint32_t i = 0; i < welcome.arenas; ++i) {
    wire::Descriptors message;
    std::vector<UniqueFd> fds;
    KVFERRY_RETURN_IF_ERROR(
        receive(socket_.get(), deadline, stop, wire::Type::kDescriptors, message, fds));
    if (fds.size() != message.count || !counts.emplace(message.arena, fds.size()).second)
      return broken("descriptors that do not belong together");
    if (kept + fds.size() > kMaxLinkDescriptors) continue;
    kept += fds.size();
    descriptors[message.arena] = std::move(fds);
  }
  // Arenas of kinds that this release does not know have descriptors too.
  for (const rpc::OfferedArena& arena : offer.arenas) {
    if (!rpc::has_descriptors(arena.kind)) continue;
    const auto found = counts.find(arena.number);
    if (found == counts.end() || found->second != arena.segments.size())
      return broken("an arena without its descriptors");
  }
  return {};
}

LenderSession::~LenderSession() {
  if (silent_.load(std::memory_order_acquire)) return;
  const wire::Unmapped message;
  // Where it does not go, this process's end will be the evidence.
  (void)send_message(socket_.get(), &message, sizeof message);
}

// ---- mapping -----------------------------------------------------------------------------------

BorrowedMemory::~BorrowedMemory() {
  pins.clear();
  pools.clear();
  const bool unclosed = view != nullptr && view->close() != 0;
  const bool stuck = unclosed || refused->load() != 0;
  if (stuck && session != nullptr) session->keep_silent();
  if (gauges == nullptr) return;
  gauges->arenas.fetch_sub(1);
  gauges->bytes.fetch_sub(bytes);
  if (stuck) gauges->stuck.fetch_add(1);
}

namespace {

Status map_host(const rpc::OfferedArena& arena, std::vector<UniqueFd> descriptors,
                const gpu::Devices* devices, BorrowedMemory& out) {
  for (std::size_t i = 0; i < arena.segments.size(); ++i) {
    auto pool = memory::HostPool::import(std::move(descriptors.at(i)), arena.segments[i].bytes, {},
                                         "segments[" + std::to_string(i) + "]");
    KVFERRY_RETURN_IF_ERROR(pool);
    out.pools.push_back(std::move(*pool));
    if (devices == nullptr) continue;
    const memory::HostPool& memory = *out.pools.back();
    auto pinned = gpu::PinnedMemory::pin(devices->all(), memory.base(),
                                         round_up(memory.bytes(), kPageBytes), out.refused);
    KVFERRY_RETURN_IF_ERROR(pinned);
    for (const auto& device : devices->all())
      if (!device->down() && (*pinned)->on(*device) == 0)
        return fail(Code::kUnavailable, "PIN_FAILED",
                    gpu::to_string(device->facts().uuid) + " does not see the memory");
    out.pins.push_back(std::move(*pinned));
  }
  return {};
}

gpu::ArenaKind device_kind(rpc::LentKind kind) {
  if (kind == rpc::LentKind::kFabricVmm) return gpu::ArenaKind::kFabricVmm;
  return kind == rpc::LentKind::kDeviceVmm ? gpu::ArenaKind::kDeviceVmm
                                           : gpu::ArenaKind::kCudaMalloc;
}

// Through which device an arena is mapped; null: none.
std::shared_ptr<const gpu::Device> device_for(const rpc::OfferedArena& arena, bool same_host,
                                              const gpu::Devices& devices) {
  if (same_host) return devices.find(arena.device_uuid);
  for (const auto& device : devices.all())
    if (!device->down()) return device;
  return nullptr;
}

Status map_on_device(const rpc::OfferedArena& arena, bool same_host,
                     std::vector<UniqueFd> descriptors, const gpu::Devices& devices,
                     BorrowedMemory& out) {
  const auto device = device_for(arena, same_host, devices);
  if (device == nullptr)
    return fail(
        Code::kNotFound, "DEVICE_NOT_VISIBLE",
        same_host ? gpu::to_string(arena.device_uuid) + " is not visible here" : "no device is up");
  // A gather may come from any of them.
  for (const auto& other : devices.all())
    if (!other->down() && !other->reaches(*device))
      return fail(Code::kFailedPrecondition, "NO_PEER_ACCESS",
                  gpu::to_string(other->facts().uuid) + " does not reach " +
                      gpu::to_string(device->facts().uuid));
  std::vector<gpu::ExportedSegment> segments;
  for (std::size_t i = 0; i < arena.segments.size(); ++i) {
    gpu::ExportedSegment& segment = segments.emplace_back();
    segment.kind = device_kind(arena.kind);
    segment.handle = arena.segments[i].handle;
    segment.bytes = arena.segments[i].bytes;
    segment.device_uuid = arena.device_uuid;
    if (rpc::has_descriptors(arena.kind)) segment.fd = std::move(descriptors.at(i));
  }
  auto view = gpu::DeviceArenaView::open(
      device, std::move(segments), devices.all(),
      same_host ? gpu::MemoryHome::kDevice : gpu::MemoryHome::kElsewhere);
  KVFERRY_RETURN_IF_ERROR(view);
  out.device = device;
  out.view = std::move(*view);
  return {};
}

}  // namespace

Result<std::unique_ptr<BorrowedMemory>> map_arena(const rpc::OfferedArena& arena, bool same_host,
                                                  std::vector<UniqueFd> descriptors,
                                                  const gpu::Devices* devices) {
  if (rpc::has_descriptors(arena.kind) && descriptors.empty())
    return fail(Code::kResourceExhausted, "TOO_MANY_DESCRIPTORS",
                "more than " + std::to_string(kMaxLinkDescriptors) + " segments over one link");
  KVFERRY_CHECK(!rpc::has_descriptors(arena.kind) || descriptors.size() == arena.segments.size(),
                "each segment has its descriptor");
  auto out = std::make_unique<BorrowedMemory>();
  for (const rpc::OfferedArena::Segment& segment : arena.segments) out->bytes += segment.bytes;
  if (arena.kind == rpc::LentKind::kHostMemfd) {
    KVFERRY_RETURN_IF_ERROR(map_host(arena, std::move(descriptors), devices, *out));
    return out;
  }
  if (devices == nullptr) return fail(Code::kNotFound, "DEVICE_NOT_VISIBLE", "no GPU is used here");
  KVFERRY_RETURN_IF_ERROR(map_on_device(arena, same_host, std::move(descriptors), *devices, *out));
  return out;
}

std::shared_ptr<const Segments> segments_of(const rpc::OfferedArena& arena,
                                            const std::shared_ptr<const BorrowedMemory>& memory) {
  auto out = std::make_shared<Segments>(arena.segments.front().number);
  for (uint32_t i = 0; i < arena.segments.size(); ++i) {
    Segments::Segment segment;
    segment.bytes = arena.segments[i].bytes;
    segment.keep = memory;
    if (memory->view != nullptr) {
      segment.device = memory->device.get();
      segment.base = *memory->view->address_of({i, 0, segment.bytes});
    } else {
      segment.host = memory->pools[i]->base();
      segment.pool = {memory, memory->pools[i].get()};
      if (!memory->pins.empty()) segment.pin = {memory, memory->pins[i].get()};
    }
    out->add(std::move(segment));
  }
  return out;
}

}  // namespace kvferry::node
