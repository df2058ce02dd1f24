#include "daemon/rpc/lifeline.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <string>
#include <vector>

#include "client/cpp/src/attachment.h"
#include "tests/unit/lifeline_support.h"

namespace kvferry::rpc {
namespace {

using client::Attachment;
using client::AttachOptions;

AttachOptions options_for(const LifelineConfig& config, const std::string& name) {
  AttachOptions options;
  options.socket = config.sockets[0].path;
  options.name = name;
  return options;
}

std::unique_ptr<Lifeline> start(const LifelineConfig& config, Recorder& recorder) {
  auto lifeline = Lifeline::start(config, recorder);
  REQUIRE(lifeline);
  return std::move(*lifeline);
}

std::shared_ptr<Attachment> attach(const LifelineConfig& config, const std::string& name) {
  auto attachment = Attachment::connect(options_for(config, name));
  INFO((attachment ? "" : attachment.error().to_string()));
  REQUIRE(attachment);
  return std::move(*attachment);
}

std::span<const uint8_t> bytes_of_token(const std::string& token) {
  return {reinterpret_cast<const uint8_t*>(token.data()), token.size()};
}

// A connection that speaks for itself.
int raw_connection(const std::string& path) {
  const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  REQUIRE(::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  return fd;
}

// True once the other side has closed; false after a generous time.
bool closed_by_peer(int fd) {
  const timeval timeout{20, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  char buffer[4096];
  for (;;) {
    const ssize_t got = ::recv(fd, buffer, sizeof buffer, 0);
    if (got == 0 || (got < 0 && errno == ECONNRESET)) return true;
    if (got < 0) return false;
  }
}

int memfd(uint64_t bytes) {
  const int fd = ::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  REQUIRE(::ftruncate(fd, static_cast<off_t>(bytes)) == 0);
  return fd;
}

auto soon() {
  return std::chrono::steady_clock::now() + std::chrono::seconds(20);
}

}  // namespace

TEST_CASE("names follow one rule") {
  CHECK(valid_name("a"));
  CHECK(valid_name("Rank0.tp-1_x:y+z"));
  CHECK(valid_name(std::string(63, 'a')));
  CHECK_FALSE(valid_name(""));
  CHECK_FALSE(valid_name(std::string(64, 'a')));
  CHECK_FALSE(valid_name("-a"));
  CHECK_FALSE(valid_name("a/b"));
  CHECK_FALSE(valid_name("a b"));
  CHECK_FALSE(valid_name(std::string_view("a\0b", 3)));
}

TEST_CASE("a worker that attaches gets its token, page and the daemon's pidfd") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  auto worker = attach(config, "rank0");
  REQUIRE(recorder.attached.size() == 1);
  const std::shared_ptr<Session> session = recorder.attached[0];
  CHECK(session->facts().name == "rank0");
  CHECK(session->facts().tenant == "default");
  CHECK(session->facts().pid == ::getpid());
  CHECK(session->facts().uid == ::getuid());
  CHECK(worker->facts().worker_id == session->id().value);
  CHECK(worker->boot_id() == config.boot.bytes);
  CHECK(worker->grpc_path() == config.sockets[0].grpc_path);
  CHECK_FALSE(worker->daemon_exited());
  const std::string token = worker->token();
  CHECK(lifeline->find(bytes_of_token(token)) == session);
  CHECK(lifeline->find(session->id()) == session);
  std::string wrong = token;
  wrong[15] = static_cast<char>(wrong[15] ^ 1);
  CHECK(lifeline->find(bytes_of_token(wrong)) == nullptr);
  CHECK(lifeline->find(bytes_of_token("")) == nullptr);

  // Each end sees what the other writes.
  control_page::Record record;
  record.client_handle = 5;
  record.state = 4;
  session->page().publish(2, record);
  control_page::Record seen;
  REQUIRE(worker->page().read(2, seen));
  CHECK(seen.client_handle == 5);
  control_page::store<uint64_t>(worker->timeline_word(3), 77);
  worker->ring();
  CHECK(recorder.wait([&] { return recorder.doorbells > 0; }));
  CHECK(session->page().load_timeline(3) == 77U);
  CHECK(worker->timeline_word(16) == nullptr);
}

TEST_CASE("a live name is refused and a dead one may be taken again") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  auto first = attach(config, "rank0");
  auto second = Attachment::connect(options_for(config, "rank0"));
  REQUIRE_FALSE(second);
  CHECK(second.error().reason == "NAME_IN_USE");
  CHECK(second.error().code == client::Code::kAlreadyExists);
  const std::string token = first->token();
  first.reset();
  // Also without waiting for the end to be noticed.
  auto third = attach(config, "rank0");
  CHECK(third->token() != token);
  REQUIRE(recorder.wait([&] { return recorder.gone.size() == 1; }));
  CHECK(recorder.gone[0] == std::make_pair(std::string("rank0"), GoneReason::kClosed));
  CHECK(lifeline->find(bytes_of_token(token)) == nullptr);
  CHECK(lifeline->sessions().size() == 1);
}

TEST_CASE("the same name in another tenant is another worker") {
  TemporaryDirectory directory;
  Recorder recorder;
  LifelineConfig config = lifeline_config(directory);
  LifelineSocket other = config.sockets[0];
  other.path = directory.file("other.sock");
  other.tenant = "other";
  config.sockets.push_back(other);
  auto lifeline = start(config, recorder);
  auto first = attach(config, "rank0");
  AttachOptions options = options_for(config, "rank0");
  options.socket = other.path;
  auto second = Attachment::connect(options);
  REQUIRE(second);
  CHECK(recorder.attached[1]->facts().tenant == "other");
  CHECK(recorder.attached[1]->facts().socket == 1);
}

TEST_CASE("who may not attach is told why") {
  TemporaryDirectory directory;
  Recorder recorder;
  LifelineConfig config = lifeline_config(directory);
  LifelineSocket closed = config.sockets[0];
  closed.path = directory.file("closed.sock");
  closed.uids = {::getuid() + 1, 65534};
  config.sockets.push_back(closed);
  config.sockets[0].max_workers = 1;
  auto lifeline = start(config, recorder);
  const auto reason_of = [&](AttachOptions options) {
    auto result = Attachment::connect(options);
    return result ? std::string("attached") : result.error().reason;
  };
  AttachOptions options = options_for(config, "rank0");
  options.socket = closed.path;
  CHECK(reason_of(options) == "UID_NOT_ALLOWED");
  CHECK(reason_of(options_for(config, "no/slash")) == "NAME_INVALID");
  CHECK(reason_of(options_for(config, std::string(64, 'a'))) == "NAME_INVALID");
  options.socket = directory.file("nobody.sock");
  CHECK(reason_of(options) == "DAEMON_UNREACHABLE");
  auto first = attach(config, "rank0");
  CHECK(reason_of(options_for(config, "rank1")) == "TOO_MANY_WORKERS");
}

TEST_CASE("what the workers of a socket hold together has its limit, whoever holds it") {
  TemporaryDirectory directory;
  Recorder recorder;
  LifelineConfig config = lifeline_config(directory);
  config.sockets[0].worker_limits.calls = 3;
  config.sockets[0].limits.descriptors = 3;
  config.sockets[0].limits.calls = 5;
  auto lifeline = start(config, recorder);
  auto one = attach(config, "rank0");
  auto other = attach(config, "rank1");
  const std::shared_ptr<Session> first = recorder.attached[0];
  const std::shared_ptr<Session> second = recorder.attached[1];
  const int fd = memfd(4096);
  const auto reason_of_sent = [&](Attachment& worker, const std::string& name) {
    const client::PoolToSend pool[] = {{name, lifeline::PoolKind::kHostShm, 4096, fd}};
    const auto sent = worker.send_pools(pool, soon());
    return sent ? std::string() : sent.error().reason;
  };
  CHECK(reason_of_sent(*one, "a") == "");
  CHECK(reason_of_sent(*one, "b") == "");
  CHECK(reason_of_sent(*other, "c") == "");
  CHECK(reason_of_sent(*other, "d") == "SOCKET_LIMIT");
  CHECK(reason_of_sent(*one, "d") == "SOCKET_LIMIT");
  CHECK(reason_of_sent(*one, "a") == "");  // takes the place of the one before
  REQUIRE(first->take_pool("a"));
  CHECK(reason_of_sent(*other, "d") == "SOCKET_LIMIT");
  first->release_descriptors(1);
  CHECK(reason_of_sent(*other, "d") == "");
  CHECK(reason_of_sent(*other, "e") == "SOCKET_LIMIT");

  for (int i = 0; i < 3; ++i) CHECK(first->begin_call());
  CHECK(first->begin_call().error().reason == "TOO_MANY_CALLS");
  for (int i = 0; i < 2; ++i) CHECK(second->begin_call());
  CHECK(second->begin_call().error().reason == "SOCKET_LIMIT");
  first->end_call();
  CHECK(second->begin_call());
  CHECK(first->begin_call().error().reason == "SOCKET_LIMIT");

  // With a worker go its descriptors, claimed or not. Its calls end one by one.
  REQUIRE(first->take_pool("b"));
  one.reset();
  recorder.wait([&] { return !recorder.gone.empty(); });
  first->release_descriptors(1);
  CHECK(reason_of_sent(*other, "e") == "");
  CHECK(reason_of_sent(*other, "f") == "SOCKET_LIMIT");
  CHECK(first->descriptors() == 0);
}

TEST_CASE("descriptors wait under their name until they are claimed, once") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  auto worker = attach(config, "rank0");
  std::vector<client::PoolToSend> pools;
  for (int i = 0; i < 18; ++i)  // more than one message
    pools.push_back({"pool" + std::to_string(i), lifeline::PoolKind::kHostShm, 4096, memfd(4096)});
  REQUIRE(worker->send_pools(pools, soon()));
  const std::shared_ptr<Session> session = recorder.attached[0];
  CHECK(session->descriptors() == 18);
  auto claimed = session->take_pool("pool17");
  REQUIRE(claimed);
  CHECK(claimed->parts.at(0).bytes == 4096);
  struct stat ours {
  }, theirs{};
  REQUIRE(::fstat(pools[17].fd, &ours) == 0);
  REQUIRE(::fstat(claimed->parts.at(0).fd.get(), &theirs) == 0);
  CHECK(ours.st_ino == theirs.st_ino);
  CHECK((::fcntl(claimed->parts.at(0).fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
  CHECK(session->take_pool("pool17").error().reason == "POOL_NOT_SENT");
  CHECK(session->take_pool("absent").error().reason == "POOL_NOT_SENT");
  // Claimed ones count until they are given back: 20 are allowed.
  const client::PoolToSend more[] = {{"a", lifeline::PoolKind::kHostShm, 4096, pools[0].fd},
                                     {"b", lifeline::PoolKind::kHostShm, 4096, pools[0].fd},
                                     {"c", lifeline::PoolKind::kHostShm, 4096, pools[0].fd}};
  auto refused = worker->send_pools(more, soon());
  REQUIRE_FALSE(refused);
  CHECK(refused.error().reason == "DESCRIPTOR_LIMIT");
  CHECK(refused.error().field == "pools[2]");
  session->release_descriptors(1);
  CHECK(worker->send_pools(std::span(more).subspan(2), soon()));
  const client::PoolToSend bad{"no/slash", lifeline::PoolKind::kHostShm, 4096, pools[0].fd};
  CHECK(worker->send_pools({&bad, 1}, soon()).error().reason == "NAME_INVALID");
  for (const auto& pool : pools) ::close(pool.fd);
}

TEST_CASE("a pool of several descriptors keeps their order, and part 0 begins anew") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  const int fd = raw_connection(config.sockets[0].path);
  lifeline::AttachRequest request;
  std::memcpy(request.name, "raw", 3);
  REQUIRE(::send(fd, &request, sizeof request, MSG_NOSIGNAL) > 0);
  lifeline::AttachReply attached;
  REQUIRE(::recv(fd, &attached, sizeof attached, 0) == static_cast<ssize_t>(sizeof attached));
  const std::shared_ptr<Session> session = recorder.attached[0];
  const int memory = memfd(4096);

  // Sends parts [first, last) of "kv"; the index of the one refused, and why.
  const auto send_parts = [&](uint32_t first, uint32_t last, uint64_t bytes,
                              lifeline::PoolKind kind) -> std::pair<uint32_t, std::string> {
    lifeline::PoolsMessage pools;
    pools.count = last - first;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)] = {};
    iovec data{&pools, sizeof pools};
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * pools.count);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * pools.count);
    for (uint32_t i = 0; i < pools.count; ++i) {
      std::memcpy(pools.pools[i].name, "kv", 3);
      pools.pools[i].kind = kind;
      pools.pools[i].part = first + i;
      pools.pools[i].bytes = bytes + first + i;
      std::memcpy(CMSG_DATA(header) + i * sizeof(int), &memory, sizeof memory);
    }
    REQUIRE(::sendmsg(fd, &message, MSG_NOSIGNAL) > 0);
    lifeline::PoolsReply reply;
    REQUIRE(::recv(fd, &reply, sizeof reply, 0) == static_cast<ssize_t>(sizeof reply));
    return {reply.index, reply.reason};
  };
  const auto vmm = lifeline::PoolKind::kCudaVmmFd;
  const std::pair<uint32_t, std::string> taken{0, ""};
  CHECK(send_parts(1, 2, 0, vmm).second == "POOL_PART_INVALID");  // part 0 is missing
  CHECK(send_parts(0, 3, 100, vmm) == taken);
  CHECK(send_parts(0, 4, 200, vmm) == taken);
  CHECK(send_parts(4, 6, 200, vmm) == taken);
  CHECK(session->descriptors() == 6);
  CHECK(send_parts(5, 6, 200, vmm).second == "POOL_PART_INVALID");  // is there
  CHECK(send_parts(7, 8, 200, vmm).second == "POOL_PART_INVALID");
  CHECK(send_parts(6, 7, 200, lifeline::PoolKind::kHostShm).second == "POOL_PART_INVALID");
  CHECK(session->descriptors() == 6);
  // 20 are allowed; what came before the refusal waits.
  CHECK(send_parts(6, 22, 200, vmm) == std::make_pair(14U, std::string("DESCRIPTOR_LIMIT")));
  CHECK(session->descriptors() == 20);

  auto claimed = session->take_pool("kv");
  REQUIRE(claimed);
  CHECK(claimed->kind == vmm);
  REQUIRE(claimed->parts.size() == 20);
  for (std::size_t i = 0; i < claimed->parts.size(); ++i) CHECK(claimed->parts[i].bytes == 200 + i);
  CHECK(session->descriptors() == 20);
  session->release_descriptors(20);
  CHECK(session->descriptors() == 0);
  // Of host memory there is only part 0, which replaces what waits, too.
  CHECK(send_parts(0, 2, 300, vmm) == taken);
  CHECK(send_parts(0, 1, 400, lifeline::PoolKind::kHostShm) == taken);
  CHECK(session->descriptors() == 1);
  CHECK(session->take_pool("kv")->parts.at(0).bytes == 400);
  ::close(memory);
  ::close(fd);
}

