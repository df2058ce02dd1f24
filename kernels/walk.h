// Walks a piece of a CopyPlan in stream order. The plan is cut into tiles: boxes of equal pieces at
// constant strides, found once per block (or plane) instead of once per fragment, so that the inner
// loops are plain strided loops. Templates without allocation or indirect calls; any thread.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/copy_plan.h"

namespace kvferry::kernels {

// dims[0] is the fastest axis. The stream's bytes of a tile are its pieces in that order.
struct Tile {
  struct Dim {
    uint64_t count = 0;
    uint64_t stride = 0;  // bytes, modulo 2^64
  };
  uint32_t pool = 0;
  uint32_t dim_count = 0;
  uint64_t offset = 0;  // of the first piece, from the pool's first byte
  uint64_t piece_bytes = 0;
  std::array<Dim, kAxes> dims{};
};

// Calls fn(pool_offset, bytes) for each piece of the tile's bytes [begin, end), clipped.
template <typename Fn>
void for_each_piece(const Tile& tile, uint64_t begin, uint64_t end, Fn&& fn) {
  if (tile.dim_count == 0) {
    fn(tile.offset + begin, end - begin);
    return;
  }
  const uint64_t piece = tile.piece_bytes;
  std::array<uint64_t, kAxes> index{};
  uint64_t number = begin / piece;
  uint64_t skip = begin % piece;
  for (uint32_t d = 0; d < tile.dim_count; ++d) {
    index[d] = number % tile.dims[d].count;
    number /= tile.dims[d].count;
  }
  uint64_t left = end - begin;
  const Tile::Dim inner = tile.dims[0];
  for (;;) {
    uint64_t offset = tile.offset;
    for (uint32_t d = 0; d < tile.dim_count; ++d) offset += index[d] * tile.dims[d].stride;
    if (skip != 0 || left < piece) {
      const uint64_t bytes = std::min(piece - skip, left);
      fn(offset + skip, bytes);
      left -= bytes;
      skip = 0;
      ++index[0];
      offset += inner.stride;
    }
    const uint64_t whole = std::min(inner.count - index[0], left / piece);
    for (uint64_t i = 0; i < whole; ++i, offset += inner.stride) fn(offset, piece);
    left -= whole * piece;
    if (left == 0) return;
    index[0] += whole;
    for (uint32_t d = 0; d + 1 < tile.dim_count && index[d] == tile.dims[d].count; ++d) {
      index[d] = 0;
      ++index[d + 1];
    }
  }
}

// Cuts a bundle into tiles. fn(tile, begin, end, stream_offset): the tile's bytes [begin, end)
// stand at stream_offset.
template <typename Fn>
class BundleWalk {
 public:
  BundleWalk(const CopyPlan& plan, const Bundle& bundle, Fn& fn)
      : bundle_(bundle),
        rows_(plan.rows.data() + bundle.first_row),
        segments_(plan.segments.data() + bundle.first_segment),
        blocks_(plan.blocks.data() + bundle.first_block),
        strips_(plan.strips.data() + bundle.first_strip),
        spans_(plan.spans.data()),
        fn_(fn) {
    for (int level = 0; level < kAxes; ++level) {
      if (bundle.order[static_cast<std::size_t>(level)] == Axis::kToken) token_level_ = level;
      if (irregular(bundle.order[static_cast<std::size_t>(level)])) deepest_ = level;
    }
    planes_left_ = bundle.plane_count;
    tokens_left_ = bundle.token_count;
    units_left_ = bundle.unit_count;
  }

  // [begin, end) counts from the bundle's first byte and is not empty.
  void run(uint64_t begin, uint64_t end) {
    stream_ = bundle_.stream_offset + begin;
    visit(0, begin, end);
  }

 private:
  bool irregular(Axis axis) const {
    switch (axis) {
      case Axis::kRow:
        return bundle_.row_count > 1 && !bundle_.rows_regular;
      case Axis::kPlane:
        return !bundle_.planes_regular;
      case Axis::kUnit:
        return bundle_.segment_count > 1;
      case Axis::kBlock:
        return true;
      case Axis::kToken:
        return false;  // depends on the block
    }
    return true;
  }

