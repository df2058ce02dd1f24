// A hostile process of the same machine: it reads and changes nothing of other workers', and cannot
// keep the daemons from serving them. An honest pair hands over and verifies all the while.
#include "tests/proc/hostile_worker.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/proc/raw_lifeline.h"

namespace kvferry::testing {
namespace {

using bad_input::RawLifeline;
using client::TransferState;

constexpr uid_t kListed = 12346, kListedToo = 12347, kUnlisted = 12345, kNobody = 65534;

// A worker with a pool, a rank and an open transfer.
struct Victim {
  std::unique_ptr<client::Connection> worker;
  v1::OpenSendRequest open = bad_input::good_open_send();
  std::string ticket;

  Victim() : worker(attached(hostile_scene().daemon(0).socket(), "victim")) {
    const UniqueFd pool = good_pool(bad_input::kPoolBytes);
    REQUIRE(send_pool(*worker, bad_input::kPool, pool.get(), bad_input::kPoolBytes).ok());
    good(*worker, &Stub::RegisterPools,
         bad_input::pools_request({{bad_input::kPool, bad_input::kPoolBytes}}));
    good(*worker, &Stub::RegisterLayout, bad_input::layout_request(bad_input::kInstance));
    v1::GetTicketRequest asked;
    asked.set_instance(bad_input::kInstance);
    ticket = good(*worker, &Stub::GetTicket, asked).ticket();
    open.set_lease_ms(600'000);
    good(*worker, &Stub::OpenSend, open);
  }
  // All that it had is there, and nobody has used it.
  void require_unharmed() {
    v1::OperationResult again = good(*worker, &Stub::OpenSend, open).result();
    CHECK(again.outcome() == v1::OPERATION_OUTCOME_EXISTING);
    v1::CancelRequest cancel;
    cancel.set_client_handle(open.client_handle());
    CHECK(good(*worker, &Stub::Cancel, cancel).state() == v1::TRANSFER_STATE_CANCELLED);
    v1::UnregisterRequest layout;
    layout.mutable_layout()->set_instance(bad_input::kInstance);
    CHECK(good(*worker, &Stub::Unregister, layout).existed());
    v1::UnregisterRequest pools;
    pools.mutable_pools()->add_names(bad_input::kPool);
    CHECK(good(*worker, &Stub::Unregister, pools).existed());
  }
};

// What no worker but the victim may do, tried by another one.
void try_victims_things(const client::Connection& thief, const Victim& victim) {
  v1::UnregisterRequest layout;
  layout.mutable_layout()->set_instance(bad_input::kInstance);
  CHECK_FALSE(good(thief, &Stub::Unregister, layout).existed());
  v1::UnregisterRequest pools;
  pools.mutable_pools()->add_names(bad_input::kPool);
  CHECK_FALSE(good(thief, &Stub::Unregister, pools).existed());
  CHECK(refused(thief, &Stub::RegisterLayout, bad_input::layout_request("stolen")) ==
        "POOL_UNKNOWN");
  CHECK(refused(thief, &Stub::RegisterPools,
                bad_input::pools_request({{bad_input::kPool, bad_input::kPoolBytes}})) ==
        "POOL_NOT_SENT");
  CHECK(refused(thief, &Stub::OpenSend, victim.open) == "LAYOUT_UNKNOWN");
  CHECK(refused(thief, &Stub::Send, bad_input::good_send()) == "LAYOUT_UNKNOWN");
  CHECK(refused(thief, &Stub::Receive, bad_input::good_receive(victim.ticket)) == "LAYOUT_UNKNOWN");
  CHECK(refused(thief, &Stub::Claim, bad_input::good_claim(victim.ticket)) == "LAYOUT_UNKNOWN");
  CHECK(refused(thief, &Stub::Decline, bad_input::good_decline(victim.ticket)) == "LAYOUT_UNKNOWN");
  CHECK(refused(thief, &Stub::WithdrawReuse, bad_input::good_withdraw()) == "LAYOUT_UNKNOWN");
  const uint64_t handle = victim.open.client_handle();
  CHECK(refused(thief, &Stub::Cancel, with_handle<v1::CancelRequest>(handle)) ==
        "TRANSFER_UNKNOWN");
  CHECK(refused(thief, &Stub::Revoke, with_handle<v1::RevokeRequest>(handle)) ==
        "TRANSFER_UNKNOWN");
  CHECK(refused(thief, &Stub::GetReceiverNeeds, with_handle<v1::GetReceiverNeedsRequest>(handle)) ==
        "TRANSFER_UNKNOWN");
  CHECK(refused(thief, &Stub::GetAux, with_handle<v1::GetAuxRequest>(handle)) == "AUX_UNKNOWN");
}

// Runs on a thread that is of that user and of nobody's groups, as the kernel sees it.
void as_user(uid_t uid, const std::function<void()>& what) {
  std::string failed;
  std::thread([&] {
    // The C library's functions would change all threads.
    if (::syscall(SYS_setgroups, 0, nullptr) != 0 || ::syscall(SYS_setresgid, uid, uid, uid) != 0 ||
        ::syscall(SYS_setresuid, uid, uid, uid) != 0)
      failed = "cannot become another user";
    else
      what();
  }).join();
  REQUIRE(failed == "");
}

int connect_to(const std::string& path, int type) {
  UniqueFd fd(::socket(AF_UNIX, type | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0
             ? 0
             : errno;
}

}  // namespace

TEST_CASE("tokens, pools, layouts and transfers of others open nothing") {
  HostileScene& s = hostile_scene();
  Victim victim;
  const auto thief = attached(s.daemon(0).socket(), "thief");
  const auto stranger = attached(other_socket(), "stranger");
  {
    INFO("a worker of the same tenant");
    try_victims_things(*thief, victim);
    const UniqueFd own = good_pool(bad_input::kPoolBytes);
    REQUIRE(send_pool(*thief, bad_input::kPool, own.get(), bad_input::kPoolBytes).ok());
    good(*thief, &Stub::RegisterPools,
         bad_input::pools_request({{bad_input::kPool, bad_input::kPoolBytes}}));
    CHECK(refused(*thief, &Stub::RegisterLayout, bad_input::layout_request(bad_input::kInstance)) ==
          "RANK_IN_USE");
  }
  {
    INFO("a worker of another tenant");
    try_victims_things(*stranger, victim);
    v1::ResolveRequest resolve;
    resolve.set_ticket(victim.ticket);
    CHECK(refused(*stranger, &Stub::Resolve, resolve) == "OTHER_TENANT");
    // What is there and what is not are one answer.
    v1::GetTicketRequest there, nowhere;
    there.set_instance(bad_input::kInstance);
    nowhere.set_instance("nowhere");
    const auto of_other = stranger->call(&Stub::GetTicket, there, kPatience);
    const auto of_none = stranger->call(&Stub::GetTicket, nowhere, kPatience);
    REQUIRE_FALSE(of_other.ok());
    REQUIRE_FALSE(of_none.ok());
    CHECK(of_other.error().to_string() == of_none.error().to_string());
  }
  // A token is good on the socket of its attachment alone.
  const std::string victims = victim.worker->attachment->token();
  const std::string strangers = stranger->attachment->token();
  for (const auto& [at, token] : {std::pair(stranger.get(), victims), {thief.get(), strangers}}) {
    const auto answer = bad_input::call_raw(*at, "GetTicket", &token, {});
    CHECK(answer.detail.reason() == "TOKEN_UNKNOWN");
  }
  for (int guesses = 0; guesses < 500; ++guesses) {
    const client::Bytes16 random = client::random_bytes16();
    const std::string token(reinterpret_cast<const char*>(&random), 16);
    REQUIRE(bad_input::call_raw(*thief, "Cancel", &token, {}).detail.reason() == "TOKEN_UNKNOWN");
  }
  victim.require_unharmed();
  s.honest().require_more();
}

TEST_CASE("who guesses a transfer's id, but not its secret, gets nothing and spoils nothing") {
  HostileScene& s = hostile_scene();
  const auto sender = s.attach("guessed", 0, true);
  const auto receiver = s.attach("guessed-decode", 1, false);
  const auto far_thief = s.attach("far-thief", 1, false);
  const auto near_thief = s.attach("near-thief", 0, false);
  const auto ticket = sender->ticket();
  require_ok(ticket);
  for (const bool thief_first : {true, false}) {
    CAPTURE(thief_first);
    receiver->clean();
    const TransferKey key = new_key("guessed");
    TransferKey guess = key;
    guess.secret = client::random_bytes16();
    Party::Send slice;
    slice.tokens = client::TokenRange{0, 256};
    slice.last = false;
    if (!thief_first) require_ok(sender->send(key, slice));
    for (Party* thief : {far_thief.get(), near_thief.get()}) {
      client::Client& rank = thief->rank(0);
      client::ClaimRequest claim;
      claim.key = guess;
      claim.layout = {thief->instance(), 0};
      claim.ticket = *ticket;
      require_ok(rank.claim(claim));
      Party::Receive receive;
      receive.wait = milliseconds(1000);
      require_ok(thief->receive(guess, *ticket, receive));
      TransferKey declined = guess;
      declined.secret = client::random_bytes16();
      client::ClaimRequest decline;
      decline.key = declined;
      decline.layout = {thief->instance(), 0};
      decline.ticket = *ticket;
      require_ok(rank.decline(decline));
    }
    if (thief_first) require_ok(sender->send(key, slice));
    for (Party* thief : {far_thief.get(), near_thief.get()}) {
      const auto ended = thief->wait(key.id, kPatience);
      require_ok(ended);
      CHECK((*ended)[0].state == TransferState::kFailed);
      CHECK((*ended)[0].bytes_done == 0);
      CHECK(thief->verify_untouched() == "");
      require_ok(thief->close(key.id));
    }
    require_ok(receiver->receive(key, *ticket, {}));
    slice.index = 1;
    slice.tokens = client::TokenRange{256, 512};
    slice.last = true;
    require_ok(sender->send(key, slice));
    for (const auto& [party, state] : {std::pair(receiver.get(), TransferState::kCompleted),
                                       {sender.get(), TransferState::kDelivered}}) {
      const auto ended = party->wait(key.id, kPatience);
      require_ok(ended);
      INFO((*ended)[0].reason);
      CHECK((*ended)[0].state == state);
    }
    CHECK(receiver->verify() == "");
    for (Party* party : {receiver.get(), sender.get()}) require_ok(party->close(key.id));
  }
  s.honest().require_more();
}

TEST_CASE("another user is kept out by sockets' modes and lists") {
  if (::geteuid() != 0) {
    WARN("only root can become other users");
    return;
  }
  HostileScene& s = hostile_scene();
  const std::string socket = s.daemon(0).socket();
  for (const auto& [path, type] : {std::pair(socket, SOCK_SEQPACKET),
                                   {socket + ".grpc", SOCK_STREAM},
                                   {s.daemon(0).admin_socket(), SOCK_STREAM},
                                   {other_socket(), SOCK_SEQPACKET},
                                   {other_socket() + ".grpc", SOCK_STREAM}}) {
    int error = 0;
    as_user(kUnlisted, [&, at = path, how = type] { error = connect_to(at, how); });
    INFO(path);
    CHECK(error == EACCES);
    CHECK(connect_to(path, type) == 0);
  }
  const std::string listed = s.path("sender.listed");
  const auto reason_for = [&](uid_t uid, const std::string& name) {
    std::string reason;
    as_user(uid, [&] {
      const auto connection = attach(listed, name);
      reason = connection ? "attached" : connection.error().reason;
    });
    return reason;
  };
  CHECK(reason_for(kUnlisted, "w") == "UID_NOT_ALLOWED");
  // What a user outside of the daemon's namespace looks like, whatever the list says.
  CHECK(reason_for(kNobody, "w") == "UID_NOT_ALLOWED");
  CHECK(reason_for(kListed, "w") == "attached");
  // The name is free again once its worker is gone, but not for another user.
  CHECK(comes_true([&] {
    const std::string reason = reason_for(kListedToo, "w");
    CHECK((reason == "NAME_IN_USE" || reason == "NAME_OF_ANOTHER_USER"));
    return reason == "NAME_OF_ANOTHER_USER";
  }));
  CHECK(reason_for(kListed, "w") == "attached");
  s.honest().require_more();
}

TEST_CASE(
    "what a worker shares with the daemon it can neither cut off nor write where it may not") {
  HostileScene& s = hostile_scene();
  RawLifeline line(s.daemon(0).socket());
  line.send(bad_input::attach_request("vandal"));
  lifeline::AttachReply reply;
  std::vector<UniqueFd> fds;
  REQUIRE(line.receive(reply, &fds));
  REQUIRE(reply.code == 0);
  REQUIRE(fds.size() == lifeline::kAttachFds);
  const int status = fds[lifeline::kFdStatus].get();
  const int words = fds[lifeline::kFdWords].get();
  const int doorbell = fds[lifeline::kFdDoorbell].get();
  const int hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  const auto bytes = [](uint64_t size) { return static_cast<off_t>(size); };
  for (const auto& [fd, size] :
       {std::pair(status, reply.status_bytes), {words, reply.words_bytes}}) {
    CHECK(::ftruncate(fd, 0) != 0);
    CHECK(::ftruncate(fd, bytes(size) + 4096) != 0);
    CHECK(::fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) != 0);
  }
  CHECK(::fallocate(status, hole, 0, bytes(reply.status_bytes)) != 0);
  CHECK(::write(status, "x", 1) != 1);
  CHECK(::mmap(nullptr, reply.status_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, status, 0) ==
        MAP_FAILED);
  // The words are the worker's: it may fill them, and take their pages away while it rings.
  void* const own =
      ::mmap(nullptr, reply.words_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, words, 0);
  REQUIRE(own != MAP_FAILED);
  const int flags = ::fcntl(doorbell, F_GETFL);
  ::fcntl(doorbell, F_SETFL, flags & ~O_NONBLOCK);
  const uint64_t before = s.honest().done();
  uint64_t rounds = 0;
  for (; s.honest().done() < before + 3 && rounds < 10'000'000; ++rounds) {
    if (rounds % 1000 == 0) {
      std::memset(own, 0xff, reply.words_bytes);
      (void)::fallocate(words, hole, 0, bytes(reply.words_bytes));
    }
    (void)::send(doorbell, "xxxxxxxx", 8, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  INFO(rounds);
  CHECK(s.honest().done() >= before + 3);
  ::munmap(own, reply.words_bytes);
  s.honest().require_more();
}

TEST_CASE("pages that are punched out while they are copied end their own transfers only") {
  HostileScene& s = hostile_scene();
  const Level before = level_of(s.daemon(0));
  uint64_t failed = 0;
  for (int round = 0; round < 4; ++round) {
    CAPTURE(round);
    const auto sender = s.attach("punched", 0, true);
    const auto receiver = s.attach("punched-decode", 1, false);
    const auto ticket = sender->ticket();
    require_ok(ticket);
    std::atomic<bool> over{false};
    // One side's pages go in even rounds, the other's in odd ones.
    const client::PoolMemory pool = (round % 2 == 0 ? sender : receiver)->pool(0);
    std::thread puncher([&] {
      while (!over.load()) (void)::madvise(pool.data, pool.bytes, MADV_REMOVE);
    });
    for (int times = 0; times < 3; ++times) {
      const TransferKey key = new_key("punched");
      // A pool that was found out is refused from then on.
      if (!sender->send(key, {}) || !receiver->receive(key, *ticket, {})) break;
      const auto received = receiver->wait(key.id, kPatience);
      if (!received) {
        CHECK(received.error().reason != "WAIT_TIMEOUT");
        break;
      }
      const auto sent = sender->wait(key.id, kPatience);
      require_ok(sent);
      if ((*received)[0].state == TransferState::kFailed) ++failed;
    }
    over.store(true);
    puncher.join();
  }
  // Each kind at least once: the daemon has seen the holes while it read or wrote.
  CHECK(failed >= 1);
  CHECK(comes_true([&] { return level_of(s.daemon(0)).within(before); }));
  s.honest().require_more();
}

}  // namespace kvferry::testing
