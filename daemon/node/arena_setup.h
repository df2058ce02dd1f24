// Which memory this daemon's arenas are made of. For its start; all functions may block for as long
// as memory is zeroed, pinned or tried.
#pragma once

#include <functional>

#include "daemon/base/result.h"
#include "daemon/node/arenas.h"
#include "daemon/node/gpu_setup.h"
#include "daemon/ops/config.h"
#include "daemon/rails/rails_capabilities.h"

namespace kvferry::node {

// Asked at most once, and only if the answer decides something.
using AskRails = std::function<Result<rails::RailsCapabilities>()>;

// Adds to `arenas` one for each device that is up and is to have one, and puts down why the host's
// is of the kind that it is. With kind auto a device that cannot have one goes through host memory,
// with a warning if that is a surprise. Errors, for a kind that was configured: FAILED_PRECONDITION
// CONFIGURATION_ARENA_KIND where it does not work, CONFIGURATION_ARENA_SHARE where it would take
// more than arena.device_share of what is free.
Status add_device_arenas(const ops::Config& config, const Gpu& gpu, const AskRails& ask_rails,
                         Arenas& arenas);

// Then the mapped arenas that [mapped] asks for. Errors as above, and those of Arenas: what is
// configured here must work.
Status add_mapped_arenas(const ops::Config& config, const Gpu& gpu, Arenas& arenas);

}  // namespace kvferry::node
