#include "daemon/mapping/stream.h"

#include <xxhash.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>

#include "daemon/mapping/limits.h"

namespace kvferry::mapping {
namespace {

std::string_view name_of(Granularity granularity) {
  switch (granularity) {
    case Granularity::kToken:
      return "TOKEN";
    case Granularity::kBlock:
      return "BLOCK";
    case Granularity::kRequest:
      return "REQUEST";
  }
  return "";
}

void append_number(std::string& text, uint64_t number) {
  char buffer[24];
  text.append(buffer, std::to_chars(buffer, buffer + sizeof buffer, number).ptr);
}

void append_dealing(std::string& text, const Dealing& dealing) {
  append_number(text, dealing.index);
  text += '/';
  append_number(text, dealing.size);
  text += '/';
  append_number(text, dealing.interleave);
}

void append_bundle(std::string& text, const Bundle& bundle) {
  text += "bundle ";
  text += bundle.order;
  text += ' ';
  text += name_of(bundle.granularity);
  text += ' ';
  append_number(text, bundle.cell_bytes);
  text += " units ";
  append_ranges(text, bundle.units);
  text += " tokens ";
  append_ranges(text, bundle.tokens);
  text += " s ";
  append_dealing(text, bundle.sender_dealing);
  text += " r ";
  append_dealing(text, bundle.receiver_dealing);
  text += " block ";
  append_number(text, bundle.receiver_block);
  text += '\n';
}

void append_plane(std::string& text, const Bundle::PlaneRef& plane) {
  text += "plane ";
  append_number(text, plane.layer);
  text += ' ';
  text += plane.role;
  text += '\n';
}

constexpr std::string_view kFirstLine = "kvferry stream 1\n";

// Hashes text piece by piece and counts it.
class TextHash {
 public:
  TextHash() : state_(XXH64_createState()) { XXH64_reset(state_.get(), 0); }
  void add(std::string_view text) {
    bytes_ += text.size();
    XXH64_update(state_.get(), text.data(), text.size());
  }
  uint64_t bytes() const { return bytes_; }
  uint64_t digest() const { return XXH64_digest(state_.get()); }

 private:
  struct Free {
    void operator()(XXH64_state_t* state) const { XXH64_freeState(state); }
  };
  std::unique_ptr<XXH64_state_t, Free> state_;
  uint64_t bytes_ = 0;
};

Result<uint64_t> digest_of(const std::vector<Bundle>& bundles) {
  TextHash hash;
  hash.add(kFirstLine);
  std::string text;
  for (const Bundle& bundle : bundles) {
    text.clear();
    append_bundle(text, bundle);
    for (const Bundle::PlaneRef& plane : bundle.planes) append_plane(text, plane);
    hash.add(text);
    if (hash.bytes() > kMaxTextBytes)
      return fail(Code::kResourceExhausted, "TOO_FRAGMENTED",
                  "the stream's description is longer than 1 MiB", "ranges");
  }
  return hash.digest();
}

tl::unexpected<Error> too_large() {
  return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", "more bytes than a stream may have",
              "ranges");
}

// What the planes of one pair of groups move.
struct PairTokens {
  std::vector<Range> ranges;  // before dealing
  uint64_t positions = 0;     // stored by both
};

// The parts of a leg that both compile_stream and expected_bytes need.
class Compiler {
 public:
  // `offer` nullptr: as if the sender offered everything, and only bytes are wanted, no planes.
  Compiler(const LegTable& table, uint32_t s, uint32_t g, std::span<const GroupNeed> needs,
           const std::span<const GroupRanges>* offer, Range layers)
      : sender_(table.sender().ranks[s]),
        receiver_(table.receiver().ranks[g]),
        needs_(needs),
        offer_(offer),
        layers_(layers) {}

  Status collect(const Ownership& owned) {
    std::vector<uint64_t> unit_counts;
    for (const auto& set : owned.unit_sets) {
      uint64_t count = 0;
      for (const Range& range : set) count += range.size();
      unit_counts.push_back(count);
    }
    std::map<std::tuple<uint32_t, uint32_t, Granularity, uint64_t, uint32_t, std::string_view>,
             std::size_t>
        known;
    for (const Ownership::OwnedPlane& plane : owned.planes) {
      const Group& group = receiver_.groups[plane.receiver_group];
      const Plane& r = group.planes[plane.receiver_plane];
      if (r.layer < layers_.begin || r.layer >= layers_.end) continue;
      const PairTokens& tokens = tokens_of(plane.receiver_group, plane.sender_group);
      if (tokens.positions == 0) continue;
      const auto [at, fresh] =
          known.try_emplace({plane.receiver_group, plane.sender_group, r.granularity, r.cell_bytes,
                             plane.units, r.order},
                            bundles_.size());
      if (fresh) {
        start_bundle(plane, r, tokens, owned.unit_sets[plane.units]);
        unit_counts_.push_back(unit_counts[plane.units]);
        plane_counts_.push_back(0);
      }
      ++plane_counts_[at->second];
      if (offer_ == nullptr) continue;
      bundles_[at->second].planes.push_back(
          {r.layer, r.role, plane.receiver_plane,
           std::vector<uint32_t>(plane.sender_planes.begin(), plane.sender_planes.end())});
    }
    for (std::size_t i = 0; i < bundles_.size(); ++i) {
      Bundle& bundle = bundles_[i];
      if (!checked_mul(bundle.cells_per_unit, unit_counts_[i], bundle.bytes) ||
          !checked_mul(bundle.bytes, plane_counts_[i], bundle.bytes) ||
          !checked_mul(bundle.bytes, bundle.cell_bytes, bundle.bytes))
        return too_large();
    }
    return {};
  }

