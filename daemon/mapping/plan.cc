#include "daemon/mapping/plan.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <string>
#include <tuple>

#include "daemon/mapping/limits.h"

namespace kvferry::mapping {
namespace {

using kernels::Axis;
using kernels::BlockEntry;
using kernels::CopyPlan;
using kernels::Strip;
using kernels::TokenSpan;

// Steps of one walk over a slice's tokens; it needs more than spans where they merge again.
constexpr uint64_t kMaxPieces = kMaxSpans * 4;

tl::unexpected<Error> mismatch(std::string field, std::string message) {
  return fail(Code::kFailedPrecondition, "LAYOUT_MISMATCH", std::move(message), std::move(field));
}

// One side of a stream, and the plan that is made for it.
class Binder {
 public:
  Binder(const Stream& stream, Side side, const RankLayout& layout,
         std::span<const GroupBlocks> blocks)
      : stream_(stream), side_(side), layout_(layout), blocks_(blocks) {}

  Result<Plan> bind() {
    for (const Bundle& bundle : stream_.bundles) {
      KVFERRY_RETURN_IF_ERROR(check(bundle));
      auto table = block_table(bundle);
      if (!table) return tl::unexpected<Error>(std::move(table).error());
      KVFERRY_RETURN_IF_ERROR(add_bundle(bundle, *table));
      if (plan_.bundles.back().bytes != bundle.bytes)
        return fail(Code::kInternal, "INTERNAL", "the plan and its stream differ in bytes");
    }
    return Plan(std::move(plan_));
  }

  Result<Plan> bind_tail(std::span<const uint64_t> prompts) {
    for (const Bundle& bundle : stream_.bundles) {
      KVFERRY_RETURN_IF_ERROR(check(bundle));
      const Group& group = layout_.groups[bundle.receiver_group];
      if (group.tail != Tail::kZero || bundle.granularity != Granularity::kToken) continue;
      if (bundle.receiver_group >= prompts.size())
        return mismatch("prompts", "no prompt length for a group");
      auto table = tail_table(bundle, prompts[bundle.receiver_group]);
      if (!table) return tl::unexpected<Error>(std::move(table).error());
      if (table->tokens != 0) KVFERRY_RETURN_IF_ERROR(add_bundle(bundle, *table));
    }
    return Plan(std::move(plan_));
  }

 private:
  // Where a bundle's entries of the block axis stand in the plan; bundles of one pair share them.
  struct BlockTable {
    uint32_t first_block = 0;
    uint32_t block_count = 0;
    uint64_t tokens = 0;
  };

  uint32_t group_number(const Bundle& bundle) const {
    return side_ == Side::kSender ? bundle.sender_group : bundle.receiver_group;
  }
  const Group& group_of(const Bundle& bundle) const { return layout_.groups[group_number(bundle)]; }

  const Plane* find_plane(const Bundle& bundle, const Bundle::PlaneRef& plane,
                          uint64_t unit) const {
    const Group& group = group_of(bundle);
    if (side_ == Side::kReceiver) return &group.planes[plane.receiver_plane];
    for (const uint32_t number : plane.sender_planes) {
      const Plane& candidate = group.planes[number];
      if (unit >= candidate.unit_begin &&
          unit < uint64_t{candidate.unit_begin} + candidate.unit_count)
        return &candidate;
    }
    return nullptr;
  }

