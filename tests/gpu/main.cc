// Skips, with the reason, where there is no GPU.
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "tests/gpu/gpu.h"

int main(int argc, char** argv) {
  // Over the fake driver all processes share the machine of this directory.
  std::string directory =
      (std::filesystem::temp_directory_path() / "kvferry-gpu-ring.XXXXXX").string();
  if (::mkdtemp(directory.data()) == nullptr) return 1;
  ::setenv("KVFERRY_FAKE_CUDA_DIR", directory.c_str(), 0);
  int status = 77;
  const std::string why_not = kvferry::testing::Gpu::why_not();
  if (why_not.empty())
    status = Catch::Session().run(argc, argv);
  else
    std::cout << "skipped: no GPU: " << why_not << "\n";
  std::error_code ignored;
  std::filesystem::remove_all(directory, ignored);
  return status;
}
