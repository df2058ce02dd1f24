// Borrowed arenas: in host memory, and with lenders that are not what they should be.
#include "daemon/node/arena_borrower.h"

#include <sys/eventfd.h>
#include <sys/mman.h>

#include <atomic>

#include "daemon/node/arena_import.h"
#include "tests/unit/arena_peer.h"
#include "tests/unit/lending_support.h"

namespace kvferry::node {
namespace {

using memory::Region;

constexpr uint64_t kPage = 4096;
constexpr uint32_t kArena = 3;  // HostMemory's, with segments from 10 on

struct World {
  explicit World(const std::function<void(ArenaBorrowerConfig&)>& change = {}) {
    forget_log();
    lender = start_lender(lender_config(directory), {memory.lent}, at_lender);
    ArenaBorrowerConfig config;
    config.host = host_id();
    if (change) change(config);
    borrower = std::make_unique<ArenaBorrower>(config, calls, at_borrower.sink());
  }
  void up(uint64_t link, engine::CheckKind check = engine::CheckKind::kNone) {
    lender->on_link_up(peer_ref(link + 100, 1), check);
    calls.connect(LinkId{link}, *lender, peer_ref(link + 100, 1));
    borrower->on_link_up(peer_ref(link, 2), check);
  }
  void gone(uint64_t link) {
    borrower->on_link_gone(LinkId{link});
    lender->on_link_gone(LinkId{link + 100});
  }
  // That nothing else comes is seen from what comes after it.
  void fence() {
    const uint64_t link = next_fence++;
    up(link);
    REQUIRE(at_borrower.mapped(LinkId{link}, kArena));
    gone(link);
    REQUIRE(at_lender.unmapped(LinkId{link + 100}));
  }

  TemporaryDirectory directory;
  HostMemory memory{{kPage, 3 * kPage}};
  Events at_lender;
  Events at_borrower;
  Calls calls;
  std::unique_ptr<ArenaLender> lender;
  std::unique_ptr<ArenaBorrower> borrower;
  uint64_t next_fence = 1000;
};

// A lender that does as the test says.
class StubLender {
 public:
  explicit StubLender(const TemporaryDirectory& directory) : path(directory.file("stub.sock")) {
    auto made = listen_seqpacket(path, 0600, "TEST");
    REQUIRE(made);
    listener = std::move(*made);
  }
  rpc::ArenasOffer offer(const std::vector<uint64_t>& sizes) const {
    rpc::ArenasOffer out;
    out.host = host_id();
    out.socket_path = path;
    out.token.bytes.fill(5);
    out.proof.bytes.fill(6);
    rpc::OfferedArena& arena = out.arenas.emplace_back();
    arena.number = kArena;
    for (uint32_t i = 0; i < sizes.size(); ++i) arena.segments.push_back({10 + i, sizes[i], {}});
    return out;
  }
  static wire::Welcome welcome(uint32_t arenas) {
    wire::Welcome out;
    out.arenas = arenas;
    std::memset(out.proof, 6, sizeof out.proof);
    return out;
  }
  // The next caller, once it has shown the token of the offer.
  UniqueFd accept() const {
    pollfd polled{listener.get(), POLLIN, 0};
    REQUIRE(::poll(&polled, 1, 20000) == 1);
    UniqueFd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    wire::Show show;
    REQUIRE(::recv(fd.get(), &show, sizeof show, 0) == sizeof show);
    REQUIRE(show.magic == wire::kMagic);
    REQUIRE(show.token[15] == 5);
    return fd;
  }
  static void hand_out(int fd, std::vector<int> fds, uint32_t arena = kArena) {
    const wire::Welcome welcome = StubLender::welcome(1);
    REQUIRE(send_message(fd, &welcome, sizeof welcome));
    wire::Descriptors message;
    message.arena = arena;
    message.count = static_cast<uint32_t>(fds.size());
    REQUIRE(send_message(fd, &message, sizeof message, fds));
  }
  // Whether the caller says UNMAPPED and then closes.
  static bool says_unmapped(int fd) {
    wire::Unmapped message;
    return ::recv(fd, &message, sizeof message, 0) == sizeof message &&
           message.type == wire::Type::kUnmapped && ::recv(fd, &message, sizeof message, 0) == 0;
  }
  // ... or closes without a word.
  static bool closes(int fd) {
    char byte = 0;
    return ::recv(fd, &byte, sizeof byte, 0) == 0;
  }

