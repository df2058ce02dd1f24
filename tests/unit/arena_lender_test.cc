// The lender and whoever comes to its socket, well-behaved or not.
#include "daemon/node/arena_lender.h"

#include <sys/wait.h>

#include "tests/unit/lending_support.h"

namespace kvferry::node {
namespace {

constexpr uint64_t kPage = 4096;

LentArena device_arena(rpc::LentKind kind, uint32_t number, uint32_t first) {
  LentArena arena;
  arena.number = number;
  arena.kind = kind;
  arena.device_uuid.fill(9);
  arena.segments.push_back({first, kPage, STDIN_FILENO, {}});  // any descriptor
  arena.segments.back().handle.fill(static_cast<uint8_t>(number));
  return arena;
}

ino_t inode_of(int fd) {
  struct stat file {};
  REQUIRE(::fstat(fd, &file) == 0);
  return file.st_ino;
}

// A lender with one host arena of two segments.
struct World {
  explicit World(const std::function<void(ArenaLenderConfig&)>& change = {}) {
    ArenaLenderConfig config = lender_config(directory);
    if (change) change(config);
    path = config.socket_path;
    lender = start_lender(config, {memory.lent}, events);
  }
  Token token(uint64_t link, uint8_t boot = 1) {
    lender->on_link_up(peer_ref(link, boot), engine::CheckKind::kNone);
    const auto offer = lender->offer(peer_ref(link, boot), {host_id()});
    REQUIRE(offer.socket_path == path);
    return offer.token;
  }
  // All there is to get, with what has come left to be closed.
  bool gets(RawClient& client) {
    wire::Welcome welcome;
    wire::Descriptors message;
    std::vector<UniqueFd> none;
    std::vector<UniqueFd> fds;
    if (!client.receive(welcome, none) || welcome.type != wire::Type::kWelcome) return false;
    return welcome.arenas == 1 && client.receive(message, fds) && fds.size() == 2;
  }
  // That nothing else is told is seen from what is told after it.
  void fence() {
    const uint64_t link = next_fence++;
    RawClient client(path);
    REQUIRE(client.show(token(link, 200)));
    REQUIRE(gets(client));
    REQUIRE(client.send(wire::Unmapped{}));
    lender->on_link_gone(LinkId{link});
    REQUIRE(events.unmapped(LinkId{link}));
  }

