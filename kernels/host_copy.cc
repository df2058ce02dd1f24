#include "kernels/host_copy.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "kernels/walk.h"

namespace kvferry::kernels {
namespace {

bool range_fits(const CopyPlan& plan, std::size_t pools, uint64_t stream_offset, uint64_t bytes) {
  return pools >= plan.pool_count && stream_offset <= plan.bytes &&
         bytes <= plan.bytes - stream_offset;
}

// Pages that are written are not read again by this daemon: stores past the caches spare the read
// of the old bytes (README.md, figures). finish_streaming() must follow before another thread may
// look.
constexpr uint64_t kStreamingBytes = 256;

void copy_streaming(std::byte* to, const std::byte* from, uint64_t bytes) {
#if defined(__x86_64__)
  constexpr uint64_t kLine = 64;
  if (const uint64_t odd = reinterpret_cast<uintptr_t>(to) % kLine; odd != 0) {
    const uint64_t head = kLine - odd;
    std::memcpy(to, from, head);
    to += head;
    from += head;
    bytes -= head;
  }
  for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine) {
    const auto* in = reinterpret_cast<const __m128i*>(from);
    auto* out = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(in);
    const __m128i b = _mm_loadu_si128(in + 1);
    const __m128i c = _mm_loadu_si128(in + 2);
    const __m128i d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
#endif
  std::memcpy(to, from, bytes);
}

void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// `bytes` is a constant for common small pieces.
template <typename Bytes>
void copy_to_pages(std::byte* to, const std::byte* from, Bytes bytes) {
  if constexpr (std::is_same_v<Bytes, uint64_t>) {
    if (bytes >= kStreamingBytes) return copy_streaming(to, from, bytes);
  }
  std::memcpy(to, from, bytes);
}

// Calls copy(pool offset, bytes) for the pieces. A piece of a common size goes with the size as a
// constant: below a kilobyte the call into the C library costs as much as the copy.
template <typename Copy>
void copy_pieces(const Tile& tile, uint64_t begin, uint64_t end, Copy&& copy) {
  for_each_piece(tile, begin, end, [&](uint64_t offset, uint64_t bytes) {
    switch (bytes) {
      case 2:
        return copy(offset, std::integral_constant<uint64_t, 2>());
      case 4:
        return copy(offset, std::integral_constant<uint64_t, 4>());
      case 8:
        return copy(offset, std::integral_constant<uint64_t, 8>());
      case 16:
        return copy(offset, std::integral_constant<uint64_t, 16>());
      case 32:
        return copy(offset, std::integral_constant<uint64_t, 32>());
      case 64:
        return copy(offset, std::integral_constant<uint64_t, 64>());
      case 128:
        return copy(offset, std::integral_constant<uint64_t, 128>());
      default:
        return copy(offset, bytes);
    }
  });
}

// Pages lie scattered, so no processor guesses where the next pieces are: they are fetched while
// those before them are copied. What lies behind a piece's first bytes the processor finds by
// itself.
constexpr std::size_t kAhead = 2;
constexpr uint64_t kFetchedFrom = 128;  // below it, asking costs as much as it saves
constexpr uint64_t kFetchedBytes = 4096;

template <typename Copy>
class FetchAhead {
 public:
  explicit FetchAhead(Copy copy) : copy_(copy) {}
  void add(std::byte* to, const std::byte* from, uint64_t bytes) {
    for (uint64_t at = 0; at < std::min(bytes, kFetchedBytes); at += 64)
      __builtin_prefetch(from + at);
    copy_waiting(count_ % kAhead);
    waiting_[count_++ % kAhead] = {to, from, bytes};
  }
  void finish() {
    for (std::size_t i = 0; i < kAhead; ++i) copy_waiting((count_ + i) % kAhead);
  }

 private:
  struct Piece {
    std::byte* to = nullptr;
    const std::byte* from = nullptr;
    uint64_t bytes = 0;
  };
  void copy_waiting(std::size_t i) {
    const Piece piece = std::exchange(waiting_[i], {});
    if (piece.bytes != 0) copy_(piece.to, piece.from, piece.bytes);
  }
  Copy copy_;
  std::array<Piece, kAhead> waiting_;
  std::size_t count_ = 0;
};

}  // namespace

bool gather(const CopyPlan& plan, std::span<std::byte* const> pool_bases, uint64_t stream_offset,
            uint64_t bytes, std::byte* to) {
  if (!range_fits(plan, pool_bases.size(), stream_offset, bytes)) return false;
  FetchAhead ahead([](std::byte* to_chunk, const std::byte* from, uint64_t size) {
    std::memcpy(to_chunk, from, size);
  });
  for_each_tile(plan, stream_offset, bytes,
                [&](const Tile& tile, uint64_t begin, uint64_t end, uint64_t) {
                  const std::byte* base = pool_bases[tile.pool];
                  copy_pieces(tile, begin, end, [&](uint64_t offset, auto size) {
                    if (size < kFetchedFrom)
                      std::memcpy(to, base + offset, size);
                    else
                      ahead.add(to, base + offset, size);
                    to += static_cast<uint64_t>(size);
                  });
                });
  ahead.finish();
  return true;
}

bool scatter(const CopyPlan& plan, std::span<std::byte* const> pool_bases, uint64_t stream_offset,
             uint64_t bytes, const std::byte* from) {
  if (!range_fits(plan, pool_bases.size(), stream_offset, bytes)) return false;
  for_each_tile(plan, stream_offset, bytes,
                [&](const Tile& tile, uint64_t begin, uint64_t end, uint64_t) {
                  std::byte* base = pool_bases[tile.pool];
                  copy_pieces(tile, begin, end, [&](uint64_t offset, auto size) {
                    copy_to_pages(base + offset, from, size);
                    from += static_cast<uint64_t>(size);
                  });
                });
  finish_streaming();
  return true;
}

bool transfer(const CopyPlan& source, std::span<std::byte* const> source_bases,
              const CopyPlan& destination, std::span<std::byte* const> destination_bases,
              uint64_t stream_offset, uint64_t bytes) {
  if (!range_fits(source, source_bases.size(), stream_offset, bytes) ||
      !range_fits(destination, destination_bases.size(), stream_offset, bytes))
    return false;
  FetchAhead ahead(
      [](std::byte* to, const std::byte* from, uint64_t size) { copy_to_pages(to, from, size); });
  for_each_fragment(source, destination, stream_offset, bytes,
                    [&](uint32_t source_pool, uint64_t source_offset, uint32_t pool,
                        uint64_t offset, uint64_t, uint64_t size) {
                      std::byte* to = destination_bases[pool] + offset;
                      const std::byte* from = source_bases[source_pool] + source_offset;
                      if (size < kFetchedFrom)
                        std::memcpy(to, from, size);
                      else
                        ahead.add(to, from, size);
                    });
  ahead.finish();
  finish_streaming();
  return true;
}

bool clear(const CopyPlan& plan, std::span<std::byte* const> pool_bases) {
  if (!range_fits(plan, pool_bases.size(), 0, plan.bytes)) return false;
  for_each_run(plan, 0, plan.bytes, [&](uint32_t pool, uint64_t offset, uint64_t, uint64_t size) {
    std::memset(pool_bases[pool] + offset, 0, size);
  });
  return true;
}

}  // namespace kvferry::kernels
