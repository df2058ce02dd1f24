// The whole daemon put together: every part is made, started, drained and stopped here, in the
// order that their dependencies ask for. Used by main() on the main thread.
#pragma once

#include <memory>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/ops/config.h"

namespace kvferry::node {

class Daemon {
 public:
  // Makes and starts everything but waits for nothing. An error names what could not be had;
  // reasons CONFIGURATION_* and those of the arena and listeners are the machine's or the file's
  // fault (exit status 78).
  // `loaded` came from `sources` and has no problems.
  static Result<std::unique_ptr<Daemon>> start(const ops::LoadedConfig& loaded,
                                               const ops::ConfigSources& sources);
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  // The rails are up for the first time, or the reason why they never will be.
  enum class Phase { kStarting, kServing, kRefused };
  Phase phase() const;
  std::string refusal() const;
  // Sound enough to tell the service manager so.
  bool healthy() const;
  std::string status_line() const;

  // To be called again and again, several times a second: has the files of mode mtls looked at each
  // second. Waits for nothing.
  void turn();
  // Reads the configuration again as a whole, and takes over what a running daemon can
  // (ops::RunningConfig): [[peers]], so that links that they do not allow any more are closed, how
  // is logged, the defaults of calls from then on. Other keys that differ
  // are told of and count from the next start on. Looks at the certificates, too. A configuration
  // that is not good changes nothing: INVALID_ARGUMENT BAD_CONFIGURATION with all that is wrong;
  // FAILED_PRECONDITION MODE_NEEDS_RESTART if it is the first with mode mtls. On another thread;
  // the log says what came of it.
  void reload();
  // How long drain() waits at most; a reload may change it.
  Duration drain_limit() const;

  // Stops admission; transfers under way go on until the limit. Returns when all have ended or the
  // limit has passed; at once if an operator has had that done already.
  void drain();
  void stop();

 private:
  struct Impl;
  explicit Daemon(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvferry::node