  std::string path;
  UniqueFd listener;
};

}  // namespace

TEST_CASE("What is written into a borrowed arena is in the lender's") {
  World world;
  world.up(1);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kArena));
  const auto segments = world.borrower->segments(LinkId{1}, kArena);
  REQUIRE(segments != nullptr);
  CHECK(segments->count() == 2);
  CHECK(world.borrower->segments(LinkId{1}, 4) == nullptr);
  CHECK(world.borrower->segments(LinkId{2}, kArena) == nullptr);
  CHECK(segments->holds({10, 0, kPage}));
  CHECK(segments->holds({11, kPage, 2 * kPage}));
  CHECK_FALSE(segments->holds({9, 0, 1}));
  CHECK_FALSE(segments->holds({12, 0, 1}));
  CHECK_FALSE(segments->holds({10, 1, kPage}));
  CHECK_FALSE(segments->holds({11, UINT64_MAX, 2}));
  const Region region{11, 2 * kPage, kPage};
  CHECK(segments->device_of(region) == nullptr);
  REQUIRE(segments->pool(region) != nullptr);
  CHECK(segments->pool(region)->contains(segments->host_address(region)));
  std::memset(segments->host_address(region), 0x5a, kPage);
  const std::byte* const there = world.memory.memory.segment(1).data();
  CHECK(there[2 * kPage - 1] == std::byte{0});
  CHECK(there[2 * kPage] == std::byte{0x5a});
  CHECK(there[3 * kPage - 1] == std::byte{0x5a});
  const auto stats = world.borrower->stats();
  CHECK(stats.arenas == 1);
  CHECK(stats.bytes == 4 * kPage);
  CHECK(stats.mapped == 1);
  CHECK(world.at_borrower.size() == 1);
  CHECK(soon([] { return logged("arena of a peer mapped").size() == 1; }));
}

TEST_CASE("The lender is told when the last user of what was mapped has gone, and not before") {
  World world;
  world.up(1);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kArena));
  const Region region{10, 0, kPage};
  // Whatever a copy may hold.
  std::shared_ptr<const void> held;
  auto segments = world.borrower->segments(LinkId{1}, kArena);
  std::byte* const address = segments->host_address(region);
  SECTION("the table") {
    held = segments;
  }
  SECTION("what the memory lasts by") {
    held = segments->keep(region);
  }
  SECTION("the pool") {
    held = segments->pool(region);
  }
  REQUIRE(held != nullptr);
  segments.reset();
  world.gone(1);
  CHECK(world.borrower->segments(LinkId{1}, kArena) == nullptr);
  world.fence();
  CHECK(world.at_lender.count<engine::PeerUnmapped>() == 1);
  CHECK(world.borrower->stats().arenas == 1);
  // A copy that still runs.
  std::memset(address, 1, kPage);
  CHECK(world.memory.memory.segment(0).data()[kPage - 1] == std::byte{1});
  held.reset();
  CHECK(world.at_lender.unmapped(LinkId{101}));
  CHECK(world.borrower->stats().arenas == 0);
  CHECK(world.borrower->stats().bytes == 0);
  CHECK(world.at_lender.count<engine::PeerUnmapped>() == 2);
}

