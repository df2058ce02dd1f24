#include "client/ctl/plan.h"

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <iomanip>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "client/ctl/plan_input.h"
#include "daemon/base/result.h"
#include "daemon/mapping/coverage.h"
#include "daemon/mapping/legs.h"
#include "daemon/mapping/plan.h"
#include "daemon/mapping/stream.h"
#include "daemon/mapping/tokens.h"
#include "daemon/mapping/validate.h"
#include "kvferry/v1/layout.pb.h"

namespace kvferry::ctl {
namespace {

constexpr int kNotOffered = 1;
constexpr int kBadData = 65;
constexpr int kLostOutput = 74;

mapping::GroupBlocks blocks_of(const v1::PlanGroup& from) {
  return {from.group(), from.first_block(), {from.block_ids().begin(), from.block_ids().end()}};
}

// All that one leg needs: compact, but too much to keep for every leg.
struct LegPlan {
  mapping::Leg leg;
  mapping::Stream stream;
  mapping::Plan source{{}};
  mapping::Plan destination{{}};
  std::optional<mapping::MissingCell> missing;
};

// What is kept of a leg from when it was worked out until it is printed.
struct Row {
  mapping::Leg leg;
  uint64_t bytes = 0, fragments = 0, source_runs = 0, destination_runs = 0, digest = 0;
  std::optional<mapping::MissingCell> missing;

  explicit Row(const LegPlan& of)
      : leg(of.leg),
        bytes(of.stream.bytes),
        fragments(mapping::fragment_count(of.source, of.destination)),
        source_runs(of.source.run_count()),
        destination_runs(of.destination.run_count()),
        digest(of.stream.digest),
        missing(of.missing) {}
};

class Planner {
 public:
  Planner(PlanSide sender, PlanSide receiver)
      : sender_(std::move(sender)), receiver_(std::move(receiver)) {}

  // Works out every leg, so that nothing is left to go wrong once printing begins. Errors name file
  // and field.
  Status prepare() {
    auto table = mapping::LegTable::make(sender_.holdings(), receiver_.holdings());
    if (!table) return tl::unexpected(between(table.error()));
    table_ = *table;
    KVFERRY_RETURN_IF_ERROR(take_blocks());
    bool any = false;
    for (uint32_t rank = 0; rank < receiver_.layouts.size(); ++rank) {
      if (receiver_.layouts[rank].topology.dp_group != receiver_.dp_group) continue;
      any = true;
      const auto legs = table_->legs_of_receiver(sender_.dp_group, rank);
      if (!legs) return tl::unexpected(without_legs(rank, legs.error()));
      for (const mapping::Leg& leg : *legs) {
        const auto of = plan(leg);
        if (!of) return tl::unexpected(of.error());
        rows_.emplace_back(*of);
      }
    }
    if (!any)
      return invalid(receiver_.field("dp_group"), "UNKNOWN_DP_GROUP", "no rank is of this group");
    return {};
  }

  const std::vector<Row>& rows() const { return rows_; }
  const PlanSide& sender() const { return sender_; }
  const PlanSide& receiver() const { return receiver_; }

  Result<LegPlan> plan(const mapping::Leg& leg) const {
    const auto& needs = needs_[leg.receiver_rank];
    const auto& offer = offers_[leg.sender_rank];
    auto stream =
        mapping::compile_stream(*table_, leg.sender_rank, leg.receiver_rank, needs, offer);
    if (!stream) return tl::unexpected(of_leg(receiver_, leg.receiver_rank, leg, stream.error()));
    auto source = bind(*stream, mapping::Side::kSender, sender_, leg.sender_rank);
    if (!source) return tl::unexpected(of_leg(sender_, leg.sender_rank, leg, source.error()));
    auto destination = bind(*stream, mapping::Side::kReceiver, receiver_, leg.receiver_rank);
    if (!destination)
      return tl::unexpected(of_leg(receiver_, leg.receiver_rank, leg, destination.error()));
    auto coverage = mapping::LegCoverage::make(*table_, leg.sender_rank, leg.receiver_rank, needs);
    if (!coverage)
      return tl::unexpected(of_leg(receiver_, leg.receiver_rank, leg, coverage.error()));
    if (const Status added = coverage->add(offer, std::nullopt); !added)
      return tl::unexpected(of_leg(sender_, leg.sender_rank, leg, added.error()));
    return LegPlan{leg, std::move(*stream), std::move(*source), std::move(*destination),
                   coverage->missing()};
  }

