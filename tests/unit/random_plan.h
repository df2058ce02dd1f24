// Random copy plans with memory of their own: every nesting of the axes, rows and segments that
// differ, blocks in spans, padding, pools apart or shared, addresses of any alignment. No two cells
// overlap.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/copy_plan.h"

namespace kvferry::kernels::test {

class Dice {
 public:
  explicit Dice(uint64_t seed) : engine_(seed) {}
  uint64_t below(uint64_t n) { return engine_() % n; }
  uint32_t between(uint32_t low, uint32_t high) {
    return low + static_cast<uint32_t>(below(high - low + 1));
  }
  bool one_in(uint64_t n) { return below(n) == 0; }
  template <typename T>
  T pick(std::initializer_list<T> list) {
    return *(list.begin() + below(list.size()));
  }
  template <typename T>
  void shuffle(T& list) {
    for (std::size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[below(i)]);
  }

 private:
  std::mt19937_64 engine_;
};

struct RandomPlan {
  CopyPlan plan;
  std::vector<uint64_t> pool_bytes;
};

class PlanMaker {
 public:
  explicit PlanMaker(uint64_t seed) : dice_(seed) {}

  RandomPlan make() {
    made_.pool_bytes.assign(dice_.between(1, 3), 0);
    // Everything in multiples of this, most of the time: wide vectors must happen.
    grain_ = dice_.pick<uint64_t>({1, 1, 2, 4, 8, 16, 16});
    const uint32_t bundles = dice_.between(1, 4);
    for (uint32_t i = 0; i < bundles; ++i) add_bundle();
    made_.plan.pool_count = static_cast<uint32_t>(made_.pool_bytes.size());
    return std::move(made_);
  }

 private:
  CopyPlan& plan() { return made_.plan; }

  void add_bundle() {
    Bundle bundle;
    bundle.stream_offset = plan().bytes;
    bundle.cell_bytes = grain_ * dice_.pick<uint64_t>({1, 1, 2, 3, 5, 16, 41, 72});
    bundle.order = {Axis::kRow, Axis::kPlane, Axis::kBlock, Axis::kUnit, Axis::kToken};
    dice_.shuffle(bundle.order);
    const auto before = [&](Axis a, Axis b) {
      const auto first = std::find(bundle.order.begin(), bundle.order.end(), a);
      const auto second = std::find(bundle.order.begin(), bundle.order.end(), b);
      if (first > second) std::swap(*first, *second);
    };
    before(Axis::kRow, Axis::kPlane);
    before(Axis::kBlock, Axis::kToken);
    add_rows(&bundle);
    add_segments(&bundle);
    add_blocks(&bundle);
    add_strips(&bundle);
    find_strides(&bundle);
    bundle.bytes = bundle.cell_bytes * bundle.plane_count * bundle.unit_count * bundle.token_count;
    plan().bytes += bundle.bytes;
    plan().bundles.push_back(bundle);
  }

  void add_rows(Bundle* bundle) {
    bundle->first_row = static_cast<uint32_t>(plan().rows.size());
    bundle->row_count = dice_.between(1, 4);
    const bool alike = dice_.one_in(2);
    const uint32_t each = dice_.between(1, 3);
    for (uint32_t i = 0; i < bundle->row_count; ++i) {
      plan().rows.push_back(bundle->plane_count);
      bundle->plane_count += alike ? each : dice_.between(1, 3);
    }
    plan().rows.push_back(bundle->plane_count);
  }

  void add_segments(Bundle* bundle) {
    bundle->first_segment = static_cast<uint32_t>(plan().segments.size());
    bundle->segment_count = dice_.one_in(2) ? 1 : dice_.between(1, 4);
    uint32_t units = 0;
    for (uint32_t i = 0; i < bundle->segment_count; ++i) {
      plan().segments.push_back(units);
      units += dice_.between(1, 4);
    }
    plan().segments.push_back(units);
    bundle->unit_count = units;
  }

  // Kernel blocks are drawn so that no token is named twice.
  void add_blocks(Bundle* bundle) {
    if (!plan().bundles.empty() && dice_.one_in(3)) {  // the table of the one before
      const Bundle& last = plan().bundles.back();
      bundle->first_block = last.first_block;
      bundle->block_count = last.block_count;
      bundle->token_count = last.token_count;
      return;
    }
    bundle->first_block = static_cast<uint32_t>(plan().blocks.size());
    bundle->block_count = dice_.one_in(4) ? 1 : dice_.between(1, 9);
    block_tokens_ = dice_.pick<uint32_t>({1, 2, 4, 7});
    const bool split = dice_.one_in(2);
    const bool partial = dice_.one_in(2);
    std::vector<uint32_t> free;
    memory_blocks_ = bundle->block_count * 3 + 2;
    for (uint32_t b = 0; b < memory_blocks_; ++b) free.push_back(b);
    if (!dice_.one_in(3)) dice_.shuffle(free);
    std::size_t next = dice_.one_in(4) ? 0 : 1;
    for (uint32_t i = 0; i < bundle->block_count; ++i) {
      plan().blocks.push_back({bundle->token_count, static_cast<uint32_t>(plan().spans.size())});
      const uint32_t spans = split ? dice_.between(1, 3) : 1;
      for (uint32_t s = 0; s < spans; ++s) {
        const bool whole = !partial || (i != 0 && i + 1 != bundle->block_count && !split);
        const uint32_t count = whole ? block_tokens_ : dice_.between(1, block_tokens_);
        plan().spans.push_back({free[next++], dice_.between(0, block_tokens_ - count), count});
        bundle->token_count += count;
      }
    }
    plan().blocks.push_back({bundle->token_count, static_cast<uint32_t>(plan().spans.size())});
  }

