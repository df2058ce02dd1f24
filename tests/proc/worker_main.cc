// kvferry-test-worker: the workers of one instance in a process of their own, to be killed. Takes
// commands from stdin, one a line, and answers each with one line; ends at the end of stdin or with
// its parent.
//
//   kvferry-test-worker send|receive SOCKET INSTANCE TOPOLOGY LAYERS HEADS HEAD_BYTES TOKENS
//       [host|vmm|cuda [DEVICES [zero]]]
//
//   ticket                       TICKET <text>
//   send ID SECRET TOKENS [packed]    OK
//   receive ID SECRET TICKET TOKENS [event]   OK; event: of one rank, ready by a CUDA event
//   wait ID MS                   STATE <monotonic ns> <state>:<reason>:<released reason> ..., one a
//   rank verify TOKENS                VERIFIED, or WRONG <where> clean                        OK
//   tail TOKENS                  CLEARED, or WRONG <where>
//   close ID                     OK
//   reattached MS                REATTACHED once the client has registered anew
// and ERROR <text> to what failed. The first line is READY.
#include <signal.h>
#include <sys/prctl.h>
#include <time.h>

#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>

#include "tests/proc/hand_off_party.h"

namespace kvferry::testing {
namespace {

using std::chrono::milliseconds;

uint64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

std::string said(const Status& status) {
  return status ? "OK" : "ERROR " + status.error().to_string();
}

std::string read_key(std::istringstream& words, TransferKey& key) {
  std::string secret;
  words >> key.id >> secret;
  const auto bytes = client::bytes16_from_text(secret);
  if (!bytes) return "ERROR no secret";
  key.secret = *bytes;
  return {};
}

std::string wait_for_end(Party& party, std::istringstream& words) {
  std::string id;
  int64_t ms = 0;
  words >> id >> ms;
  auto ended = party.wait(id, milliseconds(ms));
  if (!ended) return "ERROR " + ended.error().to_string();
  std::string line = "STATE " + std::to_string(monotonic_ns());
  for (const TransferStatus& status : *ended) {
    line += " " + std::string(name_of(status.state)) + ":" + std::string(status.reason) + ":" +
            std::string(status.released_reason);
  }
  return line;
}

std::string wait_for_reattach(Party& party, std::istringstream& words) {
  int64_t ms = 0;
  words >> ms;
  const auto until = std::chrono::steady_clock::now() + milliseconds(ms);
  for (uint32_t rank = 0; rank < party.ranks(); ++rank) {
    bool reattached = false;
    while (!reattached) {
      client::Event event;
      if (party.rank(rank).wait_any({&event, 1}, until) == 0) return "ERROR not reattached in time";
      if (event.kind != client::EventKind::kReattached) continue;
      if (event.error) return "ERROR " + event.error->to_string();
      reattached = true;
    }
  }
  return "REATTACHED";
}

std::string answer(Party& party, const std::string& line) {
  std::istringstream words(line);
  std::string command;
  words >> command;
  if (command == "ticket") {
    auto ticket = party.ticket();
    return ticket ? "TICKET " + *ticket : "ERROR " + ticket.error().to_string();
  }
  if (command == "send" || command == "receive") {
    TransferKey key;
    if (std::string bad = read_key(words, key); !bad.empty()) return bad;
    if (command == "send") {
      Party::Send what;
      std::string how;
      words >> what.num_tokens >> how;
      what.packed_copy = how == "packed";
      return said(party.send(key, what));
    }
    std::string ticket;
    Party::Receive what;
    std::string ready;
    words >> ticket >> what.num_tokens >> ready;
    if (ready == "event") {
      auto condition = party.ready_by_event(0);
      if (!condition) return "ERROR " + condition.error().to_string();
      what.ready = *condition;
    }
    return said(party.receive(key, ticket, what));
  }
  if (command == "wait") return wait_for_end(party, words);
  if (command == "verify") {
    uint64_t tokens = 0;
    words >> tokens;
    const std::string wrong = party.verify(tokens);
    return wrong.empty() ? "VERIFIED" : "WRONG " + wrong;
  }
  if (command == "tail") {
    uint64_t tokens = 0;
    words >> tokens;
    const std::string wrong = party.verify_tail(tokens);
    return wrong.empty() ? "CLEARED" : "WRONG " + wrong;
  }
  if (command == "clean") {
    party.clean();
    return "OK";
  }
  if (command == "close") {
    std::string id;
    words >> id;
    return said(party.close(id));
  }
  if (command == "reattached") return wait_for_reattach(party, words);
  return "ERROR unknown command " + command;
}

int run(int argc, char** argv) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  Party::Options options;
  options.sends = std::string(argv[1]) == "send";
  options.socket = argv[2];
  options.instance = argv[3];
  const auto topology = bench::parse_topology(argv[4]);
  if (!topology) return 64;
  options.topology = *topology;
  options.shape.name = "test";
  options.shape.layers = static_cast<uint32_t>(std::stoul(argv[5]));
  options.shape.kv_heads = static_cast<uint32_t>(std::stoul(argv[6]));
  options.shape.head_bytes = static_cast<uint32_t>(std::stoul(argv[7]));
  options.shape.tokens = std::stoull(argv[8]);
  options.seed = options.sends ? 1 : 2;
  options.reconnect = true;
  const std::string memory = argc > 9 ? argv[9] : "host";
  options.memory = memory == "vmm"    ? bench::MemoryKind::kVmm
                   : memory == "cuda" ? bench::MemoryKind::kCuda
                                      : bench::MemoryKind::kHost;
  options.zero_tail = argc > 11 && std::string(argv[11]) == "zero";
  if (argc > 10) options.devices = std::stoi(argv[10]);
  auto party = Party::make(options);
  if (!party) {
    std::cout << "ERROR " << party.error().to_string() << std::endl;
    return 1;
  }
  std::cout << "READY" << std::endl;
  for (std::string line; std::getline(std::cin, line);)
    std::cout << answer(**party, line) << std::endl;
  return 0;
}

}  // namespace
}  // namespace kvferry::testing

int main(int argc, char** argv) {
  if (argc < 9 || argc > 12) {
    std::fprintf(stderr, "see worker_main.cc for how this is called\n");
    return 64;
  }
  return kvferry::testing::run(argc, argv);
}
