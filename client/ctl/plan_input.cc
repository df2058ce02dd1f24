#include "client/ctl/plan_input.h"

#include <fcntl.h>
#include <google/protobuf/util/json_util.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <string_view>
#include <system_error>
#include <utility>

#include "client/ctl/json_place.h"
#include "daemon/base/unique_fd.h"
#include "daemon/mapping/validate.h"
#include "daemon/rpc/layout_proto.h"

namespace kvferry::ctl {
namespace {

constexpr const char* kTooLarge = ", more than the 64 MiB that are read of a file";

bool is_stdin(const std::string& path) {
  return path == "-";
}

// Mapping library -> JSON, where the names differ.
constexpr std::pair<std::string_view, std::string_view> kJsonNames[] = {
    {"block_stride", "block_stride_bytes"},
    {"cached", "cached_tokens"},
    {"cp_interleave", "cp_interleave_tokens"},
    {"offset", "offset_bytes"},
    {"prompt", "num_tokens"},
    {"token_stride", "token_stride_bytes"},
    {"tokens", "num_tokens"},
    {"unit_stride", "unit_stride_bytes"},
};

std::string json_name(std::string field) {
  const std::size_t dot = field.rfind('.');
  const std::size_t begin = dot == std::string::npos ? 0 : dot + 1;
  for (const auto& [from, to] : kJsonNames)
    if (std::string_view(field).substr(begin) == from) return field.replace(begin, from.size(), to);
  return field;
}

// Never more than one byte beyond the bound, whatever the descriptor is.
Result<std::string> read_all(int fd) {
  struct stat about {};
  if (::fstat(fd, &about) != 0) return fail_errno("UNREADABLE", "fstat", errno);
  if (S_ISREG(about.st_mode) && static_cast<uint64_t>(about.st_size) > kMaxInputBytes)
    return invalid({}, "TOO_LARGE", "has " + std::to_string(about.st_size) + " bytes" + kTooLarge);
  std::string text;
  std::array<char, 65536> buffer;
  for (;;) {
    const std::size_t room = kMaxInputBytes + 1 - text.size();
    const ssize_t got = ::read(fd, buffer.data(), std::min(room, buffer.size()));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno("UNREADABLE", "read", errno);
    if (got == 0) return text;
    text.append(buffer.data(), static_cast<std::size_t>(got));
    if (text.size() > kMaxInputBytes)
      return invalid({}, "TOO_LARGE", std::string("goes on") + kTooLarge);
  }
}

Result<std::string> read_input(const std::string& path) {
  if (is_stdin(path)) return read_all(STDIN_FILENO);
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY));
  if (!fd) return fail_errno("UNREADABLE", "open", errno);
  return read_all(fd.get());
}

Result<v1::PlanInstance> message_of(const std::string& text) {
  if (text.empty()) return invalid({}, "BAD_JSON", "is empty");
  if (auto place = misshapen(text, *v1::PlanInstance::descriptor()))
    return invalid(std::move(place->path), "BAD_JSON", std::move(place->message));
  v1::PlanInstance message;
  const auto parsed = google::protobuf::util::JsonStringToMessage(text, &message);
  if (parsed.ok()) return message;
  const auto said = parsed.message();
  JsonPlace place = place_of(text, {said.data(), said.size()});
  return invalid(std::move(place.path), "BAD_JSON", std::move(place.message));
}

// Fills the side from its message; errors' fields begin with the file.
Status take(const v1::PlanInstance& message, PlanSide& side) {
  side.instance = message.instance();
  side.dp_group = message.dp_group();
  std::vector<mapping::RankLayout> layouts;
  for (int i = 0; i < message.ranks_size(); ++i) {
    const std::string field = side.field("ranks[" + std::to_string(i) + "].layout");
    auto layout = rpc::from_proto(message.ranks(i).layout());
    if (!layout) return tl::unexpected(within(field, layout.error()));
    if (const Status valid = mapping::validate_layout(*layout); !valid)
      return tl::unexpected(within(field, valid.error()));
    layouts.push_back(std::move(*layout));
    side.places.push_back(static_cast<uint32_t>(i));
  }
  std::stable_sort(side.places.begin(), side.places.end(), [&](uint32_t a, uint32_t b) {
    return layouts[a].topology.rank < layouts[b].topology.rank;
  });
  for (const uint32_t place : side.places) {
    const auto& groups = message.ranks(static_cast<int>(place)).groups();
    side.layouts.push_back(std::move(layouts[place]));
    side.groups.emplace_back(groups.begin(), groups.end());
  }
  if (const Status valid = mapping::validate_instance(*side.holdings()); !valid)
    return tl::unexpected(side.located(valid.error()));
  return {};
}

}  // namespace

std::optional<Numbered> numbered(std::string_view field, std::string_view list) {
  if (field.substr(0, list.size()) != list || field.substr(list.size(), 1) != "[")
    return std::nullopt;
  const char* const end = field.data() + field.size();
  Numbered found;
  const auto [at, wrong] = std::from_chars(field.data() + list.size() + 1, end, found.number);
  if (wrong != std::errc() || at == end || *at != ']') return std::nullopt;
  found.rest.assign(at + 1, end);
  return found;
}

Error within(const std::string& prefix, Error error) {
  error.field = error.field.empty() ? prefix : prefix + "." + json_name(std::move(error.field));
  return error;
}

std::shared_ptr<const mapping::Instance> PlanSide::holdings() const {
  auto holdings = std::make_shared<mapping::Instance>();
  holdings->name = instance;
  for (const mapping::RankLayout& layout : layouts)
    holdings->ranks.push_back(mapping::holding_of(layout));
  return holdings;
}

std::string PlanSide::rank_field(uint32_t rank) const {
  return field("ranks[" + std::to_string(places.at(rank)) + "]");
}

const v1::PlanGroup* PlanSide::group_entry(uint32_t rank, uint32_t group) const {
  for (const v1::PlanGroup& entry : groups.at(rank))
    if (entry.group() == group) return &entry;
  return nullptr;
}

std::string PlanSide::group_field(uint32_t rank, uint32_t group) const {
  const v1::PlanGroup* entry = group_entry(rank, group);
  const std::string all = rank_field(rank) + ".groups";
  return entry == nullptr ? all : all + "[" + std::to_string(entry - groups.at(rank).data()) + "]";
}

Error PlanSide::located(Error error) const {
  const auto rank = numbered(error.field, "ranks");
  if (!rank || rank->number >= places.size()) return within(file, std::move(error));
  error.field = rank->rest.empty() ? rank->rest : rank->rest.substr(1);
  return within(rank_field(rank->number) + ".layout", std::move(error));
}

Result<PlanSide> load_side(const std::string& path) {
  PlanSide side;
  side.file = is_stdin(path) ? "stdin" : path;
  const auto text = read_input(path);
  if (!text) return tl::unexpected(within(side.file, text.error()));
  const auto message = message_of(*text);
  if (!message) {
    Error error = message.error();
    error.field = error.field.empty() ? side.file : side.field(error.field);
    return tl::unexpected(std::move(error));
  }
  KVFERRY_RETURN_IF_ERROR(take(*message, side));
  return side;
}

}  // namespace kvferry::ctl
