// fragments and model: one request, handed over again and again.
#include <cstdio>
#include <fstream>
#include <iostream>

#include "client/bench/commands.h"
#include "client/bench/measure.h"

namespace kvferry::bench {
namespace {

using client::Code;
using client::Error;

struct Workload {
  std::string command;
  std::string text;
  HandOff::Options work;
};

Json report_json(const Workload& load, const Session& session, const Measured& measured,
                 const CommonOptions& common, const std::string& devices) {
  Json out;
  out["command"] = load.command;
  out["workload"] = load.text;
  out["path"] = session.path_name();
  out.update(measured_json(measured));
  out["stages"] = stages_json(measured.before, measured.after);
  out["settings"] = settings_json(common);
  if (!devices.empty()) out["settings"]["devices"] = devices;
  out["versions"] = versions_json(measured.after);
  return out;
}

std::string metrics_table(const std::vector<Metrics>& after) {
  std::string out = "  metrics of both daemons\n";
  const std::pair<const char*, const char*> totals[] = {
      {"kvferry_transfers_ended_total", "outcome=\"done\""},
      {"kvferry_transfers_unfinished_total", ""},
      {"kvferry_transfer_bytes_total", "direction=\"sent\""},
      {"kvferry_transfer_bytes_total", "direction=\"received\""},
      {"kvferry_transfer_bytes_total", "direction=\"local\""},
      {"kvferry_chunks_total", "event=\"gathered\""},
      {"kvferry_chunks_total", "event=\"shared\""},
      {"kvferry_chunks_total", "event=\"scattered\""},
      {"kvferry_quarantines_total", ""},
      {"kvferry_messages_dropped_total", ""}};
  for (const auto& [metric, part] : totals) {
    const std::string name = part[0] == 0 ? metric : std::string(metric) + "{" + part + "}";
    out += line("    %-58s %.0f", name.c_str(), metric_sum(after, metric, part));
  }
  return out;
}

std::string report_table(const Workload& load, const Session& session, const Measured& measured,
                         const CommonOptions& common) {
  std::string out;
  out += line("  %-22s %s", "workload", load.text.c_str());
  out += line("  %-22s %.3f GB in %zu rounds over %s", "payload",
              static_cast<double>(measured.payload_bytes) / 1e9, measured.seconds.count(),
              session.path_name().c_str());
  out += line("  %-22s %.2f GB/s (median)", "speed", measured.gbps());
  out += line("  %-22s p50 %.1f ms, p99 %.1f ms", "time", measured.seconds.median() * 1e3,
              measured.seconds.percentile(0.99) * 1e3);
  out += cpu_table(measured.cpu, measured.moved_bytes());
  out += stages_table(measured.before, measured.after);
  out += line("  %-22s %s: %llu bytes of KV, %llu bytes outside untouched", "verified",
              measured.verified() ? "yes" : "NO",
              static_cast<unsigned long long>(measured.verified_bytes),
              static_cast<unsigned long long>(measured.untouched_bytes));
  if (common.show_metrics && !measured.after.empty()) out += metrics_table(measured.after);
  return out;
}

Status write_places(const std::string& path, HandOff& hand_off) {
  const Places places = places_of(hand_off);
  Json out;
  out["fragment_bytes"] = places.fragment_bytes;
  out["sender_pool_bytes"] = hand_off.sender(0).memory->pool_bytes;
  out["receiver_pool_bytes"] = hand_off.receiver(0).memory->pool_bytes;
  out["source"] = places.source;
  out["destination"] = places.destination;
  std::ofstream file(path);
  file << out.dump() << "\n";
  file.close();
  if (!file) return Error{Code::kUnavailable, "BENCH_FILE", "cannot write " + path, "places", {}};
  return {};
}

// Others' rounds come between ours: each waits for a line, and is told in one.
Status step(uint32_t round, bool after, const RoundResult& result, const CpuUse& cpu) {
  if (!after) {
    std::string go;
    if (std::getline(std::cin, go)) return {};
    return Error{Code::kCancelled, "BENCH_INTERRUPTED", "standard input has ended", {}, {}};
  }
  const Json out = {{"round", round},
                    {"seconds", result.seconds},
                    {"cpu_seconds", cpu.daemon_seconds < 0 ? Json(nullptr) : Json(cpu.total())},
                    {"verified_bytes", result.cell_bytes}};
  std::cout << out.dump() << std::endl;
  return {};
}

}  // namespace

int run_fragments(const CommonOptions& common, const FragmentsOptions& options) {
  auto session = Session::start(common, common.path);
  if (!session) return fail(session.error(), nullptr);
  Workload load{
      "fragments",
      std::to_string(options.fragments) + " x " + std::to_string(options.fragment_bytes) + " B",
      (*session)->work()};
  load.work.shape = fragment_shape(options.fragments, options.fragment_bytes);
  auto hand_off = HandOff::make(load.work);
  if (!hand_off) return fail(hand_off.error(), session->get());
  if (!options.places_file.empty())
    if (Status written = write_places(options.places_file, **hand_off); !written)
      return fail(written.error(), nullptr);
  if (options.step) std::cout << Json{{"ready", true}}.dump() << std::endl;
  auto measured = measure(**session, **hand_off, common, options.step ? OnRound(step) : OnRound());
  if (!measured) return fail(measured.error(), session->get());
  const Json json = report_json(load, **session, *measured, common, (*hand_off)->devices());
  if (options.step) {
    std::cout << json.dump() << std::endl;
    return measured->verified() ? kExitOk : kExitFailed;
  }
  return finish(common, json, report_table(load, **session, *measured, common),
                measured->verified());
}

int run_model(const CommonOptions& common, const ModelOptions& options) {
  const bool all = options.model == "all";
  std::vector<Workload> loads;
  auto session = Session::start(common, common.path);
  if (!session) return fail(session.error(), nullptr);
  for (const std::string& name : all ? model_names() : std::vector<std::string>{options.model}) {
    const std::string pair = options.pair.empty() ? usual_pair(name) : options.pair;
    Workload load{"model", name + ", " + std::to_string(options.tokens) + " tokens, " + pair,
                  (*session)->work()};
    // Parsed before: main has refused what cannot be.
    load.work.shape = *model_shape(name, options.tokens);
    if (options.block_tokens != 0) load.work.shape.tokens_per_block = options.block_tokens;
    load.work.sender = *parse_topology(pair.substr(0, pair.find(':')));
    load.work.receiver = *parse_topology(pair.substr(pair.find(':') + 1));
    loads.push_back(std::move(load));
  }
  bool verified = true;
  Json reports = Json::array();
  std::string table;
  for (Workload& load : loads) {
    auto hand_off = HandOff::make(load.work);
    if (!hand_off) return fail(hand_off.error(), session->get());
    auto measured = measure(**session, **hand_off, common);
    if (!measured) return fail(measured.error(), session->get());
    verified = verified && measured->verified();
    reports.push_back(report_json(load, **session, *measured, common, (*hand_off)->devices()));
    if (!all) {
      table = report_table(load, **session, *measured, common);
      continue;
    }
    if (table.empty())
      table = line("  %-44s %9s %9s %9s %9s %9s", ("over " + (*session)->path_name()).c_str(), "GB",
                   "GB/s", "p50 ms", "p99 ms", "CPU s/GiB");
    table += line("  %-44s %9.3f %9.2f %9.1f %9.1f %9.2f", load.text.c_str(),
                  static_cast<double>(measured->payload_bytes) / 1e9, measured->gbps(),
                  measured->seconds.median() * 1e3, measured->seconds.percentile(0.99) * 1e3,
                  measured->cpu.total() * kGiB / static_cast<double>(measured->moved_bytes()));
  }
  if (!all) return finish(common, reports[0], table, verified);
  table += line("  every byte verified: %s", verified ? "yes" : "NO");
  const Json json = {{"command", "model"},
                     {"path", (*session)->path_name()},
                     {"verified", verified},
                     {"models", reports}};
  return finish(common, json, table, verified);
}

}  // namespace kvferry::bench