TEST_CASE("A peer that does not know the link yet is asked again, an older one is not") {
  World world;
  SECTION("not yet") {
    world.calls.answer_next(fail(Code::kNotFound, "UNKNOWN_LINK", ""));
    world.calls.answer_next(fail(Code::kUnavailable, "PEER_UNREACHABLE", ""));
    world.calls.answer_next(fail(Code::kDeadlineExceeded, "PEER_TIMEOUT", ""));
    world.up(1);
    CHECK(world.at_borrower.mapped(LinkId{1}, kArena));
    CHECK(world.calls.asked() == 4);
    CHECK(logged("does not tell").empty());
    CHECK(world.borrower->stats().failed_ask == 0);
  }
  SECTION("an older release") {
    world.calls.answer_next(fail(Code::kUnimplemented, "PEER_UNREACHABLE", "no such method"));
    world.up(1);
    REQUIRE(soon([&] { return world.borrower->stats().failed_ask == 1; }));
    world.fence();
    CHECK(world.calls.asked() == 2);
    CHECK(logged("does not tell").size() == 1);
    CHECK(world.borrower->stats().failed_ask == 1);
  }
  SECTION("one that lends nothing") {
    world.calls.answer_next(rpc::ArenasOffer{});
    world.up(1);
    REQUIRE(soon([&] { return !logged("peer lends no arenas").empty(); }));
    world.fence();
    CHECK(logged("peer lends no arenas").size() == 1);
    CHECK(world.borrower->stats().failed_ask == 0);
  }
}

TEST_CASE("A peer that never answers is given up") {
  World world(
      [](ArenaBorrowerConfig& config) { config.ask_limit = std::chrono::milliseconds(100); });
  for (int i = 0; i < 100; ++i)
    world.calls.answer_next(fail(Code::kUnavailable, "PEER_UNREACHABLE", ""));
  world.up(1);
  REQUIRE(soon([&] { return world.borrower->stats().failed_ask == 1; }));
  CHECK(world.calls.asked() < 10);
  CHECK(logged("does not tell").size() == 1);
}

TEST_CASE("On another host nothing is asked of the socket") {
  TemporaryDirectory directory;
  const StubLender stub(directory);
  World world([](ArenaBorrowerConfig& config) { config.host = host_id(8); });
  // Of a lender that says what none says.
  world.calls.answer_next(stub.offer({kPage}));
  world.up(1);
  REQUIRE(soon([&] { return logged("no arena that can be mapped here").size() == 1; }));
  pollfd polled{stub.listener.get(), POLLIN, 0};
  CHECK(::poll(&polled, 1, 0) == 0);
  CHECK(world.at_borrower.size() == 0);
}

TEST_CASE("A link that ends before its arenas are mapped has none") {
  const std::size_t before = open_descriptors();
  {
    TemporaryDirectory directory;
    const StubLender stub(directory);
    World world;
    SECTION("before the answer") {
      world.calls.hold();
      world.up(1);
      REQUIRE(soon([&] { return world.calls.held() == 1; }));
      world.gone(1);
      world.calls.release();
      world.fence();
      CHECK(world.lender->stats().handed_out == 1);
    }
    SECTION("before the descriptors") {
      world.calls.answer_next(stub.offer({kPage, 3 * kPage}));
      world.up(1);
      const UniqueFd connection = stub.accept();
      world.gone(1);
      StubLender::hand_out(connection.get(), world.memory.memory.fds());
      CHECK(StubLender::says_unmapped(connection.get()));
      world.fence();
    }
    CHECK(world.at_borrower.count<engine::ArenaMapped>() == 1);
    CHECK(world.borrower->segments(LinkId{1}, kArena) == nullptr);
    CHECK(world.borrower->stats().arenas == 0);
  }
  CHECK(open_descriptors() == before);
}

TEST_CASE("A lender that says nothing is waited for, not for ever") {
  TemporaryDirectory directory;
  const StubLender stub(directory);
  SECTION("until the deadline") {
    World world(
        [](ArenaBorrowerConfig& config) { config.socket_timeout = std::chrono::milliseconds(50); });
    world.calls.answer_next(stub.offer({kPage}));
    world.up(1);
    const UniqueFd connection = stub.accept();
    CHECK(StubLender::closes(connection.get()));
    CHECK(soon([&] { return world.borrower->stats().failed_socket == 1; }));
    CHECK(logged("SOCKET_SILENT").size() == 1);
    // One behind whom nobody accepts.
    world.calls.answer_next(stub.offer({kPage}));
    world.up(2);
    CHECK(soon([&] { return world.borrower->stats().failed_socket == 2; }));
    world.fence();
  }
  SECTION("until the daemon stops") {
    World world([](ArenaBorrowerConfig& config) { config.socket_timeout = std::chrono::hours(1); });
    world.calls.answer_next(stub.offer({kPage}));
    world.up(1);
    const UniqueFd connection = stub.accept();
    world.borrower->stop();
    CHECK(StubLender::closes(connection.get()));
  }
}