  // The first cell that no leg would bring, as the error with which the hand-off would end.
  std::optional<Error> not_offered() const {
    for (const Row& row : rows_) {
      if (!row.missing) continue;
      const uint32_t rank = row.leg.sender_rank;
      const uint32_t group = row.missing->sender_group;
      std::string field = sender_.group_field(rank, group);
      if (const v1::PlanGroup* entry = sender_.group_entry(rank, group))
        field += past_prompt(*entry, rank, *row.missing) ? ".num_tokens" : ".block_ids";
      return fail(Code::kFailedPrecondition, "NOT_OFFERED",
                  "does not cover layer " + std::to_string(row.missing->layer) + ", position " +
                      std::to_string(row.missing->position) + ", which is needed by " +
                      receiver_.group_field(row.leg.receiver_rank, row.missing->receiver_group),
                  std::move(field))
          .value();
    }
    return std::nullopt;
  }

 private:
  // What the receiver's ranks need, and what the sender's offer.
  Status take_blocks() {
    for (uint32_t rank = 0; rank < receiver_.layouts.size(); ++rank) {
      std::vector<mapping::GroupReceive> receives;
      for (const v1::PlanGroup& group : receiver_.groups[rank])
        receives.push_back({group.num_tokens(), group.cached_tokens(), blocks_of(group)});
      auto needs = mapping::compute_needs(receiver_.layouts[rank], receives);
      if (!needs) return tl::unexpected(within(receiver_.rank_field(rank), needs.error()));
      needs_.push_back(std::move(*needs));
    }
    for (uint32_t rank = 0; rank < sender_.layouts.size(); ++rank) {
      auto offer = offer_of(rank);
      if (!offer) return tl::unexpected(within(sender_.rank_field(rank), offer.error()));
      offers_.push_back(std::move(*offer));
    }
    return {};
  }

  // An error about both instances: the receiver's field, and the sender's file beside it.
  Error between(Error error) const {
    error.message += " (the sender: " + sender_.file + ")";
    const auto drop = [&error](std::string_view prefix) {
      if (error.field.compare(0, prefix.size(), prefix) != 0) return false;
      error.field.erase(0, prefix.size());
      return true;
    };
    if (drop("sender.")) return sender_.located(std::move(error));
    drop("receiver.");
    if (error.field == "fingerprint") error.field.insert(0, "ranks[0].");
    return receiver_.located(std::move(error));
  }

  Error without_legs(uint32_t receiver_rank, Error error) const {
    const bool unknown = error.reason == "UNKNOWN_DP_GROUP";
    error.field = unknown ? sender_.field("dp_group") : receiver_.rank_field(receiver_rank);
    if (!unknown) error.message += " (the sender: " + sender_.file + ")";
    return error;
  }

  // An error about what one side's rank brings to a leg, where the library counts the layout's
  // groups, not the file's entries.
  Error of_leg(const PlanSide& side, uint32_t rank, const mapping::Leg& leg, Error error) const {
    const auto group = numbered(error.field, "groups");
    const bool listed = group && side.group_entry(rank, group->number) != nullptr;
    error.field = listed ? side.group_field(rank, group->number) + group->rest
                         : side.rank_field(rank) + ".groups";
    error.message += " (from " + sender_.rank_field(leg.sender_rank) + " to " +
                     receiver_.rank_field(leg.receiver_rank) + ")";
    return error;
  }

  // Whether the cell lies past the prompt that the sender's entry gives.
  bool past_prompt(const v1::PlanGroup& entry, uint32_t rank,
                   const mapping::MissingCell& cell) const {
    return !mapping::is_request_group(sender_.layouts[rank].groups[entry.group()]) &&
           cell.position >= entry.num_tokens();
  }

  // One slice that offers all.
  Result<std::vector<mapping::GroupRanges>> offer_of(uint32_t rank) const {
    const mapping::RankLayout& layout = sender_.layouts[rank];
    std::vector<mapping::GroupOffer> offers;
    for (const v1::PlanGroup& group : sender_.groups[rank]) {
      const bool request = group.group() < layout.groups.size() &&
                           mapping::is_request_group(layout.groups[group.group()]);
      const uint64_t end = request ? 1 : group.num_tokens();
      offers.push_back({group.num_tokens(), {0, end}, blocks_of(group)});
    }
    return mapping::round_offer(layout, offers);
  }

