// What two daemons of one host say to each other over the lender's socket (type SEQPACKET): one
// struct a message, in the machine's own byte order.
//
//   borrower                       lender
//   Show{token}             →
//                           ←      Welcome{arenas, proof}
//                           ←      Descriptors{arena, count}, as many as said; the segments'
//                                  descriptors come with it, in the order of the offer
//   ... and when all that was mapped for the link is unmapped:
//   Unmapped                →
//
// Anything else, and anything of another size, ends the connection.
#pragma once

#include <cstdint>

namespace kvferry::node::wire {

inline constexpr uint32_t kMagic = 0x414C564B;  // "KVLA"

enum class Type : uint32_t { kShow = 1, kWelcome = 2, kDescriptors = 3, kUnmapped = 4 };

struct Show {
  uint32_t magic = kMagic;
  Type type = Type::kShow;
  uint8_t token[16] = {};
};
struct Welcome {
  uint32_t magic = kMagic;
  Type type = Type::kWelcome;
  uint32_t arenas = 0;  // Descriptors that follow
  uint32_t reserved = 0;
  uint8_t proof[16] = {};  // rpc::WelcomeProof of the token's link
};
struct Descriptors {
  uint32_t magic = kMagic;
  Type type = Type::kDescriptors;
  uint32_t arena = 0;
  uint32_t count = 0;
};
struct Unmapped {
  uint32_t magic = kMagic;
  Type type = Type::kUnmapped;
};

// Longer than any of them, so that a longer message is seen as such.
inline constexpr std::size_t kReadBytes = 64;

}  // namespace kvferry::node::wire
