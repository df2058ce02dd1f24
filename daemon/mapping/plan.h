// A stream bound to one side's memory: stream offset -> pool bytes. Compact (plane strides, unit
// intervals, token spans, block ids) and immutable: share it by shared_ptr<const Plan> and read it
// from any thread. Copying is in kernels/host_copy.h, which takes Plan::form().
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "daemon/mapping/stream.h"
#include "kernels/copy_plan.h"
#include "kernels/walk.h"

namespace kvferry::mapping {

enum class Side : uint8_t { kSender, kReceiver };

class Plan {
 public:
  explicit Plan(kernels::CopyPlan form) : form_(std::move(form)) {}

  uint64_t bytes() const { return form_.bytes; }
  const kernels::CopyPlan& form() const { return form_; }

  // Calls fn(pool, pool_offset, stream_offset, bytes) for each maximal run of the range, in stream
  // order. Nothing is allocated. The range must lie in the plan.
  template <typename Fn>
  void for_each_run(uint64_t stream_offset, uint64_t bytes, Fn&& fn) const {
    kernels::for_each_run(form_, stream_offset, bytes, fn);
  }
  uint64_t run_count() const;
  // About as many contiguous pieces as the plan names: of each bundle the first ones are counted,
  // and all is taken to be like them. Exact where blocks and planes are alike, but for the last
  // block. Some pieces may follow each other in memory, which run_count() would make one. Costs
  // microseconds at most, where run_count() looks at each piece.
  uint64_t estimate_pieces() const;
  // Whether every stream offset lies at the same place of the same pool numbers in both: then, for
  // one layout, both are the same bytes in the same order. May answer false where that is so but
  // the two were made from unlike texts. Takes as long as comparing their arrays.
  bool same_places(const Plan& other) const;

 private:
  kernels::CopyPlan form_;
};

// Binds one side of a stream to addresses. `layout` is that side's rank, as registered, `blocks`
// its block ids: of the slice on the sender, of the transfer on the receiver. Errors:
// BLOCK_OUT_OF_RANGE and BLOCK_MISSING (a moved token without a block), LAYOUT_MISMATCH (the layout
// is not the one that the stream was compiled for), TOO_FRAGMENTED.
Result<Plan> bind_plan(const Stream& stream, Side side, const RankLayout& layout,
                       std::span<const GroupBlocks> blocks);

// Of the receiver's blocks that the stream writes, the cells at or past the prompt's end, in groups
// whose tail is kZero: to be cleared after the slice's scatter. prompts[i] belongs to layout group
// i. An empty plan where nothing is to be cleared.
Result<Plan> bind_tail(const Stream& stream, const RankLayout& layout,
                       std::span<const GroupBlocks> blocks, std::span<const uint64_t> prompts);

struct Fragment {
  uint32_t source_pool = 0;
  uint64_t source_offset = 0;
  uint32_t destination_pool = 0;
  uint64_t destination_offset = 0;
  uint64_t stream_offset = 0;
  uint64_t bytes = 0;
  auto operator<=>(const Fragment&) const = default;
};

// Calls fn(const Fragment&) for each piece contiguous on both sides, in stream order.
template <typename Fn>
void for_each_fragment(const Plan& source, const Plan& destination, Fn&& fn) {
  kernels::for_each_fragment(
      source.form(), destination.form(), 0, source.bytes(),
      [&](uint32_t source_pool, uint64_t source_offset, uint32_t destination_pool,
          uint64_t destination_offset, uint64_t stream_offset, uint64_t bytes) {
        fn(Fragment{source_pool, source_offset, destination_pool, destination_offset, stream_offset,
                    bytes});
      });
}
uint64_t fragment_count(const Plan& source, const Plan& destination);
std::vector<Fragment> fragments_of(const Plan& source, const Plan& destination);

}  // namespace kvferry::mapping
