// kvferryd's command line.
#pragma once

#include <string>
#include <variant>
#include <vector>

namespace kvferry::ops {

// What the process answers to its starter; part of the command-line contract.
enum ExitCode : int {
  kExitOk = 0,             // stopped as asked
  kExitUsage = 64,         // the command line is wrong
  kExitInternal = 70,      // something that should not happen
  kExitUnwritten = 74,     // standard output could not be written
  kExitConfiguration = 78  // the configuration, or the machine it asks for, is wrong
};

enum class Action { kServe, kCheckConfig, kPrintDefaultConfig, kPrintConfig };

struct Options {
  Action action = Action::kServe;
  std::string config_file;        // empty: none given, all defaults
  std::vector<std::string> sets;  // "section.key=value"
};

// Either what to do, or the code to exit with at once: help and version have been printed on
// stdout, usage errors on stderr.
std::variant<Options, int> parse_options(int argc, const char* const* argv);

// --check-config: prints every problem (stderr) or "configuration ok" with the warnings (stdout);
// returns the exit code.
int check_config(const Options& options);
// --print-config: prints every problem (stderr), or the values in force with their origins
// (stdout); returns the exit code.
int print_config(const Options& options);

}  // namespace kvferry::ops
