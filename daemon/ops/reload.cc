#include "daemon/ops/reload.h"

#include "daemon/ops/config_values.h"

namespace kvferry::ops {

std::vector<std::string> changed_keys(Config running, Config read) {
  std::vector<std::string> out;
  read.log.level = running.log.level;
  const std::vector<Section> before = config_schema(running);
  const std::vector<Section> after = config_schema(read);
  for (std::size_t s = 0; s < before.size(); ++s)
    for (std::size_t k = 0; k < before[s].keys.size(); ++k)
      if (before[s].keys[k].binding.print() != after[s].keys[k].binding.print())
        out.push_back(before[s].name + "." + before[s].keys[k].name);
  if (running.sockets != read.sockets) out.emplace_back("socket");
  if (running.ucx != read.ucx) out.emplace_back("ucx");
  return out;
}

}  // namespace kvferry::ops
