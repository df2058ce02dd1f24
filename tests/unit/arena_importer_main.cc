// The other process of arena_importer.h. Ends with its socket.
#include <cstdio>
#include <memory>
#include <optional>

#include "daemon/gpu/device_arena_view.h"
#include "tests/fake_cuda/control.h"
#include "tests/unit/arena_importer.h"

namespace kvferry::gpu_test {
namespace {

// The next request, and the descriptors that came with it; nothing at the socket's end.
std::optional<ImporterRequest> receive(std::vector<UniqueFd>& fds) {
  ImporterRequest request;
  iovec part{&request, sizeof request};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxSegments * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (::recvmsg(STDIN_FILENO, &message, MSG_CMSG_CLOEXEC) != static_cast<ssize_t>(sizeof request))
    return std::nullopt;
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header == nullptr) return request;
  for (std::size_t i = 0; i < (header->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
    fds.emplace_back(fd);
  }
  return request;
}

class View {
 public:
  explicit View(std::shared_ptr<const gpu::Devices> devices) : devices_(std::move(devices)) {}

  Status serve(const ImporterRequest& request, std::vector<UniqueFd> fds) {
    switch (request.op) {
      case ImporterOp::kOpen:
        return open(request, std::move(fds));
      case ImporterOp::kWrite:
        return write(request);
      case ImporterOp::kClose:
        view_.reset();
        return {};
    }
    return fail(Code::kInternal, "NO_SUCH_OPERATION", "");
  }

 private:
  Status open(const ImporterRequest& request, std::vector<UniqueFd> fds) {
    view_.reset();
    device_ = devices_->find(request.segments[0].device_uuid);
    if (device_ == nullptr) return fail(Code::kNotFound, "DEVICE_UNKNOWN", "");
    std::vector<gpu::ExportedSegment> segments;
    auto fd = fds.begin();
    for (uint32_t i = 0; i < request.segment_count; ++i) {
      const WireSegment& one = request.segments[i];
      gpu::ExportedSegment& segment = segments.emplace_back();
      segment.kind = one.kind;
      segment.bytes = one.bytes;
      segment.device_uuid = one.device_uuid;
      segment.handle = one.handle;
      if (one.kind == gpu::ArenaKind::kDeviceVmm && fd != fds.end()) segment.fd = std::move(*fd++);
    }
    auto view = gpu::DeviceArenaView::open(device_, std::move(segments));
    KVFERRY_RETURN_IF_ERROR(view);
    view_ = std::move(*view);
    return {};
  }

  Status write(const ImporterRequest& request) {
    const auto address = view_->address_of(request.region);
    if (!address) return fail(Code::kInvalidArgument, "OUTSIDE", "");
    const gpu::Device::Current current(*device_);
    KVFERRY_RETURN_IF_ERROR(current.status());
    KVFERRY_RETURN_IF_ERROR(
        device_->check(device_->api().cuMemcpyHtoDAsync(*address, request.data.data(),
                                                        request.data_bytes, nullptr),
                       "cuMemcpyHtoDAsync"));
    return device_->check(device_->api().cuStreamSynchronize(nullptr), "cuStreamSynchronize");
  }

  const std::shared_ptr<const gpu::Devices> devices_;
  std::shared_ptr<const gpu::Device> device_;
  std::unique_ptr<gpu::DeviceArenaView> view_;
};

int run(const char* library) {
  const fake_cuda::Control control(library);
  auto driver = cuda::Driver::load(library);
  if (!driver) {
    std::fprintf(stderr, "arena_importer: %s\n", driver.error().to_string().c_str());
    return 1;
  }
  auto devices = gpu::Devices::open(std::move(*driver));
  if (!devices) {
    std::fprintf(stderr, "arena_importer: %s\n", devices.error().to_string().c_str());
    return 1;
  }
  View view(std::move(*devices));
  for (;;) {
    std::vector<UniqueFd> fds;
    const auto request = receive(fds);
    if (!request) return 0;
    const Status status = view.serve(*request, std::move(fds));
    ImporterReply reply;
    if (!status) status.error().reason.copy(reply.reason.data(), reply.reason.size() - 1);
    const auto live = control.live();
    reply.held = live.total() - live.contexts;
    if (::send(STDIN_FILENO, &reply, sizeof reply, MSG_NOSIGNAL) < 0) return 1;
  }
}

}  // namespace
}  // namespace kvferry::gpu_test

int main(int argc, char** argv) {
  return argc == 2 ? kvferry::gpu_test::run(argv[1]) : 64;
}
