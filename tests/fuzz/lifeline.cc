// A lifeline whose worker says anything: attachments and pools that are good but for some bytes,
// messages of any bytes, with any number of descriptors. Each is answered or ends the connection.
#include "daemon/rpc/lifeline.h"

#include <cstring>

#include "tests/fuzz/socket_client.h"

namespace {

using namespace kvferry;
using namespace kvferry::lifeline;

class Nobody final : public rpc::LifelineEvents {
  void on_attached(const std::shared_ptr<rpc::Session>&) override {}
  void on_gone(const std::shared_ptr<rpc::Session>&, rpc::GoneReason) override {}
  void on_doorbell(const std::shared_ptr<rpc::Session>&) override {}
};

constexpr uint32_t kMostDescriptors = 20;

struct Server {
  Server() {
    rpc::LifelineConfig config;
    config.boot.bytes.fill(1);
    config.page = {4, 8, 64, 4, 4};
    rpc::LifelineSocket socket;
    socket.path = folder.file("worker.sock");
    socket.grpc_path = folder.file("grpc.sock");
    socket.worker_limits.transfers = 4;
    socket.worker_limits.descriptors = kMostDescriptors;
    path = socket.path;
    config.sockets.push_back(socket);
    auto started = rpc::Lifeline::start(std::move(config), events);
    FUZZ_CHECK(started.has_value(), "it starts");
    lifeline = std::move(*started);
  }
  fuzz::Folder folder;
  Nobody events;
  std::string path;
  std::unique_ptr<rpc::Lifeline> lifeline;
};

template <typename T>
std::vector<uint8_t> spoiled(const T& message, fuzz::Input& in) {
  std::vector<uint8_t> bytes(sizeof message + 8, 0);
  std::memcpy(bytes.data(), &message, sizeof message);
  std::size_t size = sizeof message;
  for (uint32_t n = in.below(4); n > 0; --n) bytes[in.number<uint16_t>() % size] = in.byte();
  if (in.below(16) == 1) size = in.number<uint16_t>() % bytes.size();
  bytes.resize(size);
  return bytes;
}

std::vector<uint8_t> attach(fuzz::Input& in) {
  AttachRequest request;
  request.role = in.below(8) == 1 ? Role::kController : Role::kRank;
  const auto name = in.below(4) == 1 ? fuzz::text_of(in.bytes(kNameBytes)) : "worker";
  name.copy(request.name, kNameBytes);
  return spoiled(request, in);
}

std::vector<uint8_t> pools(fuzz::Input& in, uint32_t& fds) {
  PoolsMessage message;
  message.count = in.below(kMaxDescriptors + 2);
  fds = in.below(4) == 1 ? in.below(kMaxDescriptors + 4) : message.count;
  for (PoolEntry& entry : message.pools) {
    entry.name[0] = static_cast<char>('a' + in.below(3));
    entry.kind = in.chance() ? PoolKind::kCudaVmmFd : PoolKind::kHostShm;
    entry.part = in.below(5);
    entry.bytes = in.byte();
    if (in.empty()) break;
  }
  return spoiled(message, in);
}

void check(const rpc::Lifeline& lifeline) {
  for (const auto& session : lifeline.sessions()) {
    FUZZ_CHECK(session->descriptors() <= kMostDescriptors, "a worker's descriptors are counted");
    FUZZ_CHECK(rpc::valid_name(session->facts().name), "a worker has a valid name");
  }
}

}  // namespace

// The random generator that OpenSSL keeps for the server's thread goes with the process; the leak
// sanitizer does not see who holds it. It is the same few KiB however many inputs are run.
extern "C" const char* __lsan_default_suppressions() {
  return "leak:libcrypto.so";
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  static Server server;
  static uint64_t runs = 0;
  static std::size_t descriptors_before = 0;
  fuzz::Input in(data, size);
  {
    fuzz::SocketClient client(server.path);
    bool open = true;
    for (int steps = 0; open && !in.empty() && steps < 60; ++steps) {
      std::vector<uint8_t> message;
      uint32_t fds = 0;
      switch (in.below(8)) {
        case 0:
        case 1:
          message = attach(in);
          break;
        case 2: {
          const auto raw = in.bytes(in.number<uint16_t>() % 1400);
          message.assign(raw.begin(), raw.end());
          fds = in.below(4);
          break;
        }
        default:
          message = pools(in, fds);
      }
      const std::vector<int> all(std::min<uint32_t>(fds, kMaxMessageFds), STDERR_FILENO);
      // A message of no bytes is the end of a connection, and cannot carry anything.
      if (message.empty() || !client.send(message, all)) break;
      open = !client.receive().empty();
      check(*server.lifeline);
    }
    client.finish();
  }
  // The daemon's ends and all pools go with the connection: its thread has closed them when the
  // client has seen the end, or closes them before it accepts the next one.
  if (++runs % 256 == 0) {
    fuzz::SocketClient(server.path).finish();
    const std::size_t now = fuzz::open_descriptors();
    if (descriptors_before == 0) descriptors_before = now;
    FUZZ_CHECK(now <= descriptors_before + 8, "no descriptor stays");
  }
  return 0;
}