  // The layout must be the one whose holding the stream was compiled from.
  Status check(const Bundle& bundle) const {
    const uint32_t number = group_number(bundle);
    if (number >= layout_.groups.size()) return mismatch("groups", "a group is gone");
    const Group& group = layout_.groups[number];
    const std::string field = "groups[" + std::to_string(number) + "].";
    const uint64_t block = side_ == Side::kSender ? bundle.sender_block : bundle.receiver_block;
    const Dealing& dealing =
        side_ == Side::kSender ? bundle.sender_dealing : bundle.receiver_dealing;
    if (group.tokens_per_block != block || dealing_of(group) != dealing)
      return mismatch(field + "tokens_per_block", "the group holds its tokens in another way");
    for (const Bundle::PlaneRef& ref : bundle.planes) {
      const std::span<const uint32_t> own = side_ == Side::kReceiver
                                                ? std::span(&ref.receiver_plane, 1)
                                                : std::span<const uint32_t>(ref.sender_planes);
      for (const uint32_t p : own) {
        if (p >= group.planes.size()) return mismatch(field + "planes", "a plane is gone");
        const Plane& plane = group.planes[p];
        if (plane.layer != ref.layer || plane.role != ref.role ||
            plane.cell_bytes != bundle.cell_bytes || plane.granularity != bundle.granularity)
          return mismatch(field + "planes[" + std::to_string(p) + "]", "is another plane now");
      }
    }
    return {};
  }

  const GroupBlocks* blocks_of(uint32_t group) const {
    for (const GroupBlocks& blocks : blocks_)
      if (blocks.group == group) return &blocks;
    return nullptr;
  }

  // The kernel block that holds a local block of this side's group.
  Result<uint32_t> kernel_block(const Group& group, uint32_t number, const GroupBlocks* blocks,
                                uint64_t local_block) const {
    const uint64_t per_id = group.blocks_per_id;
    const uint64_t entry = local_block / per_id;
    const auto field = [&] { return "groups[" + std::to_string(number) + "].block_ids"; };
    if (blocks == nullptr || entry < blocks->first_block ||
        entry - blocks->first_block >= blocks->ids.size() ||
        blocks->ids[entry - blocks->first_block] == kHole)
      return fail(Code::kInvalidArgument, "BLOCK_MISSING",
                  "nothing stands for local block " + std::to_string(local_block), field());
    const int32_t id = blocks->ids[entry - blocks->first_block];
    if (id < 0 || static_cast<uint64_t>(id) >= group.block_count / per_id)
      return invalid(field() + "[" + std::to_string(entry - blocks->first_block) + "]",
                     "BLOCK_OUT_OF_RANGE", std::to_string(id) + " is not one of the group's ids");
    return static_cast<uint32_t>(static_cast<uint64_t>(id) * per_id + local_block % per_id);
  }

  Result<BlockTable> block_table(const Bundle& bundle) {
    const bool by_block = bundle.granularity == Granularity::kBlock;
    const auto [at, fresh] =
        tables_.try_emplace({bundle.sender_group, bundle.receiver_group, by_block});
    if (!fresh) return at->second;
    auto table = build_table(bundle, by_block);
    if (table) at->second = *table;
    return table;
  }

