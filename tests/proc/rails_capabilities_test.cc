// What the rails process says of its UCX, and how its answer is read.
#include "daemon/rails/rails_capabilities.h"

#include <sys/stat.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "tests/proc/rails_harness.h"

namespace kvferry::rails::testing {
namespace {

constexpr Duration kLimit = std::chrono::seconds(20);

// A program of one line, removed at the end.
class Script {
 public:
  explicit Script(const std::string& line) {
    std::string folder = std::filesystem::temp_directory_path() / "kvferry-script-XXXXXX";
    REQUIRE(::mkdtemp(folder.data()) != nullptr);
    folder_ = folder;
    std::ofstream(path()) << "#!/bin/sh\n" << line << "\n";
    REQUIRE(::chmod(path().c_str(), 0700) == 0);
  }
  ~Script() { std::filesystem::remove_all(folder_); }
  Script(const Script&) = delete;
  Script& operator=(const Script&) = delete;
  std::string path() const { return folder_ / "run"; }

 private:
  std::filesystem::path folder_;
};

std::string reason_of(const std::string& executable, Duration limit = kLimit) {
  const auto told = query_capabilities(executable, {}, limit);
  return told ? "none" : told.error().reason + ": " + told.error().message;
}

bool has(const std::vector<std::string>& all, const std::string& one) {
  return std::find(all.begin(), all.end(), one) != all.end();
}

constexpr const char* kGood =
    R"({"ucx_version":"1.22.0","ucx_built_for":"1.22","memory_types":["host","cuda"],)"
    R"("transports":["tcp/lo"],"cuda_missing":""})";

// kGood with a part of it exchanged.
std::string changed(const std::string& from, const std::string& to) {
  std::string text = kGood;
  const auto at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

}  // namespace

TEST_CASE("The rails process says what its UCX has") {
  // Would hide transports if they reached it.
  REQUIRE(::setenv("UCX_TLS", "self", 1) == 0);
  const auto told = query_capabilities(rails_binary(), "/nonexistent/libcuda.so", kLimit);
  ::unsetenv("UCX_TLS");
  if (!told) FAIL(told.error().to_string());
  CHECK(told->executable == rails_binary());
  CHECK(told->ucx_version.rfind(told->ucx_built_for + ".", 0) == 0);
  CHECK(has(told->memory_types, "host"));
  CHECK(has(told->transports, "tcp/lo"));
  CHECK(has(told->transports, "posix/memory"));
  // No distribution's UCX of this release has CUDA.
  if (told->ucx_built_for == "1.13") CHECK_FALSE(told->has_cuda());
  if (!told->has_cuda()) {
    CHECK(told->cuda_missing.find("no transport cuda_copy") != std::string::npos);
    CHECK(told->cuda_missing.find("/nonexistent/libcuda.so") != std::string::npos);
  }
}

TEST_CASE("A rails process whose UCX needs no CUDA for device memory says that it takes it") {
  const auto told = query_capabilities(KVFERRY_RAILS_COHERENT, KVFERRY_FAKE_CUDA_LIBRARY, kLimit);
  REQUIRE(told);
  CHECK(told->has_cuda());
  CHECK(told->cuda_missing.empty());
}

TEST_CASE("A UCX with CUDA is told from one whose CUDA module finds no driver") {
  const char* const rails = std::getenv("KVFERRY_CUDA_RAILS");
  const char* const driver = std::getenv("KVFERRY_CUDA_RAILS_DRIVER");
  if (rails == nullptr || driver == nullptr) {
    WARN("no rails process with CUDA was named");
    return;
  }
  const auto told = query_capabilities(rails, driver, kLimit);
  REQUIRE(told);
  CHECK(told->memory_types == std::vector<std::string>{"host", "cuda"});
  CHECK(has(told->transports, "cuda_copy/cuda"));
  const auto without = query_capabilities(rails, "/nonexistent/libcuda.so", kLimit);
  REQUIRE(without);
  CHECK_FALSE(without->has_cuda());
}

TEST_CASE("Programs that are something else, say too much or never end are told apart") {
  CHECK(reason_of("/nonexistent/kvferry-rails").rfind("RAILS_NOT_FOUND", 0) == 0);
  CHECK(reason_of("/bin/false") ==
        "CAPABILITIES_INVALID: kvferry-rails --capabilities: ended with status 1");
  CHECK(reason_of("/bin/true") ==
        "CAPABILITIES_INVALID: kvferry-rails --capabilities: its answer is no JSON object");
  CHECK(reason_of(Script("exec yes").path()) ==
        "CAPABILITIES_INVALID: kvferry-rails --capabilities: says too much");
  CHECK(reason_of(Script("kill -9 $$").path()) ==
        "CAPABILITIES_INVALID: kvferry-rails --capabilities: was ended by signal 9");
  const Duration little = std::chrono::milliseconds(100);
  CHECK(reason_of(Script("exec sleep 1000").path(), little).rfind("CAPABILITIES_TIMEOUT", 0) == 0);
  // Its answer is there, but not its end.
  const Script stays(std::string("echo '") + kGood + "'; exec >&-; exec sleep 1000");
  CHECK(reason_of(stays.path(), little) ==
        "CAPABILITIES_INVALID: kvferry-rails --capabilities: does not end");
  CHECK(reason_of(Script(std::string("echo '") + kGood + "'").path()) == "none");
}

TEST_CASE("An answer is taken only if it is all that it should be") {
  const auto good = parse_capabilities(kGood);
  REQUIRE(good);
  CHECK(good->ucx_version == "1.22.0");
  CHECK(good->ucx_built_for == "1.22");
  CHECK(good->has_cuda());
  CHECK(good->transports == std::vector<std::string>{"tcp/lo"});
  // A newer program may say more.
  CHECK(parse_capabilities(changed("{", R"({"more":[1],)")));
  const std::string many = [] {
    std::string text = R"("x")";
    for (int i = 0; i < 1024; ++i) text += R"(,"x")";
    return text;
  }();
  const std::vector<std::string> bad = {
      "",
      "[]",
      "null",
      "{",
      std::string(kGood) + "x",
      changed(R"("ucx_version":"1.22.0",)", ""),
      changed(R"("1.22.0")", R"("")"),
      changed(R"("1.22.0")", "1.22"),
      changed(R"("1.22.0")", R"("1.22\n")"),
      changed(R"("1.22.0")", R"("1.22é")"),
      changed(R"("1.22.0")", '"' + std::string(513, '1') + '"'),
      changed(R"(["host","cuda"])", R"("cuda")"),
      changed(R"(["host","cuda"])", "[]"),
      changed(R"(["host","cuda"])", R"(["host",1])"),
      changed(R"("tcp/lo")", many),
      changed(R"("transports":["tcp/lo"],)", ""),
      // With CUDA, and a reason why there is none; and the other way round.
      changed(R"("cuda_missing":"")", R"("cuda_missing":"no driver")"),
      changed(R"(,"cuda"])", "]"),
  };
  for (const std::string& text : bad) {
    INFO(text.substr(0, 200));
    const auto told = parse_capabilities(text);
    REQUIRE_FALSE(told);
    CHECK(told.error().reason == "CAPABILITIES_INVALID");
  }
}

}  // namespace kvferry::rails::testing
