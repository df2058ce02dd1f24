// Models' KV from GPU to GPU memory by real daemons, as users measure it: kvferry-bench fails
// unless every byte is right.
#include <sys/wait.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

namespace kvferry::testing {
namespace {

struct Run {
  int status = -1;
  std::string output;
};

Run run_bench(const std::string& arguments) {
  // The bench beside this program, wherever both were copied, or of a directory that is named.
  const char* const named = std::getenv("KVFERRY_BIN");
  const std::filesystem::path directory =
      named != nullptr ? named : std::filesystem::read_symlink("/proc/self/exe").parent_path();
  const std::string program = (directory / "kvferry-bench").string();
  Run run;
  FILE* const pipe = ::popen((program + " " + arguments + " 2>&1").c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[4096];
  for (std::size_t n = 0; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;)
    run.output.append(buffer, n);
  const int ended = ::pclose(pipe);
  run.status = WIFEXITED(ended) ? WEXITSTATUS(ended) : -1;
  return run;
}

}  // namespace

TEST_CASE("models' KV between GPU pools of different TP degrees, every byte verified") {
  struct Row {
    const char* model;
    const char* tokens;
    const char* pair;
    const char* memory;
    const char* path;
  };
  const Row row = GENERATE(Row{"llama-3-70b", "100", "tp2:tp4", "cuda", "tcp"},
                           Row{"llama-3-70b", "100", "tp4:tp2", "cuda-vmm", "shm"},
                           Row{"deepseek-r1", "200", "tp2:tp1", "cuda-vmm", "tcp"},
                           Row{"deepseek-r1", "200", "tp1:tp2", "cuda", "local"});
  CAPTURE(row.model, row.pair, row.memory, row.path);
  // Silence is not what is looked for here, and over the fake driver a machine may be slow.
  const Run run = run_bench(std::string("model --model ") + row.model + " --tokens " + row.tokens +
                            " --pair " + row.pair + " --memory " + row.memory + " --path " +
                            row.path + " --rounds 2 --json --set engine.silence_limit=15s");
  INFO(run.output);
  REQUIRE(run.status == 0);
  const auto json = nlohmann::json::parse(run.output);
  CHECK(json["verified"] == true);
  CHECK(json["verified_bytes"] == json["payload_bytes"].get<uint64_t>() * 2);
  CHECK(json["settings"]["memory"] == row.memory);
  CHECK_FALSE(json["settings"]["devices"].get<std::string>().empty());
}

TEST_CASE("a GPU that is not there is an error, never host memory instead") {
  const Run run = run_bench("fragments --fragments 16 --memory cuda --sender-device 1000 --json");
  INFO(run.output);
  CHECK(run.status == 1);
  CHECK(run.output.find("INVALID_DEVICE") != std::string::npos);
}

}  // namespace kvferry::testing
