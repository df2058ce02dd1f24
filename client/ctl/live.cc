#include "client/ctl/live.h"

#include <algorithm>
#include <map>
#include <utility>

namespace kvferry::ctl {
namespace {

// Of a counter that may have begun anew; null if it has, or was not there.
Json rate_of(const Json* before, const Json& now, double seconds) {
  if (before == nullptr || before->is_null() || seconds <= 0) return nullptr;
  const auto from = before->get<uint64_t>();
  const auto to = now.get<uint64_t>();
  if (to < from) return nullptr;
  return static_cast<double>(to - from) / seconds;
}

const Json* row_of(const Json& rows, const char* key, const Json& value) {
  for (const Json& row : rows)
    if (row.at(key) == value) return &row;
  return nullptr;
}

bool is_open(const Json& transfer) {
  const auto state = transfer.at("state").get<std::string>();
  return state == "OPEN" || state == "ACTIVE";
}

void add_rate(Json& transfer, const Json* before, double seconds) {
  const Json* const done = before == nullptr ? nullptr : &before->at("bytes_done");
  transfer["bytes_per_second"] = rate_of(done, transfer.at("bytes_done"), seconds);
  transfer["eta_seconds"] = nullptr;
  const auto bytes_done = transfer.at("bytes_done").get<uint64_t>();
  const auto bytes_total = transfer.at("bytes_total").get<uint64_t>();
  const Json& rate = transfer.at("bytes_per_second");
  if (is_open(transfer) && bytes_total > bytes_done && !rate.is_null() && rate.get<double>() > 0)
    transfer["eta_seconds"] = static_cast<double>(bytes_total - bytes_done) / rate.get<double>();
}

// The transfers of `now`, each with its rate.
Json moving(const Json& before, const Json& now, double seconds) {
  std::map<std::string, const Json*> known;
  for (const Json& row : before) known[row.at("handle").get<std::string>()] = &row;
  Json rows = now;
  for (Json& row : rows) {
    const auto it = known.find(row.at("handle").get<std::string>());
    // A handle that names another transfer by now is unlikely, and no rate.
    const bool same = it != known.end() && it->second->at("id_hash") == row.at("id_hash");
    add_rate(row, same ? it->second : nullptr, seconds);
  }
  return rows;
}

std::vector<Column> progress_columns() {
  const auto done = [](const Json& row) {
    return human_bytes(row.at("bytes_done").get<double>()) + " / " +
           human_bytes(row.at("bytes_total").get<double>());
  };
  const auto part = [](const Json& row) {
    return percent(row.at("bytes_done").get<double>(), row.at("bytes_total").get<double>());
  };
  return {{"HANDLE", plain("handle")},
          {"HASH", plain("id_hash")},
          {"ROLE", plain("role")},
          {"RANK", plain("rank"), true},
          {"STATE", plain("state")},
          {"REASON", plain("reason")},
          {"DONE", done, true},
          {"%", part, true},
          {"RATE", rate("bytes_per_second"), true},
          {"ETA", duration("eta_seconds"), true},
          {"AGE", duration("age_seconds"), true},
          {"PEER", plain("peer")},
          {"WORKER", plain("worker")}};
}

std::string counts_text(const Json& counts) {
  std::string out;
  for (const auto& [role, states] : counts.items()) {
    out += "  " + role + ":";
    for (const auto& [state, count] : states.items())
      out += " " + count.dump() + " " + printable(state);
  }
  return out.empty() ? "  none" : out;
}

}  // namespace

Json watch_json(const Sample& before, const Sample& now) {
  const double seconds = now.seconds - before.seconds;
  return {{"transfers",
           moving(before.transfers.at("transfers"), now.transfers.at("transfers"), seconds)},
          {"total", now.transfers.at("total")},
          {"interval_seconds", seconds}};
}

std::string watch_text(const Json& watch) {
  const std::size_t shown = watch.at("transfers").size();
  const auto total = watch.at("total").get<uint64_t>();
  std::string out = table(watch.at("transfers"), progress_columns(), "no transfers");
  if (total > shown)
    out += "(" + std::to_string(shown) + " of " + std::to_string(total) + "; --limit shows more)\n";
  return out;
}

Json top_json(const Sample& before, const Sample& now, std::size_t most) {
  const bool same_life = before.status.at("boot_id") == now.status.at("boot_id");
  const double seconds = same_life ? now.seconds - before.seconds : 0;
  Json rates;
  for (const char* direction : {"sent", "received", "local"}) {
    const std::string key = std::string(direction) + "_bytes";
    rates[std::string(direction) + "_bytes_per_second"] =
        rate_of(&before.status.at(key), now.status.at(key), seconds);
  }
  Json transfers = moving(before.transfers.at("transfers"), now.transfers.at("transfers"), seconds);
  Json counts = Json::object();
  for (const Json& row : transfers) {
    Json& count = counts[row.at("role").get<std::string>()][row.at("state").get<std::string>()];
    count = count.is_null() ? 1 : count.get<uint64_t>() + 1;
  }
  // The fastest first; those that stand still by what is left of them.
  const auto weight = [](const Json& row) {
    const Json& rate = row.at("bytes_per_second");
    const auto done = row.at("bytes_done").get<uint64_t>();
    const auto total = row.at("bytes_total").get<uint64_t>();
    return std::pair(rate.is_null() ? 0.0 : rate.get<double>(),
                     is_open(row) && total > done ? total - done : 0);
  };
  std::stable_sort(transfers.begin(), transfers.end(),
                   [&](const Json& a, const Json& b) { return weight(a) > weight(b); });
  if (transfers.size() > most)
    transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(most), transfers.end());
  Json rails = now.rails.at("rails");
  for (Json& rail : rails) {
    const Json* const old = row_of(before.rails.at("rails"), "index", rail.at("index"));
    for (const char* direction : {"sent", "received"}) {
      const std::string key = std::string(direction) + "_bytes";
      rail[std::string(direction) + "_bytes_per_second"] =
          rate_of(old == nullptr ? nullptr : &old->at(key), rail.at(key), seconds);
    }
    rail.erase("settings");
  }
  return {{"interval_seconds", now.seconds - before.seconds},
          {"status", now.status},
          {"rates", std::move(rates)},
          {"transfers_by_state", std::move(counts)},
          {"transfers_total", now.transfers.at("total")},
          {"transfers", std::move(transfers)},
          {"rails", std::move(rails)},
          {"arenas", now.arenas.at("arenas")},
          {"workers", now.workers.at("workers")}};
}