  static Result<mapping::Plan> bind(const mapping::Stream& stream, mapping::Side which,
                                    const PlanSide& side, uint32_t rank) {
    std::vector<mapping::GroupBlocks> blocks;
    for (const v1::PlanGroup& group : side.groups[rank]) blocks.push_back(blocks_of(group));
    return mapping::bind_plan(stream, which, side.layouts[rank], blocks);
  }

  PlanSide sender_;
  PlanSide receiver_;
  std::shared_ptr<const mapping::LegTable> table_;
  std::vector<std::vector<mapping::GroupNeed>> needs_;
  std::vector<std::vector<mapping::GroupRanges>> offers_;
  std::vector<Row> rows_;
};

std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}
std::string digest_text(uint64_t digest) {
  char text[17];
  std::snprintf(text, sizeof text, "%016" PRIx64, digest);
  return text;
}

struct Totals {
  uint64_t legs = 0, empty_legs = 0, bytes = 0, fragments = 0, source_runs = 0,
           destination_runs = 0;

  explicit Totals(const std::vector<Row>& rows) {
    for (const Row& row : rows) {
      ++legs;
      empty_legs += row.leg.empty ? 1 : 0;
      bytes += row.bytes;
      fragments += row.fragments;
      source_runs += row.source_runs;
      destination_runs += row.destination_runs;
    }
  }
};

// The text that the leg's digest is made of. Like the fragments it is made again when it is
// printed, from what made it before, and so without an error.
Status print_text(const Planner& planner, const Row& row, bool json, std::ostream& out) {
  const auto of = planner.plan(row.leg);
  if (!of) return tl::unexpected(of.error());
  const std::string text = mapping::text_of(of->stream);
  out << (json ? quoted(text) : text);
  return {};
}

// Calls fn(leg plan, fragment) for each fragment of each leg, in stream order.
template <typename Fn>
Status for_each_fragment(const Planner& planner, Fn&& fn) {
  for (const Row& row : planner.rows()) {
    const auto of = planner.plan(row.leg);
    if (!of) return tl::unexpected(of.error());
    mapping::for_each_fragment(of->source, of->destination,
                               [&](const mapping::Fragment& fragment) { fn(*of, fragment); });
  }
  return {};
}

std::string missing_text(const mapping::MissingCell& cell) {
  return "group " + std::to_string(cell.receiver_group) + " (the sender's group " +
         std::to_string(cell.sender_group) + "), layer " + std::to_string(cell.layer) +
         ", position " + std::to_string(cell.position);
}

Status print_leg_json(const Planner& planner, const Row& row, bool text, std::ostream& out) {
  out << "    {\"sender_rank\": " << row.leg.sender_rank
      << ", \"receiver_rank\": " << row.leg.receiver_rank
      << ", \"empty\": " << (row.leg.empty ? "true" : "false")
      << ", \"carries_aux\": " << (row.leg.carries_aux ? "true" : "false")
      << ", \"bytes\": " << row.bytes << ", \"fragments\": " << row.fragments
      << ", \"source_runs\": " << row.source_runs
      << ", \"destination_runs\": " << row.destination_runs << ", \"digest\": \""
      << digest_text(row.digest) << "\"";
  if (row.missing)
    out << ", \"not_offered\": {\"sender_group\": " << row.missing->sender_group
        << ", \"receiver_group\": " << row.missing->receiver_group
        << ", \"layer\": " << row.missing->layer << ", \"position\": " << row.missing->position
        << "}";
  if (text) {
    out << ", \"text\": ";
    KVFERRY_RETURN_IF_ERROR(print_text(planner, row, true, out));
  }
  out << "}";
  return {};
}

Status print_json(const Planner& planner, const PlanOptions& options, std::ostream& out) {
  const Totals totals(planner.rows());
  out << "{\n  \"sender\": {\"instance\": " << quoted(planner.sender().instance)
      << ", \"dp_group\": " << planner.sender().dp_group
      << ", \"ranks\": " << planner.sender().layouts.size()
      << "},\n  \"receiver\": {\"instance\": " << quoted(planner.receiver().instance)
      << ", \"dp_group\": " << planner.receiver().dp_group
      << ", \"ranks\": " << planner.receiver().layouts.size() << "},\n  \"legs\": [";
  const char* separator = "\n";
  for (const Row& row : planner.rows()) {
    out << std::exchange(separator, ",\n");
    KVFERRY_RETURN_IF_ERROR(print_leg_json(planner, row, options.text, out));
  }
  out << "\n  ],\n  \"totals\": {\"legs\": " << totals.legs
      << ", \"empty_legs\": " << totals.empty_legs << ", \"bytes\": " << totals.bytes
      << ", \"fragments\": " << totals.fragments << ", \"source_runs\": " << totals.source_runs
      << ", \"destination_runs\": " << totals.destination_runs << "}";
  if (options.fragments) {
    out << ",\n  \"fragments\": [";
    separator = "\n";
    KVFERRY_RETURN_IF_ERROR(
        for_each_fragment(planner, [&](const LegPlan& of, const mapping::Fragment& fragment) {
          const auto& from = planner.sender().layouts[of.leg.sender_rank].pools;
          const auto& to = planner.receiver().layouts[of.leg.receiver_rank].pools;
          out << std::exchange(separator, ",\n") << "    {\"sender_rank\": " << of.leg.sender_rank
              << ", \"receiver_rank\": " << of.leg.receiver_rank
              << ", \"src_pool\": " << quoted(from[fragment.source_pool].name)
              << ", \"src_offset\": " << fragment.source_offset
              << ", \"dst_pool\": " << quoted(to[fragment.destination_pool].name)
              << ", \"dst_offset\": " << fragment.destination_offset
              << ", \"bytes\": " << fragment.bytes << "}";
        }));
    out << "\n  ]";
  }
  out << "\n}\n";
  return {};
}

Status print_table(const Planner& planner, const PlanOptions& options, std::ostream& out) {
  const auto line = [&](const auto& sender, const auto& receiver, const auto& bytes,
                        const auto& fragments, const auto& from, const auto& to,
                        const std::string& rest) {
    out << std::left << std::setw(8) << sender << std::setw(10) << receiver << std::right
        << std::setw(16) << bytes << std::setw(12) << fragments << std::setw(12) << from
        << std::setw(12) << to << "  " << rest << "\n";
  };
  line("SENDER", "RECEIVER", "BYTES", "FRAGMENTS", "SRC RUNS", "DST RUNS", "DIGEST");
  for (const Row& row : planner.rows()) {
    line(row.leg.sender_rank, row.leg.receiver_rank, row.bytes, row.fragments, row.source_runs,
         row.destination_runs,
         digest_text(row.digest) + (row.leg.empty ? "  empty" : "") +
             (row.leg.carries_aux ? "  aux" : ""));
    if (options.text) KVFERRY_RETURN_IF_ERROR(print_text(planner, row, false, out));
    if (row.missing) out << "        not offered: " << missing_text(*row.missing) << "\n";
  }
  const Totals totals(planner.rows());
  line("total", totals.legs, totals.bytes, totals.fragments, totals.source_runs,
       totals.destination_runs, {});
  if (!options.fragments) return {};
  out << "\nSENDER  RECEIVER  SOURCE -> DESTINATION  BYTES\n";
  return for_each_fragment(planner, [&](const LegPlan& of, const mapping::Fragment& fragment) {
    out << of.leg.sender_rank << " " << of.leg.receiver_rank << "  "
        << planner.sender().layouts[of.leg.sender_rank].pools[fragment.source_pool].name << "+"
        << fragment.source_offset << " -> "
        << planner.receiver().layouts[of.leg.receiver_rank].pools[fragment.destination_pool].name
        << "+" << fragment.destination_offset << "  " << fragment.bytes << "\n";
  });
}

Result<Planner> planner_of(const PlanOptions& options) {
  auto sender = load_side(options.sender_file);
  if (!sender) return tl::unexpected(sender.error());
  auto receiver = load_side(options.receiver_file);
  if (!receiver) return tl::unexpected(receiver.error());
  Planner planner(std::move(*sender), std::move(*receiver));
  KVFERRY_RETURN_IF_ERROR(planner.prepare());
  return planner;
}

}  // namespace

int plan_transfer(const PlanOptions& options, std::ostream& out, std::ostream& errors) {
  const auto tell = [&errors](const Error& error, int exit_code) {
    errors << "kvferryctl: plan: " << error.to_string() << "\n";
    return exit_code;
  };
  const auto planner = planner_of(options);
  if (!planner) return tell(planner.error(), kBadData);
  const Status printed = (options.json ? print_json : print_table)(*planner, options, out);
  out.flush();
  if (!printed) return tell(printed.error(), kBadData);
  if (!out)
    return tell({Code::kInternal, "OUTPUT_LOST", "standard output could not be written", {}},
                kLostOutput);
  const std::optional<Error> not_offered = planner->not_offered();
  return not_offered ? tell(*not_offered, kNotOffered) : 0;
}

}  // namespace kvferry::ctl
