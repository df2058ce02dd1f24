// Packs a CopyPlan for the kernels: addresses instead of pools and offsets, prefix sums where a
// kernel searches, and whatever spares it a division or a read.
#include <algorithm>
#include <bit>
#include <cstring>
#include <unordered_map>

#include "kernels/device_copy.h"

namespace kvferry::kernels {
namespace {

constexpr uint64_t kMaxCells = uint64_t{1} << 32;
constexpr uint64_t kMaxVector = 16;

class Packer {
 public:
  Packer(const CopyPlan& plan, std::span<const uint64_t> bases)
      : plan_(plan), bases_(bases), blocks_(plan.blocks.size()), spans_(plan.spans.size()) {
    strips_.reserve(plan.strips.size());
    for (const Strip& strip : plan.strips) {
      if (strip.pool < bases.size())
        strips_.push_back({bases[strip.pool] + strip.offset, strip.block_stride, strip.unit_stride,
                           strip.token_stride});
    }
  }

  bool run() {
    if (bases_.size() < plan_.pool_count || strips_.size() != plan_.strips.size()) return false;
    for (const Bundle& bundle : plan_.bundles) {
      if (bundle.bytes == 0) continue;
      if (bundle.cell_bytes >= kMaxCells || bundle.bytes / bundle.cell_bytes >= kMaxCells)
        return false;
      pack(bundle);
    }
    return true;
  }

  std::vector<std::byte> image(PlanView* view) const {
    std::vector<std::byte> image;
    view->bytes = plan_.bytes;
    view->bundle_count = static_cast<uint32_t>(bundles_.size());
    view->bundles = append(bundles_, &image);
    view->strips = append(strips_, &image);
    view->blocks = append(blocks_, &image);
    view->spans = append(spans_, &image);
    view->rows = append(plan_.rows, &image);
    view->segments = append(plan_.segments, &image);
    return image;
  }

 private:
  // What a bundle needs to know of its table of blocks; bundles share tables.
  struct Table {
    uint32_t tokens[2] = {1, 1};  // in the first block and in the second
    bool has_block = false;       // other than number 0
    bool has_token = false;
  };

  void pack(const Bundle& bundle) {
    const Table& table = table_of(bundle);
    PackedBundle& packed = bundles_.emplace_back();
    packed.range = {bundle.stream_offset, bundle.bytes};
    const auto shift = static_cast<uint32_t>(std::countr_zero(bundle.cell_bytes));
    const uint64_t odd = bundle.cell_bytes >> shift;
    packed.cell = {odd == 1 ? 0 : UINT64_MAX / odd + 1, static_cast<uint32_t>(bundle.cell_bytes),
                   shift};
    pack_planes(bundle, &packed);
    packed.axes.plane_count = bundle.plane_count;
    packed.axes.token_count = static_cast<uint32_t>(bundle.token_count);
    packed.axes.unit_count = static_cast<uint32_t>(bundle.unit_count);
    packed.segments = {bundle.first_strip, bundle.first_segment, bundle.segment_count,
                       vector_bytes(bundle, table)};
    packed.blocks = {bundle.first_block, bundle.block_count, table.tokens[0], table.tokens[1]};
  }

  // The axes, and rows and planes: their steps, and whether they are strides.
  void pack_planes(const Bundle& bundle, PackedBundle* packed) const {
    const uint32_t* rows = plan_.rows.data() + bundle.first_row;
    uint32_t row_planes = rows[1] - rows[0];
    for (uint32_t i = 0; i < bundle.row_count; ++i)
      if (rows[i + 1] - rows[i] != row_planes) row_planes = 0;
    packed->rows = {bundle.first_row, bundle.row_count, row_planes, 0};
    packed->strides = {bundle.row_stride, bundle.plane_stride};
    bool planes_regular = bundle.planes_regular;
    const bool rows_regular = bundle.row_count == 1 || bundle.rows_regular;

    const auto row = std::find(bundle.order.begin(), bundle.order.end(), Axis::kRow);
    const bool through = bundle.row_count == 1 || row_planes == 1 || *(row + 1) == Axis::kPlane;
    if (through && row_planes == 1) {
      planes_regular = rows_regular;
      packed->strides.plane = bundle.row_stride;
    } else if (through && bundle.row_count > 1) {
      planes_regular =
          planes_regular && rows_regular && bundle.row_stride == row_planes * bundle.plane_stride;
    }
    if (rows_regular) packed->rows.flags |= kRowsRegular;
    if (planes_regular) packed->rows.flags |= kPlanesRegular;
    packed->axes.order = order_of(bundle, through, row_planes == 1);
  }

