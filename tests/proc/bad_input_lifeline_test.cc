// Wrong descriptors and wrong messages on the lifeline, against a real daemon.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/un.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#include "proto/kvferry/lifeline.h"
#include "tests/proc/bad_input_subject.h"
#include "tests/proc/raw_lifeline.h"

using namespace kvferry;
using namespace kvferry::bad_input;
using Stub = v1::WorkerService::Stub;

namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW;

// ---- descriptors -------------------------------------------------------------------------------

struct Hostile {
  std::string name;
  std::function<UniqueFd(Subject&)> make;
  Code code = Code::kInvalidArgument;
  std::string reason;
  std::string field;
  uint64_t told = kRawPoolBytes;   // over the lifeline
  uint64_t asked = kRawPoolBytes;  // by RegisterPools
  lifeline::PoolKind kind = lifeline::PoolKind::kHostShm;
};

UniqueFd opened(const std::string& path, int flags) {
  UniqueFd fd(::open(path.c_str(), flags | O_CLOEXEC, 0600));
  REQUIRE(fd);
  return fd;
}

UniqueFd reopened(const UniqueFd& fd, int flags) {
  return opened("/proc/self/fd/" + std::to_string(fd.get()), flags);
}

UniqueFd unix_socket() {
  int ends[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  UniqueFd(ends[1]).reset();
  return UniqueFd(ends[0]);
}

// A file of the right size in the build's directory; on a tmpfs it lacks only the seal.
UniqueFd file_on_disk(Subject&) {
  std::string path = std::string(KVFERRY_BIN_DIR) + "/bad-input.XXXXXX";
  UniqueFd fd(::mkostemp(path.data(), O_CLOEXEC));
  REQUIRE(fd);
  ::unlink(path.c_str());
  REQUIRE(::posix_fallocate(fd.get(), 0, kRawPoolBytes) == 0);
  return fd;
}

const char* reason_on_disk() {
  struct statfs volume {};
  REQUIRE(::statfs(KVFERRY_BIN_DIR, &volume) == 0);
  constexpr unsigned kTmpfs = 0x01021994;
  return static_cast<unsigned>(volume.f_type) == kTmpfs ? "POOL_NOT_SEALED"
                                                        : "POOL_WRONG_FILESYSTEM";
}

std::vector<Hostile> hostile_files() {
  constexpr Code kInvalid = Code::kInvalidArgument;
  return {
      {"memory that can shrink", [](auto&) { return make_pool(kRawPoolBytes, F_SEAL_GROW); },
       kInvalid, "POOL_NOT_SEALED", "pools[0]"},
      {"memory with holes", [](auto&) { return make_pool(kRawPoolBytes, kSeals, false); }, kInvalid,
       "POOL_SPARSE", "pools[0]"},
      {"memory sealed against writing",
       [](auto&) { return make_pool(kRawPoolBytes, kSeals | F_SEAL_WRITE); }, kInvalid,
       "POOL_NOT_WRITABLE", "pools[0]"},
      {"memory opened for reading",
       [](auto&) { return reopened(good_pool(kRawPoolBytes), O_RDONLY); }, kInvalid,
       "POOL_NOT_WRITABLE", "pools[0]"},
      {"memory opened as a path", [](auto&) { return reopened(good_pool(kRawPoolBytes), O_PATH); },
       kInvalid, "POOL_NOT_A_FILE", "pools[0]"},
      {"memory that is too small", [](auto&) { return good_pool(4096); }, kInvalid,
       "POOL_TOO_SMALL", "pools[0].bytes"},
      {"/dev/null", [](auto&) { return opened("/dev/null", O_RDWR); }, kInvalid, "POOL_NOT_A_FILE",
       "pools[0]"},
      {"a directory",
       [](Subject& subject) { return opened(subject.directory(), O_RDONLY | O_DIRECTORY); },
       kInvalid, "POOL_NOT_WRITABLE", "pools[0]"},
      {"a socket", [](auto&) { return unix_socket(); }, kInvalid, "POOL_NOT_A_FILE", "pools[0]"},
      {"a file on disk", file_on_disk, kInvalid, reason_on_disk(), "pools[0]"},
  };
}

std::vector<Hostile> hostile_numbers() {
  const auto good = [](Subject&) { return good_pool(kRawPoolBytes); };
  constexpr Code kInvalid = Code::kInvalidArgument;
  std::vector<Hostile> rows = {
      {"another size than was told", good, kInvalid, "POOL_SIZE_DIFFERS", "pools[0].bytes", 4096},
      {"another kind than was told", good, kInvalid, "POOL_KIND_DIFFERS", "pools[0].kind"},
      {"more than the worker may have", good, Code::kResourceExhausted, "POOL_LIMIT",
       "pools[0].bytes", uint64_t{2} << 40, uint64_t{2} << 40},
      {"2^64 - 1 bytes", good, kInvalid, "POOL_SIZE_INVALID", "pools[0].bytes", UINT64_MAX,
       UINT64_MAX},
  };
  rows[1].kind = lifeline::PoolKind::kCudaVmmFd;
  return rows;
}

client::Status send_pools(const client::Connection& worker,
                          const std::vector<client::PoolToSend>& pools) {
  return worker.attachment->send_pools(
      pools, std::chrono::steady_clock::now() + std::chrono::milliseconds(kRawPatienceMs));
}

}  // namespace