  std::vector<Bundle> take() {
    // collect() met the planes in list order, so equal alignments keep it.
    std::stable_sort(bundles_.begin(), bundles_.end(), [](const Bundle& a, const Bundle& b) {
      return alignment(a.cell_bytes) > alignment(b.cell_bytes);
    });
    return std::move(bundles_);
  }

 private:
  static uint64_t alignment(uint64_t bytes) { return std::gcd(bytes, uint64_t{16}); }

  const PairTokens& tokens_of(uint32_t receiver_group, uint32_t sender_group) {
    const auto [at, fresh] = tokens_.try_emplace({receiver_group, sender_group});
    PairTokens& tokens = at->second;
    if (!fresh) return tokens;
    const auto need = std::find_if(needs_.begin(), needs_.end(),
                                   [&](const GroupNeed& n) { return n.group == receiver_group; });
    if (need == needs_.end()) return tokens;
    const Group& sender = sender_.groups[sender_group];
    tokens.ranges = wanted_ranges(sender, *need);
    if (offer_ != nullptr) {
      const auto offered = std::find_if(offer_->begin(), offer_->end(), [&](const GroupRanges& o) {
        return o.group == sender_group;
      });
      if (offered == offer_->end())
        tokens.ranges.clear();
      else
        tokens.ranges = intersect_ranges(tokens.ranges, offered->ranges);
    }
    tokens.positions = stored_count(tokens.ranges, dealing_of(sender),
                                    dealing_of(receiver_.groups[receiver_group]));
    return tokens;
  }

  void start_bundle(const Ownership::OwnedPlane& plane, const Plane& r, const PairTokens& tokens,
                    const std::vector<Range>& units) {
    const Group& sender = sender_.groups[plane.sender_group];
    const Group& receiver = receiver_.groups[plane.receiver_group];
    Bundle& bundle = bundles_.emplace_back();
    bundle.order = r.order;
    bundle.granularity = r.granularity;
    bundle.cell_bytes = r.cell_bytes;
    bundle.receiver_group = plane.receiver_group;
    bundle.sender_group = plane.sender_group;
    bundle.units = units;
    bundle.tokens = tokens.ranges;
    bundle.sender_dealing = dealing_of(sender);
    bundle.receiver_dealing = dealing_of(receiver);
    bundle.sender_block = sender.tokens_per_block;
    bundle.receiver_block = receiver.tokens_per_block;
    bundle.cells_per_unit = tokens.positions;
    // Ranges of BLOCK planes are whole blocks: their granule is the block, on both sides.
    if (r.granularity == Granularity::kBlock) bundle.cells_per_unit /= receiver.tokens_per_block;
  }

  const Holding& sender_;
  const Holding& receiver_;
  std::span<const GroupNeed> needs_;
  const std::span<const GroupRanges>* offer_;
  Range layers_;
  std::map<std::pair<uint32_t, uint32_t>, PairTokens> tokens_;
  std::vector<Bundle> bundles_;
  std::vector<uint64_t> unit_counts_;   // of each bundle
  std::vector<uint64_t> plane_counts_;  // of each bundle
};

Result<std::vector<Bundle>> bundles_of(const LegTable& table, uint32_t s, uint32_t g,
                                       std::span<const GroupNeed> needs,
                                       const std::span<const GroupRanges>* offer, Range layers) {
  auto owned = table.ownership(s, g);  // checks the rank numbers
  if (!owned) return tl::unexpected<Error>(std::move(owned).error());
  KVFERRY_RETURN_IF_ERROR(validate_needs(table.receiver().ranks[g], needs));
  if (offer != nullptr) KVFERRY_RETURN_IF_ERROR(validate_offer(table.sender().ranks[s], *offer));
  Compiler compiler(table, s, g, needs, offer, layers);
  KVFERRY_RETURN_IF_ERROR(compiler.collect(*owned));
  return compiler.take();
}

constexpr Range kEveryLayer{0, kMaxLayers};

}  // namespace

Result<Stream> compile_stream(const LegTable& table, uint32_t sender_rank, uint32_t receiver_rank,
                              std::span<const GroupNeed> needs, std::span<const GroupRanges> offer,
                              std::optional<Range> layers) {
  auto bundles =
      bundles_of(table, sender_rank, receiver_rank, needs, &offer, layers.value_or(kEveryLayer));
  if (!bundles) return tl::unexpected<Error>(std::move(bundles).error());
  Stream stream;
  stream.sender_rank = sender_rank;
  stream.receiver_rank = receiver_rank;
  stream.bundles = std::move(*bundles);
  for (Bundle& bundle : stream.bundles) {
    bundle.stream_offset = stream.bytes;
    if (!checked_add(stream.bytes, bundle.bytes, stream.bytes) || stream.bytes >> 62 != 0)
      return too_large();
  }
  auto digest = digest_of(stream.bundles);
  if (!digest) return tl::unexpected<Error>(std::move(digest).error());
  stream.digest = *digest;
  return stream;
}

Result<uint64_t> expected_bytes(const LegTable& table, uint32_t sender_rank, uint32_t receiver_rank,
                                std::span<const GroupNeed> needs) {
  const auto bundles = bundles_of(table, sender_rank, receiver_rank, needs, nullptr, kEveryLayer);
  if (!bundles) return tl::unexpected<Error>(bundles.error());
  uint64_t bytes = 0;
  for (const Bundle& bundle : *bundles)
    if (!checked_add(bytes, bundle.bytes, bytes)) return too_large();
  return bytes;
}

std::string text_of(const Stream& stream) {
  std::string text(kFirstLine);
  for (const Bundle& bundle : stream.bundles) {
    append_bundle(text, bundle);
    for (const Bundle::PlaneRef& plane : bundle.planes) append_plane(text, plane);
  }
  return text;
}

}  // namespace kvferry::mapping
