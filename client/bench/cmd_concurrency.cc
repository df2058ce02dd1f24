// concurrency: many transfers of mixed size at once, by turns with a single large one.
#include <algorithm>
#include <map>
#include <random>

#include "client/bench/commands.h"

namespace kvferry::bench {
namespace {

constexpr uint64_t kMiB = 1024 * 1024;

// The requests, dealt over sizes and dp groups in an order drawn with the seed.
struct Plan {
  std::vector<Request> requests;
  std::vector<uint32_t> size_mib;  // of each
  uint32_t largest = 0;            // number of one of the largest size
};

Result<Plan> plan_of(const ConcurrencyOptions& options, const HandOff::Options& work,
                     uint64_t seed) {
  // What one token brings to all receivers of a request together.
  uint64_t bytes_per_token = 0;
  for (uint32_t rank = 0; rank < work.receiver.ranks(); ++rank) {
    if (work.receiver.dp_group_of(rank) != 0) continue;
    Shape shape = work.shape;
    shape.tokens = shape.tokens_per_block;
    auto memory = rank_memory(shape, work.receiver, rank, 1, 1);
    if (!memory) return memory.error();
    bytes_per_token += request_bytes(memory->layout, 1);
  }
  Plan plan;
  for (uint32_t i = 0; i < options.transfers; ++i)
    plan.size_mib.push_back(options.sizes_mib[i % options.sizes_mib.size()]);
  std::mt19937_64 random(seed);
  std::shuffle(plan.size_mib.begin(), plan.size_mib.end(), random);
  for (uint32_t i = 0; i < options.transfers; ++i) {
    const uint64_t tokens = std::max<uint64_t>(plan.size_mib[i] * kMiB / bytes_per_token, 1);
    plan.requests.push_back({tokens, i % work.sender.dp_groups(), i % work.receiver.dp_groups()});
  }
  plan.largest = static_cast<uint32_t>(
      std::max_element(plan.size_mib.begin(), plan.size_mib.end()) - plan.size_mib.begin());
  return plan;
}

struct SizeClass {
  Samples seconds;
  Samples fairness;  // one a round
  uint64_t bytes = 0;
};

struct Outcome {
  std::map<uint32_t, SizeClass> classes;  // by MiB
  Samples all;                            // seconds of every transfer
  Samples round_seconds;
  Samples single_seconds;
  CpuUse cpu;
  uint64_t verified_bytes = 0;
};

void add(Outcome& outcome, const Plan& plan, HandOff& hand_off, const RoundResult& result) {
  std::map<uint32_t, std::vector<double>> rates;
  for (uint32_t i = 0; i < plan.requests.size(); ++i) {
    const double seconds = result.request_seconds[i];
    SizeClass& of = outcome.classes[plan.size_mib[i]];
    of.bytes = hand_off.payload_bytes(i);
    of.seconds.add(seconds);
    outcome.all.add(seconds);
    rates[plan.size_mib[i]].push_back(static_cast<double>(of.bytes) / seconds);
  }
  for (const auto& [size, shares] : rates) outcome.classes[size].fairness.add(fairness(shares));
  outcome.round_seconds.add(result.seconds);
  outcome.verified_bytes += result.cell_bytes;
}

double ratio_of(double a, double b) {
  return b > 0 ? a / b : 0;
}

std::string row(const std::string& name, const Samples& seconds, double fairness_index) {
  return line("  %-10s %6zu %8.1f %8.1f %8.1f %8.1f %8.1f %8.1f %8.2f %9.3f", name.c_str(),
              seconds.count(), seconds.mean() * 1e3, seconds.percentile(0.5) * 1e3,
              seconds.percentile(0.9) * 1e3, seconds.percentile(0.95) * 1e3,
              seconds.percentile(0.99) * 1e3, seconds.max() * 1e3,
              ratio_of(seconds.percentile(0.99), seconds.median()), fairness_index);
}

}  // namespace

int run_concurrency(const CommonOptions& common, const ConcurrencyOptions& options) {
  auto session = Session::start(common, common.path);
  if (!session) return fail(session.error(), nullptr);
  HandOff::Options work = (*session)->work();
  work.shape = *model_shape(options.model, 1);  // main has looked at names and pairs
  if (options.layers != 0) work.shape.layers = std::min(work.shape.layers, options.layers);
  work.sender = *parse_topology(options.pair.substr(0, options.pair.find(':')));
  work.receiver = *parse_topology(options.pair.substr(options.pair.find(':') + 1));
  auto plan = plan_of(options, work, common.seed);
  if (!plan) return fail(plan.error(), nullptr);
  work.requests = plan->requests;
  auto hand_off = HandOff::make(work);
  if (!hand_off) return fail(hand_off.error(), session->get());

  Outcome outcome;
  std::vector<Metrics> before;
  for (uint32_t i = 0; i < common.warm_up + common.rounds; ++i) {
    const bool timed = i >= common.warm_up;
    tell_progress(common, timed ? "round " + std::to_string(i - common.warm_up + 1) : "warm-up");
    if (i == common.warm_up) {
      auto scraped = (*session)->scrape();
      if (!scraped) return fail(scraped.error(), session->get());
      before = std::move(*scraped);
    }
    Play alone;
    alone.requests = {plan->largest};
    auto single = (*session)->play(**hand_off, alone, nullptr);
    if (!single) return fail(single.error(), session->get());
    Play together;
    together.spoil = i + 1 == common.warm_up + common.rounds ? common.spoil : 0;
    auto result = (*session)->play(**hand_off, together, timed ? &outcome.cpu : nullptr);
    if (!result) return fail(result.error(), session->get());
    if (!timed) continue;
    outcome.single_seconds.add(single->seconds);
    add(outcome, *plan, **hand_off, *result);
  }
  auto after = (*session)->scrape();
  if (!after) return fail(after.error(), session->get());

  const uint64_t payload = (*hand_off)->payload_bytes();
  const bool verified = outcome.verified_bytes == payload * outcome.round_seconds.count();
  const double total_gbps = static_cast<double>(payload) / outcome.round_seconds.median() / 1e9;
  const double single_gbps = static_cast<double>((*hand_off)->payload_bytes(plan->largest)) /
                             outcome.single_seconds.median() / 1e9;
  Json json;
  json["command"] = "concurrency";
  json["workload"] = std::to_string(options.transfers) + " transfers at once, " + options.model +
                     " with " + std::to_string(work.shape.layers) + " layers, " + options.pair;
  json["path"] = (*session)->path_name();
  json["payload_bytes"] = payload;
  json["rounds"] = outcome.round_seconds.count();
  json["gbps"] = total_gbps;
  json["single_gbps"] = single_gbps;
  json["ratio_to_single"] = ratio_of(total_gbps, single_gbps);
  json["p50_ms"] = outcome.all.median() * 1e3;
  json["p99_ms"] = outcome.all.percentile(0.99) * 1e3;
  double worst = 0;
  std::string table =
      line("  %s over %s; milliseconds", json["workload"].get<std::string>().c_str(),
           (*session)->path_name().c_str());
  table += line("  %-10s %6s %8s %8s %8s %8s %8s %8s %8s %9s", "size", "count", "mean", "p50",
                "p90", "p95", "p99", "max", "p99/p50", "fairness");
  for (const auto& [size, of] : outcome.classes) {
    Json entry = samples_json(of.seconds, 1e3, "ms");
    entry["size_mib"] = size;
    entry["bytes"] = of.bytes;
    entry["p99_to_p50"] = ratio_of(of.seconds.percentile(0.99), of.seconds.median());
    entry["fairness"] = of.fairness.mean();
    worst = std::max(worst, entry["p99_to_p50"].get<double>());
    json["classes"].push_back(entry);
    table += row(std::to_string(size) + " MiB", of.seconds, of.fairness.mean());
  }
  json["worst_p99_to_p50"] = worst;
  json["all"] = samples_json(outcome.all, 1e3, "ms");
  const Json by = cpu_json(outcome.cpu, outcome.verified_bytes);
  json["cpu_s_per_gib"] = by["total"];
  json["cpu_s_per_gib_by"] = by;
  json["verified"] = verified;
  json["verified_bytes"] = outcome.verified_bytes;
  json["stages"] = stages_json(before, *after);
  json["settings"] = settings_json(common);
  json["versions"] = versions_json(*after);
  table += line("  %-22s %.2f GB/s; a single one of %u MiB %.2f GB/s; ratio %.2f", "all together",
                total_gbps, plan->size_mib[plan->largest], single_gbps,
                ratio_of(total_gbps, single_gbps));
  table += cpu_table(outcome.cpu, outcome.verified_bytes);
  table += stages_table(before, *after);
  table += line("  %-22s %s: %llu bytes in %zu transfers", "verified", verified ? "yes" : "NO",
                static_cast<unsigned long long>(outcome.verified_bytes), outcome.all.count());
  return finish(common, json, table, verified);
}

}  // namespace kvferry::bench