TEST_CASE("Memory that a pool cannot be is refused, and nothing of it stays") {
  Subject subject;
  Calls calls(subject);
  const auto& type = *v1::RegisterPoolsRequest::descriptor();
  const std::size_t descriptors = subject.descriptors();
  std::vector<Hostile> rows = hostile_files();
  for (Hostile& row : hostile_numbers()) rows.push_back(std::move(row));
  for (const Hostile& row : rows) {
    const UniqueFd fd = row.make(subject);
    const auto sent = send_pools(subject.worker(), {{"hostile", row.kind, row.told, fd.get()}});
    INFO(row.name);
    REQUIRE(sent.ok());
    const auto answer = subject.worker().call(
        &Stub::RegisterPools, pools_request({{"hostile", row.asked}}), std::chrono::seconds(20));
    REQUIRE_FALSE(answer.ok());
    calls.compare(row.name, type, row.code, row.reason, row.field, answer.error());
    CHECK(subject.descriptors_become(descriptors));
  }
}

TEST_CASE("One wrong pool among several keeps all of them out") {
  Subject subject;
  Calls calls(subject);
  const std::size_t descriptors = subject.descriptors();
  const UniqueFd right = good_pool(kRawPoolBytes);
  const UniqueFd wrong = make_pool(kRawPoolBytes, F_SEAL_GROW);
  const auto kind = lifeline::PoolKind::kHostShm;
  REQUIRE(send_pools(subject.worker(), {{"a", kind, kRawPoolBytes, right.get()},
                                        {"b", kind, kRawPoolBytes, wrong.get()}})
              .ok());
  const v1::RegisterPoolsRequest both = pools_request({{"a", kRawPoolBytes}, {"b", kRawPoolBytes}});
  const auto refused = subject.worker().call(&Stub::RegisterPools, both, std::chrono::seconds(20));
  REQUIRE_FALSE(refused.ok());
  calls.compare("one wrong pool of two", *v1::RegisterPoolsRequest::descriptor(),
                Code::kInvalidArgument, "POOL_NOT_SEALED", "pools[1]", refused.error());
  CHECK(subject.descriptors_become(descriptors));

  REQUIRE(send_pools(subject.worker(), {{"a", kind, kRawPoolBytes, right.get()},
                                        {"b", kind, kRawPoolBytes, right.get()}})
              .ok());
  CHECK_FALSE(subject.good(&Stub::RegisterPools, both).existing());
  CHECK(subject.good(&Stub::RegisterPools, both).existing());
}

// ---- messages ----------------------------------------------------------------------------------

namespace {

std::string text_of(const char (&field)[lifeline::kNameBytes]) {
  return {field, ::strnlen(field, sizeof field)};
}

struct Refusal {
  std::string name;
  std::function<void(lifeline::AttachRequest&)> spoil;
  std::string reason;
};

std::vector<Refusal> refusals() {
  using Request = lifeline::AttachRequest;
  const auto name = [](std::string text) {
    return [=](Request& r) {
      std::memset(r.name, 0, sizeof r.name);
      std::memcpy(r.name, text.data(), std::min(text.size(), sizeof r.name));
    };
  };
  return {
      {"no name", name(""), "NAME_INVALID"},
      {"a name with a slash", name("a/b"), "NAME_INVALID"},
      {"a name without an end", name(std::string(64, 'n')), "NAME_INVALID"},
      {"a name that is taken", name("bad-input"), "NAME_IN_USE"},
      {"no role", [](Request& r) { r.role = static_cast<lifeline::Role>(0); }, "ROLE_INVALID"},
      {"role 7", [](Request& r) { r.role = static_cast<lifeline::Role>(7); }, "ROLE_INVALID"},
      {"an old protocol", [](Request& r) { r.protocol_min = r.protocol_max = 0; },
       "PROTOCOL_MISMATCH"},
      {"a new protocol", [](Request& r) { r.protocol_min = r.protocol_max = 99; },
       "PROTOCOL_MISMATCH"},
      {"a protocol range upside down",
       [](Request& r) {
         r.protocol_min = 2;
         r.protocol_max = 1;
       },
       "PROTOCOL_MISMATCH"},
  };
}

}  // namespace