TEST_CASE("A lender whose backlog is full is waited for, but not when the daemon stops") {
  TemporaryDirectory directory;
  rpc::ArenasOffer offer;
  offer.socket_path = directory.file("full.sock");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  offer.socket_path.copy(address.sun_path, sizeof address.sun_path - 1);
  const auto* generic = reinterpret_cast<const sockaddr*>(&address);
  const UniqueFd listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  REQUIRE(::bind(listener.get(), generic, sizeof address) == 0);
  REQUIRE(::listen(listener.get(), 0) == 0);
  const auto caller = [&] {
    return UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  };
  std::vector<UniqueFd> waiting;
  do {
    waiting.push_back(caller());
  } while (::connect(waiting.back().get(), generic, sizeof address) == 0);
  REQUIRE(errno == EAGAIN);
  waiting.pop_back();
  const UniqueFd stop(::eventfd(0, EFD_CLOEXEC));
  ArenaDescriptors descriptors;
  const auto open = [&](Duration limit) {
    const auto session =
        LenderSession::open(offer, monotonic_now() + limit, stop.get(), descriptors);
    return session ? std::string() : session.error().reason;
  };
  CHECK(open(std::chrono::milliseconds(50)) == "SOCKET_FAILED");
  std::string reason;
  std::thread opener([&] { reason = open(kPatience); });
  SECTION("the daemon stops") {
    const uint64_t one = 1;
    REQUIRE(::write(stop.get(), &one, sizeof one) == sizeof one);
    opener.join();
    CHECK(reason == "SHUTDOWN");
  }
  SECTION("there is room again") {
    // All that waited, then the one that could not.
    for (std::size_t i = 0; i <= waiting.size(); ++i)
      UniqueFd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC)).reset();
    opener.join();
    CHECK(reason == "SOCKET_CLOSED");
  }
}

TEST_CASE("A lender's socket that is not there, or another user's, is not used") {
  World world;
  TemporaryDirectory directory;
  SECTION("not there") {
    rpc::ArenasOffer offer = StubLender(directory).offer({kPage});
    offer.socket_path = directory.file("nobody");
    world.calls.answer_next(offer);
    world.up(1);
    CHECK(soon([&] { return world.borrower->stats().failed_socket == 1; }));
    CHECK(logged("SOCKET_FAILED").size() == 1);
  }
  SECTION("another user's") {
    if (::geteuid() != 0) return;
    const std::string path = directory.file("foreign");
    int ready[2];
    REQUIRE(::pipe2(ready, O_CLOEXEC) == 0);
    std::filesystem::permissions(directory.file(""), std::filesystem::perms::all);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    const pid_t child = ::fork();
    if (child == 0) {
      const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
      if (::setresuid(65533, 65533, 65533) != 0 ||
          ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
          ::listen(fd, 1) != 0 || ::write(ready[1], "r", 1) != 1)
        ::_exit(1);
      const int caller = ::accept(fd, nullptr, nullptr);
      char byte = 0;
      // It must not see the token.
      ::_exit(::recv(caller, &byte, 1, 0) == 0 ? 0 : 2);
    }
    REQUIRE(child > 0);
    char byte = 0;
    REQUIRE(::read(ready[0], &byte, 1) == 1);
    ::close(ready[0]);
    ::close(ready[1]);
    rpc::ArenasOffer offer = StubLender(directory).offer({kPage});
    offer.socket_path = path;
    world.calls.answer_next(offer);
    world.up(1);
    CHECK(soon([&] { return world.borrower->stats().failed_socket == 1; }));
    CHECK(logged("SOCKET_FOREIGN").size() == 1);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(status == 0);
  }
  CHECK(world.at_borrower.size() == 0);
}