  TemporaryDirectory directory;
  HostMemory memory{{kPage, 2 * kPage}};
  Events events;
  std::string path;
  std::unique_ptr<ArenaLender> lender;
  uint64_t next_fence = 1000;
};

}  // namespace

TEST_CASE("This host has an id, always the same") {
  CHECK_FALSE(this_host().is_zero());
  CHECK(this_host() == this_host());
}

TEST_CASE("A peer is offered what it could map") {
  TemporaryDirectory directory;
  HostMemory memory({kPage, 2 * kPage});
  Events events;
  const auto lender = start_lender(lender_config(directory),
                                   {device_arena(rpc::LentKind::kFabricVmm, 9, 30), memory.lent,
                                    device_arena(rpc::LentKind::kDeviceVmm, 5, 20),
                                    device_arena(rpc::LentKind::kCudaMalloc, 7, 25)},
                                   events);
  // Not yet up.
  CHECK(lender->offer(peer_ref(1), {host_id()}).arenas.empty());
  CHECK(lender->offer(peer_ref(1), {host_id()}).token.is_zero());
  lender->on_link_up(peer_ref(1), engine::CheckKind::kNone);
  lender->on_link_up(peer_ref(2), engine::CheckKind::kNone);

  const auto near = lender->offer(peer_ref(1), {host_id()});
  CHECK(near.host == host_id());
  CHECK(near.socket_path == directory.file("arenas.sock"));
  CHECK_FALSE(near.token.is_zero());
  REQUIRE(near.arenas.size() == 4);
  CHECK(near.arenas[0].number == 3);
  CHECK(near.arenas[0].segments.at(1).number == 11);
  CHECK(near.arenas[0].segments.at(1).bytes == 2 * kPage);
  CHECK(near.arenas[1].kind == rpc::LentKind::kDeviceVmm);
  CHECK(near.arenas[2].segments.at(0).handle[63] == 7);
  CHECK(near.arenas[3].device_uuid[0] == 9);
  // The seal of its secrets is good for one answer.
  CHECK(lender->offer(peer_ref(1), {host_id()}) == near);
  CHECK(lender->offer(peer_ref(2), {host_id()}).token != near.token);

  for (const rpc::HostId& host : {host_id(8), rpc::HostId{}}) {
    const auto far = lender->offer(peer_ref(1), {host});
    CHECK(far.socket_path.empty());
    CHECK(far.token.is_zero());
    REQUIRE(far.arenas.size() == 1);
    CHECK(far.arenas[0].kind == rpc::LentKind::kFabricVmm);
  }
  lender->on_link_gone(LinkId{1});
  CHECK(lender->offer(peer_ref(1), {host_id()}).arenas.empty());
}

TEST_CASE("Without a socket, or an id of its host, a lender has fabric memory for others alone") {
  TemporaryDirectory directory;
  HostMemory memory({kPage});
  Events events;
  ArenaLenderConfig config = lender_config(directory);
  SECTION("no socket") {
    config.socket_path.clear();
  }
  SECTION("no id") {
    config.host = {};
  }
  const auto lender =
      start_lender(config, {device_arena(rpc::LentKind::kFabricVmm, 9, 30), memory.lent}, events);
  lender->on_link_up(peer_ref(1), engine::CheckKind::kNone);
  if (!config.host.is_zero()) {
    CHECK(lender->offer(peer_ref(1), {host_id()}).arenas.empty());
    CHECK(events.size() == 0);
  }
  for (const rpc::HostId& host : {host_id(8), rpc::HostId{}}) {
    const auto offer = lender->offer(peer_ref(1), {host});
    CHECK(offer.socket_path.empty());
    REQUIRE(offer.arenas.size() == 1);
    CHECK(offer.arenas[0].number == 9);
  }
}

TEST_CASE("What cannot be lent is refused at start") {
  TemporaryDirectory directory;
  HostMemory memory({kPage, kPage});
  Events events;
  const auto field = [&](const std::function<void(ArenaLenderConfig&, LentArena&)>& change) {
    ArenaLenderConfig config = lender_config(directory);
    LentArena arena = memory.lent;
    change(config, arena);
    const auto lender = ArenaLender::start(config, {memory.lent, arena}, events.sink());
    return lender ? "" : lender.error().reason + " " + lender.error().field;
  };
  CHECK(field([](auto&, auto& arena) { arena.number = 4; }).empty());
  CHECK(field([](auto&, auto&) {}) == "LENDER_CONFIG arenas[1].number");
  CHECK(field([](auto& c, auto&) { c.socket_path = "relative"; }) == "LENDER_CONFIG socket_path");
  CHECK(field([](auto& c, auto&) { c.socket_path = "/" + std::string(107, 'x'); }) ==
        "LENDER_CONFIG socket_path");
  const std::string segments = "LENDER_CONFIG arenas[1].segments";
  CHECK(field([](auto&, auto& a) { a.segments.clear(); }) == segments);
  CHECK(field([](auto&, auto& a) { a.segments[1].number += 1; }) == segments);
  CHECK(field([](auto&, auto& a) { a.segments[1].bytes = 0; }) == segments);
  CHECK(field([](auto&, auto& a) { a.segments[1].fd = -1; }) == segments);
  CHECK(field([](auto& c, auto& a) {
          a.number = 4;
          c.socket_path = "/no/such/directory/socket";
        }) == "LENDER_FAILED ");
}

TEST_CASE("A dead lender's socket is replaced, a living one's is not") {
  World world;
  struct stat file {};
  REQUIRE(::lstat(world.path.c_str(), &file) == 0);
  CHECK((file.st_mode & 0777) == 0600);
  const auto second = ArenaLender::start(lender_config(world.directory), {}, world.events.sink());
  REQUIRE_FALSE(second);
  CHECK(second.error().reason == "SOCKET_IN_USE");
  world.fence();  // it still serves
  world.lender.reset();
  CHECK(::lstat(world.path.c_str(), &file) != 0);
  // What a killed one leaves.
  {
    auto stale = listen_seqpacket(world.path, 0600, "TEST");
    REQUIRE(stale);
  }
  REQUIRE(::lstat(world.path.c_str(), &file) == 0);
  world.lender = start_lender(lender_config(world.directory), {world.memory.lent}, world.events);
  world.fence();
}

TEST_CASE("The engine knows that an arena is lent before the peer can map it, and once") {
  TemporaryDirectory directory;
  HostMemory memory({kPage, 2 * kPage});
  Events events;
  const auto lender = start_lender(lender_config(directory),
                                   {device_arena(rpc::LentKind::kFabricVmm, 9, 30), memory.lent,
                                    device_arena(rpc::LentKind::kCudaMalloc, 7, 25)},
                                   events);
  lender->on_link_up(peer_ref(1), engine::CheckKind::kNone);
  SECTION("on this host, when the token has been shown") {
    const Token token = lender->offer(peer_ref(1), {host_id()}).token;
    CHECK(events.size() == 0);
    RawClient wrong(directory.file("arenas.sock"));
    REQUIRE(wrong.show(Token{}));
    REQUIRE(wrong.closed());
    CHECK(events.size() == 0);
    RawClient client(directory.file("arenas.sock"));
    REQUIRE(client.show(token));
    wire::Welcome welcome;
    std::vector<UniqueFd> none;
    REQUIRE(client.receive(welcome, none));
    // Those with handles too, which it has by the offer.
    for (const uint32_t arena : {3U, 7U, 9U}) CHECK(events.lent(LinkId{1}, arena) == 1);
    CHECK(events.size() == 3);
    // Who then says that he is of another host has been told of already.
    CHECK(lender->offer(peer_ref(1), {host_id(8)}).arenas.size() == 1);
    CHECK(events.size() == 3);
  }
  SECTION("on another host, with the handles") {
    for (int i = 0; i < 2; ++i) CHECK(lender->offer(peer_ref(1), {host_id(8)}).arenas.size() == 1);
    CHECK(events.lent(LinkId{1}, 9) == 1);
    CHECK(events.size() == 1);
    lender->on_link_up(peer_ref(2, 2), engine::CheckKind::kNone);
    (void)lender->offer(peer_ref(2, 2), {});
    CHECK(events.lent(LinkId{2}, 9) == 1);
    CHECK(events.size() == 2);
  }
  SECTION("nothing of a link that is not up") {
    lender->on_link_gone(LinkId{1});
    (void)lender->offer(peer_ref(1), {host_id(8)});
    CHECK(events.size() == 0);
  }
}

TEST_CASE("A token gets the descriptors, once, and while its link lives") {
  World world;
  const Token token = world.token(1);
  RawClient client(world.path);
  REQUIRE(client.show(token));
  wire::Welcome welcome;
  std::vector<UniqueFd> none;
  REQUIRE(client.receive(welcome, none));
  CHECK(welcome.magic == wire::kMagic);
  CHECK(welcome.arenas == 1);
  CHECK(none.empty());
  wire::Descriptors message;
  std::vector<UniqueFd> fds;
  REQUIRE(client.receive(message, fds));
  CHECK(message.type == wire::Type::kDescriptors);
  CHECK(message.arena == 3);
  REQUIRE(fds.size() == 2);
  for (uint32_t i = 0; i < 2; ++i)
    CHECK(inode_of(fds[i].get()) == inode_of(world.memory.memory.segment(i).fd()));

  const auto refused = [&](const Token& shown) {
    RawClient other(world.path);
    return other.show(shown) && other.closed();
  };
  CHECK(refused(token));  // used
  Token wrong = world.token(2);
  wrong.bytes[15] ^= 1;
  CHECK(refused(wrong));
  CHECK(refused(Token{}));
  const Token old = world.token(3);
  world.lender->on_link_gone(LinkId{3});
  CHECK(refused(old));
  CHECK(soon([&] { return world.lender->stats().refused == 4; }));
  CHECK(world.lender->stats().connections == 1);
  CHECK(world.lender->stats().handed_out == 1);
  // A guess has not spoilt the right one.
  RawClient second(world.path);
  REQUIRE(second.show(world.token(2)));
  CHECK(world.gets(second));
}

TEST_CASE("UNMAPPED counts from the link's end, a closed connection never does") {
  World world;
  const auto connect = [&](uint64_t link) {
    auto client = std::make_unique<RawClient>(world.path);
    REQUIRE(client->show(world.token(link)));
    REQUIRE(world.gets(*client));
    return client;
  };
  SECTION("said before the link's end") {
    const auto client = connect(1);
    REQUIRE(client->send(wire::Unmapped{}));
    CHECK(client->closed());  // so it has been read
    world.fence();
    CHECK(world.events.count<engine::PeerUnmapped>() == 1);
    world.lender->on_link_gone(LinkId{1});
    CHECK(world.events.unmapped(LinkId{1}));
  }
  SECTION("said after it") {
    const auto client = connect(1);
    world.lender->on_link_gone(LinkId{1});
    world.fence();
    CHECK(world.events.count<engine::PeerUnmapped>() == 1);
    REQUIRE(client->send(wire::Unmapped{}));
    CHECK(world.events.unmapped(LinkId{1}));
  }
  SECTION("two links of one life of a daemon are told apart") {
    const auto first = connect(1);
    const auto second = connect(2);
    world.lender->on_link_gone(LinkId{1});
    world.lender->on_link_gone(LinkId{2});
    REQUIRE(second->send(wire::Unmapped{}));
    CHECK(world.events.unmapped(LinkId{2}));
    world.fence();
    CHECK(world.events.count<engine::PeerUnmapped>() == 2);
    REQUIRE(first->send(wire::Unmapped{}));
    CHECK(world.events.unmapped(LinkId{1}));
  }
  SECTION("closed without a word") {
    connect(1).reset();
    CHECK(soon([&] { return world.lender->stats().connections == 0; }));
    world.lender->on_link_gone(LinkId{1});
    world.fence();
    CHECK(world.events.evidence() == 1);
    // The process, which is this one, is looked at on.
    CHECK(soon([&] { return world.lender->stats().processes == 1; }));
    return;
  }
  SECTION("nonsense after the token") {
    const auto client = connect(1);
    REQUIRE(client->send(wire::Show{}));
    CHECK(client->closed());
    world.lender->on_link_gone(LinkId{1});
    world.fence();
    CHECK(world.events.evidence() == 1);
    CHECK(soon([&] { return world.lender->stats().processes == 1; }));
    return;
  }
  CHECK(soon([&] { return world.lender->stats().processes == 0; }));
  CHECK(world.events.count<engine::PeerProcessGone>() == 0);
}

TEST_CASE("Who says nothing is turned away, and so is who says what nobody says") {
  World world(
      [](ArenaLenderConfig& config) { config.token_timeout = std::chrono::milliseconds(50); });
  SECTION("nothing at all") {
    RawClient client(world.path);
    CHECK(client.closed());
  }
  SECTION("the end before a token") {
    RawClient client(world.path);
    client.fd.reset();
  }
  SECTION("too short") {
    RawClient client(world.path);
    REQUIRE(client.send(uint32_t{wire::kMagic}));
    CHECK(client.closed());
  }
  SECTION("too long") {
    RawClient client(world.path);
    REQUIRE(client.send(std::array<char, 5000>{}));
    CHECK(client.closed());
  }
  SECTION("another magic number") {
    wire::Show show;
    show.magic ^= 1;
    RawClient client(world.path);
    REQUIRE(client.send(show));
    CHECK(client.closed());
  }
  SECTION("UNMAPPED before the token") {
    RawClient client(world.path);
    REQUIRE(client.send(wire::Unmapped{}));
    CHECK(client.closed());
  }
  SECTION("a good token, with descriptors nobody asked for") {
    const Token token = world.token(1);
    wire::Show show;
    std::memcpy(show.token, token.bytes.data(), sizeof show.token);
    RawClient client(world.path);
    const int own[] = {client.fd.get(), STDIN_FILENO};
    REQUIRE(client.send(show, own));
    CHECK(client.closed());
  }
  CHECK(soon([&] { return world.lender->stats().refused == 1; }));
  CHECK(logged("connection for lent arenas ended").size() >= 1);
  world.fence();
  CHECK(world.events.evidence() == 1);
}

TEST_CASE("Connections are limited, and those that have shown no token more so") {
  World world([](ArenaLenderConfig& config) {
    config.token_timeout = std::chrono::hours(1);
    config.max_connections = 4;
    config.max_unproven = 2;
  });
  std::vector<std::unique_ptr<RawClient>> silent;
  for (int i = 0; i < 2; ++i) silent.push_back(std::make_unique<RawClient>(world.path));
  CHECK(RawClient(world.path).closed());
  silent.clear();
  CHECK(soon([&] { return world.lender->stats().refused == 3; }));
  std::vector<std::unique_ptr<RawClient>> proven;
  for (uint64_t link = 1; link <= 4; ++link) {
    proven.push_back(std::make_unique<RawClient>(world.path));
    REQUIRE(proven.back()->show(world.token(link)));
    REQUIRE(world.gets(*proven.back()));
  }
  CHECK(RawClient(world.path).closed());
  proven.pop_back();
  CHECK(soon([&] { return world.lender->stats().connections == 3; }));
  world.fence();
}

TEST_CASE("As many daemons of this host are served as there are processes looked after") {
  World world([](ArenaLenderConfig& config) { config.token_timeout = std::chrono::hours(1); });
  std::vector<std::unique_ptr<RawClient>> clients;
  for (uint8_t boot = 1; boot <= 80; ++boot) {
    clients.push_back(std::make_unique<RawClient>(world.path));
    REQUIRE(clients.back()->show(world.token(boot, boot)));
    REQUIRE(world.gets(*clients.back()));
  }
  CHECK(soon([&] { return world.lender->stats().connections == 80; }));
  CHECK(world.lender->stats().refused == 0);
}

TEST_CASE("A process that has been told enough lives of daemons is told no more") {
  World world([](ArenaLenderConfig& config) { config.max_processes = 2; });
  std::vector<std::unique_ptr<RawClient>> clients;
  for (uint8_t boot = 1; boot <= 2; ++boot) {
    clients.push_back(std::make_unique<RawClient>(world.path));
    REQUIRE(clients.back()->show(world.token(boot, boot)));
    REQUIRE(world.gets(*clients.back()));
  }
  RawClient third(world.path);
  REQUIRE(third.show(world.token(3, 3)));
  CHECK(third.closed());
  RawClient again(world.path);
  REQUIRE(again.show(world.token(4, 1)));
  CHECK(world.gets(again));
}

TEST_CASE("A process that does not say UNMAPPED gets no more after a while") {
  World world([](ArenaLenderConfig& config) { config.max_links_of_process = 2; });
  std::vector<std::unique_ptr<RawClient>> clients;
  for (uint64_t link = 1; link <= 2; ++link) {
    clients.push_back(std::make_unique<RawClient>(world.path));
    REQUIRE(clients.back()->show(world.token(link)));
    REQUIRE(world.gets(*clients.back()));
    world.lender->on_link_gone(LinkId{link});
  }
  RawClient third(world.path);
  REQUIRE(third.show(world.token(3)));
  CHECK(third.closed());
  CHECK(world.events.lent(LinkId{3}, 3) == 0);
  // Nothing is forgotten of the others, and one that has unmapped makes room.
  for (const auto& client : clients) REQUIRE(client->send(wire::Unmapped{}));
  for (uint64_t link = 1; link <= 2; ++link) CHECK(world.events.unmapped(LinkId{link}));
  RawClient fourth(world.path);
  REQUIRE(fourth.show(world.token(4)));
  CHECK(world.gets(fourth));
}

TEST_CASE("A life of a daemon is its node's: who names another's boot id changes nothing for him") {
  World world;
  const PeerRef honest = {LinkId{1}, "honest", boot_id(5)};
  const PeerRef liar = {LinkId{2}, "liar", boot_id(5)};
  const auto token = [&](const PeerRef& peer) {
    world.lender->on_link_up(peer, engine::CheckKind::kNone);
    return world.lender->offer(peer, {host_id()}).token;
  };
  // A process that shows the liar's token and lives until it is told to end.
  int hold[2];
  REQUIRE(::pipe2(hold, O_CLOEXEC) == 0);
  int shown[2];
  REQUIRE(::pipe2(shown, O_CLOEXEC) == 0);
  const Token theirs = token(liar);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  world.path.copy(address.sun_path, sizeof address.sun_path - 1);
  wire::Show show;
  std::memcpy(show.token, theirs.bytes.data(), sizeof show.token);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(hold[1]);
    const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
    char byte = 0;
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
        ::send(fd, &show, sizeof show, 0) != sizeof show || ::recv(fd, &byte, 1, 0) != 1 ||
        ::write(shown[1], "s", 1) != 1)
      ::_exit(1);
    ::_exit(static_cast<int>(::read(hold[0], &byte, 1)));
  }
  REQUIRE(child > 0);
  ::close(hold[0]);
  ::close(shown[1]);
  char byte = 0;
  REQUIRE(::read(shown[0], &byte, 1) == 1);
  ::close(shown[0]);
  // The honest one, which is another process, gets what it is offered.
  RawClient client(world.path);
  REQUIRE(client.show(token(honest)));
  CHECK(world.gets(client));
  CHECK(world.lender->watches("honest", boot_id(5)));
  CHECK(world.lender->watches("liar", boot_id(5)));
  CHECK(world.lender->watches("liar", std::nullopt));
  CHECK(world.lender->watches("", boot_id(5)));
  CHECK(world.lender->watches("", std::nullopt));
  CHECK_FALSE(world.lender->watches("", boot_id(6)));
  CHECK_FALSE(world.lender->watches("honest", boot_id(6)));
  CHECK_FALSE(world.lender->watches("other", boot_id(5)));
  CHECK_FALSE(world.lender->watches("other", std::nullopt));
  // The liar's end is the liar's alone.
  ::close(hold[1]);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  REQUIRE(world.events.wait<engine::PeerProcessGone>());
  CHECK(world.events.count<engine::PeerProcessGone>([](const auto& event) {
    return event.node == "liar" && event.boot == boot_id(5);
  }) == 1);
  CHECK(soon([&] { return !world.lender->watches("liar", boot_id(5)); }));
  CHECK(world.lender->watches("honest", boot_id(5)));
  CHECK(world.events.count<engine::PeerProcessGone>() == 1);
  // Of the honest one there is its word, and then there is nothing to look for.
  REQUIRE(client.send(wire::Unmapped{}));
  world.lender->on_link_gone(LinkId{1});
  CHECK(world.events.unmapped(LinkId{1}));
  CHECK(soon([&] { return !world.lender->watches("", std::nullopt); }));
}

TEST_CASE("A process is looked at before it gets anything, and until the lender stops") {
  World world;
  CHECK_FALSE(world.lender->watches("", std::nullopt));
  RawClient client(world.path);
  REQUIRE(client.show(world.token(1)));
  wire::Welcome welcome;
  std::vector<UniqueFd> none;
  REQUIRE(client.receive(welcome, none));
  CHECK(world.lender->watches("peer-1", boot_id(1)));
  world.lender->stop();
  CHECK_FALSE(world.lender->watches("peer-1", boot_id(1)));
}

TEST_CASE("A lender that has gone leaves no descriptor open") {
  const std::size_t before = open_descriptors();
  {
    World world;
    RawClient client(world.path);
    REQUIRE(client.show(world.token(1)));
    REQUIRE(world.gets(client));
    RawClient silent(world.path);
    world.fence();
    world.lender->stop();
    CHECK(client.closed());
    CHECK(silent.closed());
    CHECK_FALSE(std::filesystem::exists(world.path));
    world.lender->stop();
    world.lender->on_link_gone(LinkId{1});
  }
  CHECK(open_descriptors() == before);
}

}  // namespace kvferry::node