TEST_CASE("a controller has no pools") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  AttachOptions options = options_for(config, "scheduler");
  options.role = client::WorkerRole::kController;
  auto controller = Attachment::connect(options);
  REQUIRE(controller);
  const int fd = memfd(4096);
  const client::PoolToSend pool{"kv", lifeline::PoolKind::kHostShm, 4096, fd};
  CHECK((*controller)->send_pools({&pool, 1}, soon()).error().reason == "ROLE_WITHOUT_POOLS");
  ::close(fd);
}

TEST_CASE("whoever breaks the protocol is disconnected") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  const std::string& path = config.sockets[0].path;
  lifeline::AttachRequest request;
  std::memcpy(request.name, "raw", 3);
  const auto send_raw = [](int fd, const void* data, std::size_t bytes) {
    return ::send(fd, data, bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
  };

  SECTION("garbage instead of an attach message") {
    const int fd = raw_connection(path);
    CHECK(send_raw(fd, "hello", 5));
    CHECK(closed_by_peer(fd));
    ::close(fd);
  }
  SECTION("a message that is too long") {
    const int fd = raw_connection(path);
    const std::vector<char> long_message(8192, 'x');
    CHECK(send_raw(fd, long_message.data(), long_message.size()));
    CHECK(closed_by_peer(fd));
    ::close(fd);
  }
  SECTION("a protocol of another time") {
    request.protocol_min = request.protocol_max = 99;
    const int fd = raw_connection(path);
    CHECK(send_raw(fd, &request, sizeof request));
    lifeline::AttachReply reply;
    REQUIRE(::recv(fd, &reply, sizeof reply, 0) == static_cast<ssize_t>(sizeof reply));
    CHECK(std::string(reply.reason) == "PROTOCOL_MISMATCH");
    CHECK(closed_by_peer(fd));
    ::close(fd);
  }
  SECTION("attaching twice") {
    const int fd = raw_connection(path);
    CHECK(send_raw(fd, &request, sizeof request));
    CHECK(send_raw(fd, &request, sizeof request));
    CHECK(closed_by_peer(fd));
    CHECK(recorder.wait([&] { return recorder.gone.size() == 1; }));
    CHECK(recorder.gone[0].second == GoneReason::kProtocol);
    ::close(fd);
  }
  SECTION("pools without descriptors, or before attaching") {
    lifeline::PoolsMessage pools;
    pools.count = 1;
    const int early = raw_connection(path);
    CHECK(send_raw(early, &pools, sizeof pools));
    CHECK(closed_by_peer(early));
    ::close(early);
    const int fd = raw_connection(path);
    CHECK(send_raw(fd, &request, sizeof request));
    CHECK(send_raw(fd, &pools, sizeof pools));
    CHECK(closed_by_peer(fd));
    ::close(fd);
  }
  SECTION("more descriptors than a message may carry") {
    const int fd = raw_connection(path);
    CHECK(send_raw(fd, &request, sizeof request));
    lifeline::PoolsMessage pools;
    pools.count = 16;
    iovec part{&pools, sizeof pools};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 17)] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * 17);
    const int one = memfd(4096);
    for (std::size_t i = 0; i < 17; ++i)
      std::memcpy(CMSG_DATA(header) + i * sizeof(int), &one, sizeof one);
    CHECK(::sendmsg(fd, &message, MSG_NOSIGNAL) > 0);
    CHECK(closed_by_peer(fd));
    CHECK(recorder.wait([&] { return recorder.gone.size() == 1; }));
    ::close(one);
    ::close(fd);
  }
  // The daemon serves on.
  auto worker = attach(config, "rank0");
  CHECK(worker->facts().code == 0);
}

