// The files of `kvferryctl plan`: read within a bound, checked, and named in errors by file and
// field, as whoever wrote them knows them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "daemon/mapping/legs.h"
#include "kvferry/v1/layout.pb.h"

namespace kvferry::ctl {

// A file, or what a pipe gives. The largest instances of the mapping's limits take some 10 MiB.
inline constexpr uint64_t kMaxInputBytes = uint64_t{64} << 20;

// One instance as its file describes it. Ranks stand in order here, in any order in the file.
struct PlanSide {
  std::string file;  // as errors name it: the path, or "stdin"
  std::string instance;
  uint32_t dp_group = 0;
  std::vector<mapping::RankLayout> layouts;
  std::vector<std::vector<v1::PlanGroup>> groups;
  std::vector<uint32_t> places;  // rank -> index in the file

  std::shared_ptr<const mapping::Instance> holdings() const;

  // Fields of the file: "prefill.json.dp_group", a rank, and a rank's entry for one of its layout's
  // groups (all entries where it has none).
  std::string field(const std::string& name) const { return file + "." + name; }
  std::string rank_field(uint32_t rank) const;
  std::string group_field(uint32_t rank, uint32_t group) const;
  // The rank's entry for a group of its layout, or null.
  const v1::PlanGroup* group_entry(uint32_t rank, uint32_t group) const;
  // An error of the mapping library about this instance, whose field begins with "ranks".
  Error located(Error error) const;
};

// "groups[3].block_ids[1]" with list "groups": 3 and ".block_ids[1]". Nothing for another list.
struct Numbered {
  uint32_t number = 0;
  std::string rest;
};
std::optional<Numbered> numbered(std::string_view field, std::string_view list);

// The error with its field below `prefix`, the field's name as JSON has it.
Error within(const std::string& prefix, Error error);

// Reads and checks one file; "-" is standard input. A regular file's size is looked at before
// anything is read; reading a pipe may wait for its writer. Errors name file and field: UNREADABLE,
// TOO_LARGE, BAD_JSON, and those of validate_layout and validate_instance.
Result<PlanSide> load_side(const std::string& path);

}  // namespace kvferry::ctl