TEST_CASE("A lender that hands over something else than it offers gets nothing written") {
  const std::size_t before = open_descriptors();
  {
    TemporaryDirectory directory;
    const StubLender stub(directory);
    World world;
    const auto good = world.memory.memory.fds();
    std::string reason = "SOCKET_PROTOCOL";
    UniqueFd other;
    world.calls.answer_next(stub.offer({kPage, 3 * kPage}));
    world.up(1);
    const UniqueFd connection = stub.accept();
    SECTION("a descriptor too few") {
      StubLender::hand_out(connection.get(), {good[0]});
    }
    SECTION("one too many") {
      StubLender::hand_out(connection.get(), {good[0], good[1], good[0]});
    }
    SECTION("those of another arena") {
      StubLender::hand_out(connection.get(), good, kArena + 1);
    }
    SECTION("the same arena twice") {
      const wire::Welcome welcome = StubLender::welcome(2);
      REQUIRE(send_message(connection.get(), &welcome, sizeof welcome));
      wire::Descriptors message;
      message.arena = kArena;
      message.count = 2;
      for (int i = 0; i < 2; ++i)
        REQUIRE(send_message(connection.get(), &message, sizeof message, good));
    }
    SECTION("another count than there are") {
      const wire::Welcome welcome = StubLender::welcome(1);
      REQUIRE(send_message(connection.get(), &welcome, sizeof welcome));
      wire::Descriptors message;
      message.arena = kArena;
      message.count = 1;
      REQUIRE(send_message(connection.get(), &message, sizeof message, good));
    }
    SECTION("more arenas than there can be") {
      const wire::Welcome welcome = StubLender::welcome(65);
      REQUIRE(send_message(connection.get(), &welcome, sizeof welcome));
    }
    SECTION("a welcome that is not the peer's") {
      wire::Welcome welcome = StubLender::welcome(1);
      welcome.proof[GENERATE(0, 15)] ^= 1;
      REQUIRE(send_message(connection.get(), &welcome, sizeof welcome));
      reason = "LENDER_FOREIGN";
    }
    SECTION("another message") {
      REQUIRE(send_message(connection.get(), good.data(), 4));
    }
    SECTION("a long one") {
      const std::array<char, 4096> long_message{};
      REQUIRE(send_message(connection.get(), long_message.data(), long_message.size()));
    }
    SECTION("smaller memory") {
      StubLender::hand_out(connection.get(), {good[0], good[0]});
      reason = "POOL_TOO_SMALL";
    }
    SECTION("memory that can be taken away again") {
      other.reset(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
      REQUIRE(::fallocate(other.get(), 0, 0, 3 * kPage) == 0);
      StubLender::hand_out(connection.get(), {good[0], other.get()});
      reason = "POOL_NOT_SEALED";
    }
    SECTION("no memory at all") {
      StubLender::hand_out(connection.get(), {good[0], STDIN_FILENO});
      reason = "POOL_";
    }
    if (reason == "SOCKET_PROTOCOL" || reason == "LENDER_FOREIGN") {
      CHECK(StubLender::closes(connection.get()));
      CHECK(soon([&] { return world.borrower->stats().failed_socket == 1; }));
    } else {
      // Nothing of it is mapped.
      CHECK(StubLender::says_unmapped(connection.get()));
      CHECK(soon([&] { return world.borrower->stats().failed_import == 1; }));
    }
    CHECK(logged(reason).size() == 1);
    CHECK(world.at_borrower.size() == 0);
    CHECK(world.borrower->stats().arenas == 0);
    world.fence();
  }
  CHECK(open_descriptors() == before);
}

TEST_CASE("A lender of very many segments does not take all descriptors") {
  TemporaryDirectory directory;
  World world;
  HostMemory many(std::vector<uint64_t>(40, kPage), 20, 100);
  HostMemory more(std::vector<uint64_t>(25, kPage), 21, 200);
  HostMemory last(std::vector<uint64_t>(24, kPage), 22, 300);
  Events events;
  ArenaLenderConfig config = lender_config(directory);
  const auto lender = start_lender(config, {many.lent, more.lent, last.lent}, events);
  const std::size_t before = open_descriptors();
  lender->on_link_up(peer_ref(700, 1), engine::CheckKind::kNone);
  world.calls.connect(LinkId{7}, *lender, peer_ref(700, 1));
  world.borrower->on_link_up(peer_ref(7, 4), engine::CheckKind::kNone);
  CHECK(world.at_borrower.mapped(LinkId{7}, 20));
  CHECK(world.at_borrower.mapped(LinkId{7}, 22));
  CHECK(world.borrower->segments(LinkId{7}, 21) == nullptr);
  CHECK(world.borrower->stats().failed_import == 1);
  CHECK(logged("TOO_MANY_DESCRIPTORS").size() == 1);
  // And the two ends of the socket, and the process that is looked at.
  CHECK(open_descriptors() <= before + kMaxLinkDescriptors + 3);
  world.borrower->on_link_gone(LinkId{7});
  lender->on_link_gone(LinkId{700});
  CHECK(events.unmapped(LinkId{700}));
}

TEST_CASE("A peer that names another daemon's socket has nothing of that daemon's written") {
  World world;
  // The liar has a link to the honest lender, and offers as its own what it is offered there.
  const PeerRef liar = peer_ref(901, 9);
  world.lender->on_link_up(liar, engine::CheckKind::kNone);
  rpc::ArenasOffer offer = world.lender->offer(liar, {host_id(), proof_of(liar.link)});
  REQUIRE(offer.socket_path == world.directory.file("arenas.sock"));
  offer.proof = proof_of(LinkId{101});  // of the liar's link to us
  world.calls.answer_next(offer);
  world.borrower->on_link_up(peer_ref(1, 9), engine::CheckKind::kNone);
  CHECK(soon([&] { return world.borrower->stats().failed_socket == 1; }));
  CHECK(logged("LENDER_FOREIGN").size() == 1);
  CHECK(world.borrower->segments(LinkId{1}, kArena) == nullptr);
  CHECK(world.borrower->stats().arenas == 0);
  CHECK(world.at_borrower.size() == 0);
  world.fence();
}

TEST_CASE("An arena into which a gather failed is not borrowed again from that life of the peer") {
  World world;
  world.up(1);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kArena));
  auto held = world.borrower->segments(LinkId{1}, kArena);
  world.borrower->distrust(LinkId{1}, kArena + 1);  // none
  world.borrower->distrust(LinkId{2}, kArena);
  CHECK(world.borrower->stats().failed_gather == 0);
  world.borrower->distrust(LinkId{1}, kArena);
  world.borrower->distrust(LinkId{1}, kArena);  // by another copy
  CHECK(world.borrower->segments(LinkId{1}, kArena) == nullptr);
  CHECK(world.borrower->stats().failed_gather == 1);
  CHECK(logged("not borrowed any more").size() == 1);
  // Who has it keeps it.
  std::memset(held->host_address({10, 0, kPage}), 1, kPage);
  held.reset();
  CHECK(soon([&] { return world.borrower->stats().arenas == 0; }));
  world.gone(1);
  CHECK(world.at_lender.unmapped(LinkId{101}));
  // The same life again: all that is handed over is given back.
  world.up(2);
  REQUIRE(soon([&] { return world.lender->stats().handed_out == 2; }));
  world.gone(2);
  CHECK(world.at_lender.unmapped(LinkId{102}));
  CHECK(world.at_borrower.count<engine::ArenaMapped>() == 1);
  // Another life, and another node that says that it is this life.
  uint64_t link = 3;
  for (const PeerRef& peer :
       {PeerRef{LinkId{3}, "peer-2", boot_id(3)}, PeerRef{LinkId{4}, "other", boot_id(2)}}) {
    world.lender->on_link_up(peer_ref(link + 100, 1), engine::CheckKind::kNone);
    world.calls.connect(LinkId{link}, *world.lender, peer_ref(link + 100, 1));
    world.borrower->on_link_up(peer, engine::CheckKind::kNone);
    CHECK(world.at_borrower.mapped(LinkId{link}, kArena));
    ++link;
  }
}