  // Memory nests blocks, units, tokens and perhaps planes; planes or segments that are not in the
  // nest have places of their own.
  void add_strips(Bundle* bundle) {
    bundle->first_strip = static_cast<uint32_t>(plan().strips.size());
    std::vector<char> nest{'b', 'u', 't'};
    const bool planes_inside = dice_.one_in(2);
    const bool segments_inside = dice_.one_in(2);
    if (planes_inside) nest.push_back('p');
    if (!dice_.one_in(3)) dice_.shuffle(nest);
    uint64_t stride[128] = {};
    uint64_t bytes = bundle->cell_bytes;
    for (auto axis = nest.rbegin(); axis != nest.rend(); ++axis) {
      if (dice_.one_in(5)) bytes += padding();
      stride[static_cast<std::size_t>(*axis)] = bytes;
      bytes *= *axis == 'b'   ? memory_blocks_
               : *axis == 'u' ? bundle->unit_count
               : *axis == 't' ? block_tokens_
                              : bundle->plane_count;
    }
    const uint32_t* segments = plan().segments.data() + bundle->first_segment;
    const bool one_pool = dice_.one_in(2);
    const auto pool_of = [&] {
      return static_cast<uint32_t>(dice_.below(made_.pool_bytes.size()));
    };
    uint32_t pool = pool_of();
    uint64_t at = place(pool, bytes);
    for (uint32_t p = 0; p < bundle->plane_count; ++p) {
      for (uint32_t s = 0; s < bundle->segment_count; ++s) {
        const bool same = (p == 0 || planes_inside) && (s == 0 || segments_inside);
        const bool fresh = (p != 0 || s != 0) && !same;
        if (fresh && (s == 0 || !segments_inside)) {
          if (!one_pool) pool = pool_of();
          if (!(planes_inside && p != 0)) at = place(pool, bytes);
        }
        Strip strip;
        strip.pool = pool;
        strip.offset = at;
        if (planes_inside && !segments_inside && p != 0) {
          const Strip& first = plan().strips[bundle->first_strip + s];
          strip.pool = first.pool;
          strip.offset = first.offset;
        }
        if (planes_inside) strip.offset += p * stride[std::size_t{'p'}];
        if (segments_inside) strip.offset += segments[s] * stride[std::size_t{'u'}];
        strip.block_stride = stride[std::size_t{'b'}];
        strip.unit_stride = stride[std::size_t{'u'}];
        strip.token_stride = stride[std::size_t{'t'}];
        plan().strips.push_back(strip);
      }
    }
  }

  uint64_t padding() { return grain_ * dice_.between(1, 3); }

  uint64_t place(uint32_t pool, uint64_t bytes) {
    uint64_t& end = made_.pool_bytes[pool];
    if (dice_.one_in(4)) end += padding();
    const uint64_t at = (end + grain_ - 1) / grain_ * grain_;
    end = at + bytes;
    return at;
  }

  void find_strides(Bundle* bundle) {
    const uint32_t* rows = plan().rows.data() + bundle->first_row;
    const auto steps = [&](uint32_t a, uint32_t b, uint64_t stride) {
      for (uint32_t s = 0; s < bundle->segment_count; ++s) {
        const Strip& x = plan().strips[bundle->first_strip + a * bundle->segment_count + s];
        const Strip& y = plan().strips[bundle->first_strip + b * bundle->segment_count + s];
        if (x.pool != y.pool || y.offset - x.offset != stride) return false;
      }
      return true;
    };
    const auto offset = [&](uint32_t plane) {
      return plan().strips[bundle->first_strip + plane * bundle->segment_count].offset;
    };
    bundle->planes_regular = true;
    bool known = false;
    for (uint32_t row = 0; row < bundle->row_count; ++row)
      for (uint32_t p = rows[row]; p + 1 < rows[row + 1]; ++p) {
        if (!known) bundle->plane_stride = offset(p + 1) - offset(p);
        known = true;
        bundle->planes_regular = bundle->planes_regular && steps(p, p + 1, bundle->plane_stride);
      }
    bundle->rows_regular = bundle->planes_regular;
    if (bundle->row_count > 1) bundle->row_stride = offset(rows[1]) - offset(rows[0]);
    for (uint32_t row = 0; row + 1 < bundle->row_count; ++row)
      bundle->rows_regular = bundle->rows_regular &&
                             rows[row + 1] - rows[row] == rows[row + 2] - rows[row + 1] &&
                             steps(rows[row], rows[row + 1], bundle->row_stride);
  }

  Dice dice_;
  RandomPlan made_;
  uint64_t grain_ = 1;
  // Of the last table.
  uint32_t memory_blocks_ = 0;
  uint32_t block_tokens_ = 0;
};

}  // namespace kvferry::kernels::test