std::string top_text(const Json& top) {
  const Json& status = top.at("status");
  const auto text = [&](const char* key) { return printable(status.at(key).get<std::string>()); };
  std::string out = "kvferryd " + text("version") + " on " + text("node_id") + ", up " +
                    human_duration(status.at("uptime_seconds").get<double>()) + ": " +
                    (status.at("draining").get<bool>() ? "draining"
                     : status.at("ready").get<bool>()  ? "ready"
                                                       : "not ready") +
                    (status.at("healthy").get<bool>() ? "" : ", unhealthy");
  if (!text("reason").empty()) out += " (" + text("reason") + ")";
  const Json& rates = top.at("rates");
  out += "\nout " + rate("sent_bytes_per_second")(rates) + "   in " +
         rate("received_bytes_per_second")(rates) + "   within the node " +
         rate("local_bytes_per_second")(rates) + "   links " + status.at("links").dump() +
         "   workers " + status.at("workers").dump() + "\n";
  out += "transfers" + counts_text(top.at("transfers_by_state")) + "\n\n";
  const auto busy = [](const Json& row) {
    const auto total = row.at("total_bytes").get<double>();
    return percent(total - row.at("free_bytes").get<double>(), total);
  };
  out += table(top.at("arenas"),
               {{"ARENA", plain("index"), true},
                {"DEVICE", plain("device")},
                {"KIND", plain("kind")},
                {"MAPPED", plain("mapped")},
                {"SIZE", bytes("total_bytes"), true},
                {"BUSY", busy, true},
                {"GRANTED", bytes("granted_bytes"), true},
                {"LANDING", bytes("landing_bytes"), true},
                {"SCATTERING", bytes("scattering_bytes"), true},
                {"STAGING", bytes("staging_bytes"), true},
                {"QUARANTINED", bytes("quarantined_bytes"), true}},
               "no arenas") +
         "\n";
  out += table(top.at("rails"),
               {{"RAIL", plain("index"), true},
                {"TRANSPORT", plain("transport")},
                {"DEVICE", plain("device")},
                {"UP", plain("up")},
                {"OUT", rate("sent_bytes_per_second"), true},
                {"IN", rate("received_bytes_per_second"), true},
                {"ERRORS", plain("errors"), true},
                {"RESTARTS", plain("restarts"), true}},
               "no rails") +
         "\n";
  out += table(top.at("transfers"), progress_columns(), "no transfers");
  const auto total = top.at("transfers_total").get<uint64_t>();
  if (total > top.at("transfers").size())
    out += "(the busiest " + std::to_string(top.at("transfers").size()) + " of " +
           std::to_string(total) + ")\n";
  const auto pools = [](const Json& row) {
    double sum = 0;
    for (const Json& pool : row.at("pools")) sum += pool.at("bytes").get<double>();
    return human_bytes(sum);
  };
  return out + "\n" +
         table(top.at("workers"),
               {{"WORKER", plain("id"), true},
                {"NAME", plain("name")},
                {"TENANT", plain("tenant")},
                {"ROLE", plain("role")},
                {"PID", plain("pid"), true},
                {"TRANSFERS", plain("transfers"), true},
                {"POOLS", pools, true},
                {"AGE", duration("age_seconds"), true}},
               "no workers");
}

}  // namespace kvferry::ctl
