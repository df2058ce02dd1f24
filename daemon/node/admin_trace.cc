// kvferryctl trace: the timelines of a transfer's parts here, and what its peers' daemons say of
// theirs; and the same question from a peer.
#include <algorithm>
#include <charconv>
#include <iterator>
#include <set>
#include <utility>

#include "daemon/base/mutex.h"
#include "daemon/engine/traces.h"
#include "daemon/node/admin.h"

namespace kvferry::node {
namespace {

// "s3x17", as transfer_handle() makes it.
std::optional<engine::TraceQuery::Part> parse_handle(std::string_view text) {
  if (text.empty() || (text[0] != 's' && text[0] != 'r')) return std::nullopt;
  engine::TraceQuery::Part part;
  part.role = text[0] == 's' ? engine::Role::kSender : engine::Role::kReceiver;
  const char* const end = text.data() + text.size();
  const auto worker = std::from_chars(text.data() + 1, end, part.worker.value);
  if (worker.ec != std::errc{} || worker.ptr == end || *worker.ptr != 'x') return std::nullopt;
  const auto handle = std::from_chars(worker.ptr + 1, end, part.client_handle);
  if (handle.ec != std::errc{} || handle.ptr != end) return std::nullopt;
  return part;
}

// All parts here of the transfer that the selector names.
std::vector<engine::TransferTrace> find(const engine::Engine& engine, const std::string& selector,
                                        Time now) {
  engine::TraceQuery query;
  query.hash = selector;
  if (const auto part = parse_handle(selector)) {
    engine::TraceQuery one;
    one.part = part;
    const auto found = engine.traces(one, now);
    if (found.empty()) return {};
    query.hash = found.front().view.hash;
  }
  return engine.traces(query, now);
}

const char* name_of_role(engine::Role role) {
  return role == engine::Role::kSender ? "send" : "receive";
}

// A part with the moments of its steps; the clock is this machine's.
struct Moments {
  struct Step {
    std::string name;
    Time first;
    Time last;
    uint64_t count = 0;
  };
  rpc::TracePartInfo part;
  std::vector<Step> steps;
};

Moments moments_of(const engine::TransferTrace& trace, const std::string& node) {
  const engine::TransferView& view = trace.view;
  Moments out;
  out.part.node = node;
  out.part.handle = transfer_handle(view);
  out.part.id_hash = view.hash;
  out.part.role = name_of_role(view.role);
  out.part.rank = view.rank;
  out.part.state = name_of_state(view.state);
  out.part.reason = view.reason;
  out.part.bytes_done = view.bytes_done;
  out.part.bytes_total = view.bytes_total;
  out.part.fragments = view.fragments;
  out.part.chunks = view.chunks;
  for (const std::string& peer : view.nodes) out.part.peers.push_back(peer.empty() ? node : peer);
  for (std::size_t i = 0; i < engine::kSteps; ++i) {
    const auto step = static_cast<engine::Step>(i);
    const engine::StepTimes& times = trace.timeline.of(step);
    if (times.count == 0) continue;
    out.steps.push_back({std::string(name_of(step)), times.first, times.last, times.count});
  }
  return out;
}

// `at`: when the peer made its answer, by this machine's clock.
Moments moments_of(rpc::TraceReplyPart& part, const std::string& node, const std::string& hash,
                   Time at, Duration clock_error) {
  Moments out;
  out.part.node = node;
  out.part.id_hash = hash;
  out.part.role = std::move(part.role);
  out.part.rank = part.rank;
  out.part.state = std::move(part.state);
  out.part.reason = part.reason;
  out.part.bytes_done = part.bytes_done;
  out.part.bytes_total = part.bytes_total;
  out.part.fragments = part.fragments;
  out.part.chunks = part.chunks;
  out.part.clock_error = clock_error;
  for (rpc::TraceReplyStep& step : part.steps)
    out.steps.push_back({std::move(step.name), Time{at.ns - step.first_ago.count()},
                         Time{at.ns - step.last_ago.count()}, step.count});
  return out;
}

// What is known so far; answers when the last peer has.
struct Gathering {
  Mutex mutex;
  std::vector<Moments> parts KVFERRY_GUARDED_BY(mutex);
  std::vector<rpc::TraceGapInfo> gaps KVFERRY_GUARDED_BY(mutex);
  std::size_t left KVFERRY_GUARDED_BY(mutex) = 0;
  Time begin;  // of the first step here: what times count from, whatever peers say
  rpc::Reply<rpc::TraceInfo> done;

  // What a peer says, or why it is left out.
  void add(const std::string& node, std::vector<Moments> of, const TraceWindow& window)
      KVFERRY_REQUIRES(mutex) {
    for (const Moments& part : of)
      for (const Moments::Step& step : part.steps)
        if (!window.holds(step.first, step.last)) {
          gaps.push_back(
              {node, "TRACE_TIMES: it tells of times that the transfer cannot have had"});
          return;
        }
    std::move(of.begin(), of.end(), std::back_inserter(parts));
  }

