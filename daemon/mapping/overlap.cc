#include "daemon/mapping/overlap.h"

#include <algorithm>

namespace kvferry::mapping {
namespace {

using Axes = std::span<const StridedBox::Axis>;

uint64_t extent_of(Axes axes, uint64_t cell_bytes) {
  uint64_t extent = cell_bytes;
  for (const auto& axis : axes) extent += (axis.count - 1) * axis.stride;
  return extent;
}

// Do [0, a) and [shift, shift + b) meet?
bool intervals_meet(uint64_t a, int64_t shift, uint64_t b) {
  return shift >= 0 ? static_cast<uint64_t>(shift) < a
                    : b > uint64_t{0} - static_cast<uint64_t>(shift);
}

// Two boxes without an id axis, the second one `shift` bytes after the first. The slower axis is
// taken off, step by step; only the few steps at which the rest can meet are looked into.
class Pair {
 public:
  Pair(uint64_t a_cell, uint64_t b_cell, uint64_t& steps)
      : a_cell_(a_cell), b_cell_(b_cell), steps_(steps) {}

  bool disjoint(Axes a, Axes b, int64_t shift) {
    if (!intervals_meet(extent_of(a, a_cell_), shift, extent_of(b, b_cell_))) return true;
    if (steps_ == 0) return false;
    --steps_;
    if (a.empty() && b.empty()) return false;
    const uint64_t a_stride = a.empty() ? 0 : a.front().stride;
    const uint64_t b_stride = b.empty() ? 0 : b.front().stride;
    // Boxes of one nesting: what counts is the difference of the two indices.
    if (a_stride == b_stride)
      return over(a.subspan(1), b.subspan(1), shift, a_stride,
                  -static_cast<int64_t>(a.front().count - 1),
                  static_cast<int64_t>(b.front().count - 1));
    if (a_stride > b_stride)
      return over(a.subspan(1), b, shift, a_stride, -static_cast<int64_t>(a.front().count - 1), 0);
    return over(a, b.subspan(1), shift, b_stride, 0, static_cast<int64_t>(b.front().count - 1));
  }

  // Are the rests disjoint at shift + i * stride for all first <= i <= last?
  bool over(Axes a, Axes b, int64_t shift, uint64_t stride, int64_t first, int64_t last,
            bool skip_zero = false) {
    const auto step = static_cast<int64_t>(stride);
    const auto a_extent = static_cast<int64_t>(extent_of(a, a_cell_));
    const auto b_extent = static_cast<int64_t>(extent_of(b, b_cell_));
    if (step == 0) return skip_zero && first == 0 && last == 0 ? true : disjoint(a, b, shift);
    // They meet only where -b_extent < shift + i * step < a_extent.
    const auto floor_div = [step](int64_t x) {
      return x >= 0 ? x / step : -((-x + step - 1) / step);
    };
    const int64_t low = std::max(first, floor_div(-b_extent - shift) + 1);
    const int64_t high = std::min(last, floor_div(a_extent - shift - 1));
    for (int64_t i = low; i <= high; ++i) {
      if (skip_zero && i == 0) continue;
      if (steps_ == 0) return false;
      --steps_;
      if (!disjoint(a, b, shift + i * step)) return false;
    }
    return true;
  }

 private:
  uint64_t a_cell_;
  uint64_t b_cell_;
  uint64_t& steps_;
};

void add_axis(std::vector<StridedBox::Axis>& axes, uint64_t count, uint64_t stride) {
  if (count > 1) axes.push_back({count, stride});
}

void sort_falling(std::vector<StridedBox::Axis>& axes) {
  std::stable_sort(axes.begin(), axes.end(),
                   [](const auto& x, const auto& y) { return x.stride > y.stride; });
}

}  // namespace

StridedBox box_of(const Group& group, const Plane& plane) {
  StridedBox box;
  box.offset = plane.offset;
  box.cell_bytes = plane.cell_bytes;
  const uint64_t per_id = group.blocks_per_id;
  add_axis(box.ids, group.block_count / per_id, plane.block_stride * per_id);
  add_axis(box.inner, std::min(per_id, group.block_count), plane.block_stride);
  add_axis(box.inner, plane.unit_count, plane.unit_stride);
  if (plane.granularity == Granularity::kToken)
    add_axis(box.inner, group.tokens_per_block, plane.token_stride);
  sort_falling(box.inner);
  box.all = box.ids;
  box.all.insert(box.all.end(), box.inner.begin(), box.inner.end());
  sort_falling(box.all);
  box.extent = extent_of(box.all, box.cell_bytes);
  return box;
}

bool steps_over_itself(const StridedBox& box) {
  uint64_t extent = box.cell_bytes;
  for (auto axis = box.all.rbegin(); axis != box.all.rend(); ++axis) {
    if (axis->stride < extent) return false;
    extent += (axis->count - 1) * axis->stride;
  }
  return true;
}

bool shown_disjoint(const StridedBox& a, const StridedBox& b, SameId same_id, uint64_t& steps) {
  const auto shift = static_cast<int64_t>(b.offset - a.offset);
  if (!intervals_meet(a.extent, shift, b.extent)) return true;
  Pair pair(a.cell_bytes, b.cell_bytes, steps);
  if (same_id == SameId::kMustNotMeet) return pair.disjoint(a.all, b.all, shift);
  // Equal ids may share their bytes. Both id axes must step alike, else ids do not tell memory
  // apart.
  const StridedBox::Axis a_ids = a.ids.empty() ? StridedBox::Axis{} : a.ids.front();
  const StridedBox::Axis b_ids = b.ids.empty() ? StridedBox::Axis{} : b.ids.front();
  if (a_ids.count == 1 && b_ids.count == 1) return true;
  const uint64_t stride = std::max(a_ids.stride, b_ids.stride);
  if (a_ids.count > 1 && b_ids.count > 1 && a_ids.stride != b_ids.stride) return false;
  return pair.over(a.inner, b.inner, shift, stride, -static_cast<int64_t>(a_ids.count - 1),
                   static_cast<int64_t>(b_ids.count - 1), true);
}

}  // namespace kvferry::mapping
