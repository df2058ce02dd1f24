// One KV hand-off through the daemon of this machine: a prefill worker sends the blocks of a
// prompt, a decode worker receives them at other block ids, and every byte is compared. In a real
// engine the two are processes on different nodes; nothing else changes but the ticket's journey.
//
//   kvferry-handoff-example /run/kvferry/kvferry.sock
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kvferry/client.h"

namespace kc = kvferry::client;

namespace {

constexpr uint32_t kLayers = 4;
constexpr uint32_t kHeads = 8;
constexpr uint64_t kTokensPerBlock = 16;
constexpr uint64_t kBlocks = 64;
constexpr uint64_t kHeadBytes = 256;  // 128 dimensions of two bytes

// The value of a result, or the end of the program.
template <typename T>
T must(kc::Result<T> result, const char* what) {
  if (result) return std::move(*result);
  std::fprintf(stderr, "%s: %s\n", what, result.error().to_string().c_str());
  std::exit(1);
}

struct Worker {
  std::unique_ptr<kc::Client> client;
  kc::PoolMemory pool;
  kc::LayoutRef layout;
  uint64_t block_bytes = 0;
};

// Attaches, allocates a pool and says what lies in it: one [blocks, layers, 2, heads, tokens, dim]
// tensor.
Worker start_worker(const std::string& socket, const std::string& instance) {
  Worker worker;
  kc::AttachOptions options;
  options.socket = socket;
  options.name = instance + "-rank0";
  worker.client = must(kc::Client::attach(options), "attach");
  kc::AttentionShape shape;
  for (uint32_t layer = 0; layer < kLayers; ++layer) shape.layers.push_back(layer);
  shape.heads_total = shape.head_count = kHeads;
  shape.tokens_per_block = kTokensPerBlock;
  shape.block_count = kBlocks;
  shape.head_bytes = kHeadBytes;
  shape.packing = kc::KvPacking::kSeparate;
  worker.block_bytes = kc::block_bytes(shape) * kLayers;
  worker.pool = must(worker.client->alloc_pool("kv", worker.block_bytes * kBlocks), "alloc_pool");
  kc::LayoutRegistration registration;
  registration.instance = instance;
  registration.layout.fingerprint = "example-model";
  registration.layout.pools = {{"kv", worker.pool.bytes}};
  registration.layout.groups = {must(kc::cross_layer_group(shape, 0), "layout")};
  must(worker.client->register_layout(registration), "register_layout");
  worker.layout = {instance, 0};
  return worker;
}

kc::TransferStatus finish(Worker& worker, kc::TransferHandle transfer, const char* what) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  const kc::TransferStatus status = must(worker.client->wait(transfer, deadline), what);
  std::printf("%s: %s (%s)\n", what, std::string(kc::name_of(status.state)).c_str(),
              std::string(status.reason).c_str());
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s PREFILL_SOCKET DECODE_SOCKET\n", argv[0]);
    return 64;
  }
  Worker prefill = start_worker(argv[1], "example-prefill");
  Worker decode = start_worker(argv[2], "example-decode");

  // What a scheduler or router makes up, and what it carries from one side to the other.
  kc::TransferKey key;
  key.instance = prefill.layout.instance;
  key.id = "request-1";
  key.secret = kc::random_bytes16();
  const std::string ticket = must(prefill.client->ticket(prefill.layout.instance), "ticket");

  constexpr uint64_t kPromptTokens = 100;  // the seventh block is covered in part
  const std::vector<int32_t> source_ids = {3, 60, 17, 8, 41, 22, 5};
  const std::vector<int32_t> destination_ids = {50, 2, 33, 9, 14, 61, 0};
  for (uint64_t i = 0; i < prefill.pool.bytes; ++i)
    prefill.pool.data[i] = static_cast<std::byte>((i * 2654435761U) >> 13);

  kc::GroupBlocks wanted;
  wanted.ids = destination_ids;
  kc::ReceiveRequest receive;
  receive.key = key;
  receive.layout = decode.layout;
  receive.ticket = ticket;
  receive.num_tokens = kPromptTokens;
  receive.groups = {&wanted, 1};
  const kc::TransferHandle receiving = must(decode.client->receive(receive), "receive");

  kc::GroupBlocks offered;
  offered.ids = source_ids;
  kc::SendRequest send;
  send.key = key;
  send.layout = prefill.layout;
  send.num_tokens = kPromptTokens;
  send.tokens = {0, kPromptTokens};
  send.groups = {&offered, 1};
  send.aux = "first token: 42";
  const kc::TransferHandle sending = must(prefill.client->send(send), "send");

  if (finish(decode, receiving, "receive").state != kc::TransferState::kCompleted) return 1;
  if (finish(prefill, sending, "send").state != kc::TransferState::kDelivered) return 1;
  std::printf("aux: %s\n", must(decode.client->aux(receiving), "aux").c_str());
  for (std::size_t i = 0; i < source_ids.size(); ++i) {
    const auto* from =
        prefill.pool.data + static_cast<uint64_t>(source_ids[i]) * prefill.block_bytes;
    const auto* to =
        decode.pool.data + static_cast<uint64_t>(destination_ids[i]) * decode.block_bytes;
    if (std::memcmp(from, to, prefill.block_bytes) != 0) {
      std::fprintf(stderr, "block %zu differs\n", i);
      return 1;
    }
  }
  if (auto closed = decode.client->close(receiving); !closed) return 1;
  if (auto closed = prefill.client->close(sending); !closed) return 1;
  std::printf("every byte arrived\n");
  return 0;
}
