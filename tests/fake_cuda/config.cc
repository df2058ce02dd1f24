#include "tests/fake_cuda/config.h"

#include <cstdlib>
#include <sstream>

namespace kvferry::fake_cuda {
namespace {

std::string text(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

uint64_t number(const char* name, uint64_t otherwise) {
  const std::string value = text(name);
  return value.empty() ? otherwise : std::strtoull(value.c_str(), nullptr, 10);
}

std::vector<std::string> split(const std::string& list, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(list);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// As the real driver reads it: an unknown device ends the list.
std::vector<int> visible_devices(int count) {
  std::vector<int> all;
  const char* list = std::getenv("CUDA_VISIBLE_DEVICES");
  if (list == nullptr) {
    for (int i = 0; i < count; ++i) all.push_back(i);
    return all;
  }
  for (const std::string& part : split(list, ',')) {
    char* end = nullptr;
    const long device = std::strtol(part.c_str(), &end, 10);
    if (part.empty() || *end != '\0' || device < 0 || device >= count) break;
    all.push_back(static_cast<int>(device));
  }
  return all;
}

}  // namespace

Config Config::from_environment() {
  Config config;
  config.directory = text("KVFERRY_FAKE_CUDA_DIR");
  config.machine_devices = static_cast<int>(number("KVFERRY_FAKE_CUDA_DEVICES", 1));
  config.visible = visible_devices(config.machine_devices);
  config.memory_bytes = number("KVFERRY_FAKE_CUDA_MEMORY_MB", 1024) << 20;
  config.granularity = number("KVFERRY_FAKE_CUDA_GRANULARITY_KB", 2048) << 10;
  config.fabric_granularity =
      number("KVFERRY_FAKE_CUDA_FABRIC_GRANULARITY_KB", config.granularity >> 10) << 10;
  config.version = static_cast<int>(number("KVFERRY_FAKE_CUDA_VERSION", 13000));
  config.seed = number("KVFERRY_FAKE_CUDA_SEED", 1);
  config.delay_us = number("KVFERRY_FAKE_CUDA_DELAY_US", 100);
  config.host_visible = number("KVFERRY_FAKE_CUDA_HOST_VISIBLE", 0) != 0;
  for (const std::string& feature : split(text("KVFERRY_FAKE_CUDA_LACKS"), ',')) {
    config.lacks.insert(feature);
  }
  const std::vector<std::string> fail = split(text("KVFERRY_FAKE_CUDA_FAIL"), ':');
  if (fail.size() == 3) {
    config.fail_function = fail[0] == "*" ? "" : fail[0];
    config.fail_nth = std::strtoull(fail[1].c_str(), nullptr, 10);
    config.fail_code = std::atoi(fail[2].c_str());
  }
  return config;
}

}  // namespace kvferry::fake_cuda
