// kvferry_sim: runs seeds.
//
//   kvferry_sim --seeds A..B     runs them all
//   kvferry_sim --seed N         one run; --verbose prints all that happens
//   kvferry_sim --replay N       one run, twice: the traces must be equal
//   kvferry_sim --flaw NAME      with that flaw put back: must be caught (only in the flawed build)
//   kvferry_sim --flaws          every flaw, each in a process of its own
//   --profile NAME               that profile instead of the seed's own
//   --most N                     seeds to try for a flaw
//
// A failing seed prints what is broken and how to run it again; the exit status is 1 then, 3 if the
// engine ended the process on an invariant of its own.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/engine/flaws.h"
#include "tests/sim/world.h"

namespace {

using namespace kvferry;
using namespace kvferry::sim;

struct Options {
  std::optional<uint64_t> seed;
  std::optional<uint64_t> replay;
  uint64_t first = 1;
  uint64_t last = 0;
  bool verbose = false;
  bool all_flaws = false;
  std::optional<Profile> profile;
  std::string flaw;
  uint64_t most = 3000;
};

// For the signal handler: what runs now.
volatile uint64_t running_seed = 0;
volatile bool hunting = false;

void print_signal_safe(const char* text) {
  const ssize_t written = write(STDERR_FILENO, text, std::strlen(text));
  static_cast<void>(written);
}

void on_abort(int) {
  char digits[24];
  char* at = digits + sizeof digits - 1;
  *at = 0;
  for (uint64_t n = running_seed; n != 0 || at == digits + sizeof digits - 1; n /= 10)
    *--at = static_cast<char>('0' + n % 10);
  print_signal_safe(hunting ? "caught by the engine's own invariants at seed " : "FAILED seed ");
  print_signal_safe(at);
  print_signal_safe(hunting ? "\n" : ": the engine ended the process (above)\n  again: --seed ");
  if (!hunting) {
    print_signal_safe(at);
    print_signal_safe(" --verbose\n");
  }
  _exit(hunting ? 0 : 3);
}

// Below this number of seeds a case may be missing by chance.
constexpr uint64_t kSeedsForAll = 1000;

Totals all_runs;

struct Outcome {
  uint64_t hash = 0;
  std::optional<Violation> violation;
};

Outcome run_seed(uint64_t seed, std::optional<Profile> profile, bool verbose,
                 bool check_each_step = true) {
  running_seed = seed;
  Trace trace(verbose);
  Outcome outcome;
  try {
    Scenario scenario = make_scenario(seed, profile);
    scenario.check_each_step = check_each_step;
    World world(std::move(scenario), trace);
    world.run();
    all_runs.add(world.totals);
  } catch (const Violation& violation) {
    outcome.violation = violation;
  }
  outcome.hash = trace.hash();
  return outcome;
}

void report(uint64_t seed, std::optional<Profile> profile, const Violation& violation) {
  std::fflush(stdout);
  std::fprintf(stderr, "FAILED seed %llu: %s: %s\n  again: kvferry_sim --seed %llu --verbose%s%s\n",
               static_cast<unsigned long long>(seed), violation.name.c_str(), violation.what(),
               static_cast<unsigned long long>(seed), profile ? " --profile " : "",
               profile ? std::string(name_of(*profile)).c_str() : "");
}

int run_one(const Options& options) {
  const Outcome outcome = run_seed(*options.seed, options.profile, options.verbose);
  std::printf("seed %llu trace %016llx\n", static_cast<unsigned long long>(*options.seed),
              static_cast<unsigned long long>(outcome.hash));
  if (!outcome.violation) return 0;
  report(*options.seed, options.profile, *outcome.violation);
  return 1;
}

int replay(const Options& options) {
  const Outcome first = run_seed(*options.replay, options.profile, false);
  const Outcome second = run_seed(*options.replay, options.profile, false);
  std::printf(
      "seed %llu traces %016llx %016llx\n", static_cast<unsigned long long>(*options.replay),
      static_cast<unsigned long long>(first.hash), static_cast<unsigned long long>(second.hash));
  return first.hash == second.hash ? 0 : 1;
}

int run_range(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  uint64_t runs = 0;
  uint64_t failures = 0;
  const auto one = [&](uint64_t seed) {
    const Outcome outcome = run_seed(seed, options.profile, false);
    ++runs;
    if (!outcome.violation) return;
    ++failures;
    report(seed, options.profile, *outcome.violation);
  };
  for (uint64_t seed = options.first; seed <= options.last && failures < 20; ++seed) one(seed);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%llu runs, %llu failed, %.1f s\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(failures), took.count());
  all_runs.print();
  if (!options.profile && runs >= kSeedsForAll && !all_runs.missing().empty()) {
    std::fprintf(stderr, "in none of these runs: %s\n", all_runs.missing().c_str());
    return 1;
  }
  return failures == 0 ? 0 : 1;
}

