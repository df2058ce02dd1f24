#include "client/bench/measure.h"

#include <ctime>

#include "client/bench/stop.h"

namespace kvferry::bench {
namespace {

double own_cpu_seconds() {
  timespec used{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
  return static_cast<double>(used.tv_sec) + static_cast<double>(used.tv_nsec) * 1e-9;
}

void add(Measured& measured, const RoundResult& result, const CpuUse& cpu) {
  measured.seconds.add(result.seconds);
  measured.verified_bytes += result.cell_bytes;
  measured.untouched_bytes += result.outside_bytes;
  measured.cpu += cpu;
}

// One round of something that moves the hand-off's bytes within this process.
template <typename Move>
Status play_here(HandOff& hand_off, bool verify, bool timed, Measured& measured, Move&& move) {
  if (auto stop = stop_asked()) return *stop;
  if (verify)
    if (Status cleared = hand_off.clear_receivers(); !cleared) return cleared;
  RoundResult result;
  CpuUse cpu;
  const double before = own_cpu_seconds();
  Result<double> seconds = move();
  if (!seconds) return seconds.error();
  cpu.worker_seconds = own_cpu_seconds() - before;
  result.seconds = *seconds;
  if (verify) {
    if (Status right = hand_off.verify({}, result); !right) return right;
  } else {
    result.cell_bytes = measured.payload_bytes;  // the buffers mean nothing
  }
  if (timed) add(measured, result, cpu);
  return {};
}

}  // namespace

double Measured::gbps() const {
  const double median = seconds.median();
  return median > 0 ? static_cast<double>(payload_bytes) / median / 1e9 : 0;
}

Result<Measured> measure(Session& session, HandOff& hand_off, const CommonOptions& options,
                         const OnRound& on_round) {
  Measured measured;
  measured.payload_bytes = hand_off.payload_bytes();
  for (uint32_t i = 0; i < options.warm_up + options.rounds; ++i) {
    const bool timed = i >= options.warm_up;
    const uint32_t round = timed ? i - options.warm_up : i;
    tell_progress(options, (timed ? "round " : "warm-up round ") + std::to_string(round + 1));
    if (i == options.warm_up) {
      auto before = session.scrape();
      if (!before) return before.error();
      measured.before = std::move(*before);
    }
    if (timed && on_round)
      if (Status go = on_round(round, false, {}, {}); !go) return go.error();
    Play play;
    play.spoil = timed && round + 1 == options.rounds ? options.spoil : 0;
    CpuUse cpu;
    auto result = session.play(hand_off, play, &cpu);
    if (!result) return result.error();
    if (!timed) continue;
    add(measured, *result, cpu);
    if (on_round)
      if (Status told = on_round(round, true, *result, cpu); !told) return told.error();
  }
  auto after = session.scrape();
  if (!after) return after.error();
  measured.after = std::move(*after);
  return measured;
}

Places places_of(HandOff& hand_off) {
  const HandOff::View from = hand_off.sender(0);
  const HandOff::View to = hand_off.receiver(0);
  Places places;
  places.from = from.data;
  places.to = to.data;
  const client::Plane& source = from.memory->layout.groups[0].planes[0];
  const client::Plane& destination = to.memory->layout.groups[0].planes[0];
  places.fragment_bytes = source.cell_bytes;
  const std::size_t count = from.memory->block_ids.size();
  for (std::size_t i = 0; i < count; ++i) {
    places.source.push_back(source.offset +
                            static_cast<uint64_t>(from.memory->block_ids[i]) * source.block_stride);
    places.destination.push_back(destination.offset +
                                 static_cast<uint64_t>(to.memory->block_ids[i]) *
                                     destination.block_stride);
  }
  return places;
}

Result<Contest> contest(Session& session, HandOff& hand_off, HandOff* one_piece,
                        const CommonOptions& options) {
  auto socket = RawSocket::make();
  if (!socket) return socket.error();
  const Places places = places_of(hand_off);
  Contest out;
  for (Measured* measured :
       {&out.transfer, &out.one_piece, &out.scattered_memcpy, &out.socket_copy, &out.socket_stream})
    measured->payload_bytes = hand_off.payload_bytes();
  const auto play = [&](HandOff& of, const Play& how, bool timed, Measured& measured) -> Status {
    CpuUse cpu;
    auto result = session.play(of, how, &cpu);
    if (!result) return result.error();
    if (timed) add(measured, *result, cpu);
    return {};
  };
  for (uint32_t i = 0; i < options.warm_up + options.rounds; ++i) {
    const bool timed = i >= options.warm_up;
    tell_progress(options, (timed ? "round " : "warm-up round ") +
                               std::to_string((timed ? i - options.warm_up : i) + 1));
    Play how;
    how.spoil = i + 1 == options.warm_up + options.rounds ? options.spoil : 0;
    if (i == options.warm_up) {
      auto before = session.scrape();
      if (!before) return before.error();
      out.transfer.before = std::move(*before);
    }
    if (Status done = play(hand_off, how, timed, out.transfer); !done) return done.error();
    if (one_piece != nullptr)
      if (Status done = play(*one_piece, {}, timed, out.one_piece); !done) return done.error();
    Status done = play_here(hand_off, true, timed, out.scattered_memcpy,
                            [&] { return Result<double>(scattered_memcpy(places)); });
    if (done)
      done = play_here(hand_off, true, timed, out.socket_copy,
                       [&] { return (*socket)->scattered(places); });
    if (done)
      done = play_here(hand_off, false, timed, out.socket_stream,
                       [&] { return (*socket)->stream(places.bytes()); });
    if (!done) return done.error();
  }
  auto after = session.scrape();
  if (!after) return after.error();
  out.transfer.after = std::move(*after);
  return out;
}

Json measured_json(const Measured& measured) {
  Json out;
  out["payload_bytes"] = measured.payload_bytes;
  out["rounds"] = measured.seconds.count();
  out["gbps"] = measured.gbps();
  out.update(samples_json(measured.seconds, 1e3, "ms"));
  out.erase("count");
  const Json cpu = cpu_json(measured.cpu, measured.moved_bytes());
  out["cpu_s_per_gib"] = cpu["total"];
  out["cpu_s_per_gib_by"] = {
      {"daemon", cpu["daemon"]}, {"rails", cpu["rails"]}, {"worker", cpu["worker"]}};
  out["verified"] = measured.verified();
  out["verified_bytes"] = measured.verified_bytes;
  out["untouched_bytes"] = measured.untouched_bytes;
  return out;
}

}  // namespace kvferry::bench
