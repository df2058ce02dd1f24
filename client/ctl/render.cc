#include "client/ctl/render.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <map>
#include <vector>

#include "client/ctl/table.h"

namespace kvferry::ctl {
namespace {

std::string date_of(int64_t seconds_since_1970) {
  const auto when = static_cast<time_t>(seconds_since_1970);
  tm parts{};
  char out[32];
  if (::gmtime_r(&when, &parts) == nullptr ||
      ::strftime(out, sizeof out, "%Y-%m-%dT%H:%M:%SZ", &parts) == 0)
    return std::to_string(seconds_since_1970) + " s since 1970";
  return out;
}

double seconds_of(const google::protobuf::Duration& duration) {
  return static_cast<double>(duration.seconds()) + static_cast<double>(duration.nanos()) * 1e-9;
}

std::string line(const char* name, const std::string& value) {
  std::string label(name);
  label.resize(std::max<std::size_t>(label.size(), 12), ' ');
  return label + " " + printable(value) + "\n";
}

}  // namespace

Json to_json(const v1::StatusResponse& r) {
  Json arenas = Json::array();
  for (const auto& arena : r.arenas())
    arenas.push_back(
        {{"device", arena.device()}, {"kind", arena.kind()}, {"reason", arena.reason()}});
  Json gpus = Json::array();
  for (const auto& gpu : r.gpus())
    gpus.push_back({{"device", gpu.device()},
                    {"uuid", gpu.uuid()},
                    {"name", gpu.name()},
                    {"up", gpu.up()},
                    {"detail", gpu.detail()}});
  Json numa = Json::array();
  for (const auto& row : r.numa())
    numa.push_back({{"part", row.part()},
                    {"place", row.place()},
                    {"reason", row.reason()},
                    {"problem", row.problem()}});
  return {{"version", r.version()},
          {"commit", r.commit()},
          {"node_id", r.node_id()},
          {"boot_id", r.boot_id()},
          {"uptime_seconds", seconds_of(r.uptime())},
          {"healthy", r.healthy()},
          {"ready", r.ready()},
          {"draining", r.draining()},
          {"reason", r.reason()},
          {"ucx_version", r.ucx_version()},
          {"protocol_min", r.protocol_min()},
          {"protocol_max", r.protocol_max()},
          {"peer_address", r.peer_address()},
          {"http_address", r.http_address()},
          {"sent_bytes", r.sent_bytes()},
          {"received_bytes", r.received_bytes()},
          {"local_bytes", r.local_bytes()},
          {"certificate_expiry",
           r.has_certificate_expiry() ? date_of(r.certificate_expiry().seconds()) : ""},
          {"workers", r.workers()},
          {"transfers", r.transfers()},
          {"links", r.links()},
          {"rails_up", r.rails_up()},
          {"rails_total", r.rails_total()},
          {"rails_restarts", r.rails_restarts()},
          {"arenas", std::move(arenas)},
          {"gpus", std::move(gpus)},
          {"numa", std::move(numa)}};
}

Json to_json(const v1::ListWorkersResponse& r) {
  Json list = Json::array();
  for (const auto& worker : r.workers()) {
    Json pools = Json::array();
    for (const auto& pool : worker.pools())
      pools.push_back({{"name", pool.name()}, {"kind", pool.kind()}, {"bytes", pool.bytes()}});
    Json layouts = Json::array();
    for (const auto& layout : worker.layouts())
      layouts.push_back({{"instance", layout.instance()},
                         {"rank", layout.rank()},
                         {"generation", layout.generation()},
                         {"groups", layout.groups()},
                         {"planes", layout.planes()}});
    list.push_back({{"id", worker.id()},
                    {"name", worker.name()},
                    {"tenant", worker.tenant()},
                    {"role", worker.role()},
                    {"uid", worker.uid()},
                    {"pid", worker.pid()},
                    {"age_seconds", seconds_of(worker.age())},
                    {"transfers", worker.transfers()},
                    {"pools", std::move(pools)},
                    {"layouts", std::move(layouts)}});
  }
  return {{"workers", std::move(list)}};
}

Json to_json(const v1::ListTransfersResponse& r) {
  Json list = Json::array();
  for (const auto& part : r.transfers())
    list.push_back({{"handle", part.handle()},
                    {"id_hash", part.id_hash()},
                    {"id", part.id()},
                    {"tenant", part.tenant()},
                    {"instance", part.instance()},
                    {"worker", part.worker()},
                    {"role", part.role()},
                    {"rank", part.rank()},
                    {"state", part.state()},
                    {"reason", part.reason()},
                    {"memory_in_use", part.memory_in_use()},
                    {"bytes_done", part.bytes_done()},
                    {"bytes_total", part.bytes_total()},
                    {"legs", part.legs()},
                    {"legs_done", part.legs_done()},
                    {"age_seconds", seconds_of(part.age())},
                    {"peer", part.peer()}});
  return {{"transfers", std::move(list)}, {"total", r.total()}};
}

Json to_json(const v1::ListPeersResponse& r) {
  Json list = Json::array();
  for (const auto& peer : r.peers()) {
    Json lanes = Json::array();
    for (const auto& lane : peer.lanes())
      lanes.push_back({{"lane", lane.lane()},
                       {"rail", lane.rail()},
                       {"up", lane.up()},
                       {"send_bytes_per_second", lane.send_rate()},
                       {"in_flight_bytes", lane.in_flight_bytes()},
                       {"arrived_bytes", lane.arrived_bytes()}});
    list.push_back({{"node_id", peer.node_id()},
                    {"address", peer.address()},
                    {"boot_id", peer.boot_id()},
                    {"state", peer.state()},
                    {"detail", peer.detail()},
                    {"ucx_version", peer.ucx_version()},
                    {"lanes_up", peer.lanes_up()},
                    {"lanes_total", peer.lanes_total()},
                    {"last_heard_seconds",
                     peer.has_last_heard() ? Json(seconds_of(peer.last_heard())) : Json(nullptr)},
                    {"round_trip_seconds",
                     peer.has_round_trip() ? Json(seconds_of(peer.round_trip())) : Json(nullptr)},
                    {"legs", peer.legs()},
                    {"mapped_arenas", peer.mapped_arenas()},
                    {"lent_arenas", peer.lent_arenas()},
                    {"lanes", std::move(lanes)}});
  }
  return {{"peers", std::move(list)}};
}

Json to_json(const v1::ListRailsResponse& r) {
  Json list = Json::array();
  for (const auto& rail : r.rails()) {
    Json settings = Json::object();
    for (const auto& setting : rail.settings()) settings[setting.name()] = setting.value();
    list.push_back({{"index", rail.index()},
                    {"transport", rail.transport()},
                    {"device", rail.device()},
                    {"connection", rail.connection()},
                    {"address", rail.address()},
                    {"up", rail.up()},
                    {"sent_bytes", rail.sent_bytes()},
                    {"received_bytes", rail.received_bytes()},
                    {"send_bytes_per_second", rail.send_rate()},
                    {"errors", rail.errors()},
                    {"restarts", rail.restarts()},
                    {"settings", std::move(settings)}});
  }
  return {{"rails", std::move(list)}};
}

Json to_json(const v1::ReleaseArenasResponse& r) {
  return {{"regions", r.regions()}, {"bytes", r.bytes()}, {"linked", r.linked()}};
}

Json to_json(const v1::ListArenasResponse& r) {
  Json list = Json::array();
  for (const auto& arena : r.arenas())
    list.push_back({{"index", arena.index()},
                    {"device", arena.device()},
                    {"kind", arena.kind()},
                    {"reason", arena.reason()},
                    {"total_bytes", arena.total_bytes()},
                    {"free_bytes", arena.free_bytes()},
                    {"granted_bytes", arena.granted_bytes()},
                    {"landing_bytes", arena.landing_bytes()},
                    {"landed_bytes", arena.landed_bytes()},
                    {"scattering_bytes", arena.scattering_bytes()},
                    {"quarantined_bytes", arena.quarantined_bytes()},
                    {"staging_bytes", arena.staging_bytes()},
                    {"reserved_bytes", arena.reserved_bytes()},
                    {"regions", arena.regions()},
                    {"quarantined_regions", arena.quarantined_regions()},
                    {"segments", arena.segments()},
                    {"mapped", arena.mapped()},
                    {"huge_page_bytes", arena.huge_page_bytes()}});
  Json lent = Json::array();
  for (const auto& regions : r.lent())
    lent.push_back({{"arena", regions.arena()},
                    {"node", regions.node()},
                    {"boot", regions.boot()},
                    {"linked", regions.linked()},
                    {"regions", regions.regions()},
                    {"bytes", regions.bytes()}});
  return {{"arenas", std::move(list)}, {"lent", std::move(lent)}};
}

Json to_json(const v1::CancelTransferResponse& r) {
  Json list = Json::array();
  for (const auto& part : r.transfers())
    list.push_back({{"handle", part.handle()},
                    {"state", part.state()},
                    {"memory_in_use", part.memory_in_use()}});
  return {{"transfers", std::move(list)}};
}

Json to_json(const v1::ReloadResponse& r) {
  Json taken = Json::array();
  for (const std::string& key : r.taken_keys()) taken.push_back(key);
  Json keys = Json::array();
  for (const std::string& key : r.restart_keys()) keys.push_back(key);
  return {
      {"peers", r.peers()}, {"taken_keys", std::move(taken)}, {"restart_keys", std::move(keys)}};
}

Json to_json(const v1::GetConfigResponse& r) {
  Json list = Json::array();
  for (const auto& row : r.values())
    list.push_back({{"key", row.key()},
                    {"value", row.value()},
                    {"origin", row.origin()},
                    {"reloadable", row.reloadable()},
                    {"next", row.next()}});
  return {{"values", std::move(list)}};
}

Json to_json(const v1::TraceResponse& r) {
  Json parts = Json::array();
  for (const auto& part : r.parts()) {
    Json steps = Json::array();
    for (const auto& step : part.steps())
      steps.push_back({{"name", step.name()},
                       {"first_seconds", seconds_of(step.first())},
                       {"last_seconds", seconds_of(step.last())},
                       {"count", step.count()}});
    Json peers = Json::array();
    for (const std::string& peer : part.peers()) peers.push_back(peer);
    parts.push_back({{"node_id", part.node_id()},
                     {"handle", part.handle()},
                     {"id_hash", part.id_hash()},
                     {"role", part.role()},
                     {"rank", part.rank()},
                     {"state", part.state()},
                     {"reason", part.reason()},
                     {"bytes_done", part.bytes_done()},
                     {"bytes_total", part.bytes_total()},
                     {"fragments", part.fragments()},
                     {"chunks", part.chunks()},
                     {"peers", std::move(peers)},
                     {"clock_error_seconds", seconds_of(part.clock_error())},
                     {"steps", std::move(steps)}});
  }
  Json gaps = Json::array();
  for (const auto& gap : r.gaps())
    gaps.push_back({{"node_id", gap.node_id()}, {"detail", gap.detail()}});
  return {
      {"parts", std::move(parts)}, {"gaps", std::move(gaps)}, {"age_seconds", seconds_of(r.age())}};
}

Json to_json(const v1::HealthResponse& r) {
  Json list = Json::array();
  for (const auto& check : r.checks())
    list.push_back({{"name", check.name()}, {"ok", check.ok()}, {"detail", check.detail()}});
  return {{"healthy", r.healthy()}, {"checks", std::move(list)}};
}

std::string status_text(const Json& s) {
  const auto text = [&](const char* key) { return s.at(key).get<std::string>(); };
  const auto number = [&](const char* key) { return std::to_string(s.at(key).get<uint64_t>()); };
  const bool ready = s.at("ready").get<bool>();
  std::string state = s.at("draining").get<bool>() ? "draining" : ready ? "ready" : "not ready";
  state += s.at("healthy").get<bool>() ? ", healthy" : ", unhealthy";
  if (!text("reason").empty()) state += ": " + text("reason");
  const std::string ucx = text("ucx_version").empty() ? "not known yet" : text("ucx_version");
  std::string out =
      line("kvferryd", text("version") + " (" + text("commit") + ")") +
      line("node", text("node_id")) + line("boot", text("boot_id")) + line("state", state) +
      line("uptime", human_duration(s.at("uptime_seconds").get<double>())) +
      line("peers dial", text("peer_address")) + line("metrics", text("http_address")) +
      (text("certificate_expiry").empty()
           ? ""
           : line("certificate", "until " + text("certificate_expiry"))) +
      line("ucx", ucx) +
      line("rails", number("rails_up") + " of " + number("rails_total") +
                        " up, process restarted " + number("rails_restarts") + " times") +
      line("links", number("links")) + line("workers", number("workers")) +
      line("transfers", number("transfers") + " open");
  for (const Json& arena : s.at("arenas"))
    out += line("arena", arena.at("device").get<std::string>() + ": " +
                             arena.at("kind").get<std::string>() + " (" +
                             arena.at("reason").get<std::string>() + ")");
  for (const Json& gpu : s.at("gpus")) {
    const auto of = [&](const char* key) { return gpu.at(key).get<std::string>(); };
    const bool up = gpu.at("up").get<bool>();
    out += line("gpu", of("device") + ": " + of("name") + ", " + of("uuid") +
                           (up ? ", up" : ", down: " + of("detail")));
  }
  for (const Json& row : s.at("numa")) {
    const auto of = [&](const char* key) { return row.at(key).get<std::string>(); };
    out += line("numa", of("part") + ": " + of("place") +
                            (of("reason").empty() ? "" : " (" + of("reason") + ")") +
                            (of("problem").empty() ? "" : ", failed: " + of("problem")));
  }
  return out;
}

std::string workers_text(const Json& json) {
  const auto pools = [](const Json& row) {
    double sum = 0;
    std::map<std::string, uint64_t> kinds;
    for (const Json& pool : row.at("pools")) {
      sum += pool.at("bytes").get<double>();
      ++kinds[printable(pool.at("kind").get<std::string>())];
    }
    std::string out;
    for (const auto& [kind, count] : kinds)
      out += (out.empty() ? "" : " + ") + std::to_string(count) + " " + kind;
    return out.empty() ? "-" : out + ", " + human_bytes(sum);
  };
  const auto layouts = [](const Json& row) {
    std::string out;
    for (const Json& layout : row.at("layouts"))
      out += (out.empty() ? "" : " ") + printable(layout.at("instance").get<std::string>()) + "/" +
             layout.at("rank").dump();
    return out.empty() ? "-" : out;
  };
  return table(json.at("workers"),
               {{"ID", plain("id"), true},
                {"NAME", plain("name")},
                {"TENANT", plain("tenant")},
                {"ROLE", plain("role")},
                {"UID", plain("uid"), true},
                {"PID", plain("pid"), true},
                {"AGE", duration("age_seconds"), true},
                {"TRANSFERS", plain("transfers"), true},
                {"POOLS", pools},
                {"LAYOUTS", layouts}},
               "no workers");
}

std::string transfers_text(const Json& json) {
  const auto done = [](const Json& row) {
    return human_bytes(row.at("bytes_done").get<double>()) + " / " +
           human_bytes(row.at("bytes_total").get<double>());
  };
  const auto legs = [](const Json& row) {
    return row.at("legs_done").dump() + "/" + row.at("legs").dump();
  };
  std::string out = table(json.at("transfers"),
                          {{"HANDLE", plain("handle")},
                           {"HASH", plain("id_hash")},
                           {"INSTANCE", plain("instance")},
                           {"ROLE", plain("role")},
                           {"RANK", plain("rank"), true},
                           {"STATE", plain("state")},
                           {"REASON", plain("reason")},
                           {"DONE", done, true},
                           {"LEGS", legs, true},
                           {"AGE", duration("age_seconds"), true},
                           {"IN USE", plain("memory_in_use")},
                           {"PEER", plain("peer")},
                           {"WORKER", plain("worker")}},
                          "no transfers");
  const std::size_t shown = json.at("transfers").size();
  const auto total = json.at("total").get<uint64_t>();
  if (total > shown)
    out += "(" + std::to_string(shown) + " of " + std::to_string(total) + "; --limit shows more)\n";
  return out;
}

std::string peers_text(const Json& json) {
  const auto lanes = [](const Json& row) {
    return row.at("lanes_up").dump() + "/" + row.at("lanes_total").dump();
  };
  const auto arenas = [](const char* key) {
    return [key](const Json& row) {
      std::string out;
      for (const Json& number : row.at(key)) out += (out.empty() ? "" : ",") + number.dump();
      return out.empty() ? "-" : out;
    };
  };
  return table(json.at("peers"),
               {{"NODE", plain("node_id")},
                {"ADDRESS", plain("address")},
                {"STATE", plain("state")},
                {"LANES", lanes, true},
                {"LEGS", plain("legs"), true},
                {"HEARD", duration("last_heard_seconds"), true},
                {"RTT", duration("round_trip_seconds"), true},
                {"MAPPED", arenas("mapped_arenas")},
                {"LENT", arenas("lent_arenas")},
                {"UCX", plain("ucx_version")},
                {"BOOT", plain("boot_id")},
                {"DETAIL", plain("detail")}},
               "no peers");
}

std::string rails_text(const Json& json) {
  std::string out = table(json.at("rails"),
                          {{"RAIL", plain("index"), true},
                           {"TRANSPORT", plain("transport")},
                           {"DEVICE", plain("device")},
                           {"CONNECTION", plain("connection"), true},
                           {"ADDRESS", plain("address")},
                           {"UP", plain("up")},
                           {"SENT", bytes("sent_bytes"), true},
                           {"RECEIVED", bytes("received_bytes"), true},
                           {"SENDS/S", bytes("send_bytes_per_second"), true},
                           {"ERRORS", plain("errors"), true},
                           {"RESTARTS", plain("restarts"), true}},
                          "no rails");
  for (const Json& rail : json.at("rails")) {
    if (rail.at("settings").empty()) continue;
    out += "rail " + rail.at("index").dump() + " settings:\n";
    for (const auto& [name, value] : rail.at("settings").items())
      out += "  " + printable(name) + "=" + printable(value.get<std::string>()) + "\n";
  }
  return out;
}

std::string arenas_text(const Json& json) {
  const auto busy = [](const Json& row) {
    const auto total = row.at("total_bytes").get<double>();
    return percent(total - row.at("free_bytes").get<double>(), total);
  };
  std::string out = table(json.at("arenas"),
                          {{"ARENA", plain("index"), true},
                           {"DEVICE", plain("device")},
                           {"KIND", plain("kind")},
                           {"MAPPED", plain("mapped")},
                           {"SIZE", bytes("total_bytes"), true},
                           {"HUGE", bytes("huge_page_bytes"), true},
                           {"BUSY", busy, true},
                           {"FREE", bytes("free_bytes"), true},
                           {"GRANTED", bytes("granted_bytes"), true},
                           {"LANDING", bytes("landing_bytes"), true},
                           {"LANDED", bytes("landed_bytes"), true},
                           {"SCATTERING", bytes("scattering_bytes"), true},
                           {"STAGING", bytes("staging_bytes"), true},
                           {"RESERVED", bytes("reserved_bytes"), true},
                           {"QUARANTINED", bytes("quarantined_bytes"), true},
                           {"REGIONS", plain("regions"), true}},
                          "no arenas");
  if (json.at("lent").empty()) return out;
  out += "quarantined until the peer is known to write no more:\n";
  return out + table(json.at("lent"),
                     {{"ARENA", plain("arena"), true},
                      {"NODE", plain("node")},
                      {"BOOT", plain("boot")},
                      {"LINKED", plain("linked")},
                      {"REGIONS", plain("regions"), true},
                      {"BYTES", bytes("bytes"), true}},
                     "");
}

std::string released_text(const Json& json) {
  const auto regions = json.at("regions").get<uint32_t>();
  const auto linked = json.at("linked").get<uint32_t>();
  std::string out = "released " + std::to_string(regions) + " regions, " +
                    human_bytes(json.at("bytes").get<double>()) + "\n";
  if (linked > 0) out += std::to_string(linked) + " regions left: their peer's link is up\n";
  return out;
}

std::string cancel_text(const Json& json) {
  return table(json.at("transfers"),
               {{"HANDLE", plain("handle")},
                {"STATE", plain("state")},
                {"MEMORY IN USE", plain("memory_in_use")}},
               "nothing to cancel");
}

std::string reload_text(const Json& json) {
  std::string out = "reloaded; peers in force: " + std::to_string(json.at("peers").get<uint32_t>());
  const auto list = [&](const char* words, const Json& keys) {
    if (keys.empty()) return;
    out.append("\n").append(words);
    for (const Json& key : keys) out += " " + printable(key.get<std::string>());
  };
  list("changed, and in force now:", json.at("taken_keys"));
  list("changed, but in force from the next start on:", json.at("restart_keys"));
  return out + "\n";
}

std::string config_text(const Json& json) {
  std::string out =
      table(json.at("values"),
            {{"KEY", plain("key")}, {"VALUE", plain("value")}, {"FROM", plain("origin")}},
            "no configuration");
  std::string waiting;
  for (const Json& row : json.at("values")) {
    const std::string next = row.at("next").get<std::string>();
    if (!next.empty())
      waiting +=
          "  " + printable(row.at("key").get<std::string>()) + " = " + printable(next) + "\n";
  }
  if (!waiting.empty()) out += "\nIn force from the next start on:\n" + waiting;
  return out;
}

std::string health_text(const Json& json) {
  std::string out = json.at("healthy").get<bool>() ? "healthy\n" : "unhealthy\n";
  for (const Json& check : json.at("checks")) {
    out += check.at("ok").get<bool>() ? "  ok    " : "  FAIL  ";
    out += printable(check.at("name").get<std::string>());
    const std::string detail = printable(check.at("detail").get<std::string>());
    out += detail.empty() ? "\n" : ": " + detail + "\n";
  }
  return out;
}

std::string trace_text(const Json& json) {
  const auto at = [](const char* key) {
    return [key](const Json& row) {
      const auto seconds = row.at(key).get<double>();
      return (seconds < 0 ? "-" : "+") + human_duration(std::abs(seconds));
    };
  };
  std::string out;
  for (const Json& part : json.at("parts")) {
    const auto text = [&](const char* key) { return printable(part.at(key).get<std::string>()); };
    out += (out.empty() ? "" : "\n") + text("role") + " rank " + part.at("rank").dump() + " on " +
           text("node_id");
    if (!text("handle").empty()) out += ", " + text("handle");
    out += " (" + text("id_hash") + "): " + text("state");
    if (!text("reason").empty()) out += " " + text("reason");
    out += "\n" + human_bytes(part.at("bytes_done").get<double>()) + " of " +
           human_bytes(part.at("bytes_total").get<double>()) + ", " + part.at("chunks").dump() +
           " chunks of " + part.at("fragments").dump() + " pieces of memory\n";
    if (const auto error = part.at("clock_error_seconds").get<double>(); error > 0)
      out += "times may be wrong by " + human_duration(error) + "\n";
    out += table(part.at("steps"),
                 {{"STEP", plain("name")},
                  {"FIRST", at("first_seconds"), true},
                  {"LAST", at("last_seconds"), true},
                  {"COUNT", plain("count"), true}},
                 "no steps");
  }
  for (const Json& gap : json.at("gaps"))
    out +=
        "\n" + printable(gap.at("node_id").get<std::string>()) +
        " did not tell of its side; ask there: " + printable(gap.at("detail").get<std::string>()) +
        "\n";
  return out;
}

}  // namespace kvferry::ctl