TEST_CASE("An attachment that is refused is told why and changes nothing") {
  Subject subject;
  const std::string state = subject.state();
  const std::size_t descriptors = subject.descriptors();
  for (const Refusal& row : refusals()) {
    INFO(row.name);
    RawLifeline line(subject.daemon().socket());
    lifeline::AttachRequest request = attach_request("newcomer");
    row.spoil(request);
    line.send(request);
    lifeline::AttachReply reply;
    REQUIRE(line.receive(reply));
    CHECK(reply.code != 0);
    CHECK(text_of(reply.reason) == row.reason);
    CHECK(reply.token[0] == 0);
    CHECK(line.closed());
    CHECK(subject.state() == state);
  }
  CHECK(subject.descriptors_become(descriptors));
}

TEST_CASE("Who sends what is no message loses the connection and nobody else anything") {
  Subject subject;
  const std::string state = subject.state();
  const std::size_t descriptors = subject.descriptors();
  const UniqueFd pool = good_pool(kRawPoolBytes);
  const auto attach = attach_request("newcomer");
  auto wrong_magic = attach;
  wrong_magic.header.magic = 7;
  auto wrong_type = attach;
  wrong_type.header.type = lifeline::MessageType::kPoolsReply;
  const std::string garbage(4096, '\x5a');
  const std::vector<std::pair<std::string, std::function<void(RawLifeline&)>>> rows = {
      {"a byte", [](RawLifeline& l) { l.send("x", 1); }},
      {"garbage", [&](RawLifeline& l) { l.send(garbage.data(), garbage.size()); }},
      {"64 KiB", [](RawLifeline& l) { l.send(std::string(65536, 'x').data(), 65536); }},
      {"another magic", [&](RawLifeline& l) { l.send(wrong_magic); }},
      {"a reply", [&](RawLifeline& l) { l.send(wrong_type); }},
      {"half a message", [&](RawLifeline& l) { l.send(&attach, sizeof attach / 2); }},
      {"a message and a byte",
       [&](RawLifeline& l) {
         char longer[sizeof attach + 1] = {};
         std::memcpy(longer, &attach, sizeof attach);
         l.send(longer, sizeof longer);
       }},
      {"a descriptor with the attachment", [&](RawLifeline& l) { l.send(attach, {pool.get()}); }},
      {"pools before the attachment",
       [&](RawLifeline& l) { l.send(pools_message(1), {pool.get()}); }},
  };
  for (const auto& [name, send] : rows) {
    INFO(name);
    RawLifeline line(subject.daemon().socket());
    send(line);
    CHECK(line.closed());
    CHECK(subject.state() == state);
  }
  CHECK(subject.descriptors_become(descriptors));
}

TEST_CASE("A worker that breaks the protocol loses its attachment and nobody else anything") {
  Subject subject;
  const std::string state = subject.state();
  const std::size_t descriptors = subject.descriptors();
  const UniqueFd pool = good_pool(kRawPoolBytes);
  const auto many = [&](std::size_t count) { return std::vector<int>(count, pool.get()); };
  const std::vector<std::pair<std::string, std::function<void(RawLifeline&)>>> rows = {
      {"a second attachment", [](RawLifeline& l) { l.send(attach_request("newcomer")); }},
      {"no pool", [](RawLifeline& l) { l.send(pools_message(0)); }},
      {"17 pools", [&](RawLifeline& l) { l.send(pools_message(17), many(16)); }},
      {"2^32 - 1 pools", [&](RawLifeline& l) { l.send(pools_message(UINT32_MAX), many(16)); }},
      {"a pool without a descriptor", [](RawLifeline& l) { l.send(pools_message(1)); }},
      {"a descriptor without a pool", [&](RawLifeline& l) { l.send(pools_message(1), many(2)); }},
      {"more descriptors than a message takes",
       [&](RawLifeline& l) { l.send(pools_message(16), many(64)); }},
  };
  for (const auto& [name, send] : rows) {
    INFO(name);
    RawLifeline line(subject.daemon().socket());
    line.send(attach_request("newcomer"));
    lifeline::AttachReply reply;
    REQUIRE(line.receive(reply));
    REQUIRE(reply.code == 0);
    send(line);
    CHECK(line.closed());
    CHECK(subject.state_becomes(state));
  }
  CHECK(subject.descriptors_become(descriptors));
}

