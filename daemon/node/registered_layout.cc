#include "daemon/node/registered_layout.h"

#include <algorithm>
#include <atomic>

#include "daemon/base/crypto.h"
#include "daemon/mapping/legs.h"
#include "daemon/mapping/tokens.h"

namespace kvferry::node {
namespace {

// A layout of this group alone, as one rank that is a whole instance.
std::shared_ptr<const mapping::Instance> of_group(const mapping::RankLayout& holding,
                                                  uint32_t group) {
  auto instance = std::make_shared<mapping::Instance>();
  mapping::Holding alone;
  alone.fingerprint = holding.fingerprint;
  alone.groups.push_back(holding.groups[group]);
  instance->ranks.push_back(std::move(alone));
  return instance;
}

bool works_out(const RegisteredLayout& from, uint32_t group, const RegisteredLayout& to,
               uint32_t to_group) {
  const mapping::Group& source = from.layout.groups[group];
  const mapping::Group& destination = to.layout.groups[to_group];
  // A block is named by what the prompt is up to its end, so both must be as long.
  if (from.reuse_groups[group].block_tokens != to.reuse_groups[to_group].block_tokens ||
      from.reuse_groups[group].block_tokens == 0)
    return false;
  const auto table =
      mapping::LegTable::make(of_group(from.holding, group), of_group(to.holding, to_group));
  if (!table) return false;
  const auto owned = (*table)->ownership(0, 0);
  if (!owned) return false;
  // Every unit of every plane, optional ones too: the sender might have them.
  std::vector<uint64_t> units(destination.planes.size(), 0);
  for (const auto& plane : owned->planes)
    for (const Range& range : owned->unit_sets[plane.units])
      units[plane.receiver_plane] += range.end - range.begin;
  for (std::size_t p = 0; p < units.size(); ++p)
    if (units[p] != destination.planes[p].unit_count) return false;
  return mapping::dealing_of(source) == mapping::dealing_of(destination);
}

}  // namespace

Digest16 reuse_space_of(const ReuseDomain& domain) {
  const Secret& key = domain.reuse_key.is_zero() ? domain.instance_key : domain.reuse_key;
  const std::string who = key.is_zero() ? "user " + std::to_string(domain.uid)
                                        : "key " + std::string(key.bytes.begin(), key.bytes.end());
  std::string text = "kvferry reuse 1";
  for (const std::string& part : {domain.tenant, who, domain.fingerprint, domain.hash_scheme})
    text += std::to_string(part.size()) + ":" + part;
  return {cut<16>(sha256({bytes_of(text)}))};
}

std::vector<engine::ReuseGroup> reuse_groups_of(const mapping::RankLayout& layout) {
  std::vector<engine::ReuseGroup> groups;
  for (const mapping::Group& from : layout.groups) {
    engine::ReuseGroup group{from.tokens_per_block * from.blocks_per_id, from.sliding_window,
                             from.id_space};
    // Blocks that hold every other piece of the prompt, or none of its tokens, have no such hash.
    const bool per_request =
        !from.planes.empty() && from.planes.front().granularity == mapping::Granularity::kRequest;
    if (per_request || from.cp_size > 1) group.block_tokens = 0;
    groups.push_back(group);
  }
  return groups;
}

uint64_t RegisteredLayout::next_number() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

bool RegisteredLayout::shares_pages(const LayoutHandle& other) const {
  const auto* there = dynamic_cast<const RegisteredLayout*>(&other);
  if (there == nullptr) return true;
  return std::any_of(pools.begin(), pools.end(), [&](const auto& pool) {
    return std::any_of(there->pools.begin(), there->pools.end(),
                       [&](const auto& another) { return pool->same_memory(*another); });
  });
}

Status CompiledPlan::make_device_forms() {
  const gpu::Device* const device = layout->device();
  if (device == nullptr) return {};
  std::vector<uint64_t> bases;
  for (const auto& pool : layout->pools) bases.push_back(reinterpret_cast<uintptr_t>(pool->base()));
  auto made = DeviceForms::make(*plan, bases);
  KVFERRY_RETURN_IF_ERROR(made);
  (void)forms.put(*device, std::move(*made));
  if (tail == nullptr) return {};
  auto tail_made = DeviceForms::make(*tail, bases);
  KVFERRY_RETURN_IF_ERROR(tail_made);
  (void)tail_forms.put(*device, std::move(*tail_made));
  return {};
}

bool CompiledPlan::same_source(const engine::Plan& other) const {
  const auto* there = dynamic_cast<const CompiledPlan*>(&other);
  return there != nullptr && layout == there->layout && plan->same_places(*there->plan);
}

bool RegisteredLayout::serves(uint32_t group, const LayoutHandle& other,
                              uint32_t other_group) const {
  const auto* to = dynamic_cast<const RegisteredLayout*>(&other);
  if (to == nullptr || group >= reuse_groups.size() || other_group >= to->reuse_groups.size())
    return false;
  const std::tuple key{group, to->number_, other_group};
  MutexLock lock(mutex_);
  const auto known = serves_.find(key);
  if (known != serves_.end()) return known->second;
  // Layouts come and go; what is forgotten is worked out again.
  constexpr std::size_t kMostRemembered = 1024;
  if (serves_.size() >= kMostRemembered) serves_.clear();
  return serves_[key] = works_out(*this, group, *to, other_group);
}

}  // namespace kvferry::node