  // `through`: planes are counted through all rows, where the planes stand; or where the rows stand
  // if each row is one plane.
  static uint32_t order_of(const Bundle& bundle, bool through, bool single) {
    uint32_t order = 0;
    uint32_t levels = 0;
    const auto add = [&](PackedAxis axis) { order |= uint32_t{axis} << (4 * levels++); };
    const bool at_row = single && bundle.row_count > 1;
    for (const Axis axis : bundle.order) {
      switch (axis) {
        case Axis::kRow:
          if (!through) add(kPackedRow);
          if (through && at_row && bundle.plane_count > 1) add(kPackedPlane);
          break;
        case Axis::kPlane:
          if (!(through && at_row) && bundle.plane_count > 1) add(kPackedPlane);
          break;
        case Axis::kBlock:
          add(kPackedBlock);
          break;
        case Axis::kUnit:
          if (bundle.unit_count > 1) add(kPackedUnit);
          break;
        case Axis::kToken:
          add(kPackedToken);
          break;
      }
    }
    return order | levels << 28;
  }

  uint32_t vector_bytes(const Bundle& bundle, const Table& table) const {
    uint64_t common = bundle.cell_bytes | kMaxVector;
    const PackedStrip* strip = strips_.data() + bundle.first_strip;
    const uint64_t count = uint64_t{bundle.plane_count} * bundle.segment_count;
    for (uint64_t i = 0; i < count; ++i, ++strip)
      common |= strip->address | (table.has_block ? strip->block_stride : 0) |
                (bundle.unit_count > 1 ? strip->unit_stride : 0) |
                (table.has_token ? strip->token_stride : 0);
    return static_cast<uint32_t>(common & (~common + 1));
  }

  const Table& table_of(const Bundle& bundle) {
    const auto [at, fresh] =
        tables_.try_emplace(uint64_t{bundle.first_block} << 32 | bundle.block_count);
    Table& table = at->second;
    if (!fresh) return table;
    const BlockEntry* entries = plan_.blocks.data() + bundle.first_block;
    for (uint32_t i = 0; i < bundle.block_count; ++i) {
      const BlockEntry& entry = entries[i];
      const auto tokens = static_cast<uint32_t>(entries[i + 1].tokens_before - entry.tokens_before);
      blocks_[bundle.first_block + i] = {static_cast<uint32_t>(entry.tokens_before), tokens,
                                         entry.first_span,
                                         entries[i + 1].first_span - entry.first_span};
      if (i < 2) table.tokens[i] = std::max(tokens, uint32_t{1});
      uint32_t before = 0;
      for (uint32_t s = entry.first_span; s < entries[i + 1].first_span; ++s) {
        const TokenSpan& span = plan_.spans[s];
        spans_[s] = {before, span.count, span.block, span.token};
        before += span.count;
        table.has_block = table.has_block || span.block != 0;
        table.has_token = table.has_token || span.token + span.count > 1;
      }
    }
    return table;
  }

  template <typename T>
  static uint64_t append(const std::vector<T>& array, std::vector<std::byte>* image) {
    const uint64_t at = image->size();
    const uint64_t bytes = array.size() * sizeof(T);
    const uint64_t aligned = (bytes + PackedPlan::kAlignment - 1) & ~(PackedPlan::kAlignment - 1);
    image->resize(at + aligned);
    if (bytes != 0) std::memcpy(image->data() + at, array.data(), bytes);
    return at;
  }

  const CopyPlan& plan_;
  const std::span<const uint64_t> bases_;
  std::vector<PackedBundle> bundles_;
  std::vector<PackedStrip> strips_;
  std::vector<PackedBlock> blocks_;
  std::vector<PackedSpan> spans_;
  std::unordered_map<uint64_t, Table> tables_;
};

}  // namespace

std::optional<PackedPlan> PackedPlan::make(const CopyPlan& plan,
                                           std::span<const uint64_t> pool_bases) {
  Packer packer(plan, pool_bases);
  if (!packer.run()) return std::nullopt;
  PackedPlan packed;
  packed.image_ = packer.image(&packed.view_);
  return packed;
}

PlanView PackedPlan::view_at(uint64_t address) const {
  PlanView view = view_;
  for (uint64_t* array :
       {&view.bundles, &view.strips, &view.blocks, &view.spans, &view.rows, &view.segments})
    *array += address;
  return view;
}

}  // namespace kvferry::kernels