TEST_CASE("A descriptor that cannot be a pool's is refused and the attachment stays") {
  Subject subject;
  const UniqueFd pool = good_pool(kRawPoolBytes);
  const std::string state = subject.state();
  {
    RawLifeline line(subject.daemon().socket());
    line.send(attach_request("newcomer"));
    lifeline::AttachReply attached;
    REQUIRE(line.receive(attached));
    REQUIRE(attached.code == 0);
    auto unknown_kind = pools_message(2);
    unknown_kind.pools[1].kind = static_cast<lifeline::PoolKind>(9);
    auto host_parts = pools_message(1, "parts");
    host_parts.pools[0].part = 1;
    auto late_part = pools_message(1, "parts");
    late_part.pools[0].kind = lifeline::PoolKind::kCudaVmmFd;
    late_part.pools[0].part = 1;
    auto gap = pools_message(2, "parts");
    for (auto& entry : gap.pools) {
      std::memcpy(entry.name, "gap", 4);
      entry.kind = lifeline::PoolKind::kCudaVmmFd;
    }
    gap.pools[1].part = 2;
    auto parts = gap;
    parts.pools[1].part = 1;
    const std::vector<std::tuple<lifeline::PoolsMessage, uint32_t, std::string>> rows = {
        {pools_message(1, ""), 0, "NAME_INVALID"},
        {pools_message(1, "a/b"), 0, "NAME_INVALID"},
        {unknown_kind, 1, "POOL_KIND_INVALID"},
        {host_parts, 0, "POOL_PART_INVALID"},
        {late_part, 0, "POOL_PART_INVALID"},
        {gap, 1, "POOL_PART_INVALID"},
        {parts, 0, ""},
        {pools_message(16), 0, ""},
    };
    for (const auto& [message, index, reason] : rows) {
      line.send(message, std::vector<int>(message.count, pool.get()));
      lifeline::PoolsReply reply;
      REQUIRE(line.receive(reply));
      CHECK(text_of(reply.reason) == reason);
      CHECK(reply.index == index);
      CHECK((reply.code == 0) == reason.empty());
    }
  }
  CHECK(subject.state_becomes(state));
}

TEST_CASE("A controller has no pools and no transfers of its own") {
  Subject subject;
  const std::string state = subject.state();
  {
    const auto controller = subject.attach("scheduler", client::WorkerRole::kController);
    const UniqueFd pool = good_pool(kRawPoolBytes);
    const auto sent =
        send_pools(*controller, {{"kv", lifeline::PoolKind::kHostShm, kRawPoolBytes, pool.get()}});
    REQUIRE_FALSE(sent.ok());
    CHECK(sent.error().reason == "ROLE_WITHOUT_POOLS");
    v1::ReceiveRequest receive = good_receive(subject.ticket());
    receive.clear_layout();
    const auto answer = controller->call(&Stub::Receive, receive, std::chrono::seconds(20));
    REQUIRE_FALSE(answer.ok());
    CHECK(answer.error().code == client::Code::kPermissionDenied);
    CHECK(answer.error().reason == "ROLE_WITHOUT_TRANSFERS");
    CHECK(answer.error().field == "layout");
    // Another's layout is none of its own, but for look-ups, which need one.
    receive.mutable_layout()->set_instance(kInstance);
    const auto other = controller->call(&Stub::Receive, receive, std::chrono::seconds(20));
    REQUIRE_FALSE(other.ok());
    CHECK(other.error().reason == "LAYOUT_UNKNOWN");
    v1::LookupReuseRequest lookup = good_lookup();
    CHECK(controller->call(&Stub::LookupReuse, lookup, std::chrono::seconds(20)).ok());
    lookup.set_reuse_key("short");
    const auto wrong = controller->call(&Stub::LookupReuse, lookup, std::chrono::seconds(20));
    REQUIRE_FALSE(wrong.ok());
    CHECK(wrong.error().field == "reuse_key");
    lookup.clear_layout();
    const auto missing = controller->call(&Stub::LookupReuse, lookup, std::chrono::seconds(20));
    REQUIRE_FALSE(missing.ok());
    CHECK(missing.error().reason == "MISSING");
    CHECK(missing.error().field == "layout");
  }
  CHECK(subject.state_becomes(state));
}

TEST_CASE("A daemon that finds its sockets taken leaves them to their owner") {
  Subject subject;
  const std::string state = subject.state();
  bench::DaemonOptions options;
  options.binary_directory = KVFERRY_BIN_DIR;
  options.settings = {"arena.bytes=16MiB", "arena.segment_bytes=16MiB"};
  auto second =
      bench::DaemonProcess::start(subject.directory(), {"subject", 0, "nobody", 9}, options);
  REQUIRE(second.ok());
  CHECK_FALSE((*second)->wait_until_serving().ok());
  CHECK(subject.state() == state);
  // Newcomers still reach the first one.
  const auto newcomer = subject.attach("newcomer");
  v1::GetTicketRequest ticket;
  ticket.set_instance(kInstance);
  const auto answer = newcomer->call(&Stub::GetTicket, ticket, std::chrono::seconds(20));
  REQUIRE(answer.ok());
  CHECK(answer->ticket() == subject.ticket());
}