  // Bytes below the axes that are fixed now.
  uint64_t rest() const { return bundle_.cell_bytes * planes_left_ * tokens_left_ * units_left_; }

  void visit(int level, uint64_t begin, uint64_t end) {
    int deepest = deepest_;
    if (block_spans_ > 1 && token_level_ > deepest) deepest = token_level_;
    if (level > deepest) {
      emit(level, begin, end);
      return;
    }
    switch (bundle_.order[static_cast<std::size_t>(level)]) {
      case Axis::kRow:
        visit_rows(level, begin, end);
        break;
      case Axis::kPlane:
        visit_planes(level, begin, end);
        break;
      case Axis::kBlock:
        visit_blocks(level, begin, end);
        break;
      case Axis::kUnit:
        visit_units(level, begin, end, level == deepest);
        break;
      case Axis::kToken:
        visit_tokens(level, begin, end, level == deepest);
        break;
    }
  }

  // The child stands at [first, last) of the parent's bytes.
  void descend(int level, uint64_t first, uint64_t last, uint64_t begin, uint64_t end) {
    visit(level + 1, std::max(begin, first) - first, std::min(end, last) - first);
  }

  void visit_rows(int level, uint64_t begin, uint64_t end) {
    planes_left_ = 1;
    const uint64_t plane_bytes = rest();
    const uint32_t* last = rows_ + bundle_.row_count + 1;
    const uint32_t* row = std::upper_bound(rows_, last, begin / plane_bytes) - 1;
    for (; row + 1 < last && row[0] * plane_bytes < end; ++row) {
      plane_ = row[0];
      planes_left_ = row[1] - row[0];
      descend(level, row[0] * plane_bytes, row[1] * plane_bytes, begin, end);
    }
    plane_ = 0;
    planes_left_ = bundle_.plane_count;
  }

  void visit_planes(int level, uint64_t begin, uint64_t end) {
    const uint32_t first = plane_;
    const uint64_t count = planes_left_;
    planes_left_ = 1;
    const uint64_t child = rest();
    for (uint64_t i = begin / child; i < count && i * child < end; ++i) {
      plane_ = first + static_cast<uint32_t>(i);
      descend(level, i * child, (i + 1) * child, begin, end);
    }
    plane_ = first;
    planes_left_ = count;
  }

  void visit_blocks(int level, uint64_t begin, uint64_t end) {
    tokens_left_ = 1;
    const uint64_t token_bytes = rest();
    const BlockEntry* last = blocks_ + bundle_.block_count + 1;
    const BlockEntry* block = std::upper_bound(blocks_, last, begin / token_bytes,
                                               [](uint64_t token, const BlockEntry& b) {
                                                 return token < b.tokens_before;
                                               }) -
                              1;
    for (; block + 1 < last && block[0].tokens_before * token_bytes < end; ++block) {
      first_span_ = block[0].first_span;
      block_spans_ = block[1].first_span - first_span_;
      span_ = first_span_;
      tokens_left_ = block[1].tokens_before - block[0].tokens_before;
      descend(level, block[0].tokens_before * token_bytes, block[1].tokens_before * token_bytes,
              begin, end);
    }
    block_spans_ = 0;
    tokens_left_ = bundle_.token_count;
  }

  void visit_tokens(int level, uint64_t begin, uint64_t end, bool by_span) {
    const uint64_t count = tokens_left_;
    tokens_left_ = 1;
    const uint64_t child = rest();
    uint64_t before = 0;
    for (uint32_t s = 0; s < block_spans_; ++s) {
      span_ = first_span_ + s;
      const uint64_t tokens = spans_[span_].count;
      const uint64_t first = before * child;
      const uint64_t last = (before + tokens) * child;
      before += tokens;
      if (last <= begin) continue;
      if (first >= end) break;
      if (by_span) {
        tokens_left_ = tokens;
        emit(level, std::max(begin, first) - first, std::min(end, last) - first);
        tokens_left_ = 1;
        continue;
      }
      for (uint64_t t = begin > first ? (begin - first) / child : 0; t < tokens; ++t) {
        const uint64_t at = first + t * child;
        if (at >= end) break;
        token_ = t;
        descend(level, at, at + child, begin, end);
      }
      token_ = 0;
    }
    span_ = first_span_;
    tokens_left_ = count;
  }