  // Walks the positions that both sides store, cut at both sides' blocks. BLOCK cells are walked as
  // blocks of one token each.
  Result<BlockTable> build_table(const Bundle& bundle, bool by_block) {
    const Group& group = group_of(bundle);
    const uint32_t number = group_number(bundle);
    const GroupBlocks* blocks = blocks_of(number);
    const uint64_t scale = by_block ? bundle.receiver_block : 1;
    Dealing receiver = bundle.receiver_dealing;
    Dealing sender = bundle.sender_dealing;
    receiver.interleave /= scale;
    sender.interleave /= scale;
    const Dealing& mine = side_ == Side::kSender ? sender : receiver;
    const Dealing& dealing = sender.size > 1 ? sender : receiver;
    const uint64_t receiver_block = bundle.receiver_block / scale;
    const uint64_t my_block = group.tokens_per_block / scale;

    BlockTable table;
    table.first_block = static_cast<uint32_t>(plan_.blocks.size());
    uint64_t last_block = UINT64_MAX;
    uint64_t my_last_block = UINT64_MAX;
    uint32_t kernel = 0;
    uint64_t pieces = 0;
    const auto add_piece = [&](uint64_t position, uint64_t end) -> Status {
      uint64_t there = receiver.local(position);
      uint64_t here = mine.local(position);
      while (position < end) {
        const uint64_t count = std::min(
            {end - position, receiver_block - there % receiver_block, my_block - here % my_block});
        if (here / my_block != my_last_block) {
          my_last_block = here / my_block;
          auto found = kernel_block(group, number, blocks, my_last_block);
          if (!found) return tl::unexpected<Error>(std::move(found).error());
          kernel = *found;
        }
        const auto token = static_cast<uint32_t>(here % my_block);
        if (there / receiver_block != last_block) {
          last_block = there / receiver_block;
          plan_.blocks.push_back({table.tokens, static_cast<uint32_t>(plan_.spans.size())});
          plan_.spans.push_back({kernel, token, static_cast<uint32_t>(count)});
        } else if (TokenSpan& last = plan_.spans.back();
                   last.block == kernel && last.token + last.count == token) {
          last.count += static_cast<uint32_t>(count);
        } else {
          plan_.spans.push_back({kernel, token, static_cast<uint32_t>(count)});
        }
        if (plan_.spans.size() > kMaxSpans || ++pieces > kMaxPieces)
          return fail(Code::kResourceExhausted, "TOO_FRAGMENTED",
                      "the tokens of a slice lie in too many pieces", "ranges");
        table.tokens += count;
        position += count;
        there += count;
        here += count;
      }
      return {};
    };
    for (const Range& moved : bundle.tokens) {
      const Range range{moved.begin / scale, moved.end / scale};
      KVFERRY_RETURN_IF_ERROR(for_each_stored(range, dealing, add_piece));
    }
    finish(table);
    return table;
  }

  // Calls fn(begin, end) for the pieces of a range that the dealing stores.
  template <typename Fn>
  static Status for_each_stored(Range range, const Dealing& dealing, Fn&& fn) {
    if (range.empty()) return {};
    if (dealing.size == 1) return fn(range.begin, range.end);
    const uint64_t granule = dealing.interleave;
    const uint64_t round = granule * dealing.size;
    uint64_t begin = range.begin / round * round + dealing.index * granule;
    if (begin + granule <= range.begin) begin += round;
    for (; begin < range.end; begin += round)
      KVFERRY_RETURN_IF_ERROR(
          fn(std::max(begin, range.begin), std::min(begin + granule, range.end)));
    return {};
  }

  // The cells at or past the prompt's end in the receiver's blocks that the bundle touches.
  Result<BlockTable> tail_table(const Bundle& bundle, uint64_t prompt) {
    const Group& group = group_of(bundle);
    const Dealing& dealing = bundle.receiver_dealing;
    const uint64_t block = bundle.receiver_block;
    const uint64_t local_end = dealing.stored_below(prompt);
    // Local blocks before this one end below the prompt's end.
    const uint64_t first_local = round_down(local_end, block);
    const uint64_t first = dealing.size == 1
                               ? first_local
                               : (first_local / dealing.interleave * dealing.size + dealing.index) *
                                     dealing.interleave;
    BlockTable table;
    table.first_block = static_cast<uint32_t>(plan_.blocks.size());
    const Dealing& both = bundle.sender_dealing.size > 1 ? bundle.sender_dealing : dealing;
    uint64_t next_block = 0;
    const auto touch = [&](uint64_t begin, uint64_t end) -> Status {
      const uint64_t last = dealing.local(end - 1) / block;
      for (uint64_t b = std::max(dealing.local(begin) / block, next_block); b <= last; ++b) {
        const uint64_t token = local_end > b * block ? local_end - b * block : 0;
        if (token >= block) continue;
        auto kernel =
            kernel_block(group, bundle.receiver_group, blocks_of(bundle.receiver_group), b);
        if (!kernel) return tl::unexpected<Error>(std::move(kernel).error());
        plan_.blocks.push_back({table.tokens, static_cast<uint32_t>(plan_.spans.size())});
        plan_.spans.push_back(
            {*kernel, static_cast<uint32_t>(token), static_cast<uint32_t>(block - token)});
        table.tokens += block - token;
      }
      next_block = last + 1;
      return {};
    };
    for (const Range& moved : bundle.tokens)
      KVFERRY_RETURN_IF_ERROR(for_each_stored(intersect(moved, {first, UINT64_MAX}), both, touch));
    finish(table);
    return table;
  }

