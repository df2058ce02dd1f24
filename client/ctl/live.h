// What `transfers --watch` and `top` show: two samples of a daemon, some time apart, made into
// rates. Pure functions.
#pragma once

#include <string>

#include "client/ctl/table.h"

namespace kvferry::ctl {

// The daemon's answers as JSON (render.h), all of about one moment.
struct Sample {
  double seconds = 0;  // of a clock that goes on evenly
  Json status;         // null for transfers alone, as the next three
  Json workers;
  Json rails;
  Json arenas;
  Json transfers;
};

// {"transfers": [...], "total": n, "interval_seconds": s}: each transfer with bytes_per_second and
// eta_seconds, which are null where they are not known: it was not there before, or stands still.
Json watch_json(const Sample& before, const Sample& now);
std::string watch_text(const Json& watch);

// All of it, transfers by state and the busiest `most` of them. Rates are null where the daemon has
// been started anew in between.
Json top_json(const Sample& before, const Sample& now, std::size_t most);
std::string top_text(const Json& top);

}  // namespace kvferry::ctl
