#include "client/bench/hand_off.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <ctime>
#include <numeric>
#include <thread>
#include <unordered_map>

#include "client/bench/stop.h"

namespace kvferry::bench {
namespace {

using client::Code;
using client::Error;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kRoundLimit(120);

// Several benches may use the same daemons, and one bench several hand-offs.
std::string unique_suffix() {
  static std::atomic<uint32_t> count{0};
  return std::to_string(::getpid()) + "-" + std::to_string(count.fetch_add(1));
}

double own_cpu_seconds() {
  timespec used{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
  return static_cast<double>(used.tv_sec) + static_cast<double>(used.tv_nsec) * 1e-9;
}

uint64_t blocks_of(uint64_t tokens, uint64_t per_block) {
  return (tokens + per_block - 1) / per_block;
}

Error ended_badly(const RankMemory& memory, client::TransferState state, std::string_view reason) {
  return Error{
      Code::kAborted,
      std::string(reason),
      "rank " + std::to_string(memory.layout.rank) + " ended " + std::string(name_of(state)),
      {},
      {}};
}

// What a rank gives as block lists: the same ids for all groups, holes where a window has passed.
class BlockLists {
 public:
  BlockLists(const client::Layout& layout, const RequestCells& cells, bool with_holes) {
    const uint64_t per_block = layout.groups[0].tokens_per_block;
    const uint64_t count = blocks_of(cells.tokens, per_block);
    for (uint32_t g = 0; g < layout.groups.size(); ++g) {
      lists_.emplace_back(cells.block_ids.begin(),
                          cells.block_ids.begin() + static_cast<std::ptrdiff_t>(count));
      const uint64_t needed = needed_tokens(layout.groups[g], cells.tokens).begin / per_block;
      if (with_holes)
        std::fill_n(lists_.back().begin(), static_cast<std::ptrdiff_t>(needed), client::kHole);
    }
    for (uint32_t g = 0; g < lists_.size(); ++g) groups_.push_back({g, 0, lists_[g], {}, 0});
  }
  std::span<const client::GroupBlocks> groups() const { return groups_; }

 private:
  std::vector<std::vector<int32_t>> lists_;
  std::vector<client::GroupBlocks> groups_;
};

}  // namespace

// ---- before the rounds -------------------------------------------------------------------------

Result<std::unique_ptr<HandOff>> HandOff::make(Options options) {
  if (options.requests.empty()) options.requests.push_back({options.shape.tokens, 0, 0});
  std::unique_ptr<HandOff> run(new HandOff(std::move(options)));
  const std::string suffix = unique_suffix();
  run->sender_instance_ = "bench-prefill-" + suffix;
  run->receiver_instance_ = "bench-decode-" + suffix;
  if (Status attached = run->attach(true); !attached) return attached.error();
  if (Status attached = run->attach(false); !attached) return attached.error();
  auto ticket = run->senders_.front().client->ticket(run->sender_instance_);
  if (!ticket) return ticket.error();
  run->ticket_ = *ticket;
  return run;
}

Status HandOff::attach(bool sender) {
  const Topology& topology = sender ? options_.sender : options_.receiver;
  for (uint32_t rank = 0; rank < topology.ranks(); ++rank) {
    if (auto stop = stop_asked()) return *stop;
    if (options_.progress)
      options_.progress(std::string(sender ? "filling sender rank " : "preparing receiver rank ") +
                        std::to_string(rank));
    if (Status attached = attach_rank(sender, rank); !attached) return attached;
  }
  return {};
}

bool HandOff::takes_part(const Rank& rank, bool sender, uint32_t request) const {
  const Request& of = options_.requests[request];
  return rank.memory.layout.dp_group == (sender ? of.sender_group : of.receiver_group);
}

RequestCells HandOff::cells(const Rank& rank, uint32_t request) const {
  const uint64_t tokens = options_.requests[request].tokens;
  const uint64_t count = blocks_of(tokens, options_.shape.tokens_per_block);
  return {std::span(rank.memory.block_ids).subspan(rank.first_block[request], count), tokens,
          options_.seed * 1'000'003 + request};
}

Status HandOff::attach_rank(bool sender, uint32_t number) {
  const Topology& topology = sender ? options_.sender : options_.receiver;
  const uint32_t group = topology.dp_group_of(number);
  // Room for the requests of this rank's group; at least a block, as its layout must have some.
  std::vector<uint64_t> first_block;
  uint64_t blocks = 0;
  for (const Request& request : options_.requests) {
    first_block.push_back(blocks);
    if ((sender ? request.sender_group : request.receiver_group) == group)
      blocks += blocks_of(request.tokens, options_.shape.tokens_per_block);
  }
  Shape shape = options_.shape;
  shape.tokens = std::max<uint64_t>(blocks, 1) * shape.tokens_per_block;
  const uint64_t seed = options_.seed * 1000 + number * 2 + (sender ? 0 : 1);
  auto memory = rank_memory(shape, topology, number, options_.spare, seed);
  if (!memory) return memory.error();
  client::AttachOptions attach;
  attach.socket = sender ? options_.sender_socket : options_.receiver_socket;
  attach.name = (sender ? sender_instance_ : receiver_instance_) + "-" + std::to_string(number);
  attach.reconnect = false;
  auto client = client::Client::attach(attach);
  if (!client) return client.error();
  auto pool = RankPool::make(**client, options_.memory, memory->pool_bytes,
                             sender ? options_.sender_device : options_.receiver_device);
  if (!pool) return pool.error();
  Rank rank{std::move(*pool), std::move(*client), std::move(*memory), std::move(first_block), {}};
  rank.transfer.resize(options_.requests.size());
  fill_untouched(rank.memory.pool_bytes, rank.pool.data());
  for (uint32_t request = 0; sender && request < options_.requests.size(); ++request)
    if (takes_part(rank, true, request))
      fill_request(rank.memory, cells(rank, request), rank.pool.data());
  if (Status written = rank.pool.put(); !written) return written;
  client::LayoutRegistration registration;
  registration.instance = sender ? sender_instance_ : receiver_instance_;
  registration.layout = rank.memory.layout;
  auto layout = rank.client->register_layout(registration);
  if (!layout) return layout.error();
  (sender ? senders_ : receivers_).push_back(std::move(rank));
  return {};
}

// ---- one round ---------------------------------------------------------------------------------

Status HandOff::send(Rank& rank, uint32_t request, const client::TransferKey& key) {
  const BlockLists blocks(rank.memory.layout, cells(rank, request), false);
  const uint64_t tokens = options_.requests[request].tokens;
  client::SendRequest call;
  call.key = key;
  call.layout = {sender_instance_, rank.memory.layout.rank};
  call.num_tokens = tokens;
  call.tokens = {0, tokens};
  call.groups = blocks.groups();
  auto transfer = rank.client->send(call);
  if (!transfer) return transfer.error();
  rank.transfer[request] = *transfer;
  return {};
}

Status HandOff::receive(Rank& rank, uint32_t request, const client::TransferKey& key) {
  const BlockLists blocks(rank.memory.layout, cells(rank, request), true);
  client::ReceiveRequest call;
  call.key = key;
  call.layout = {receiver_instance_, rank.memory.layout.rank};
  call.ticket = ticket_;
  call.num_tokens = options_.requests[request].tokens;
  if (options_.sender.attention_dp) call.sender_dp_group = options_.requests[request].sender_group;
  call.groups = blocks.groups();
  auto transfer = rank.client->receive(call);
  if (!transfer) return transfer.error();
  rank.transfer[request] = *transfer;
  return {};
}

Status HandOff::start(std::span<const uint32_t> requests, bool sender_first,
                      std::vector<Clock::time_point>& begins) {
  std::vector<client::TransferKey> keys(requests.size());
  begins.resize(requests.size());
  const auto receive_all = [&](std::size_t i) -> Status {
    for (Rank& rank : receivers_)
      if (takes_part(rank, false, requests[i]))
        if (Status called = receive(rank, requests[i], keys[i]); !called) return called;
    return {};
  };
  for (std::size_t i = 0; i < requests.size(); ++i) {
    keys[i].instance = sender_instance_;
    keys[i].id = client::to_text(client::random_bytes16());
    keys[i].secret = client::random_bytes16();
    begins[i] = Clock::now();
    for (Rank& rank : senders_)
      if (takes_part(rank, true, requests[i]))
        if (Status called = send(rank, requests[i], keys[i]); !called) return called;
    if (sender_first) continue;
    if (Status called = receive_all(i); !called) return called;
  }
  if (!sender_first) return {};
  if (Status ready = wait_for_senders(requests); !ready) return ready;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    begins[i] = Clock::now();
    if (Status called = receive_all(i); !called) return called;
  }
  return {};
}

// No event tells that a daemon has a Send; the control page does.
Status HandOff::wait_for_senders(std::span<const uint32_t> requests) {
  const Clock::time_point limit = Clock::now() + kRoundLimit;
  for (Rank& rank : senders_) {
    for (const uint32_t request : requests) {
      if (!takes_part(rank, true, request)) continue;
      for (;;) {
        auto status = rank.client->status(rank.transfer[request]);
        if (status && status->state != client::TransferState::kNone) {
          if (!client::is_terminal(status->state)) break;
          return ended_badly(rank.memory, status->state, status->reason);
        }
        if (auto stop = stop_asked()) return *stop;
        if (Clock::now() > limit)
          return Error{Code::kDeadlineExceeded, "BENCH_NO_SEND", "no Send was taken", {}, {}};
        std::this_thread::yield();
      }
    }
  }
  return {};
}

Status HandOff::finish(Rank& rank, uint32_t request, client::TransferState wanted) {
  const Clock::time_point limit = Clock::now() + kRoundLimit;
  for (;;) {
    const Clock::time_point look = std::min(limit, Clock::now() + kStopLook);
    auto status = rank.client->wait(rank.transfer[request], look);
    if (status) {
      if (status->state == wanted) return {};
      return ended_badly(rank.memory, status->state, status->reason);
    }
    if (status.error().reason != "WAIT_TIMEOUT" || Clock::now() >= limit) return status.error();
    if (auto stop = stop_asked()) return *stop;
  }
}

Status HandOff::follow(Rank& rank, std::span<const uint32_t> requests,
                       std::vector<Clock::time_point>& ends) {
  struct Open {
    std::size_t position;
    bool completed = false;
    bool released = false;
  };
  std::unordered_map<client::TransferHandle, Open> open;
  for (std::size_t i = 0; i < requests.size(); ++i)
    if (takes_part(rank, false, requests[i])) open.emplace(rank.transfer[requests[i]], Open{i});
  const Clock::time_point limit = Clock::now() + kRoundLimit;
  std::vector<client::Event> events(64);
  while (!open.empty()) {
    const std::size_t count = rank.client->wait_any(events, Clock::now() + kStopLook);
    const Clock::time_point now = Clock::now();
    if (auto stop = stop_asked()) return *stop;
    if (now > limit)
      return Error{Code::kDeadlineExceeded, "WAIT_TIMEOUT", "transfers have not ended", {}, {}};
    for (std::size_t i = 0; i < count; ++i) {
      const client::Event& event = events[i];
      if (event.kind == client::EventKind::kDaemonRestarted)
        return Error{Code::kUnavailable, "DAEMON_ENDED", "a daemon has ended", {}, {}};
      const auto found = open.find(event.transfer);
      if (found == open.end()) continue;
      if (event.kind == client::EventKind::kRejected && event.error) return *event.error;
      if (client::is_terminal(event.state) && event.state != client::TransferState::kCompleted)
        return ended_badly(rank.memory, event.state, event.reason);
      found->second.completed |= event.kind == client::EventKind::kCompleted;
      found->second.released |= event.kind == client::EventKind::kDestReleased;
      if (!found->second.completed || !found->second.released) continue;
      ends[found->second.position] = now;
      open.erase(found);
    }
  }
  return {};
}

Status HandOff::finish_receivers(std::span<const uint32_t> requests,
                                 std::vector<Clock::time_point>& ends) {
  ends.assign(requests.size(), Clock::time_point{});
  if (requests.size() == 1) {
    for (Rank& rank : receivers_)
      if (takes_part(rank, false, requests[0]))
        if (Status ended = finish(rank, requests[0], client::TransferState::kCompleted); !ended)
          return ended;
    ends[0] = Clock::now();
    return {};
  }
  // Each rank waits for itself, as its process would.
  std::vector<std::vector<Clock::time_point>> by_rank(receivers_.size(), ends);
  std::vector<Status> outcomes(receivers_.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < receivers_.size(); ++r)
    threads.emplace_back([&, r] { outcomes[r] = follow(receivers_[r], requests, by_rank[r]); });
  for (std::thread& thread : threads) thread.join();
  for (std::size_t r = 0; r < receivers_.size(); ++r) {
    if (!outcomes[r]) return outcomes[r];
    for (std::size_t i = 0; i < ends.size(); ++i) ends[i] = std::max(ends[i], by_rank[r][i]);
  }
  return {};
}

Status HandOff::close_all(std::span<const uint32_t> requests) {
  for (const uint32_t request : requests) {
    for (Rank& rank : senders_) {
      if (!takes_part(rank, true, request)) continue;
      if (Status sent = finish(rank, request, client::TransferState::kDelivered); !sent)
        return sent;
      if (Status closed = rank.client->close(rank.transfer[request]); !closed) return closed;
    }
    for (Rank& rank : receivers_)
      if (takes_part(rank, false, request))
        if (Status closed = rank.client->close(rank.transfer[request]); !closed) return closed;
  }
  return {};
}

Result<RoundResult> HandOff::round(const Play& play) {
  if (auto stop = stop_asked()) return *stop;
  if (Status cleared = clear_receivers(); !cleared) return cleared.error();
  std::vector<uint32_t> requests = play.requests;
  if (requests.empty()) {
    requests.resize(options_.requests.size());
    std::iota(requests.begin(), requests.end(), 0U);
  }
  RoundResult result;
  std::vector<Clock::time_point> begins;
  std::vector<Clock::time_point> ends;
  const double cpu = own_cpu_seconds();
  if (Status started = start(requests, play.sender_first, begins); !started) return started.error();
  if (Status received = finish_receivers(requests, ends); !received) return received.error();
  if (Status closed = close_all(requests); !closed) return closed.error();
  result.worker_cpu_seconds = own_cpu_seconds() - cpu;
  const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };
  result.seconds = seconds(*std::max_element(ends.begin(), ends.end()) - begins.front());
  for (std::size_t i = 0; i < requests.size(); ++i)
    result.request_seconds.push_back(seconds(ends[i] - begins[i]));
  if (Status right = verify(play, result); !right) return right.error();
  return result;
}

