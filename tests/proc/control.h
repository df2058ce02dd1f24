// kvferryctl, run against a daemon.
#pragma once

#include <array>
#include <catch2/catch.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {

// What `kvferryctl --json WORDS` prints. Blocks until it has ended; fails the test unless it ends
// well.
inline nlohmann::json control(const bench::DaemonProcess& daemon, const std::string& words) {
  const std::string command =
      binary_directory() + "/kvferryctl --json --socket " + daemon.admin_socket() + " " + words;
  std::FILE* const pipe = ::popen(command.c_str(), "re");
  REQUIRE(pipe != nullptr);
  std::string text;
  std::array<char, 4096> buffer{};
  for (std::size_t got = 0; (got = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
    text.append(buffer.data(), got);
  INFO(text);
  REQUIRE(::pclose(pipe) == 0);
  return nlohmann::json::parse(text);
}

}  // namespace kvferry::testing
