// kvferry-rails-coherent for a daemon's test: the daemon gives its rails process none of the
// variables by which the fake driver finds its machine, so a script in between sets them.
#pragma once

#include <sys/stat.h>

#include <fstream>
#include <stdexcept>
#include <string>

#include "tests/fake_cuda/control.h"

namespace kvferry::rails::testing {

// Writes the script into the machine's directory, where it stays as long as the machine. `rails` is
// the program. In its process the host sees device memory, whether or not it does in others of the
// machine. The path is what `rails.binary` takes.
inline std::string coherent_rails(const fake_cuda::Machine& machine, const std::string& rails) {
  const std::string path = machine.directory() + "/kvferry-rails";
  std::ofstream script(path);
  script << "#!/bin/sh\n";
  for (const std::string& line : machine.environment()) script << "export '" << line << "'\n";
  script << "export KVFERRY_FAKE_CUDA_HOST_VISIBLE=1\n";
  script << "exec '" << rails << "' \"$@\"\n";
  script.close();
  if (!script || ::chmod(path.c_str(), 0700) != 0) throw std::runtime_error("cannot write " + path);
  return path;
}

}  // namespace kvferry::rails::testing
