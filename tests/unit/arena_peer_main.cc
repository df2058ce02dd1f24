// The other process of arena_peer.h. Ends with its socket.
#include <cstdio>
#include <cstring>

#include "tests/unit/arena_peer.h"
#include "tests/unit/lending_support.h"

namespace kvferry::node {
namespace {

rpc::ArenasOffer from_plain(const PeerOffer& in) {
  rpc::ArenasOffer out;
  out.socket_path = in.path.data();
  out.token = in.token;
  out.host = in.host;
  for (uint32_t i = 0; i < in.arena_count; ++i) {
    const PeerOffer::Arena& from = in.arenas[i];
    rpc::OfferedArena& arena = out.arenas.emplace_back();
    arena.number = from.number;
    arena.kind = from.kind;
    arena.device_uuid = from.device_uuid;
    arena.segments.assign(from.segments.begin(), from.segments.begin() + from.segment_count);
  }
  return out;
}

class Peer {
 public:
  explicit Peer(std::shared_ptr<const gpu::Devices> devices) {
    ArenaBorrowerConfig config;
    config.host = host_id();
    config.devices = std::move(devices);
    borrower_.emplace(config, calls_, events_.sink());
  }

  std::string serve(const PeerRequest& request) {
    const LinkId link{request.link};
    switch (request.op) {
      case PeerOp::kUp: {
        const std::size_t before = events_.count<engine::ArenaMapped>();
        calls_.answer_next(from_plain(request.offer));
        borrower_->on_link_up(peer_ref(request.link, 2), engine::CheckKind::kNone);
        return events_.wait<engine::ArenaMapped>({}, before + request.expected) ? ""
               : logged("not mapped").empty()                                   ? "NOTHING"
                                              : logged("not mapped").back();
      }
      case PeerOp::kWrite: {
        const auto segments = borrower_->segments(link, request.arena);
        if (segments == nullptr) return "NO_ARENA";
        if (!segments->holds(request.region)) return "OUTSIDE";
        return write(*segments, request.region, request.byte);
      }
      case PeerOp::kHold:
        held_ = borrower_->segments(link, request.arena);
        return held_ == nullptr ? "NO_ARENA" : "";
      case PeerOp::kRelease:
        held_.reset();
        return "";
      case PeerOp::kGone:
        borrower_->on_link_gone(link);
        return "";
    }
    return "NO_SUCH_OPERATION";
  }

 private:
  static std::string write(const Segments& segments, const memory::Region& region, uint8_t byte) {
    const gpu::Device* const device = segments.device_of(region);
    if (device == nullptr) {
      std::memset(segments.host_address(region), byte, region.bytes);
      return "";
    }
    const std::vector<uint8_t> data(region.bytes, byte);
    const gpu::Device::Current current(*device);
    if (!current.ok()) return "NO_CONTEXT";
    const cuda::Api& api = device->api();
    if (api.cuMemcpyHtoDAsync(segments.address_on(*device, region), data.data(), data.size(),
                              nullptr) != cuda::CUDA_SUCCESS ||
        api.cuStreamSynchronize(nullptr) != cuda::CUDA_SUCCESS)
      return "COPY_FAILED";
    return "";
  }

  Calls calls_;
  Events events_;
  std::optional<ArenaBorrower> borrower_;
  std::shared_ptr<const Segments> held_;
};

int run(const char* library) {
  std::shared_ptr<const gpu::Devices> devices;
  if (library != nullptr) {
    auto driver = cuda::Driver::load(library);
    if (!driver) return 1;
    auto opened = gpu::Devices::open(std::move(*driver));
    if (!opened) return 1;
    devices = std::move(*opened);
  }
  Peer peer(std::move(devices));
  PeerRequest request;
  while (::recv(STDIN_FILENO, &request, sizeof request, 0) ==
         static_cast<ssize_t>(sizeof request)) {
    PeerReply reply;
    peer.serve(request).copy(reply.reason.data(), reply.reason.size() - 1);
    if (::send(STDIN_FILENO, &reply, sizeof reply, MSG_NOSIGNAL) < 0) return 1;
  }
  return 0;
}

}  // namespace
}  // namespace kvferry::node

int main(int argc, char** argv) {
  return kvferry::node::run(argc == 2 ? argv[1] : nullptr);
}