  void visit_units(int level, uint64_t begin, uint64_t end, bool by_segment) {
    units_left_ = 1;
    const uint64_t child = rest();
    for (uint32_t s = 0; s < bundle_.segment_count; ++s) {
      const uint64_t first = segments_[s] * child;
      const uint64_t last = segments_[s + 1] * child;
      if (last <= begin) continue;
      if (first >= end) break;
      segment_ = s;
      if (by_segment) {
        units_left_ = segments_[s + 1] - segments_[s];
        emit(level, std::max(begin, first) - first, std::min(end, last) - first);
        units_left_ = 1;
        continue;
      }
      const uint64_t units = segments_[s + 1] - segments_[s];
      for (uint64_t u = begin > first ? (begin - first) / child : 0; u < units; ++u) {
        const uint64_t at = first + u * child;
        if (at >= end) break;
        unit_ = u;
        descend(level, at, at + child, begin, end);
      }
      unit_ = 0;
    }
    segment_ = 0;
    units_left_ = bundle_.unit_count;
  }

  void emit(int level, uint64_t begin, uint64_t end) {
    const Strip& strip = strips_[uint64_t{plane_} * bundle_.segment_count + segment_];
    const TokenSpan& span = spans_[span_];
    Tile tile;
    tile.pool = strip.pool;
    tile.offset = strip.offset + span.block * strip.block_stride + unit_ * strip.unit_stride +
                  (span.token + token_) * strip.token_stride;
    tile.piece_bytes = bundle_.cell_bytes;
    for (int i = kAxes - 1; i >= level; --i) {
      switch (bundle_.order[static_cast<std::size_t>(i)]) {
        case Axis::kRow:
          add_dim(tile, bundle_.row_count, bundle_.row_stride);
          break;
        case Axis::kPlane:
          add_dim(tile, row_planes(level), bundle_.plane_stride);
          break;
        case Axis::kUnit:
          add_dim(tile, units_left_, strip.unit_stride);
          break;
        case Axis::kToken:
          add_dim(tile, tokens_left_, strip.token_stride);
          break;
        case Axis::kBlock:
          break;  // always fixed before a tile
      }
    }
    fn_(static_cast<const Tile&>(tile), begin, end, stream_);
    stream_ += end - begin;
  }

  // Planes of one row, where the row axis may be a dimension of the same tile.
  uint64_t row_planes(int level) const {
    for (int i = level; i < kAxes; ++i)
      if (bundle_.order[static_cast<std::size_t>(i)] == Axis::kRow)
        return planes_left_ / bundle_.row_count;
    return planes_left_;
  }

  static void add_dim(Tile& tile, uint64_t count, uint64_t stride) {
    if (count == 1) return;
    if (tile.dim_count == 0) {
      if (stride == tile.piece_bytes) {
        tile.piece_bytes *= count;
        return;
      }
    } else {
      Tile::Dim& faster = tile.dims[tile.dim_count - 1];
      if (stride == faster.count * faster.stride) {
        faster.count *= count;
        return;
      }
    }
    tile.dims[tile.dim_count++] = {count, stride};
  }

  const Bundle& bundle_;
  const uint32_t* rows_;
  const uint32_t* segments_;
  const BlockEntry* blocks_;
  const Strip* strips_;
  const TokenSpan* spans_;
  Fn& fn_;
  int deepest_ = 0;  // last level that must be walked one by one
  int token_level_ = 0;

