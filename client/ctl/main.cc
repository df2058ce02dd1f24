// kvferryctl: what an operator asks a daemon, over its admin socket.
#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include "client/ctl/doctor.h"
#include "client/ctl/live.h"
#include "client/ctl/plan.h"
#include "client/ctl/render.h"
#include "client/ctl/screen.h"
#include "kvferry/v1/admin.grpc.pb.h"

namespace kvferry::ctl {
namespace {

enum ExitCode : int {
  kOk = 0,
  kRefused = 1,      // health: unhealthy or out of reach; else: the daemon answered with an error
  kUsage = 64,       // the command line is wrong
  kUnwritten = 74,   // standard output could not be written
  kUnavailable = 69  // no daemon answers, or it does not serve what was asked
};

// For the busiest of them.
constexpr uint32_t kAllTransfers = 100'000;

struct Arguments {
  std::string socket = "/run/kvferry/admin.sock";
  double timeout_seconds = 5;
  bool json = false;
  uint32_t limit = 0;
  std::string selector;
  std::string node;
  std::string boot;
  std::optional<double> drain_seconds;
  // Of live views: between pictures, and how many; 0: until the daemon is gone, or a signal.
  double interval_seconds = 1;
  uint32_t pictures = 0;
  uint32_t rows = 15;
  PlanOptions plan;
  DoctorOptions doctor;
};

class Session {
 public:
  explicit Session(const Arguments& arguments) : arguments_(arguments) {
    grpc::ChannelArguments channel;
    // Other gRPC stacks refuse the path as an authority.
    channel.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "localhost");
    channel.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    channel.SetMaxReceiveMessageSize(64 * 1024 * 1024);
    stub_ = v1::Admin::NewStub(grpc::CreateCustomChannel(
        "unix:" + arguments.socket, grpc::InsecureChannelCredentials(), channel));
  }

  template <typename Request, typename Response>
  using Method = grpc::Status (v1::Admin::Stub::*)(grpc::ClientContext*, const Request&, Response*);

  template <typename Request, typename Response>
  grpc::Status call(Method<Request, Response> method, const Request& request, Response& response) {
    grpc::ClientContext context;
    context.set_deadline(
        std::chrono::system_clock::now() +
        std::chrono::milliseconds(static_cast<int64_t>(arguments_.timeout_seconds * 1000)));
    return (stub_.get()->*method)(&context, request, &response);
  }

  // Calls and prints; the exit code.
  template <typename Request, typename Response>
  int show(Method<Request, Response> method, const Request& request,
           std::string (*text)(const Json&)) {
    Response response;
    const grpc::Status status = call(method, request, response);
    if (!status.ok()) return tell(status);
    print(to_json(response), text);
    return kOk;
  }

  int health() {
    v1::HealthResponse response;
    const grpc::Status status = call(&v1::Admin::Stub::Health, v1::HealthRequest(), response);
    if (!status.ok()) {
      tell(status);
      return kRefused;
    }
    print(to_json(response), health_text);
    return response.healthy() ? kOk : kRefused;
  }

  // What the machine's checks want to know of a daemon; nothing if none answers.
  std::optional<DaemonFacts> facts() {
    v1::StatusResponse status;
    if (!call(&v1::Admin::Stub::Status, v1::StatusRequest(), status).ok()) return std::nullopt;
    DaemonFacts out;
    out.version = status.version();
    out.healthy = status.healthy();
    out.reason = status.reason();
    out.ucx_version = status.ucx_version();
    for (const auto& arena : status.arenas())
      out.arenas.push_back(arena.device() + " " + arena.kind());
    v1::ListRailsResponse rails;
    if (call(&v1::Admin::Stub::ListRails, v1::ListRailsRequest(), rails).ok())
      for (const auto& rail : rails.rails())
        if (rail.up()) out.transports.push_back(rail.transport());
    return out;
  }

  int doctor(DoctorOptions options) {
    options.admin = arguments_.socket;
    const Findings findings = run_doctor(
        *this_system(), options, facts(),
        [](const ChildRequest& request) { return run_child("/proc/self/exe", request); },
        installed_rails(options));
    if (arguments_.json)
      std::cout << doctor_json(findings).dump(2, ' ', false, Json::error_handler_t::replace)
                << "\n";
    else
      std::cout << doctor_text(findings);
    return doctor_exit(findings) == 0 ? kOk : kRefused;
  }

  // Transfers with their progress, again and again.
  int watch() {
    return live([this](Sample& sample) { return take_transfers(sample, arguments_.limit); },
                watch_json, watch_text);
  }