TEST_CASE("who says nothing is turned away in time, and only so many may say nothing") {
  TemporaryDirectory directory;
  Recorder recorder;
  LifelineConfig config = lifeline_config(directory);
  config.attach_timeout = std::chrono::milliseconds(50);
  config.max_unattached = 2;
  auto lifeline = start(config, recorder);
  const std::string& path = config.sockets[0].path;
  const int silent[] = {raw_connection(path), raw_connection(path), raw_connection(path)};
  for (const int fd : silent) {
    CHECK(closed_by_peer(fd));
    ::close(fd);
  }
  CHECK(recorder.wait([&] { return recorder.refused.size() == 3; }));
  auto worker = attach(config, "rank0");
  CHECK(worker->facts().code == 0);
}

TEST_CASE("a process with too many silent connections loses its oldest, and newcomers attach") {
  TemporaryDirectory directory;
  Recorder recorder;
  LifelineConfig config = lifeline_config(directory);
  config.attach_timeout = std::chrono::minutes(10);
  config.max_unattached = 4;
  auto lifeline = start(config, recorder);
  const std::string& path = config.sockets[0].path;
  const int first = raw_connection(path);  // of this process there is only this one
  // Another process floods, and leaves when it is killed.
  int ready[2];
  REQUIRE(::pipe2(ready, O_CLOEXEC) == 0);
  const pid_t flood = ::_Fork();
  if (flood == 0) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    for (int i = 0; i < 100; ++i) {
      const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
      if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
        ::_exit(1);
    }
    (void)!::write(ready[1], "x", 1);
    ::pause();
    ::_exit(0);
  }
  REQUIRE(flood > 0);
  char byte = 0;
  CHECK(::read(ready[0], &byte, 1) == 1);
  // Three of its hundred may wait beside ours.
  CHECK(recorder.wait([&] { return recorder.refused.size() == 97; }));
  CHECK(recorder.refused.front() == "TOO_MANY_CONNECTIONS");
  auto worker = attach(config, "rank0");
  CHECK(worker->facts().code == 0);
  // Whoever was here before the flood still may say his name.
  lifeline::AttachRequest request;
  std::memcpy(request.name, "rank1", 5);
  CHECK(::send(first, &request, sizeof request, MSG_NOSIGNAL) == sizeof request);
  CHECK(recorder.wait([&] { return recorder.attached.size() == 2; }));
  ::kill(flood, SIGKILL);
  ::waitpid(flood, nullptr, 0);
  for (const int fd : {first, ready[0], ready[1]}) ::close(fd);
}