  rpc::TraceInfo finish(Time now) KVFERRY_REQUIRES(mutex) {
    rpc::TraceInfo info;
    for (Moments& of : parts) {
      for (Moments::Step& step : of.steps)
        of.part.steps.push_back(
            {std::move(step.name), step.first - begin, step.last - begin, step.count});
      info.parts.push_back(std::move(of.part));
    }
    info.gaps = std::move(gaps);
    info.age = now - begin;
    return info;
  }
};

}  // namespace

void Admin::trace(std::string selector, Time deadline, rpc::Reply<rpc::TraceInfo> done) {
  engine_.ask([this, selector = std::move(selector), deadline, done = std::move(done)](
                  const engine::Engine& engine, Time now) {
    const std::vector<engine::TransferTrace> found = find(engine, selector, now);
    if (found.empty())
      return done(fail(Code::kNotFound, "TRANSFER_UNKNOWN",
                       "neither an open transfer nor one of the last " +
                           std::to_string(engine::kMostKeptTraces) +
                           " ranks' parts, closed within " +
                           std::to_string(engine::kTraceLife / std::chrono::minutes(1)) +
                           " minutes, is called " + selector));
    auto gathering = std::make_shared<Gathering>();
    gathering->done = done;
    gathering->begin = now;
    std::set<std::string> nodes;
    {
      MutexLock lock(gathering->mutex);
      for (const engine::TransferTrace& trace : found) {
        gathering->parts.push_back(moments_of(trace, config_.node.id));
        for (const Moments::Step& step : gathering->parts.back().steps)
          gathering->begin = std::min(gathering->begin, step.first);
        nodes.insert(trace.view.nodes.begin(), trace.view.nodes.end());
      }
      nodes.erase(std::string());
      gathering->left = nodes.size() + 1;
    }
    const std::string hash = found.front().view.hash;
    const auto settle = [gathering](Time at) {
      rpc::TraceInfo info;
      {
        MutexLock lock(gathering->mutex);
        if (--gathering->left > 0) return;
        info = gathering->finish(at);
      }
      gathering->done(std::move(info));
    };
    const Duration longest = std::max({config_.engine.lease_max, config_.engine.wait_deadline_max,
                                       config_.engine.transfer_deadline_max});
    for (const std::string& node : nodes) {
      const Time asked = monotonic_now();
      links_.get_trace(
          node, {hash}, peer_deadline(asked, deadline),
          [gathering, settle, node, hash, asked, longest](Result<rpc::TraceReply> reply) {
            const Time got = monotonic_now();
            {
              MutexLock lock(gathering->mutex);
              if (!reply) {
                gathering->gaps.push_back({node, reply.error().to_string()});
              } else if (reply->parts.empty()) {
                gathering->gaps.push_back({node, "TRANSFER_UNKNOWN: it knows nothing of it"});
              } else {
                std::vector<Moments> parts;
                for (rpc::TraceReplyPart& part : reply->parts)
                  parts.push_back(moments_of(part, node, hash, asked + (got - asked) / 2,
                                             (got - asked + Duration(1)) / 2));
                gathering->add(node, std::move(parts),
                               trace_window(gathering->begin, got, engine::kTraceLife, longest));
              }
            }
            settle(got);
          });
    }
    settle(monotonic_now());
  });
}

void Admin::answer_trace(const PeerRef& peer, const rpc::TraceQuery& query,
                         std::function<void(Result<rpc::TraceReply>)> done) {
  if (!trace_budget_.take(peer.node, monotonic_now()))
    return done(fail(Code::kResourceExhausted, "TRACE_BUSY", "asked too often: ask again"));
  engine::TraceQuery question;
  question.hash = query.hash;
  question.node = peer.node;
  question.most = rpc::kMaxTraceParts;
  engine_.ask([question = std::move(question), done = std::move(done)](const engine::Engine& engine,
                                                                       Time at) {
    rpc::TraceReply reply;
    for (const engine::TransferTrace& trace : engine.traces(question, at)) {
      Moments of = moments_of(trace, {});
      rpc::TraceReplyPart& part = reply.parts.emplace_back();
      part.role = std::move(of.part.role);
      part.rank = of.part.rank;
      part.state = std::move(of.part.state);
      part.reason = of.part.reason;
      part.bytes_done = of.part.bytes_done;
      part.bytes_total = of.part.bytes_total;
      part.fragments = of.part.fragments;
      part.chunks = of.part.chunks;
      for (Moments::Step& step : of.steps)
        part.steps.push_back({std::move(step.name), at - step.first, at - step.last, step.count});
    }
    done(std::move(reply));
  });
}

}  // namespace kvferry::node