// ---- bytes -------------------------------------------------------------------------------------

Status HandOff::clear_receivers() {
  for (Rank& rank : receivers_) {
    fill_untouched(rank.memory.pool_bytes, rank.pool.data());
    if (Status written = rank.pool.put(); !written) return written;
  }
  return {};
}

Status HandOff::verify(const Play& play, RoundResult& result) {
  uint32_t spoil = play.spoil;
  for (Rank& rank : receivers_) {
    if (auto stop = stop_asked()) return *stop;
    if (options_.progress && options_.shape.bytes() > (uint64_t{1} << 28))
      options_.progress("verifying receiver rank " + std::to_string(rank.memory.layout.rank));
    if (Status read = rank.pool.get(); !read) return read;
    std::vector<RequestCells> expected;
    for (uint32_t request = 0; request < options_.requests.size(); ++request) {
      const bool played =
          play.requests.empty() ||
          std::find(play.requests.begin(), play.requests.end(), request) != play.requests.end();
      if (played && takes_part(rank, false, request)) expected.push_back(cells(rank, request));
    }
    for (; spoil > 0 && !expected.empty(); --spoil) {
      const client::Plane& plane = rank.memory.layout.groups[0].planes[0];
      const uint64_t last = expected[0].tokens - 1;
      const uint64_t per_block = rank.memory.layout.groups[0].tokens_per_block;
      rank.pool.data()[plane.offset +
                       static_cast<uint64_t>(expected[0].block_ids[last / per_block]) *
                           plane.block_stride +
                       last % per_block * plane.token_stride + (spoil - 1) % plane.cell_bytes] ^=
          std::byte{1};
    }
    const Verdict verdict = verify_requests(rank.memory, expected, rank.pool.data());
    if (!verdict.ok()) {
      return Error{Code::kDataLoss,
                   "BENCH_WRONG_BYTES",
                   std::to_string(verdict.wrong_bytes) + " wrong bytes at receiver rank " +
                       std::to_string(rank.memory.layout.rank) + ", first at " + verdict.first,
                   {},
                   {}};
    }
    result.cell_bytes += verdict.cell_bytes;
    result.outside_bytes += verdict.outside_bytes;
  }
  return {};
}

uint64_t HandOff::payload_bytes(uint32_t request) const {
  uint64_t bytes = 0;
  for (const Rank& rank : receivers_)
    if (takes_part(rank, false, request))
      bytes += request_bytes(rank.memory.layout, options_.requests[request].tokens);
  return bytes;
}

uint64_t HandOff::payload_bytes() const {
  uint64_t bytes = 0;
  for (uint32_t request = 0; request < options_.requests.size(); ++request)
    bytes += payload_bytes(request);
  return bytes;
}

std::string HandOff::devices() const {
  const std::string from = senders_.front().pool.description();
  if (from.empty() || options_.sender_device == options_.receiver_device) return from;
  return from + "; " + receivers_.front().pool.description();
}

HandOff::View HandOff::sender(uint32_t rank) {
  return {senders_[rank].pool.data(), &senders_[rank].memory};
}

HandOff::View HandOff::receiver(uint32_t rank) {
  return {receivers_[rank].pool.data(), &receivers_[rank].memory};
}

}  // namespace kvferry::bench
