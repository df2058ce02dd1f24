// What a daemon shows to processes of its machine that are none of its own: which services answer
// where, what its metrics tell, and what can be seen of its memory.
#include <fcntl.h>
#include <grpcpp/generic/generic_stub.h>

#include <fstream>
#include <future>
#include <sstream>
#include <thread>

#include "daemon/rails/process/confinement.h"
#include "tests/proc/hostile_worker.h"

namespace kvferry::testing {
namespace {

// How a method that may not be there is answered.
grpc::StatusCode answer_to(const std::string& address, const std::string& method) {
  grpc::GenericStub stub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kPatience);
  const grpc::Slice nothing{std::string()};
  const grpc::ByteBuffer request(&nothing, 1);
  grpc::ByteBuffer response;
  std::promise<grpc::Status> ended;
  stub.UnaryCall(&context, method, grpc::StubOptions(), &request, &response,
                 [&](grpc::Status status) { ended.set_value(std::move(status)); });
  return ended.get_future().get().error_code();
}

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// What stands in the braces of a page of metrics.
std::string labels_of(const std::string& page) {
  std::istringstream lines(page);
  std::string out;
  for (std::string line; std::getline(lines, line);)
    if (const std::size_t at = line.find('{'); at != std::string::npos && line[0] != '#')
      out += line.substr(at, line.rfind('}') - at) + "\n";
  return out;
}

}  // namespace

TEST_CASE("each service answers at its own address, and strangers have no reflection and health") {
  HostileScene& s = hostile_scene();
  const bench::DaemonProcess& daemon = s.daemon(0);
  const std::string worker = "unix:" + daemon.socket() + ".grpc";
  const std::string admin = "unix:" + daemon.admin_socket();
  const std::string peers = "127.0.0.1:" + std::to_string(daemon.peer_port());
  const std::string metrics = "127.0.0.1:" + std::to_string(daemon.http_port());
  const std::string of_worker = "/kvferry.v1.WorkerService/GetTicket";
  const std::string of_admin = "/kvferry.v1.Admin/Status";
  const std::string of_peers = "/kvferry.v1.PeerService/Challenge";
  for (const auto& [address, method] :
       {std::pair(worker, of_worker), {admin, of_admin}, {peers, of_peers}}) {
    INFO(method << " at " << address);
    const grpc::StatusCode code = answer_to(address, method);
    CHECK(code != grpc::StatusCode::UNIMPLEMENTED);
    CHECK(code != grpc::StatusCode::UNAVAILABLE);
  }
  for (const auto& [address, method] : {std::pair(worker, of_admin),
                                        {worker, of_peers},
                                        {admin, of_worker},
                                        {admin, of_peers},
                                        {peers, of_worker},
                                        {peers, of_admin},
                                        {peers, "/grpc.health.v1.Health/Check"},
                                        {peers,
                                         "/grpc.reflection.v1alpha.ServerReflection/"
                                         "ServerReflectionInfo"}}) {
    INFO(method << " at " << address);
    CHECK(answer_to(address, method) == grpc::StatusCode::UNIMPLEMENTED);
  }
  CHECK(answer_to(metrics, of_admin) != grpc::StatusCode::OK);
  // As an operator calls it.
  CHECK(answer_to(admin, of_admin) == grpc::StatusCode::OK);
}

TEST_CASE("no metric has a name in it that a worker or a peer has chosen") {
  HostileScene& s = hostile_scene();
  const auto worker = attached(other_socket(), "a-worker-s-name");
  const auto sender = s.attach("an-instance-s-name", 0, true);
  TransferKey key = new_key("an-instance-s-name");
  key.id = "a-transfer-s-id";
  require_ok(sender->send(key, {}));
  s.honest().require_more();
  for (const int side : {0, 1}) {
    const std::string labels = labels_of(s.daemon(side).http("/metrics"));
    REQUIRE(labels.find("state=\"free\"") != std::string::npos);
    for (const char* const name : {"a-worker-s-name", "an-instance-s-name", "a-transfer-s-id",
                                   "prefill", "decode", "crowd", "sender", "receiver"}) {
      INFO(name);
      CHECK(labels.find(name) == std::string::npos);
    }
  }
}

TEST_CASE("the daemon has no UCX in it") {
  HostileScene& s = hostile_scene();
  const std::string process = "/proc/" + std::to_string(s.daemon(0).pid());
  const std::string maps = text_of(process + "/maps");
  if (maps.empty()) WARN("not looked at: the daemon's mappings, which takes CAP_SYS_PTRACE");
  for (const char* const library : {"libucp", "libuct", "libucs"})
    CHECK(maps.find(library) == std::string::npos);
}

#if !defined(__SANITIZE_ADDRESS__)
TEST_CASE("a daemon's memory is not to be looked into by other processes of its user") {
  // Root's capabilities would open it, and keep others out: daemon and looker do without.
  std::thread([] {
    rails::drop_privileges();
    const auto pair = start_pair();
    const auto opens = [](const std::string& process) {
      const UniqueFd memory(::open(("/proc/" + process + "/mem").c_str(), O_RDONLY | O_CLOEXEC));
      return memory.get() >= 0;
    };
    CHECK(opens("self"));
    CHECK_FALSE(opens(std::to_string(pair->side(0).pid())));
  }).join();
}
#endif

}  // namespace kvferry::testing
