// What the daemon runs with, and what a configuration that is read again changes of it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/ops/config.h"

namespace kvferry::ops {

// Whether a running daemon takes over this key ("log.level"). Beside them [[peers]] as a whole.
bool is_reloadable(std::string_view key);

// A key that is in force, and what waits for the next start.
struct RunningValue : EffectiveValue {
  bool reloadable = false;
  std::string next;  // as TOML; empty: the same. "removed": the entry is no longer in the files
};

// Thread-safe; nothing blocks.
class RunningConfig {
 public:
  // `started` has no problems.
  explicit RunningConfig(LoadedConfig started);

  // By key as they are written; [[socket]], [[peers]] and [ucx] as a whole.
  struct Change {
    std::vector<std::string> taken;    // in force from now on
    std::vector<std::string> waiting;  // differ, and are in force from the next start on
  };
  // Takes over of `read`, which has no problems, what may change in a running daemon, all at once.
  // A default of calls waits beside its longest value, if that differs, too; [[peers]] with one
  // that is plain off loopback waits beside another peer.cluster_secret_file.
  Change take(const LoadedConfig& read);

  Config config() const;
  // Every key in the order of the default file, then entries that wait to be added.
  std::vector<RunningValue> values() const;

 private:
  mutable Mutex mutex_;
  Config config_ KVFERRY_GUARDED_BY(mutex_);
  Places places_ KVFERRY_GUARDED_BY(mutex_);
  // As last read.
  Config next_ KVFERRY_GUARDED_BY(mutex_);
  Places next_places_ KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::ops
