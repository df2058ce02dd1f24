// latency: small transfers whose sender is ready, beside a bare gRPC call.
#include "client/bench/commands.h"
#include "client/bench/echo.h"

namespace kvferry::bench {
namespace {

std::string row(const char* name, const Samples& seconds) {
  return line("  %-22s %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f", name, seconds.mean() * 1e6,
              seconds.percentile(0.5) * 1e6, seconds.percentile(0.9) * 1e6,
              seconds.percentile(0.95) * 1e6, seconds.percentile(0.99) * 1e6, seconds.max() * 1e6);
}

}  // namespace

int run_latency(const CommonOptions& common, const LatencyOptions& options) {
  // The server is a process of its own, made before this one has threads and pools.
  auto echo = Echo::start();
  if (!echo) return fail(echo.error(), nullptr);
  auto session = Session::start(common, common.path);
  if (!session) return fail(session.error(), nullptr);
  HandOff::Options work = (*session)->work();
  work.progress = nullptr;
  work.shape = fragment_shape(options.bytes / options.fragment_bytes, options.fragment_bytes);
  auto hand_off = HandOff::make(work);
  if (!hand_off) return fail(hand_off.error(), session->get());

  Samples transfers;
  Samples calls;
  CpuUse cpu;
  uint64_t verified_bytes = 0;
  std::vector<Metrics> before;
  const uint32_t last = common.warm_up + common.rounds - 1;
  for (uint32_t i = 0; i <= last; ++i) {
    const bool timed = i >= common.warm_up;
    tell_progress(common, timed ? "round " + std::to_string(i - common.warm_up + 1) : "warm-up");
    if (i == common.warm_up) {
      auto scraped = (*session)->scrape();
      if (!scraped) return fail(scraped.error(), session->get());
      before = std::move(*scraped);
    }
    for (uint32_t n = 0; n < options.calls; ++n) {
      auto seconds = (*echo)->call(0);
      if (!seconds) return fail(seconds.error(), session->get());
      if (timed) calls.add(*seconds);
    }
    for (uint32_t n = 0; n < options.calls; ++n) {
      Play play;
      play.sender_first = true;
      play.spoil = i == last && n + 1 == options.calls ? common.spoil : 0;
      auto result = (*session)->play(**hand_off, play, timed ? &cpu : nullptr);
      if (!result) return fail(result.error(), session->get());
      if (!timed) continue;
      transfers.add(result->seconds);
      verified_bytes += result->cell_bytes;
    }
  }
  auto after = (*session)->scrape();
  if (!after) return fail(after.error(), session->get());

  const uint64_t payload = (*hand_off)->payload_bytes();
  const bool verified = verified_bytes == payload * transfers.count();
  const double ratio = transfers.median() / calls.median();
  Json json;
  json["command"] = "latency";
  json["workload"] = std::to_string(options.bytes) + " B in pieces of " +
                     std::to_string(options.fragment_bytes) + " B, sender ready";
  json["path"] = (*session)->path_name();
  json["payload_bytes"] = payload;
  json["transfer"] = samples_json(transfers, 1e6, "us");
  json["grpc_echo"] = samples_json(calls, 1e6, "us");
  json["ratio_p50"] = ratio;
  json["gbps"] = static_cast<double>(payload) / transfers.median() / 1e9;
  json["p50_ms"] = transfers.median() * 1e3;
  json["p99_ms"] = transfers.percentile(0.99) * 1e3;
  const Json by = cpu_json(cpu, verified_bytes);
  json["cpu_s_per_gib"] = by["total"];
  json["cpu_s_per_gib_by"] = by;
  json["verified"] = verified;
  json["verified_bytes"] = verified_bytes;
  json["stages"] = stages_json(before, *after);
  json["settings"] = settings_json(common);
  json["versions"] = versions_json(*after);

  std::string table =
      line("  %s over %s; microseconds", json["workload"].get<std::string>().c_str(),
           (*session)->path_name().c_str());
  table += line("  %-22s %9s %9s %9s %9s %9s %9s", "", "mean", "p50", "p90", "p95", "p99", "max");
  table += row("transfer", transfers);
  table += row("gRPC echo", calls);
  table += line("  %-22s %.1f (of the p50s)", "transfer / echo", ratio);
  table += stages_table(before, *after);
  table += line("  %-22s %s: %llu bytes in %zu transfers", "verified", verified ? "yes" : "NO",
                static_cast<unsigned long long>(verified_bytes), transfers.count());
  return finish(common, json, table, verified);
}

}  // namespace kvferry::bench