  uint64_t stream_ = 0;
  uint32_t plane_ = 0;
  uint32_t segment_ = 0;
  uint64_t unit_ = 0;  // in the segment
  uint32_t first_span_ = 0;
  uint32_t block_spans_ = 0;
  uint32_t span_ = 0;
  uint64_t token_ = 0;  // in the span
  uint64_t planes_left_ = 0;
  uint64_t tokens_left_ = 0;
  uint64_t units_left_ = 0;
};

// Calls fn(tile, begin, end, stream_offset) for the tiles of a stream range, which must lie in the
// plan.
template <typename Fn>
void for_each_tile(const CopyPlan& plan, uint64_t stream_offset, uint64_t bytes, Fn&& fn) {
  if (bytes == 0) return;
  const uint64_t end = stream_offset + bytes;
  auto bundle =
      std::upper_bound(plan.bundles.begin(), plan.bundles.end(), stream_offset,
                       [](uint64_t offset, const Bundle& b) { return offset < b.stream_offset; });
  if (bundle != plan.bundles.begin()) --bundle;
  for (; bundle != plan.bundles.end() && bundle->stream_offset < end; ++bundle) {
    const uint64_t first = std::max(stream_offset, bundle->stream_offset);
    const uint64_t last = std::min(end, bundle->stream_offset + bundle->bytes);
    BundleWalk walk(plan, *bundle, fn);
    walk.run(first - bundle->stream_offset, last - bundle->stream_offset);
  }
}

// Calls fn(pool, pool_offset, stream_offset, bytes) for the maximal contiguous runs of the range.
template <typename Fn>
void for_each_run(const CopyPlan& plan, uint64_t stream_offset, uint64_t bytes, Fn&& fn) {
  uint32_t pool = 0;
  uint64_t offset = 0;
  uint64_t at = stream_offset;
  uint64_t length = 0;
  for_each_tile(plan, stream_offset, bytes,
                [&](const Tile& tile, uint64_t begin, uint64_t end, uint64_t) {
                  for_each_piece(tile, begin, end, [&](uint64_t piece, uint64_t piece_bytes) {
                    if (length != 0 && tile.pool == pool && piece == offset + length) {
                      length += piece_bytes;
                      return;
                    }
                    if (length != 0) fn(pool, offset, at, length);
                    at += length;
                    pool = tile.pool;
                    offset = piece;
                    length = piece_bytes;
                  });
                });
  if (length != 0) fn(pool, offset, at, length);
}

// Calls fn(source_pool, source_offset, destination_pool, destination_offset, stream_offset, bytes)
// for each maximal piece of the range that is contiguous on both sides. Both plans must be of the
// same stream.
template <typename Fn>
void for_each_fragment(const CopyPlan& source, const CopyPlan& destination, uint64_t stream_offset,
                       uint64_t bytes, Fn&& fn) {
  struct Run {
    uint64_t offset = 0;
    uint64_t at = 0;
    uint64_t bytes = 0;
    uint32_t pool = 0;
  };
  // The destination's runs are kept for a while, so that the source is searched once for many of
  // them. A batch ends where a destination run ends, which ends a fragment anyway.
  std::array<Run, 128> batch;
  std::size_t count = 0;
  const auto flush = [&] {
    if (count == 0) return;
    const Run* run = batch.data();
    const uint64_t end = batch[count - 1].at + batch[count - 1].bytes;
    for_each_run(source, run->at, end - run->at,
                 [&](uint32_t pool, uint64_t offset, uint64_t at, uint64_t length) {
                   while (length != 0) {
                     const uint64_t done = at - run->at;
                     const uint64_t size = std::min(length, run->bytes - done);
                     fn(pool, offset, run->pool, run->offset + done, at, size);
                     offset += size;
                     at += size;
                     length -= size;
                     if (done + size == run->bytes) ++run;
                   }
                 });
    count = 0;
  };
  for_each_run(destination, stream_offset, bytes,
               [&](uint32_t pool, uint64_t offset, uint64_t at, uint64_t length) {
                 batch[count++] = {offset, at, length, pool};
                 if (count == batch.size()) flush();
               });
  flush();
}

}  // namespace kvferry::kernels