  // All there is to see of the daemon, again and again.
  int top() {
    return live([this](Sample& sample) { return take_all(sample); },
                [this](const Sample& before, const Sample& now) {
                  return top_json(before, now, arguments_.rows);
                },
                top_text);
  }

  // Waits as long as the daemon does, whatever --timeout says.
  int drain(std::optional<double> limit_seconds) {
    constexpr std::chrono::hours kLongest(25);
    v1::DrainRequest request;
    if (limit_seconds) {
      const double whole = std::floor(*limit_seconds);
      request.mutable_limit()->set_seconds(static_cast<int64_t>(whole));
      request.mutable_limit()->set_nanos(static_cast<int32_t>((*limit_seconds - whole) * 1e9));
    }
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kLongest);
    v1::DrainResponse response;
    const grpc::Status status = stub_->Drain(&context, request, &response);
    if (!status.ok()) return tell(status);
    std::cout << (arguments_.json ? "{}\n" : "drained: no transfer is left\n");
    return kOk;
  }

 private:
  // Every picture is of two samples, so the first one comes after an interval.
  template <typename Take, typename Make>
  int live(const Take& take, const Make& make, std::string (*text)(const Json&)) {
    const Screen screen;
    const auto interval = std::chrono::duration_cast<std::chrono::steady_clock::duration>(
        std::chrono::duration<double>(arguments_.interval_seconds));
    Sample before;
    if (const grpc::Status status = take(before); !status.ok()) return tell(status);
    auto next = std::chrono::steady_clock::now();
    for (uint32_t shown = 0; arguments_.pictures == 0 || shown < arguments_.pictures; ++shown) {
      next = std::max(next + interval, std::chrono::steady_clock::now());
      std::this_thread::sleep_until(next);
      Sample now;
      if (const grpc::Status status = take(now); !status.ok()) return tell(status);
      const Json picture = make(before, now);
      if (arguments_.json)
        std::cout << picture.dump(-1, ' ', false, Json::error_handler_t::replace) << "\n"
                  << std::flush;
      else
        screen.show(text(picture));
      if (!std::cout) break;
      before = std::move(now);
    }
    return kOk;
  }

  template <typename Request, typename Response>
  grpc::Status take(Method<Request, Response> method, const Request& request, Json& out) {
    Response response;
    grpc::Status status = call(method, request, response);
    if (status.ok()) out = to_json(response);
    return status;
  }
  grpc::Status take_transfers(Sample& sample, uint32_t limit) {
    v1::ListTransfersRequest request;
    request.set_limit(limit);
    sample.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    return take(&v1::Admin::Stub::ListTransfers, request, sample.transfers);
  }
  grpc::Status take_all(Sample& sample) {
    using Stub = v1::Admin::Stub;
    grpc::Status status = take_transfers(sample, kAllTransfers);
    if (status.ok()) status = take(&Stub::Status, v1::StatusRequest(), sample.status);
    if (status.ok()) status = take(&Stub::ListWorkers, v1::ListWorkersRequest(), sample.workers);
    if (status.ok()) status = take(&Stub::ListRails, v1::ListRailsRequest(), sample.rails);
    if (status.ok()) status = take(&Stub::ListArenas, v1::ListArenasRequest(), sample.arenas);
    return status;
  }

  void print(const Json& json, std::string (*text)(const Json&)) const {
    std::cout << (arguments_.json ? json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"
                                  : text(json));
  }

  int tell(const grpc::Status& status) const {
    const grpc::StatusCode code = status.error_code();
    // A daemon that stops cancels what is asked of it.
    const bool out_of_reach =
        code == grpc::StatusCode::UNAVAILABLE || code == grpc::StatusCode::CANCELLED;
    std::cerr << "kvferryctl: "
              << (out_of_reach ? "no daemon answers on " + arguments_.socket + ": " : std::string())
              << status.error_message() << "\n";
    return out_of_reach || code == grpc::StatusCode::UNIMPLEMENTED ? kUnavailable : kRefused;
  }

  const Arguments& arguments_;
  std::unique_ptr<v1::Admin::Stub> stub_;
};

using Run = std::function<int(Session&)>;

// One verb without arguments of its own.
struct Verb {
  const char* name;
  const char* help;
  Run run;
};

template <typename Request, typename Response>
Run shows(Session::Method<Request, Response> method, std::string (*text)(const Json&)) {
  return [=](Session& session) { return session.show(method, Request(), text); };
}

