// From the daemon's answers to JSON for programs and tables for people. Pure functions.
#pragma once

#include <string>

#include "client/ctl/table.h"
#include "kvferry/v1/admin.pb.h"

namespace kvferry::ctl {

// Sizes are bytes, durations seconds; a list stands under its name ({"workers": [...]}).
Json to_json(const v1::StatusResponse& response);
Json to_json(const v1::ListWorkersResponse& response);
Json to_json(const v1::ListTransfersResponse& response);
Json to_json(const v1::ListPeersResponse& response);
Json to_json(const v1::ListRailsResponse& response);
Json to_json(const v1::ListArenasResponse& response);
Json to_json(const v1::ReleaseArenasResponse& response);
Json to_json(const v1::CancelTransferResponse& response);
Json to_json(const v1::HealthResponse& response);
Json to_json(const v1::ReloadResponse& response);
Json to_json(const v1::TraceResponse& response);
Json to_json(const v1::GetConfigResponse& response);

// The same for people, made from the JSON; each ends with a line break.
std::string status_text(const Json& status);
std::string workers_text(const Json& workers);
std::string transfers_text(const Json& transfers);
std::string peers_text(const Json& peers);
std::string rails_text(const Json& rails);
std::string arenas_text(const Json& arenas);
std::string released_text(const Json& released);
std::string cancel_text(const Json& cancelled);
std::string reload_text(const Json& reloaded);
std::string config_text(const Json& config);
std::string health_text(const Json& health);
std::string trace_text(const Json& trace);

}  // namespace kvferry::ctl