TEST_CASE("Of arenas that are not trusted the oldest is forgotten") {
  World world([](ArenaBorrowerConfig& config) { config.max_distrusted = 3; });
  const auto up = [&](uint64_t link, const PeerRef& peer) {
    world.lender->on_link_up(peer_ref(link + 10000, 1), engine::CheckKind::kNone);
    world.calls.connect(LinkId{link}, *world.lender, peer_ref(link + 10000, 1));
    world.borrower->on_link_up(peer, engine::CheckKind::kNone);
  };
  const auto gone = [&](uint64_t link) {
    world.borrower->on_link_gone(LinkId{link});
    world.lender->on_link_gone(LinkId{link + 10000});
    return world.at_lender.unmapped(LinkId{link + 10000});
  };
  const auto fail_one = [&](uint64_t link) {
    up(link, {LinkId{link}, "n" + std::to_string(link), boot_id(1)});
    REQUIRE(world.at_borrower.mapped(LinkId{link}, kArena));
    world.borrower->distrust(LinkId{link}, kArena);
    REQUIRE(gone(link));
  };
  constexpr uint64_t kMost = 3;
  for (uint64_t link = 1; link <= kMost; ++link) fail_one(link);
  const uint64_t handed = world.lender->stats().handed_out;
  up(5000, {LinkId{5000}, "n1", boot_id(1)});
  REQUIRE(soon([&] { return world.lender->stats().handed_out == handed + 1; }));
  REQUIRE(gone(5000));
  CHECK(world.at_borrower.count<engine::ArenaMapped>() == kMost);
  fail_one(kMost + 1);
  up(5001, {LinkId{5001}, "n1", boot_id(1)});
  CHECK(world.at_borrower.mapped(LinkId{5001}, kArena));
}