constexpr double kShortestInterval = 0.05;
constexpr double kLongestInterval = 3600;

double parse_interval(const std::string& text) {
  double seconds = 0;
  const char* const end = text.data() + text.size();
  const auto read = std::from_chars(text.data(), end, seconds);
  if (read.ec != std::errc{} || read.ptr != end || !(seconds >= kShortestInterval) ||
      seconds > kLongestInterval)
    throw CLI::ValidationError("--watch", "must be from 0.05 to 3600 seconds");
  return seconds;
}

// The code, unless the answer was lost.
int written(int code) {
  if (code != kOk || std::cout.flush()) return code;
  std::cerr << "kvferryctl: standard output could not be written\n";
  return kUnwritten;
}

int run(int argc, const char* const* argv) {
  using Stub = v1::Admin::Stub;
  Arguments arguments;
  Run chosen;
  CLI::App app("kvferryctl: looks at and steers a kvferry daemon");
  app.fallthrough();
  app.require_subcommand(1);
  app.add_option("--socket", arguments.socket, "The daemon's admin socket")
      ->capture_default_str()
      ->envname("KVFERRY_ADMIN_SOCKET");
  app.add_option("--timeout", arguments.timeout_seconds, "Seconds to wait for the answer")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 3600.0));
  app.add_flag("--json", arguments.json, "Print JSON: sizes in bytes, times in seconds");
  app.add_flag_callback(
      "--version",
      [] {
        std::cout << "kvferryctl " << KVFERRY_VERSION << "\n";
        throw CLI::Success();
      },
      "Print the version and exit");
  app.footer(
      "Exit codes: 0 done, 1 refused by the daemon (health, doctor: not well), 64 usage,\n"
      "65 a file is wrong, 69 no daemon answers or this release does not serve the command,\n"
      "74 standard output could not be written.");

  const Verb verbs[] = {
      {"status", "What the daemon is and how it fares", shows(&Stub::Status, status_text)},
      {"workers", "Attached workers, their pools and layouts",
       shows(&Stub::ListWorkers, workers_text)},
      {"peers", "Other daemons and the links to them", shows(&Stub::ListPeers, peers_text)},
      {"rails", "Network rails, the settings in force", shows(&Stub::ListRails, rails_text)},
      {"health", "Exits 0 if the daemon is healthy, else 1",
       [](Session& session) { return session.health(); }},
      {"reload", "Read the configuration again; what is not good as a whole changes nothing",
       [](Session& session) {
         return session.show(&Stub::Reload, v1::ReloadRequest(), reload_text);
       }},
      {"config", "What the daemon runs with, and where each value comes from",
       shows(&Stub::GetConfig, config_text)},
  };
  for (const Verb& verb : verbs)
    app.add_subcommand(verb.name, verb.help)->callback([&] { chosen = verb.run; });

  auto* transfers = app.add_subcommand("transfers", "Transfers with a side on this daemon");
  transfers->add_option("--limit", arguments.limit, "At most so many (default 1000)");
  std::string watch;
  auto* watching = transfers->add_option(
      "--watch", watch, "Show progress, again and again: each SECONDS (default 1)");
  watching->expected(0, 1)->type_name("[SECONDS]");
  transfers->add_option("--count", arguments.pictures, "With --watch: so often, then end")
      ->needs(watching)
      ->check(CLI::Range(1U, 1'000'000U));
  transfers->callback([&, watching] {
    if (watching->count() > 0) {
      if (!watch.empty()) arguments.interval_seconds = parse_interval(watch);
      chosen = [](Session& session) { return session.watch(); };
      return;
    }
    chosen = [&](Session& session) {
      v1::ListTransfersRequest request;
      request.set_limit(arguments.limit);
      return session.show(&Stub::ListTransfers, request, transfers_text);
    };
  });
  auto* top = app.add_subcommand("top", "A live view of the daemon: rates, rails, transfers");
  top->add_option("--interval", arguments.interval_seconds, "Seconds between pictures")
      ->capture_default_str()
      ->check(CLI::Range(kShortestInterval, kLongestInterval));
  auto* count = top->add_option("--count", arguments.pictures, "End after so many pictures")
                    ->check(CLI::Range(1U, 1'000'000U));
  top->add_flag_callback(
         "--once", [&] { arguments.pictures = 1; }, "End after one picture")
      ->excludes(count);
  top->add_option("--rows", arguments.rows, "Show so many transfers, the busiest")
      ->capture_default_str();
  top->callback([&] { chosen = [](Session& session) { return session.top(); }; });
  auto* arenas = app.add_subcommand("arenas", "Bounce memory by state");
  auto* release = arenas->add_subcommand(
      "release", "Say that a peer on another machine is gone: what was lent to it is used again");
  release->add_option("--node", arguments.node, "The peer's node id");
  release->add_option("--boot", arguments.boot,
                      "Only this life of its daemon, as \"arenas\" shows it");
  arenas->callback([&, release] {
    if (!release->parsed()) chosen = shows(&Stub::ListArenas, arenas_text);
  });
  release->callback([&] {
    chosen = [&](Session& session) {
      v1::ReleaseArenasRequest request;
      request.set_node(arguments.node);
      request.set_boot(arguments.boot);
      return session.show(&Stub::ReleaseArenas, request, released_text);
    };
  });
  auto* drain =
      app.add_subcommand("drain", "Stop taking work for good, and wait until what runs has ended");
  drain
      ->add_option("--limit", arguments.drain_seconds,
                   "Seconds until what still runs fails (default: the daemon's drain.limit)")
      ->check(CLI::Range(0.0, 86400.0));
  drain->callback(
      [&] { chosen = [&](Session& session) { return session.drain(arguments.drain_seconds); }; });
  auto* cancel = app.add_subcommand("cancel", "End a transfer on behalf of its worker");
  cancel->add_option("transfer", arguments.selector, "A handle or hash from \"transfers\"")
      ->required();
  cancel->callback([&] {
    chosen = [&](Session& session) {
      v1::CancelTransferRequest request;
      request.set_selector(arguments.selector);
      return session.show(&Stub::CancelTransfer, request, cancel_text);
    };
  });
  auto* trace =
      app.add_subcommand("trace", "When each step of a transfer was taken, here and at its peers");
  trace->add_option("transfer", arguments.selector, "A handle or hash from \"transfers\"")
      ->required();
  trace->callback([&] {
    chosen = [&](Session& session) {
      v1::TraceRequest request;
      request.set_selector(arguments.selector);
      return session.show(&Stub::Trace, request, trace_text);
    };
  });
  auto* plan = app.add_subcommand("plan", "What a transfer between two layouts would move");
  plan->add_option("--sender", arguments.plan.sender_file,
                   "File with the sending instance, its ranks' layouts and blocks (JSON); - is\n"
                   "standard input")
      ->required();
  plan->add_option("--receiver", arguments.plan.receiver_file,
                   "File with the receiving instance (JSON)")
      ->required();
  plan->add_flag("--fragments", arguments.plan.fragments,
                 "List every piece that is contiguous on both sides");
  plan->add_flag("--text", arguments.plan.text, "Print the text that each leg's digest is made of");
  plan->footer(
      "Works without a daemon. Exits 65 where a file is wrong or the instances do not fit,\n"
      "1 where the sender's blocks do not cover what the receiver needs.");
  plan->callback([&] {
    if (arguments.plan.sender_file == "-" && arguments.plan.receiver_file == "-")
      throw CLI::ValidationError("plan", "only one of --sender and --receiver can be stdin");
    chosen = [&](Session&) {
      arguments.plan.json = arguments.json;
      return plan_transfer(arguments.plan, std::cout, std::cerr);
    };
  });

  auto* doctor = app.add_subcommand("doctor", "What on this machine stands in kvferry's way");
  doctor
      ->add_option("--worker-socket", arguments.doctor.lifeline, "The socket where workers attach")
      ->capture_default_str()
      ->envname("KVFERRY_SOCKET");
  doctor->add_option("--cuda-driver", arguments.doctor.cuda_driver,
                     "The CUDA driver's library (default: KVFERRY_CUDA_DRIVER, or libcuda.so.1)");
  doctor->footer(
      "Tries every way of sharing GPU memory with a second process; changes nothing.\n"
      "Each line is OK, note or PROBLEM. Exits 1 if there is a problem.");
  doctor->callback(
      [&] { chosen = [&](Session& session) { return session.doctor(arguments.doctor); }; });

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return written(app.exit(error, std::cout, std::cerr) == 0 ? kOk : kUsage);
  }
  Session session(arguments);
  return written(chosen(session));
}

}  // namespace
}  // namespace kvferry::ctl

int main(int argc, char** argv) {
  // Of doctor, for itself: see doctor_child.h.
  if (argc == 2 && std::string_view(argv[1]) == kvferry::ctl::kChildCommand)
    return kvferry::ctl::child_main();
  return kvferry::ctl::run(argc, argv);
}
