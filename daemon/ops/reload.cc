#include "daemon/ops/reload.h"

#include <algorithm>
#include <array>
#include <map>

#include "daemon/ops/config_values.h"

namespace kvferry::ops {
namespace {

struct Reloadable {
  std::string_view key;
  void (*take)(Config& to, const Config& from);
  std::string_view limit;  // a key that waits for a restart and bounds this one; empty: none
};

constexpr std::array<Reloadable, 7> kReloadable{{
    {"log.level", [](Config& to, const Config& from) { to.log.level = from.log.level; }, ""},
    {"log.format", [](Config& to, const Config& from) { to.log.format = from.log.format; }, ""},
    {"engine.max_receivers",
     [](Config& to, const Config& from) { to.engine.max_receivers = from.engine.max_receivers; },
     ""},
    {"engine.lease", [](Config& to, const Config& from) { to.engine.lease = from.engine.lease; },
     "engine.lease_max"},
    {"engine.wait_deadline",
     [](Config& to, const Config& from) { to.engine.wait_deadline = from.engine.wait_deadline; },
     "engine.wait_deadline_max"},
    {"engine.transfer_deadline",
     [](Config& to, const Config& from) {
       to.engine.transfer_deadline = from.engine.transfer_deadline;
     },
     "engine.transfer_deadline_max"},
    {"drain.limit", [](Config& to, const Config& from) { to.drain.limit = from.drain.limit; }, ""},
}};

const Reloadable* find_reloadable(std::string_view key) {
  const auto* found = std::find_if(kReloadable.begin(), kReloadable.end(),
                                   [&](const Reloadable& row) { return row.key == key; });
  return found == kReloadable.end() ? nullptr : found;
}

// The keys that differ, but for [[socket]], [[peers]] and [ucx].
std::vector<std::string> changed_keys(Config running, Config read) {
  std::vector<std::string> out;
  const std::vector<Section> before = config_schema(running);
  const std::vector<Section> after = config_schema(read);
  for (std::size_t s = 0; s < before.size(); ++s)
    for (std::size_t k = 0; k < before[s].keys.size(); ++k)
      if (before[s].keys[k].binding.print() != after[s].keys[k].binding.print())
        out.push_back(before[s].name + "." + before[s].keys[k].name);
  return out;
}

}  // namespace

bool is_reloadable(std::string_view key) {
  return find_reloadable(key) != nullptr;
}

RunningConfig::RunningConfig(LoadedConfig started)
    : config_(std::move(started.config)),
      places_(std::move(started.places)),
      next_(config_),
      next_places_(places_) {}

RunningConfig::Change RunningConfig::take(const LoadedConfig& read) {
  MutexLock lock(mutex_);
  Change change;
  const std::vector<std::string> changed = changed_keys(config_, read.config);
  const auto differs = [&](std::string_view key) {
    return std::find(changed.begin(), changed.end(), key) != changed.end();
  };
  for (const std::string& key : changed) {
    const Reloadable* row = find_reloadable(key);
    if (row != nullptr && !differs(row->limit)) {
      row->take(config_, read.config);
      change.taken.push_back(key);
    } else {
      change.waiting.push_back(key);
    }
  }
  if (config_.peers != read.config.peers) {
    // Written for a secret that is not in force, they would be refused, or believed by the old one.
    const bool waits =
        differs("peer.cluster_secret_file") &&
        std::any_of(read.config.peers.begin(), read.config.peers.end(), needs_cluster_secret);
    (waits ? change.waiting : change.taken).emplace_back("peers");
    if (!waits) config_.peers = read.config.peers;
  }
  if (config_.sockets != read.config.sockets) change.waiting.emplace_back("socket");
  if (config_.ucx != read.config.ucx) change.waiting.emplace_back("ucx");
  next_ = read.config;
  next_places_ = read.places;
  // What is equal now is what was read, from where it was read; the others keep their origins.
  Places places = next_places_;
  std::map<std::string, std::string> values;
  for (EffectiveValue& row : effective_values(next_, {})) values[row.path()] = row.value;
  for (const EffectiveValue& row : effective_values(config_, {})) {
    const auto same = values.find(row.path());
    if (same != values.end() && same->second == row.value) continue;
    places.erase(row.path());
    if (const auto place = places_.find(row.path()); place != places_.end()) places.insert(*place);
  }
  places_ = std::move(places);
  return change;
}

Config RunningConfig::config() const {
  MutexLock lock(mutex_);
  return config_;
}

std::vector<RunningValue> RunningConfig::values() const {
  MutexLock lock(mutex_);
  std::map<std::string, EffectiveValue> next;
  for (EffectiveValue& row : effective_values(next_, next_places_))
    next.emplace(row.path(), std::move(row));
  std::vector<RunningValue> out;
  for (EffectiveValue& row : effective_values(config_, places_)) {
    RunningValue& value = out.emplace_back();
    static_cast<EffectiveValue&>(value) = std::move(row);
    value.reloadable = value.section == "peers" || is_reloadable(value.section + "." + value.key);
    const auto found = next.find(value.path());
    if (found == next.end()) {
      value.next = "removed";
      continue;
    }
    if (found->second.value != value.value) value.next = found->second.value;
    next.erase(found);
  }
  for (auto& [path, row] : next) {
    RunningValue& value = out.emplace_back();
    value.next = row.value;
    static_cast<EffectiveValue&>(value) = std::move(row);
    value.value.clear();
  }
  return out;
}

}  // namespace kvferry::ops