  void finish(BlockTable& table) {
    table.block_count = static_cast<uint32_t>(plan_.blocks.size()) - table.first_block;
    plan_.blocks.push_back({table.tokens, static_cast<uint32_t>(plan_.spans.size())});
  }

  // Units of the bundle, cut where this side's planes begin or end.
  std::vector<Range> cut_units(const Bundle& bundle) const {
    if (side_ == Side::kReceiver) return bundle.units;
    std::vector<uint64_t> cuts;
    const Group& group = group_of(bundle);
    for (const Bundle::PlaneRef& ref : bundle.planes) {
      if (ref.sender_planes.size() < 2) continue;
      for (const uint32_t number : ref.sender_planes) {
        cuts.push_back(group.planes[number].unit_begin);
        cuts.push_back(uint64_t{group.planes[number].unit_begin} + group.planes[number].unit_count);
      }
    }
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    std::vector<Range> segments;
    for (Range units : bundle.units) {
      for (auto cut = std::upper_bound(cuts.begin(), cuts.end(), units.begin);
           cut != cuts.end() && *cut < units.end; ++cut) {
        segments.push_back({units.begin, *cut});
        units.begin = *cut;
      }
      segments.push_back(units);
    }
    return segments;
  }

  Status add_bundle(const Bundle& source, const BlockTable& table) {
    kernels::Bundle& bundle = plan_.bundles.emplace_back();
    bundle.stream_offset = plan_.bytes;
    bundle.cell_bytes = source.cell_bytes;
    bundle.first_block = table.first_block;
    bundle.block_count = table.block_count;
    bundle.token_count = table.tokens;

    const std::vector<Range> segments = cut_units(source);
    bundle.first_segment = static_cast<uint32_t>(plan_.segments.size());
    bundle.segment_count = static_cast<uint32_t>(segments.size());
    uint32_t units = 0;
    for (const Range& segment : segments) {
      plan_.segments.push_back(units);
      units += static_cast<uint32_t>(segment.size());
    }
    plan_.segments.push_back(units);
    bundle.unit_count = units;

    KVFERRY_RETURN_IF_ERROR(add_planes(source, segments, bundle));
    find_strides(bundle);
    bundle.bytes = bundle.cell_bytes * bundle.plane_count * bundle.unit_count * bundle.token_count;
    plan_.bytes += bundle.bytes;
    return {};
  }