TEST_CASE("A borrower that stops leaves what copies hold, and nothing else") {
  World world;
  world.up(1);
  world.up(2);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kArena));
  REQUIRE(world.at_borrower.mapped(LinkId{2}, kArena));
  auto held = world.borrower->segments(LinkId{1}, kArena);
  world.borrower->stop();
  CHECK(world.borrower->stats().arenas == 1);
  CHECK(world.borrower->segments(LinkId{2}, kArena) == nullptr);
  world.borrower->on_link_up(peer_ref(3, 2), engine::CheckKind::kNone);
  // What nobody holds is unmapped, and its lender told.
  world.lender->on_link_gone(LinkId{101});
  world.lender->on_link_gone(LinkId{102});
  CHECK(world.at_lender.unmapped(LinkId{102}));
  CHECK(world.at_lender.count<engine::PeerUnmapped>() == 1);
  world.borrower.reset();
  std::memset(held->host_address({10, 0, kPage}), 3, kPage);
  CHECK(world.memory.memory.segment(0).data()[0] == std::byte{3});
  held.reset();
  CHECK(world.at_lender.unmapped(LinkId{101}));
}

// ---- another process ---------------------------------------------------------------------------

TEST_CASE("A borrower's end is seen on its process, and a pause of it is not its end") {
  World world;
  ArenaPeer peer(KVFERRY_ARENA_PEER, nullptr);
  world.lender->on_link_up(peer_ref(501, 77), engine::CheckKind::kNone);
  REQUIRE(peer.up(1, world.lender->offer(peer_ref(501, 77), {host_id()}), 1).empty());
  REQUIRE(peer.write(1, kArena, {11, kPage, 2 * kPage}, 0x33).empty());
  CHECK(world.memory.memory.segment(1).data()[3 * kPage - 1] == std::byte{0x33});
  CHECK(peer.write(1, kArena, {11, 3 * kPage, 1}, 0x33) == "OUTSIDE");
  const auto gone = [](const engine::PeerProcessGone& event) { return event.boot == boot_id(77); };
  SECTION("killed") {
    peer.kill();
    CHECK(world.at_lender.wait<engine::PeerProcessGone>(gone));
  }
  SECTION("stopped, then killed") {
    peer.stop();
    world.fence();
    world.lender->on_link_gone(LinkId{501});
    world.fence();
    CHECK(world.at_lender.count<engine::PeerProcessGone>() == 0);
    CHECK(world.at_lender.count<engine::PeerUnmapped>() == 2);
    peer.kill();
    CHECK(world.at_lender.wait<engine::PeerProcessGone>(gone));
  }
  SECTION("killed while a copy of an ended link runs") {
    REQUIRE(peer.tell(PeerOp::kHold, 1, kArena).empty());
    REQUIRE(peer.tell(PeerOp::kGone, 1).empty());
    world.lender->on_link_gone(LinkId{501});
    world.fence();
    CHECK(world.at_lender.count<engine::PeerUnmapped>() == 1);
    peer.kill();
    CHECK(world.at_lender.wait<engine::PeerProcessGone>(gone));
  }
  SECTION("one that has unmapped everything is not looked at any more") {
    REQUIRE(peer.tell(PeerOp::kHold, 1, kArena).empty());
    REQUIRE(peer.tell(PeerOp::kGone, 1).empty());
    world.lender->on_link_gone(LinkId{501});
    REQUIRE(peer.tell(PeerOp::kRelease, 1).empty());
    CHECK(world.at_lender.unmapped(LinkId{501}));
    peer.kill();
    world.fence();
    CHECK(world.at_lender.count<engine::PeerProcessGone>() == 0);
    return;
  }
  world.fence();
  CHECK(world.at_lender.count<engine::PeerProcessGone>() == 1);
  CHECK(world.lender->stats().processes_gone == 1);
}

