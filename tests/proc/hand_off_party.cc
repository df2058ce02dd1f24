#include "tests/proc/hand_off_party.h"

#include <unistd.h>

#include <algorithm>

namespace kvferry::testing {
namespace {

constexpr uint64_t kPattern = 77;

}  // namespace

TransferKey new_key(const std::string& instance) {
  TransferKey key;
  key.instance = instance;
  key.id = client::to_text(client::random_bytes16());
  key.secret = client::random_bytes16();
  return key;
}

Result<std::unique_ptr<Party>> Party::make(Options options) {
  std::unique_ptr<Party> party(new Party(std::move(options)));
  for (uint32_t rank = 0; rank < party->options_.topology.ranks(); ++rank)
    if (Status attached = party->attach(rank); !attached) return attached.error();
  return party;
}

Status Party::attach(uint32_t rank) {
  bench::Shape shape = options_.shape;
  shape.tokens *= options_.requests;
  auto memory =
      bench::rank_memory(shape, options_.topology, rank, 1.25, options_.seed * 1000 + rank);
  if (!memory) return memory.error();
  client::AttachOptions attach;
  attach.socket = options_.sockets.empty() ? options_.socket : options_.sockets.at(rank);
  attach.name = options_.instance + "-" + std::to_string(rank) + "-" + std::to_string(::getpid());
  attach.reconnect = options_.reconnect;
  auto client = client::Client::attach(attach);
  if (!client) return client.error();
  Rank fresh{{}, {}, std::move(*client), std::move(*memory), {}};
  if (Status made = make_pool(fresh, rank); !made) return made;
  bench::fill_untouched(fresh.memory.pool_bytes, fresh.pool.data);
  if (options_.sends) bench::fill_cells(fresh.memory, shape.tokens, kPattern, fresh.pool.data);
  if (fresh.device != nullptr)
    if (Status there = fresh.device->upload(fresh.pool.data); !there) return there;
  client::LayoutRegistration registration;
  registration.instance = options_.instance;
  registration.incarnation = options_.incarnation;
  registration.instance_key = options_.instance_key;
  if (options_.zero_tail)
    for (client::Group& group : fresh.memory.layout.groups) group.tail = client::Tail::kZero;
  registration.layout = fresh.memory.layout;
  auto layout = fresh.client->register_layout(registration);
  if (!layout) return layout.error();
  cards_.push_back(layout->card);
  ranks_.push_back(std::move(fresh));
  return {};
}

Status Party::make_pool(Rank& rank, uint32_t number) {
  const uint64_t bytes = rank.memory.pool_bytes;
  if (options_.memory == bench::MemoryKind::kHost) {
    auto pool = rank.client->alloc_pool("kv", bytes);
    if (!pool) return pool.error();
    rank.pool = *pool;
    return {};
  }
  auto device = bench::DeviceMemory::make(*rank.client, "kv", options_.memory, bytes,
                                          static_cast<int>(number) % options_.devices);
  if (!device) return device.error();
  rank.device = std::move(*device);
  rank.mirror.resize(bytes);
  rank.pool.data = rank.mirror.data();
  rank.pool.bytes = bytes;
  return {};
}

const std::byte* Party::bytes_of(const Rank& rank) {
  if (rank.device != nullptr) {
    // What could not be read is wrong at the first look.
    if (!rank.device->download(rank.pool.data))
      std::fill_n(rank.pool.data, rank.pool.bytes, std::byte{0x5a});
  }
  return rank.pool.data;
}

Result<client::ReadyCondition> Party::ready_by_event(uint32_t rank) {
  auto handle = ranks_[rank].device->record_event(*ranks_[rank].client);
  if (!handle) return handle.error();
  return client::ReadyCondition::cuda_event(*handle);
}

std::vector<int32_t> Party::blocks(uint32_t rank, uint32_t request,
                                   client::TokenRange tokens) const {
  const uint64_t per_block = options_.shape.tokens_per_block;
  const uint64_t first = request * ((options_.shape.tokens + per_block - 1) / per_block);
  const std::vector<int32_t>& ids = ranks_[rank].memory.block_ids;
  const auto at = [&](uint64_t block) {
    return ids.begin() + static_cast<std::ptrdiff_t>(first + block);
  };
  return {at(tokens.begin / per_block), at((tokens.end + per_block - 1) / per_block)};
}

Status Party::send(TransferKey key, const Send& what) {
  if (key.instance.empty()) key.instance = options_.instance;
  const uint64_t num_tokens = what.num_tokens != 0 ? what.num_tokens : options_.shape.tokens;
  const client::TokenRange tokens = what.tokens.value_or(client::TokenRange{0, num_tokens});
  std::vector<client::TransferHandle> handles;
  for (uint32_t rank = 0; rank < ranks(); ++rank) {
    const std::vector<int32_t> ids = blocks(rank, what.request, tokens);
    const client::GroupBlocks group{0, tokens.begin / options_.shape.tokens_per_block, ids, {}, 0};
    client::SendRequest request;
    request.key = key;
    request.layout = {options_.instance, rank};
    request.index = what.index;
    request.num_tokens = num_tokens;
    request.tokens = tokens;
    request.groups = {&group, 1};
    request.layers = what.layers;
    request.last = what.last;
    if (what.aux) request.aux = *what.aux;
    request.lease = what.lease;
    request.deadline = what.deadline;
    request.done = what.done;
    request.packed_copy = what.packed_copy;
    request.max_receivers = what.max_receivers;
    auto transfer = ranks_[rank].client->send(request);
    if (!transfer) return transfer.error();
    handles.push_back(*transfer);
  }
  transfers_[key.id] = std::move(handles);
  return {};
}

Status Party::receive(TransferKey key, const std::string& ticket, const Receive& what) {
  const uint64_t num_tokens = what.num_tokens != 0 ? what.num_tokens : options_.shape.tokens;
  std::vector<client::TransferHandle> handles;
  for (uint32_t rank = 0; rank < ranks(); ++rank) {
    const std::vector<int32_t> ids = blocks(rank, what.request, {0, num_tokens});
    const client::GroupBlocks group{0, 0, ids, {}, 0};
    client::ReceiveRequest request;
    request.key = key;
    request.layout = {options_.instance, rank};
    request.ticket = ticket;
    request.num_tokens = num_tokens;
    request.groups = {&group, 1};
    request.ready = what.ready;
    request.wait = what.wait;
    request.deadline = what.deadline;
    request.done = what.done;
    auto transfer = ranks_[rank].client->receive(request);
    if (!transfer) return transfer.error();
    handles.push_back(*transfer);
  }
  transfers_[key.id] = std::move(handles);
  return {};
}

Result<std::vector<TransferStatus>> Party::wait(const std::string& id,
                                                std::chrono::milliseconds limit) {
  const auto until = std::chrono::steady_clock::now() + limit;
  std::vector<TransferStatus> out;
  for (uint32_t rank = 0; rank < ranks(); ++rank) {
    auto status = ranks_[rank].client->wait(handle(id, rank), until);
    if (!status) return status.error();
    out.push_back(*status);
  }
  return out;
}

Status Party::close(const std::string& id) {
  for (uint32_t rank = 0; rank < ranks(); ++rank)
    if (Status closed = ranks_[rank].client->close(handle(id, rank)); !closed)
      return closed.error();
  transfers_.erase(id);
  return {};
}

std::string Party::verify(uint64_t tokens) const {
  if (tokens == 0) tokens = options_.shape.tokens * options_.requests;
  for (const Rank& rank : ranks_) {
    const bench::Verdict verdict = bench::verify(rank.memory, tokens, kPattern, bytes_of(rank));
    if (!verdict.ok()) {
      return "rank " + std::to_string(rank.memory.layout.rank) + ": " +
             std::to_string(verdict.wrong_bytes) + " wrong bytes of " +
             std::to_string(verdict.cell_bytes) + ", first at " + verdict.first;
    }
  }
  return {};
}

std::string Party::verify_untouched() const {
  for (const Rank& rank : ranks_) {
    std::vector<std::byte> wanted(rank.memory.pool_bytes);
    bench::fill_untouched(wanted.size(), wanted.data());
    const std::byte* const pool = bytes_of(rank);
    const auto differ = std::mismatch(wanted.begin(), wanted.end(), pool);
    if (differ.first != wanted.end())
      return "rank " + std::to_string(rank.memory.layout.rank) + " has got something at byte " +
             std::to_string(differ.first - wanted.begin());
  }
  return {};
}

std::string Party::verify_tail(uint64_t tokens) const {
  const uint64_t per_block = options_.shape.tokens_per_block;
  if (tokens % per_block == 0) return {};
  for (const Rank& rank : ranks_) {
    const std::byte* const pool = bytes_of(rank);
    const auto block = static_cast<uint64_t>(rank.memory.block_ids[tokens / per_block]);
    for (const client::Plane& plane : rank.memory.layout.groups[0].planes) {
      for (uint64_t unit = 0; unit < plane.unit_count; ++unit) {
        for (uint64_t token = tokens % per_block; token < per_block; ++token) {
          const uint64_t at = plane.offset + block * plane.block_stride + unit * plane.unit_stride +
                              token * plane.token_stride;
          for (uint64_t i = 0; i < plane.cell_bytes; ++i) {
            if (pool[at + i] == std::byte{0}) continue;
            return "rank " + std::to_string(rank.memory.layout.rank) + ", layer " +
                   std::to_string(plane.layer) + ", " + plane.role + ": token " +
                   std::to_string(token) + " of the last block is not cleared";
          }
        }
      }
    }
  }
  return {};
}

void Party::clean() {
  for (Rank& rank : ranks_) {
    bench::fill_untouched(rank.memory.pool_bytes, rank.pool.data);
    if (rank.device != nullptr) (void)rank.device->upload(rank.pool.data);
  }
}

}  // namespace kvferry::testing
