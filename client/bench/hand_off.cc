#include "client/bench/hand_off.h"

#include <unistd.h>

#include <chrono>

namespace kvferry::bench {
namespace {

using client::Code;
using client::Error;
using Clock = std::chrono::steady_clock;

constexpr char kSenderInstance[] = "bench-prefill";
constexpr char kReceiverInstance[] = "bench-decode";
constexpr std::chrono::seconds kRoundLimit(120);

}  // namespace

Result<std::unique_ptr<HandOff>> HandOff::make(Options options) {
  std::unique_ptr<HandOff> run(new HandOff(std::move(options)));
  if (Status attached = run->attach(true); !attached) return attached.error();
  if (Status attached = run->attach(false); !attached) return attached.error();
  auto ticket = run->senders_.front().client->ticket(kSenderInstance);
  if (!ticket) return ticket.error();
  run->ticket_ = *ticket;
  return run;
}

Status HandOff::attach(bool sender) {
  const Topology& topology = sender ? options_.sender : options_.receiver;
  std::vector<Rank>& ranks = sender ? senders_ : receivers_;
  for (uint32_t rank = 0; rank < topology.ranks(); ++rank) {
    if (options_.progress)
      options_.progress(std::string(sender ? "filling sender rank " : "preparing receiver rank ") +
                        std::to_string(rank));
    const uint64_t seed = options_.seed * 1000 + rank * 2 + (sender ? 0 : 1);
    auto memory = rank_memory(options_.shape, topology, rank, options_.spare, seed);
    if (!memory) return memory.error();
    client::AttachOptions attach;
    attach.socket = sender ? options_.sender_socket : options_.receiver_socket;
    // Several benches may use the same daemons.
    attach.name = std::string(sender ? "bench-s" : "bench-r") + std::to_string(rank) + "-" +
                  std::to_string(::getpid());
    attach.reconnect = false;
    auto client = client::Client::attach(attach);
    if (!client) return client.error();
    auto pool = RankPool::make(**client, options_.memory, memory->pool_bytes,
                               sender ? options_.sender_device : options_.receiver_device);
    if (!pool) return pool.error();
    fill_untouched(memory->pool_bytes, pool->data());
    if (sender) fill_cells(*memory, options_.shape.tokens, options_.seed, pool->data());
    if (Status written = pool->put(); !written) return written;
    client::LayoutRegistration registration;
    registration.instance = sender ? kSenderInstance : kReceiverInstance;
    registration.layout = memory->layout;
    auto layout = (*client)->register_layout(registration);
    if (!layout) return layout.error();
    if (!sender) {
      for (const client::Plane& plane : memory->layout.groups[0].planes)
        payload_bytes_ += plane.cell_bytes * plane.unit_count * options_.shape.tokens;
    }
    ranks.push_back({std::move(*pool), std::move(*client), std::move(*memory), 0});
  }
  return {};
}

Status HandOff::start_round(const client::TransferKey& key) {
  for (Rank& rank : senders_) {
    const client::GroupBlocks blocks{0, 0, rank.memory.block_ids, {}, 0};
    client::SendRequest request;
    request.key = key;
    request.layout = {kSenderInstance, rank.memory.layout.rank};
    request.num_tokens = options_.shape.tokens;
    request.tokens = {0, options_.shape.tokens};
    request.groups = {&blocks, 1};
    auto transfer = rank.client->send(request);
    if (!transfer) return transfer.error();
    rank.transfer = *transfer;
  }
  for (Rank& rank : receivers_) {
    const client::GroupBlocks blocks{0, 0, rank.memory.block_ids, {}, 0};
    client::ReceiveRequest request;
    request.key = key;
    request.layout = {kReceiverInstance, rank.memory.layout.rank};
    request.ticket = ticket_;
    request.num_tokens = options_.shape.tokens;
    request.groups = {&blocks, 1};
    auto transfer = rank.client->receive(request);
    if (!transfer) return transfer.error();
    rank.transfer = *transfer;
  }
  return {};
}

Status HandOff::finish(std::vector<Rank>& ranks, client::TransferState wanted) {
  const Clock::time_point limit = Clock::now() + kRoundLimit;
  for (Rank& rank : ranks) {
    auto status = rank.client->wait(rank.transfer, limit);
    if (!status) return status.error();
    if (status->state != wanted) {
      return Error{Code::kAborted,
                   std::string(status->reason),
                   "rank " + std::to_string(rank.memory.layout.rank) + " ended " +
                       std::string(name_of(status->state)),
                   {}};
    }
  }
  return {};
}

std::string HandOff::devices() const {
  const std::string from = senders_.front().pool.description();
  if (from.empty() || options_.sender_device == options_.receiver_device) return from;
  return from + "; " + receivers_.front().pool.description();
}

Result<RoundResult> HandOff::round() {
  for (Rank& rank : receivers_) {
    fill_untouched(rank.memory.pool_bytes, rank.pool.data());
    if (Status written = rank.pool.put(); !written) return written.error();
  }
  client::TransferKey key;
  key.instance = kSenderInstance;
  key.id = client::to_text(client::random_bytes16());
  key.secret = client::random_bytes16();

  RoundResult result;
  const Clock::time_point begin = Clock::now();
  if (Status started = start_round(key); !started) return started.error();
  if (Status received = finish(receivers_, client::TransferState::kCompleted); !received)
    return received.error();
  result.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  if (Status sent = finish(senders_, client::TransferState::kDelivered); !sent) return sent.error();

  for (std::vector<Rank>* side : {&senders_, &receivers_})
    for (Rank& rank : *side)
      if (Status closed = rank.client->close(rank.transfer); !closed) return closed.error();
  for (Rank& rank : receivers_) {
    if (options_.progress)
      options_.progress("verifying receiver rank " + std::to_string(rank.memory.layout.rank));
    if (Status read = rank.pool.get(); !read) return read.error();
    const Verdict verdict =
        verify(rank.memory, options_.shape.tokens, options_.seed, rank.pool.data());
    if (!verdict.ok()) {
      return Error{Code::kDataLoss,
                   "BENCH_WRONG_BYTES",
                   std::to_string(verdict.wrong_bytes) + " wrong bytes at receiver rank " +
                       std::to_string(rank.memory.layout.rank) + ", first at " + verdict.first,
                   {}};
    }
    result.cell_bytes += verdict.cell_bytes;
    result.outside_bytes += verdict.outside_bytes;
  }
  return result;
}

}  // namespace kvferry::bench