// ---- many at once ------------------------------------------------------------------------------

TEST_CASE("Links come and go while copies run and others look") {
  constexpr uint64_t kThreads = 4;
  constexpr uint64_t kRounds = 20;
  World world;
  std::atomic<bool> done{false};
  std::thread looker([&] {
    uint64_t found = 0;
    while (!done.load()) {
      for (uint64_t link = 1; link <= kThreads * kRounds; ++link)
        if (const auto segments = world.borrower->segments(LinkId{link}, kArena))
          found += segments->count();
      (void)world.borrower->stats();
      (void)world.lender->stats();
    }
  });
  std::vector<std::thread> users;
  std::atomic<uint64_t> failures{0};
  for (uint64_t t = 0; t < kThreads; ++t) {
    users.emplace_back([&, t] {
      for (uint64_t round = 0; round < kRounds; ++round) {
        const uint64_t link = 1 + t * kRounds + round;
        world.up(link);
        if (round % 3 != 0) {
          if (!world.at_borrower.mapped(LinkId{link}, kArena)) ++failures;
          if (auto segments = world.borrower->segments(LinkId{link}, kArena))
            std::memset(segments->host_address({11, t * 512, 512}), static_cast<int>(link), 512);
        }
        auto held = round % 2 == 0 ? world.borrower->segments(LinkId{link}, kArena) : nullptr;
        world.gone(link);
        held.reset();
      }
    });
  }
  for (std::thread& user : users) user.join();
  done.store(true);
  looker.join();
  CHECK(failures == 0);
  // Whoever has been handed descriptors says in the end that nothing is mapped.
  CHECK(soon([&] {
    return world.lender->stats().unmapped == world.lender->stats().handed_out &&
           world.borrower->stats().arenas == 0 && world.lender->stats().processes == 0;
  }));
  CHECK(world.lender->stats().handed_out >= kThreads * (kRounds - kRounds / 3 - 1));
}

}  // namespace kvferry::node
