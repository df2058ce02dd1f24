// Which tokens of which layers a leg's slices have brought, so that none comes twice.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "daemon/base/units.h"
#include "daemon/engine/messages.h"

namespace kvferry::engine {

// Slices that continue each other take the room of one. A slice is looked at beside those whose
// layers it may share, so that the cost of one does not grow with how many there were.
class Coverage {
 public:
  // False if one of the slice's cells has come before, its ranges are not ascending and disjoint,
  // or a limit is passed; part of it may have been entered then, and the leg is to fail. Without
  // `layers`: all of them.
  bool enter(const std::vector<GroupRanges>& offer, const std::optional<Range>& layers);
  // Takes back a slice that was entered with the same words.
  void leave(const std::vector<GroupRanges>& offer, const std::optional<Range>& layers);
  void clear();

  uint64_t intervals() const;  // kept, of tokens

 private:
  using Tokens = std::map<uint64_t, uint64_t>;  // begin -> end; disjoint, none touches the next
  struct Group {
    std::map<Range, Tokens> layers;
    uint64_t most_layers = 0;  // of any interval that was ever entered
  };
  static bool meets(const Tokens& tokens, const Range& range);
  static void add(Tokens& tokens, Range range);
  static void remove(Tokens& tokens, const Range& range);

  std::map<uint32_t, Group> groups_;
  uint64_t ranges_ = 0;  // that slices have named
};

}  // namespace kvferry::engine
