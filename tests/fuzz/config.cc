// The configuration: a TOML file, then a zero byte, then environment and --set texts with a zero
// byte after each. Whatever is written, every problem has a place and a message, and what is
// accepted holds together.
#include "daemon/ops/config.h"

#include <sys/mman.h>
#include <unistd.h>

#include "daemon/base/unique_fd.h"
#include "tests/fuzz/input.h"

namespace {

using namespace kvferry;

void check(const ops::LoadedConfig& loaded) {
  for (const auto& problem : loaded.problems)
    FUZZ_CHECK(!problem.where.empty() && !problem.message.empty(), "a problem says where and what");
  if (!loaded.ok()) return;
  FUZZ_CHECK(!loaded.config.sockets.empty(), "workers can attach");
  FUZZ_CHECK(ops::least_arena_bytes(loaded.config) > 0, "an arena has a least size");
  for (const auto& socket : loaded.config.sockets)
    FUZZ_CHECK(!socket.path.empty() && !socket.grpc_path.empty(), "a socket has its paths");
}

void check_values(std::string_view text) {
  if (const auto bytes = ops::parse_size(text)) {
    const auto again = ops::parse_size(ops::format_size(*bytes));
    FUZZ_CHECK(again && *again == *bytes, "a size that is written reads as the same");
  }
  if (const auto duration = ops::parse_duration(text)) {
    const auto again = ops::parse_duration(ops::format_duration(*duration));
    FUZZ_CHECK(again && *again == *duration, "a duration that is written reads as the same");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  static const UniqueFd file(::memfd_create("kvferry-fuzz", MFD_CLOEXEC));
  static const std::string path = "/proc/self/fd/" + std::to_string(file.get());
  fuzz::Input in(data, size);
  const auto text = in.until_zero();
  FUZZ_CHECK(::ftruncate(file.get(), 0) == 0, "a file");
  FUZZ_CHECK(::pwrite(file.get(), text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()),
             "its text");
  ops::ConfigSources sources;
  sources.file = path;
  while (!in.empty()) {
    std::string item(fuzz::text_of(in.until_zero()));
    check_values(item);
    const std::size_t equals = item.find('=');
    if (item.starts_with("KVFERRY_") && equals != std::string::npos)
      sources.environment.emplace_back(item.substr(0, equals), item.substr(equals + 1));
    else
      sources.sets.push_back(std::move(item));
  }
  check(ops::load_config(sources));
  return 0;
}