TEST_CASE("a killed worker is gone at once, also when a child of it holds the socket") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  int grandchild_pid_pipe[2];
  REQUIRE(::pipe2(grandchild_pid_pipe, O_CLOEXEC) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    // Attached by hand, so that nothing closes the socket in the grandchild.
    const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, config.sockets[0].path.data(), config.sockets[0].path.size());
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) ::_exit(1);
    lifeline::AttachRequest request;
    std::memcpy(request.name, "victim", 6);
    if (::send(fd, &request, sizeof request, 0) < 0) ::_exit(1);
    const pid_t grandchild = ::fork();
    if (grandchild == 0)
      for (;;) ::pause();
    (void)!::write(grandchild_pid_pipe[1], &grandchild, sizeof grandchild);
    for (;;) ::pause();
  }
  pid_t grandchild = 0;
  REQUIRE(::read(grandchild_pid_pipe[0], &grandchild, sizeof grandchild) ==
          static_cast<ssize_t>(sizeof grandchild));
  REQUIRE(recorder.wait([&] { return recorder.attached.size() == 1; }));
  CHECK(recorder.attached[0]->facts().pid == child);
  ::kill(child, SIGKILL);
  CHECK(recorder.wait([&] { return recorder.gone.size() == 1; }));
  CHECK(recorder.gone[0].second == GoneReason::kProcessExited);
  CHECK_FALSE(recorder.attached[0]->alive());
  int status = 0;
  ::waitpid(child, &status, 0);
  ::kill(grandchild, SIGKILL);
  ::close(grandchild_pid_pipe[0]);
  ::close(grandchild_pid_pipe[1]);
}

