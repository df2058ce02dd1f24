#include "kvferry/layout.h"

#include <string>
#include <utility>

namespace kvferry::client {
namespace {

// Multiplication and addition that remember whether anything overflowed.
struct Checked {
  bool ok = true;
  uint64_t mul(uint64_t a, uint64_t b) {
    uint64_t out = 0;
    if (__builtin_mul_overflow(a, b, &out)) ok = false;
    return out;
  }
  uint64_t add(uint64_t a, uint64_t b) {
    uint64_t out = 0;
    if (__builtin_add_overflow(a, b, &out)) ok = false;
    return out;
  }
};

Error bad_shape(std::string field, std::string message) {
  return {Code::kInvalidArgument, "LAYOUT_SHAPE", std::move(message), std::move(field), {}};
}

Status check(const AttentionShape& s) {
  if (s.layers.empty()) return bad_shape("layers", "no layers");
  if (s.tokens_per_block == 0) return bad_shape("tokens_per_block", "must be positive");
  if (s.block_count == 0) return bad_shape("block_count", "must be positive");
  if (s.head_bytes == 0) return bad_shape("head_bytes", "must be positive");
  if (s.head_count == 0 || s.head_count > s.heads_total ||
      s.head_begin > s.heads_total - s.head_count)
    return bad_shape("head_count", "heads outside the model's");
  return {};
}

// Where the cells of K and V lie within one block, in bytes.
struct BlockShape {
  uint64_t unit_stride = 0;
  uint64_t token_stride = 0;
  uint64_t value_offset = 0;  // of V from K; 0 with K and V apart
  uint64_t bytes = 0;         // of the part that holds this plane's tensor
};

BlockShape block_shape(const AttentionShape& s, Checked& c) {
  const uint64_t cell = s.head_bytes, tokens = s.tokens_per_block, heads = s.head_count;
  const bool head_major = s.token_order == TokenOrder::kHeadMajor;
  const auto strided = [&](uint64_t step, uint64_t head_count) {
    // `step`: bytes of what stands for one head of one token.
    BlockShape b;
    b.unit_stride = head_major ? c.mul(step, tokens) : step;
    b.token_stride = head_major ? step : c.mul(step, head_count);
    b.bytes = c.mul(c.mul(step, tokens), head_count);
    return b;
  };
  switch (s.packing) {
    case KvPacking::kSeparate:
      return strided(cell, heads);
    case KvPacking::kPerToken: {
      BlockShape b = strided(c.mul(cell, 2), heads);
      b.value_offset = cell;
      return b;
    }
    case KvPacking::kHeadAxis: {
      BlockShape b = strided(cell, c.mul(heads, 2));
      b.value_offset = c.mul(b.unit_stride, heads);
      return b;
    }
    case KvPacking::kPerHeadBlock: {
      // Always head-major: a head's K of all tokens, then its V of all tokens.
      BlockShape b;
      b.value_offset = c.mul(cell, tokens);
      b.unit_stride = c.mul(b.value_offset, 2);
      b.token_stride = cell;
      b.bytes = c.mul(b.unit_stride, heads);
      return b;
    }
  }
  return {};
}

Plane plane_of(const AttentionShape& s, uint32_t layer, const char* role, uint32_t pool,
               uint64_t offset, uint64_t block_stride, const BlockShape& b) {
  Plane p;
  p.layer = layer;
  p.role = role;
  p.units_total = s.heads_total;
  p.unit_begin = s.head_begin;
  p.unit_count = s.head_count;
  p.cell_bytes = s.head_bytes;
  p.type = s.type;
  p.pool = pool;
  p.offset = offset;
  p.block_stride = block_stride;
  p.unit_stride = b.unit_stride;
  p.token_stride = b.token_stride;
  return p;
}

Group group_of(const AttentionShape& s) {
  Group g;
  g.tokens_per_block = s.tokens_per_block;
  g.block_count = s.block_count;
  return g;
}

}  // namespace

uint64_t block_bytes(const AttentionShape& shape) {
  Checked c;
  const BlockShape b = block_shape(shape, c);
  const uint64_t bytes = shape.packing == KvPacking::kSeparate ? c.mul(b.bytes, 2) : b.bytes;
  return c.ok ? bytes : 0;
}

Result<Group> per_layer_group(const AttentionShape& shape, uint32_t pool,
                              const std::vector<uint64_t>& layer_offsets, bool kv_outside) {
  if (auto status = check(shape); !status) return status.error();
  if (layer_offsets.size() != shape.layers.size())
    return bad_shape("layer_offsets", "one offset a layer is needed");
  const bool separate = shape.packing == KvPacking::kSeparate;
  if (kv_outside && !separate) return bad_shape("kv_outside", "only for K and V apart");
  Checked c;
  const BlockShape b = block_shape(shape, c);
  uint64_t block_stride = b.bytes, value_offset = b.value_offset;
  if (separate) {
    block_stride = kv_outside ? b.bytes : c.mul(b.bytes, 2);
    value_offset = kv_outside ? c.mul(b.bytes, shape.block_count) : b.bytes;
  }
  Group group = group_of(shape);
  for (std::size_t i = 0; i < shape.layers.size(); ++i) {
    const uint64_t key = layer_offsets[i];
    group.planes.push_back(plane_of(shape, shape.layers[i], "key", pool, key, block_stride, b));
    group.planes.push_back(
        plane_of(shape, shape.layers[i], "value", pool, c.add(key, value_offset), block_stride, b));
  }
  if (!c.ok) return bad_shape("", "the layout's size overflows");
  return group;
}

Result<Group> split_group(const AttentionShape& shape, uint32_t pool,
                          const std::vector<uint64_t>& key_offsets,
                          const std::vector<uint64_t>& value_offsets) {
  if (auto status = check(shape); !status) return status.error();
  if (shape.packing != KvPacking::kSeparate)
    return bad_shape("packing", "tensors of their own mean K and V apart");
  if (key_offsets.size() != shape.layers.size() || value_offsets.size() != shape.layers.size())
    return bad_shape("key_offsets", "one offset a layer is needed");
  Checked c;
  const BlockShape b = block_shape(shape, c);
  Group group = group_of(shape);
  for (std::size_t i = 0; i < shape.layers.size(); ++i) {
    group.planes.push_back(
        plane_of(shape, shape.layers[i], "key", pool, key_offsets[i], b.bytes, b));
    group.planes.push_back(
        plane_of(shape, shape.layers[i], "value", pool, value_offsets[i], b.bytes, b));
  }
  if (!c.ok) return bad_shape("", "the layout's size overflows");
  return group;
}

Result<Group> cross_layer_group(const AttentionShape& shape, uint32_t pool, uint64_t offset) {
  if (auto status = check(shape); !status) return status.error();
  Checked c;
  const BlockShape b = block_shape(shape, c);
  const bool separate = shape.packing == KvPacking::kSeparate;
  const uint64_t layer_bytes = separate ? c.mul(b.bytes, 2) : b.bytes;
  const uint64_t value_offset = separate ? b.bytes : b.value_offset;
  const uint64_t block_stride = c.mul(layer_bytes, shape.layers.size());
  Group group = group_of(shape);
  for (std::size_t i = 0; i < shape.layers.size(); ++i) {
    const uint64_t key = c.add(offset, c.mul(layer_bytes, i));
    group.planes.push_back(plane_of(shape, shape.layers[i], "key", pool, key, block_stride, b));
    group.planes.push_back(
        plane_of(shape, shape.layers[i], "value", pool, c.add(key, value_offset), block_stride, b));
  }
  if (!c.ok) return bad_shape("", "the layout's size overflows");
  return group;
}

Result<Group> latent_group(const AttentionShape& shape, uint32_t pool,
                           const std::vector<uint64_t>& layer_offsets) {
  AttentionShape latent = shape;
  latent.heads_total = 1;
  latent.head_begin = 0;
  latent.head_count = 1;
  latent.packing = KvPacking::kSeparate;
  if (auto status = check(latent); !status) return status.error();
  if (layer_offsets.size() != latent.layers.size())
    return bad_shape("layer_offsets", "one offset a layer is needed");
  Checked c;
  const BlockShape b = block_shape(latent, c);
  Group group = group_of(latent);
  for (std::size_t i = 0; i < latent.layers.size(); ++i)
    group.planes.push_back(
        plane_of(latent, latent.layers[i], "latent", pool, layer_offsets[i], b.bytes, b));
  if (!c.ok) return bad_shape("", "the layout's size overflows");
  return group;
}

}  // namespace kvferry::client