#ifdef KVFERRY_ENGINE_FLAWS

using engine::Flaw;

struct FlawCase {
  std::string_view name;
  Flaw flaw;
  // Where the flaw shows most easily.
  Profile profile;
};
constexpr FlawCase kFlaws[] = {
    {"fresh", Flaw::kFresh, Profile::kLossy},
    {"error_only", Flaw::kErrorOnly, Profile::kLossy},
    {"no_refuse", Flaw::kNoRefuse, Profile::kTiny},
    {"status", Flaw::kStatus, Profile::kLossy},
    {"local_done", Flaw::kLocalDone, Profile::kLossy},
    {"free_shared", Flaw::kFreeShared, Profile::kClean},
    {"share_by_digest", Flaw::kShareByDigest, Profile::kClean},
    {"scatter_quarantined", Flaw::kScatterQuarantined, Profile::kLossy},
    {"free_landing", Flaw::kFreeLanding, Profile::kEnds},
    {"keep_credit", Flaw::kKeepCredit, Profile::kTiny},
    {"no_resync", Flaw::kNoResync, Profile::kLossy},
    {"refuse_by_control", Flaw::kRefuseByControl, Profile::kTiny},
    {"update_first", Flaw::kUpdateFirst, Profile::kLossy},
    {"no_gap_timer", Flaw::kNoGapTimer, Profile::kLossy},
    {"old_numbers", Flaw::kOldNumbers, Profile::kLossy},
    {"keep_reservation", Flaw::kKeepReservation, Profile::kEnds},
    {"withdraw_now", Flaw::kWithdrawNow, Profile::kClean},
    {"write_unread", Flaw::kWriteUnread, Profile::kClean},
    {"release_unpacked", Flaw::kReleaseUnpacked, Profile::kClean},
    {"repay_early", Flaw::kRepayEarly, Profile::kClean},
    {"pages_arena", Flaw::kPagesArena, Profile::kClean},
    {"tail_first", Flaw::kTailFirst, Profile::kLossy},
    {"free_lent", Flaw::kFreeLent, Profile::kEnds},
    {"free_unproven", Flaw::kFreeUnproven, Profile::kEnds},
    {"drain_early", Flaw::kDrainEarly, Profile::kEnds},
    {"keep_written", Flaw::kKeepWritten, Profile::kRevoke},
    {"forget_written", Flaw::kForgetWritten, Profile::kRevoke},
    {"reuse_written", Flaw::kReuseWritten, Profile::kRevoke},
    {"trust_pull", Flaw::kTrustPull, Profile::kLossy},
    {"foreign_ack", Flaw::kForeignAck, Profile::kLossy},
    {"foreign_leg", Flaw::kForeignLeg, Profile::kLossy},
    {"hold_all", Flaw::kHoldAll, Profile::kEnds},
    {"free_by_time", Flaw::kFreeByTime, Profile::kChaos},
    {"deliver_less", Flaw::kDeliverLess, Profile::kRevoke},
    {"forget_stray", Flaw::kForgetStray, Profile::kRevoke},
    {"life_by_boot", Flaw::kLifeByBoot, Profile::kChaos},
    {"sticky", Flaw::kSticky, Profile::kRevoke},
};

