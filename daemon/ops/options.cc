#include "daemon/ops/options.h"

#include <CLI/CLI.hpp>
#include <iostream>

#include "daemon/ops/config.h"
#include "daemon/ops/version.h"

namespace kvferry::ops {

std::variant<Options, int> parse_options(int argc, const char* const* argv) {
  Options options;
  bool check = false;
  bool print_default = false;
  bool print_effective = false;
  bool print_version = false;

  CLI::App app("kvferryd: moves KV cache between this node's workers and other nodes");
  app.add_option("--config", options.config_file, "The configuration file (TOML)")
      ->type_name("FILE");
  app.add_option("--set", options.sets, "Overrides one key; may be repeated")
      ->type_name("SECTION.KEY=VALUE")
      ->allow_extra_args(false);
  app.add_flag("--check-config", check, "Tell every problem of the configuration and exit");
  app.add_flag("--print-default-config", print_default,
               "Print the default configuration with comments and exit");
  app.add_flag("--print-config", print_effective,
               "Print every key as it is in force, with where it comes from, and exit");
  app.add_flag("--version", print_version, "Print the version and exit");
  app.footer(
      "Every key may also be given by the environment as KVFERRY_SECTION_KEY.\n"
      "Order: command line, environment, conf.d beside the file, file, default.\n"
      "Exit codes: 0 stopped as asked, 64 usage, 70 internal error,\n"
      "74 standard output could not be written, 78 configuration.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error, std::cout, std::cerr) == 0 ? kExitOk : kExitUsage;
  }
  if (print_version) {
    std::cout << "kvferryd " << version() << " (" << commit() << ")\n";
    return kExitOk;
  }
  if (int{check} + int{print_default} + int{print_effective} > 1) {
    std::cerr << "--check-config, --print-default-config and --print-config do not go together\n";
    return kExitUsage;
  }
  if (check) options.action = Action::kCheckConfig;
  if (print_default) options.action = Action::kPrintDefaultConfig;
  if (print_effective) options.action = Action::kPrintConfig;
  return options;
}

namespace {

// Problems are told on stderr.
LoadedConfig load(const Options& options) {
  LoadedConfig loaded = load_config({options.config_file, options.sets, current_environment()});
  for (const ConfigProblem& problem : loaded.problems) std::cerr << problem.to_string() << "\n";
  return loaded;
}

}  // namespace

int print_config(const Options& options) {
  const LoadedConfig loaded = load(options);
  if (!loaded.ok()) return kExitConfiguration;
  std::cout << effective_config_text(effective_values(loaded.config, loaded.places));
  return kExitOk;
}

int check_config(const Options& options) {
  const LoadedConfig loaded = load(options);
  if (!loaded.ok()) return kExitConfiguration;
  for (const ConfigProblem& warning : loaded.warnings)
    std::cout << "warning: " << warning.to_string() << "\n";
  std::cout << "configuration ok\n";
  return kExitOk;
}

}  // namespace kvferry::ops
