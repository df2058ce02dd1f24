// Messages of the lifeline: the Unix SOCK_SEQPACKET socket over which a worker attaches to its
// daemon and hands over memory descriptors. Shared by the daemon and the clients; depends on
// nothing but the standard library. Every message is one fixed-size struct in the host's byte order
// (both ends are on one machine); texts are zero-terminated and zero-padded.
//
//   worker                              daemon
//   AttachRequest               --->
//                               <---    AttachReply + {daemon's pidfd, doorbell, status, words}
//   PoolMessage + descriptors   --->    (any number of times)
//                               <---    PoolReply
//
// Whoever closes the socket ends the attachment. An unknown or malformed message ends it too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace kvferry::lifeline {

inline constexpr uint32_t kMagic = 0x4C46564B;  // "KVFL"
inline constexpr uint32_t kProtocolMin = 1;     // versions that this tree speaks
inline constexpr uint32_t kProtocolMax = 1;
inline constexpr std::size_t kNameBytes = 64;       // 63 characters and the zero
inline constexpr std::size_t kMaxDescriptors = 16;  // of one message

enum class MessageType : uint32_t { kAttach = 1, kAttachReply = 2, kPools = 3, kPoolsReply = 4 };

enum class Role : uint32_t {
  kRank = 1,        // has pools and layouts
  kController = 2,  // a scheduler or router: no pools
};

// Kinds of pools that come as descriptors; the numbers are PoolKind's in worker.proto.
enum class PoolKind : uint32_t { kHostShm = 1, kCudaVmmFd = 2 };

struct Header {
  uint32_t magic = kMagic;
  MessageType type = MessageType::kAttach;
};

struct AttachRequest {
  Header header{kMagic, MessageType::kAttach};
  uint32_t protocol_min = kProtocolMin;
  uint32_t protocol_max = kProtocolMax;
  Role role = Role::kRank;
  uint32_t reserved = 0;
  char name[kNameBytes] = {};
};

// The order of the descriptors of an AttachReply; a refusal has none.
inline constexpr std::size_t kFdDaemonPid = 0;  // pidfd of the daemon
inline constexpr std::size_t kFdDoorbell = 1;   // SOCK_SEQPACKET; one byte means "look at the page"
inline constexpr std::size_t kFdStatus = 2;     // control_page.h; read-only for the worker
inline constexpr std::size_t kFdWords = 3;      // control_page.h
inline constexpr std::size_t kAttachFds = 4;

struct AttachReply {
  Header header{kMagic, MessageType::kAttachReply};
  uint32_t code = 0;      // canonical gRPC code; 0: attached, what follows the message is valid
  uint32_t protocol = 0;  // the one in force
  char reason[kNameBytes] = {};
  char message[192] = {};
  uint8_t token[16] = {};
  uint8_t boot_id[16] = {};
  uint64_t worker_id = 0;
  uint64_t status_bytes = 0;
  uint64_t words_bytes = 0;
  uint64_t max_pool_bytes = 0;
  uint32_t max_descriptors = 0;
  uint32_t max_transfers = 0;
  char grpc_path[128] = {};  // Unix socket of the gRPC service
};

// A pool is one descriptor; one of kind kCudaVmmFd may be several, in the order in which they lie
// in its address range. `part` counts them from 0: part 0 replaces all that waits under the name,
// part n follows part n - 1, in the same message or a later one.
inline constexpr uint32_t kMaxPoolParts = 4096;

struct PoolEntry {
  char name[kNameBytes] = {};
  PoolKind kind = PoolKind::kHostShm;
  uint32_t part = 0;
  uint64_t bytes = 0;  // of this part
};

// `count` descriptors travel with it, in the order of the entries.
struct PoolsMessage {
  Header header{kMagic, MessageType::kPools};
  uint32_t count = 0;  // 1 ... kMaxDescriptors
  uint32_t reserved = 0;
  PoolEntry pools[kMaxDescriptors] = {};
};

// Answers PoolsMessages in order. After code 0 the descriptors wait to be claimed by RegisterPools.
struct PoolsReply {
  Header header{kMagic, MessageType::kPoolsReply};
  uint32_t code = 0;
  uint32_t index = 0;  // the entry at fault
  char reason[kNameBytes] = {};
  char message[192] = {};
};

static_assert(std::is_trivially_copyable_v<AttachRequest> && sizeof(AttachRequest) == 88);
static_assert(std::is_trivially_copyable_v<AttachReply> && sizeof(AttachReply) == 472);
static_assert(std::is_trivially_copyable_v<PoolsMessage> && sizeof(PoolsMessage) == 1296);
static_assert(std::is_trivially_copyable_v<PoolsReply> && sizeof(PoolsReply) == 272);

}  // namespace kvferry::lifeline