TEST_CASE("a forked child of a worker does not keep its lifeline open") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  auto worker = attach(config, "rank0");
  const int lifeline_fd = worker->lifeline_fd();
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) ::_exit(::fcntl(lifeline_fd, F_GETFD) == -1 && errno == EBADF ? 0 : 1);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(::fcntl(lifeline_fd, F_GETFD) != -1);
}

TEST_CASE("an evicted worker sees its lifeline close") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  auto worker = attach(config, "rank0");
  lifeline->close_session(WorkerId{worker->facts().worker_id});
  CHECK(closed_by_peer(worker->lifeline_fd()));
  REQUIRE(recorder.wait([&] { return recorder.gone.size() == 1; }));
  CHECK(recorder.gone[0].second == GoneReason::kEvicted);
}

TEST_CASE("a daemon replaces a stale socket but never a living one") {
  TemporaryDirectory directory;
  Recorder recorder;
  const LifelineConfig config = lifeline_config(directory);
  auto lifeline = start(config, recorder);
  Recorder other;
  auto second = Lifeline::start(config, other);
  REQUIRE_FALSE(second);
  CHECK(second.error().reason == "SOCKET_IN_USE");
  auto worker = attach(config, "rank0");
  lifeline->stop();
  CHECK(recorder.gone.size() == 1);
  CHECK(recorder.gone[0].second == GoneReason::kStopped);
  // A socket file that nobody listens on.
  const int stale = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, config.sockets[0].path.data(), config.sockets[0].path.size());
  REQUIRE(::bind(stale, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  ::close(stale);
  auto third = start(config, other);
  CHECK(attach(config, "rank0")->facts().code == 0);
}

}  // namespace kvferry::rpc