  // Planes sorted into rows, each with a strip per unit segment.
  Status add_planes(const Bundle& source, const std::vector<Range>& segments,
                    kernels::Bundle& bundle) {
    bool layer_first = true;
    bool seen_plane_axis = false;
    for (std::size_t i = 0; i < source.order.size(); ++i) {
      const char axis = source.order[i];
      if ((axis == 'l' || axis == 'r') && !seen_plane_axis) {
        layer_first = axis == 'l';
        seen_plane_axis = true;
        bundle.order[i] = Axis::kRow;
      } else {
        bundle.order[i] = axis == 'b'   ? Axis::kBlock
                          : axis == 'u' ? Axis::kUnit
                          : axis == 't' ? Axis::kToken
                                        : Axis::kPlane;
      }
    }
    struct Sorted {
      uint64_t row, column;
      const Bundle::PlaneRef* plane;
    };
    std::map<std::string_view, uint64_t> roles;  // by first appearance
    std::vector<Sorted> sorted;
    for (const Bundle::PlaneRef& plane : source.planes) {
      const uint64_t role = roles.emplace(plane.role, roles.size()).first->second;
      if (layer_first)
        sorted.push_back({plane.layer, role, &plane});
      else
        sorted.push_back({role, plane.layer, &plane});
    }
    std::sort(sorted.begin(), sorted.end(), [](const Sorted& a, const Sorted& b) {
      return std::tie(a.row, a.column) < std::tie(b.row, b.column);
    });

    bundle.first_row = static_cast<uint32_t>(plan_.rows.size());
    bundle.first_strip = static_cast<uint32_t>(plan_.strips.size());
    bundle.plane_count = static_cast<uint32_t>(sorted.size());
    for (std::size_t i = 0; i < sorted.size(); ++i) {
      if (i == 0 || sorted[i].row != sorted[i - 1].row) {
        plan_.rows.push_back(static_cast<uint32_t>(i));
        ++bundle.row_count;
      }
      for (const Range& segment : segments) {
        const Plane* plane = find_plane(source, *sorted[i].plane, segment.begin);
        if (plane == nullptr || segment.begin < plane->unit_begin ||
            segment.end > uint64_t{plane->unit_begin} + plane->unit_count)
          return mismatch("groups[" + std::to_string(group_number(source)) + "].planes",
                          "the units of layer " + std::to_string(sorted[i].plane->layer) + " " +
                              sorted[i].plane->role + " are others now");
        const bool has_tokens = source.granularity == Granularity::kToken;
        Strip strip;
        strip.offset = plane->offset + (segment.begin - plane->unit_begin) * plane->unit_stride;
        strip.block_stride = plane->block_stride;
        strip.unit_stride = plane->unit_stride;
        strip.token_stride = has_tokens ? plane->token_stride : 0;
        strip.pool = plane->pool;
        plan_.pool_count = std::max(plan_.pool_count, strip.pool + 1);
        plan_.strips.push_back(strip);
      }
    }
    plan_.rows.push_back(bundle.plane_count);
    return {};
  }

  // Finds out whether rows and planes may be walked as strides.
  void find_strides(kernels::Bundle& bundle) const {
    const uint32_t* rows = plan_.rows.data() + bundle.first_row;
    const uint64_t segments = bundle.segment_count;
    const auto strip = [&](uint64_t plane, uint64_t segment) -> const Strip& {
      return plan_.strips[bundle.first_strip + plane * segments + segment];
    };
    // Does going from plane a to plane b add `stride` in every segment?
    const auto steps = [&](uint64_t a, uint64_t b, uint64_t stride) {
      for (uint64_t s = 0; s < segments; ++s) {
        const Strip& x = strip(a, s);
        const Strip& y = strip(b, s);
        if (x.pool != y.pool || x.block_stride != y.block_stride ||
            x.unit_stride != y.unit_stride || x.token_stride != y.token_stride ||
            y.offset - x.offset != stride)
          return false;
      }
      return true;
    };
    bundle.planes_regular = true;
    bool known = false;
    for (uint32_t row = 0; row < bundle.row_count && bundle.planes_regular; ++row) {
      for (uint32_t p = rows[row]; p + 1 < rows[row + 1] && bundle.planes_regular; ++p) {
        if (!known) bundle.plane_stride = strip(p + 1, 0).offset - strip(p, 0).offset;
        known = true;
        bundle.planes_regular = steps(p, p + 1, bundle.plane_stride);
      }
    }
    bundle.rows_regular = bundle.planes_regular;
    if (bundle.row_count > 1)
      bundle.row_stride = strip(rows[1], 0).offset - strip(rows[0], 0).offset;
    for (uint32_t row = 0; row + 1 < bundle.row_count && bundle.rows_regular; ++row)
      bundle.rows_regular = rows[row + 1] - rows[row] == rows[row + 2] - rows[row + 1] &&
                            steps(rows[row], rows[row + 1], bundle.row_stride);
  }

