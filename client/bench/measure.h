// Rounds of one hand-off, alone or by turns with what else can move the same bytes.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "client/bench/limits.h"
#include "client/bench/session.h"

namespace kvferry::bench {

struct Measured {
  Samples seconds;  // one a timed round
  uint64_t payload_bytes = 0;
  uint64_t verified_bytes = 0;
  uint64_t untouched_bytes = 0;
  CpuUse cpu;
  std::vector<Metrics> before;
  std::vector<Metrics> after;

  bool verified() const { return verified_bytes == payload_bytes * seconds.count(); }
  uint64_t moved_bytes() const { return payload_bytes * seconds.count(); }
  double gbps() const;  // 10^9 bytes a second, of the median round
};

// Called before (false) and after (true) each timed round; an error ends the run.
using OnRound =
    std::function<Status(uint32_t round, bool after, const RoundResult&, const CpuUse&)>;

// Warm-up and timed rounds.
Result<Measured> measure(Session& session, HandOff& hand_off, const CommonOptions& options,
                         const OnRound& on_round = {});

// The same rounds by turns with the limits: within a round, one after the other.
struct Contest {
  Measured transfer;
  Measured one_piece;  // the same bytes as a single fragment; empty unless asked for
  Measured scattered_memcpy;
  Measured socket_copy;    // gather, send, receive, scatter
  Measured socket_stream;  // send and receive only; nothing to verify
};
Result<Contest> contest(Session& session, HandOff& hand_off, HandOff* one_piece,
                        const CommonOptions& options);

// Where the fragments of a hand-off of fragment_shape() lie. Memory of the host only.
Places places_of(HandOff& hand_off);

// What all hand-off reports say: payload_bytes, rounds, gbps, p50_ms, ..., cpu_s_per_gib, verified.
Json measured_json(const Measured& measured);

}  // namespace kvferry::bench
