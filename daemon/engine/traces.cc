#include "daemon/engine/traces.h"

#include <algorithm>
#include <utility>

namespace kvferry::engine {
namespace {

constexpr std::size_t kMostNodes = 64;

bool wanted(const TraceQuery& query, const std::string& hash, Role role, WorkerId worker,
            uint64_t handle, const std::vector<std::string>& nodes) {
  if (!query.hash.empty() && query.hash != hash) return false;
  if (query.part && *query.part != TraceQuery::Part{role, worker, handle}) return false;
  return !query.node || std::find(nodes.begin(), nodes.end(), *query.node) != nodes.end();
}

}  // namespace

TransferView view_of(const Transfer& transfer, Role role, Time now) {
  TransferView view;
  view.worker = transfer.worker;
  view.client_handle = transfer.record.client_handle;
  view.role = role;
  view.instance = transfer.name.instance;
  view.id = transfer.name.id;
  view.hash = transfer.hash;
  view.nodes = transfer.nodes;
  view.rank = transfer.layout->rank;
  view.state = transfer.record.state;
  view.reason = transfer.record.reason;
  view.released = transfer.record.released;
  view.memory_in_use = transfer.record.memory_in_use;
  view.bytes_done = transfer.record.bytes_done;
  view.bytes_total = transfer.record.bytes_total;
  view.fragments = transfer.fragments;
  view.chunks = transfer.chunks;
  view.age = now - transfer.created;
  return view;
}

TransferTrace trace_of(const Transfer& transfer, Role role, Time now) {
  return {view_of(transfer, role, now), transfer.timeline};
}

void note_node(Transfer& transfer, const Link& link) {
  std::vector<std::string>& nodes = transfer.nodes;
  const std::string node = link.looped() ? std::string() : link.node;
  if (nodes.size() >= kMostNodes || std::find(nodes.begin(), nodes.end(), node) != nodes.end())
    return;
  nodes.push_back(node);
}

bool wanted(const TraceQuery& query, const TransferTrace& trace) {
  const TransferView& view = trace.view;
  return wanted(query, view.hash, view.role, view.worker, view.client_handle, view.nodes);
}

bool wanted(const TraceQuery& query, const Transfer& transfer, Role role) {
  return wanted(query, transfer.hash, role, transfer.worker, transfer.record.client_handle,
                transfer.nodes);
}

void Traces::keep(TransferTrace trace, Time now) {
  while (!kept_.empty() &&
         (kept_.size() >= kMostKeptTraces || kept_.front().since + kTraceLife <= now))
    kept_.pop_front();
  kept_.push_back({now, std::move(trace)});
}

void Traces::find(const TraceQuery& query, Time now, std::vector<TransferTrace>& out) const {
  for (auto it = kept_.rbegin(); it != kept_.rend() && out.size() < query.most; ++it) {
    if (it->since + kTraceLife <= now) return;
    if (wanted(query, it->trace)) out.push_back(it->trace);
  }
}

}  // namespace kvferry::engine