  const Stream& stream_;
  const Side side_;
  const RankLayout& layout_;
  const std::span<const GroupBlocks> blocks_;
  std::map<std::tuple<uint32_t, uint32_t, bool>, BlockTable> tables_;
  CopyPlan plan_;
};

}  // namespace

bool Plan::same_places(const Plan& other) const {
  const auto equal = [](const auto& a, const auto& b, auto&& fields) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [&](const auto& x, const auto& y) { return fields(x) == fields(y); });
  };
  const auto bundle = [](const kernels::Bundle& b) {
    // The strides follow from the strips.
    return std::tie(b.stream_offset, b.bytes, b.cell_bytes, b.order, b.first_row, b.row_count,
                    b.plane_count, b.first_strip, b.first_segment, b.segment_count, b.first_block,
                    b.block_count, b.token_count, b.unit_count);
  };
  const auto strip = [](const Strip& s) {
    return std::tie(s.pool, s.offset, s.block_stride, s.unit_stride, s.token_stride);
  };
  const auto entry = [](const BlockEntry& e) { return std::tie(e.tokens_before, e.first_span); };
  const auto span = [](const TokenSpan& s) { return std::tie(s.block, s.token, s.count); };
  const CopyPlan& a = form_;
  const CopyPlan& b = other.form_;
  return a.bytes == b.bytes && a.rows == b.rows && a.segments == b.segments &&
         equal(a.bundles, b.bundles, bundle) && equal(a.strips, b.strips, strip) &&
         equal(a.blocks, b.blocks, entry) && equal(a.spans, b.spans, span);
}

uint64_t Plan::run_count() const {
  uint64_t count = 0;
  for_each_run(0, bytes(), [&](uint32_t, uint64_t, uint64_t, uint64_t) { ++count; });
  return count;
}

uint64_t Plan::estimate_pieces() const {
  constexpr uint64_t kTiles = 64;     // of each bundle are looked at ...
  constexpr uint64_t kCells = 4'096;  // ... where so many cells have that many
  double pieces = 0;
  for (const kernels::Bundle& bundle : form_.bundles) {
    uint64_t tile_bytes = 0;
    kernels::for_each_tile(form_, bundle.stream_offset, 1,
                           [&](const kernels::Tile& tile, uint64_t, uint64_t, uint64_t) {
                             tile_bytes = tile.piece_bytes;
                             for (uint32_t d = 0; d < tile.dim_count; ++d)
                               tile_bytes *= tile.dims[d].count;
                           });
    const uint64_t most = std::max(tile_bytes, kCells * bundle.cell_bytes);
    const uint64_t some = tile_bytes > bundle.bytes / kTiles ? bundle.bytes : kTiles * tile_bytes;
    const uint64_t sample = std::min({bundle.bytes, some, most});
    uint64_t counted = 0;
    kernels::for_each_tile(form_, bundle.stream_offset, sample,
                           [&](const kernels::Tile& tile, uint64_t begin, uint64_t end, uint64_t) {
                             counted +=
                                 tile.dim_count == 0 ? 1 : ceil_div(end - begin, tile.piece_bytes);
                           });
    if (sample > 0)
      pieces += static_cast<double>(counted) * static_cast<double>(bundle.bytes) /
                static_cast<double>(sample);
  }
  return static_cast<uint64_t>(pieces + 0.5);
}

Result<Plan> bind_plan(const Stream& stream, Side side, const RankLayout& layout,
                       std::span<const GroupBlocks> blocks) {
  return Binder(stream, side, layout, blocks).bind();
}

Result<Plan> bind_tail(const Stream& stream, const RankLayout& layout,
                       std::span<const GroupBlocks> blocks, std::span<const uint64_t> prompts) {
  return Binder(stream, Side::kReceiver, layout, blocks).bind_tail(prompts);
}

uint64_t fragment_count(const Plan& source, const Plan& destination) {
  uint64_t count = 0;
  for_each_fragment(source, destination, [&](const Fragment&) { ++count; });
  return count;
}

std::vector<Fragment> fragments_of(const Plan& source, const Plan& destination) {
  std::vector<Fragment> fragments;
  for_each_fragment(source, destination,
                    [&](const Fragment& fragment) { fragments.push_back(fragment); });
  return fragments;
}

}  // namespace kvferry::mapping
