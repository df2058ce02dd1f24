// The part of `kvferryctl doctor` that has to run in another process: importing memory that its
// parent has on a GPU, as a daemon would. The parent starts itself again with the hidden command
// `doctor-child`, gives one request on standard input and takes one line from standard output.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace kvferry::ctl {

inline constexpr std::size_t kTrialBytes = 64 * 1024;  // that are compared
inline constexpr char kChildCommand[] = "doctor-child";

enum class ChildTask : uint32_t { kImportIpc = 1, kImportFd = 2, kImportFabric = 3 };

struct ChildRequest {
  ChildTask task = ChildTask::kImportIpc;
  std::string cuda_driver;           // the library
  std::array<uint8_t, 16> uuid{};    // the device
  std::array<uint8_t, 64> handle{};  // imports by value
  int fd = -1;                       // imports by descriptor
  uint64_t offset = 0;               // where the trial's bytes begin in the allocation
  uint64_t bytes = 0;                // of the allocation
};

struct ChildAnswer {
  bool ok = false;
  std::string text;  // what it found, or why it could not; one line
};

// The byte at a place of the trial's memory.
constexpr std::byte trial_byte(std::size_t at) {
  return static_cast<std::byte>((at * 131 + at / 256 * 7 + 17) & 0xff);
}

// Starts `program doctor-child`, waits at most some seconds.
ChildAnswer run_child(const std::string& program, const ChildRequest& request);
// The child's side: reads the request, does it, answers; the exit code.
int child_main();

}  // namespace kvferry::ctl
