// compare and sweep: hand-offs beside what the machine does with the same bytes.
#include <cstdio>
#include <fstream>
#include <map>

#include "client/bench/commands.h"
#include "client/bench/measure.h"
#include "client/bench/plot.h"

namespace kvferry::bench {
namespace {

struct Contestant {
  const char* key;
  const char* title;
  Measured Contest::*measured;
};
constexpr Contestant kContestants[] = {
    {"transfer", "kvferry, scattered", &Contest::transfer},
    {"one_piece", "kvferry, one piece", &Contest::one_piece},
    {"scattered_memcpy", "memcpy, scattered", &Contest::scattered_memcpy},
    {"socket_copy", "one socket, scattered", &Contest::socket_copy},
    {"socket_stream", "one socket, no copies", &Contest::socket_stream},
};

// Of the transfer's rate to another's.
double ratio(const Measured& transfer, const Measured& other) {
  return other.gbps() > 0 ? transfer.gbps() / other.gbps() : 0;
}

Json contest_json(const Contest& contest) {
  Json out;
  for (const Contestant& one : kContestants) {
    const Measured& measured = contest.*one.measured;
    if (measured.seconds.count() == 0) continue;
    Json entry = measured_json(measured);
    // A socket's bare stream has nothing to verify.
    if (one.measured == &Contest::socket_stream)
      for (const char* key : {"verified", "verified_bytes", "untouched_bytes"}) entry.erase(key);
    out[one.key] = std::move(entry);
    if (one.measured != &Contest::transfer)
      out["ratios"][std::string("to_") + one.key] = ratio(contest.transfer, measured);
  }
  return out;
}

bool verified(const Contest& contest) {
  for (const Contestant& one : kContestants)
    if (!(contest.*one.measured).verified()) return false;
  return contest.transfer.seconds.count() > 0;
}

std::vector<uint64_t> usual_values(const std::string& over) {
  std::vector<uint64_t> out;
  if (over == "fragment-bytes")
    for (uint64_t v = 512; v <= uint64_t{4} << 20; v *= 2) out.push_back(v);
  if (over == "fragments")
    for (uint64_t v = 1024; v <= 131072; v *= 2) out.push_back(v);
  if (over == "bytes")
    for (uint64_t v = uint64_t{1} << 20; v <= uint64_t{1} << 30; v *= 4) out.push_back(v);
  return out;
}

struct Point {
  uint64_t value = 0;
  uint64_t fragments = 0;
  uint64_t fragment_bytes = 0;
  std::string path;
  Contest contest;
  uint64_t daemon_private_bytes = 0;  // at the end
};

Result<Point> measure_point(Session& session, const CommonOptions& common,
                            const SweepOptions& options, uint64_t value) {
  Point point;
  point.value = value;
  point.path = session.path_name();
  point.fragment_bytes = options.over == "fragment-bytes" ? value : options.fragment_bytes;
  const uint64_t bytes = options.over == "bytes" ? value : options.bytes;
  point.fragments =
      options.over == "fragments" ? value : std::max<uint64_t>(bytes / point.fragment_bytes, 1);
  HandOff::Options work = session.work();
  work.shape = fragment_shape(point.fragments, point.fragment_bytes);
  if (work.shape.bytes() > uint64_t{1} << 30) work.spare = 1.02;  // the machine's memory is finite
  auto hand_off = HandOff::make(work);
  if (!hand_off) return hand_off.error();
  if (options.limits) {
    auto result = contest(session, **hand_off, nullptr, common);
    if (!result) return result.error();
    point.contest = std::move(*result);
  } else {
    auto result = measure(session, **hand_off, common);
    if (!result) return result.error();
    point.contest.transfer = std::move(*result);
  }
  point.daemon_private_bytes = session.private_bytes();
  return point;
}

bool verified(const Point& point, bool limits) {
  return limits ? verified(point.contest) : point.contest.transfer.verified();
}

std::string sweep_row(const Point& point, bool limits) {
  const Measured& transfer = point.contest.transfer;
  std::string out = line("  %-6s %10s %9llu %9.1f %9.3f %9.3f %9.2f %9.1f", point.path.c_str(),
                         binary_text(static_cast<double>(point.fragment_bytes)).c_str(),
                         static_cast<unsigned long long>(point.fragments),
                         static_cast<double>(transfer.payload_bytes) / (1024 * 1024),
                         transfer.seconds.median() * 1e3, transfer.gbps(),
                         transfer.cpu.total() * kGiB /
                             static_cast<double>(std::max<uint64_t>(1, transfer.moved_bytes())),
                         static_cast<double>(point.daemon_private_bytes) / 1e6);
  if (!limits) return out;
  out.pop_back();
  return out + line(" %9.3f %9.3f %7.2f %7.2f", point.contest.scattered_memcpy.gbps(),
                    point.contest.socket_copy.gbps(),
                    ratio(transfer, point.contest.scattered_memcpy),
                    ratio(transfer, point.contest.socket_copy));
}

std::string plot_of(const std::vector<Point>& points, const SweepOptions& options,
                    const CommonOptions& common) {
  Plot plot;
  const bool sizes = options.over != "fragments";
  plot.title = "kvferry: rate by " + options.over;
  plot.subtitle =
      options.over == "fragment-bytes"
          ? binary_text(static_cast<double>(options.bytes)) + "B a transfer"
          : "fragments of " + binary_text(static_cast<double>(options.fragment_bytes)) + "B";
  plot.subtitle += "; median of " + std::to_string(common.rounds) + " rounds; every byte verified";
  plot.x_title = options.over + (sizes ? "" : " of a transfer");
  plot.y_title = "10^9 bytes a second";
  plot.x_in_powers_of_two = true;
  std::map<std::string, PlotLine> paths;
  PlotLine copies{"memcpy, scattered", {}};
  PlotLine sockets{"one socket, scattered", {}};
  for (const Point& point : points) {
    const auto x = static_cast<double>(point.value);
    PlotLine& of = paths[point.path];
    of.name = "kvferry " + point.path;
    of.points.emplace_back(x, point.contest.transfer.gbps());
    // The limits were measured beside every path; the first path's stand for all.
    if (point.path != points.front().path) continue;
    copies.points.emplace_back(x, point.contest.scattered_memcpy.gbps());
    sockets.points.emplace_back(x, point.contest.socket_copy.gbps());
  }
  for (auto& [path, of] : paths) plot.lines.push_back(std::move(of));
  if (options.limits) {
    plot.lines.push_back(std::move(copies));
    plot.lines.push_back(std::move(sockets));
  }
  return to_svg(plot);
}

}  // namespace

int run_compare(const CommonOptions& common, const FragmentsOptions& options) {
  auto session = Session::start(common, common.path);
  if (!session) return fail(session.error(), nullptr);
  HandOff::Options work = (*session)->work();
  work.shape = fragment_shape(options.fragments, options.fragment_bytes);
  auto hand_off = HandOff::make(work);
  if (!hand_off) return fail(hand_off.error(), session->get());
  work.shape = fragment_shape(1, options.fragments * options.fragment_bytes);
  auto one_piece = HandOff::make(work);
  if (!one_piece) return fail(one_piece.error(), session->get());
  auto result = contest(**session, **hand_off, one_piece->get(), common);
  if (!result) return fail(result.error(), session->get());

  const bool all = verified(*result);
  Json json;
  json["command"] = "compare";
  json["workload"] =
      std::to_string(options.fragments) + " x " + std::to_string(options.fragment_bytes) + " B";
  json["path"] = (*session)->path_name();
  json.update(measured_json(result->transfer));
  json["verified"] = all;
  json["contestants"] = contest_json(*result);
  json["ratios"] = json["contestants"]["ratios"];
  json["contestants"].erase("ratios");
  json["settings"] = settings_json(common);
  json["settings"]["socket_piece_bytes"] = RawSocket::kPieceBytes;
  json["versions"] = versions_json(result->transfer.after);

  std::string table =
      line("  %s over %s, %u rounds by turns", json["workload"].get<std::string>().c_str(),
           (*session)->path_name().c_str(), common.rounds);
  table += line("  %-22s %9s %9s %9s %9s %10s", "", "p50 ms", "max ms", "GB/s", "CPU s/GiB",
                "kvferry is");
  for (const Contestant& one : kContestants) {
    const Measured& measured = (*result).*one.measured;
    table += line("  %-22s %9.2f %9.2f %9.2f %9.2f %9.2fx", one.title,
                  measured.seconds.median() * 1e3, measured.seconds.max() * 1e3, measured.gbps(),
                  measured.cpu.total() * kGiB / static_cast<double>(measured.moved_bytes()),
                  ratio(result->transfer, measured));
  }
  table += line("  %-22s %s", "every byte verified", all ? "yes" : "NO");
  return finish(common, json, table, all);
}

int run_sweep(const CommonOptions& common, const SweepOptions& options) {
  const std::vector<uint64_t> values =
      options.values.empty() ? usual_values(options.over) : options.values;
  const std::vector<std::string> paths =
      options.paths.empty() ? std::vector<std::string>{common.path} : options.paths;
  std::vector<Point> points;
  Json versions;
  for (const std::string& path : paths) {
    auto session = Session::start(common, path);
    if (!session) return fail(session.error(), nullptr);
    for (const uint64_t value : values) {
      tell_progress(common, path + ", " + options.over + " " + std::to_string(value));
      auto point = measure_point(**session, common, options, value);
      if (!point) return fail(point.error(), session->get());
      versions = versions_json(point->contest.transfer.after);
      points.push_back(std::move(*point));
    }
  }
  bool all = true;
  Json json;
  json["command"] = "sweep";
  json["over"] = options.over;
  json["paths"] = paths;
  json["rounds"] = common.rounds;
  std::string table = line("  %-6s %10s %9s %9s %9s %9s %9s %9s", "path", "fragment", "count",
                           "MiB", "p50 ms", "GB/s", "CPU s/GiB", "daemon MB");
  if (options.limits) {
    table.pop_back();
    table += line(" %9s %9s %7s %7s", "memcpy", "socket", "/memcpy", "/socket");
  }
  for (const Point& point : points) {
    all = all && verified(point, options.limits);
    Json entry = {{"path", point.path},
                  {"value", point.value},
                  {"fragments", point.fragments},
                  {"fragment_bytes", point.fragment_bytes}};
    entry.update(measured_json(point.contest.transfer));
    if (options.limits) {
      entry["scattered_memcpy_gbps"] = point.contest.scattered_memcpy.gbps();
      entry["socket_copy_gbps"] = point.contest.socket_copy.gbps();
      entry["socket_stream_gbps"] = point.contest.socket_stream.gbps();
    }
    entry["stages"] = stages_json(point.contest.transfer.before, point.contest.transfer.after);
    if (point.daemon_private_bytes > 0) entry["daemon_private_bytes"] = point.daemon_private_bytes;
    json["points"].push_back(std::move(entry));
    table += sweep_row(point, options.limits);
  }
  json["verified"] = all;
  json["settings"] = settings_json(common);
  json["versions"] = versions;
  table += line("  %-22s %s", "every byte verified", all ? "yes" : "NO");
  if (!options.plot.empty()) {
    std::ofstream file(options.plot);
    file << plot_of(points, options, common);
    file.close();
    if (!file) {
      std::fprintf(stderr, "kvferry-bench: cannot write --plot %s\n", options.plot.c_str());
      return kExitFailed;
    }
    json["plot"] = options.plot;
  }
  return finish(common, json, table, all);
}

}  // namespace kvferry::bench