int hunt(const FlawCase& flaw, const Options& options) {
  engine::active_flaw = flaw.flaw;
  hunting = true;
  for (uint64_t seed = 1; seed <= options.most; ++seed) {
    // Every third seed as it comes: the profile is a guess.
    const std::optional<Profile> profile =
        options.profile ? options.profile
                        : (seed % 3 == 0 ? std::nullopt : std::optional<Profile>(flaw.profile));
    // Without the engine's own invariants: the flaw must show from outside.
    const Outcome outcome = run_seed(seed, profile, false, false);
    if (!outcome.violation) continue;
    std::printf("%-20.*s caught at seed %llu by '%s': %s\n", static_cast<int>(flaw.name.size()),
                flaw.name.data(), static_cast<unsigned long long>(seed),
                outcome.violation->name.c_str(), outcome.violation->what());
    return 0;
  }
  std::printf("%-20.*s NOT CAUGHT in %llu seeds\n", static_cast<int>(flaw.name.size()),
              flaw.name.data(), static_cast<unsigned long long>(options.most));
  return 1;
}

// Each flaw in a child: the engine ends its process where it notices a flaw itself.
int hunt_all(const Options& options) {
  int missed = 0;
  for (const FlawCase& flaw : kFlaws) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      std::printf("%.*s: ", static_cast<int>(flaw.name.size()), flaw.name.data());
      std::fflush(stdout);
      const int status = hunt(flaw, options);
      std::fflush(stdout);
      _exit(status);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) ||
        WEXITSTATUS(status) != 0)
      ++missed;
  }
  std::printf("%zu flaws, %d not caught\n", std::size(kFlaws), missed);
  return missed == 0 ? 0 : 1;
}

int run_flaws(const Options& options) {
  if (options.all_flaws) return hunt_all(options);
  for (const FlawCase& flaw : kFlaws)
    if (flaw.name == options.flaw) {
      if (!options.seed) return hunt(flaw, options);
      engine::active_flaw = flaw.flaw;
      return run_one(options);
    }
  std::fprintf(stderr, "no flaw is called %s\n", options.flaw.c_str());
  return 64;
}

#else

int run_flaws(const Options&) {
  std::fprintf(stderr, "this build's engine has no flaws: use kvferry_sim_flawed\n");
  return 64;
}

#endif

int usage() {
  std::fprintf(
      stderr,
      "usage: kvferry_sim --seeds A..B | --seed N [--verbose] | --replay N | --flaw NAME | "
      "--flaws\n       [--profile clean|lossy|tiny|revoke|ends|chaos] [--most N]\n");
  return 64;
}

bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    const auto value = [&]() -> const char* { return i + 1 < argc ? argv[++i] : ""; };
    if (name == "--seed") {
      options.seed = std::strtoull(value(), nullptr, 10);
    } else if (name == "--replay") {
      options.replay = std::strtoull(value(), nullptr, 10);
    } else if (name == "--seeds") {
      char* end = nullptr;
      options.first = std::strtoull(value(), &end, 10);
      if (std::strncmp(end, "..", 2) != 0) return false;
      options.last = std::strtoull(end + 2, nullptr, 10);
    } else if (name == "--verbose") {
      options.verbose = true;
    } else if (name == "--flaw") {
      options.flaw = value();
    } else if (name == "--flaws") {
      options.all_flaws = true;
    } else if (name == "--most") {
      options.most = std::strtoull(value(), nullptr, 10);
    } else if (name == "--profile") {
      options.profile = profile_named(value());
      if (!options.profile) return false;
    } else {
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Options options;
  if (!parse(argc, argv, options)) return usage();
  std::signal(SIGABRT, on_abort);
  if (!options.flaw.empty() || options.all_flaws) return run_flaws(options);
  if (options.seed) return run_one(options);
  if (options.replay) return replay(options);
  if (options.last >= options.first) return run_range(options);
  return usage();
}
