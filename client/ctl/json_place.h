// Where in a JSON text something is wrong, for messages: the field's path, line and column.
#pragma once

#include <string>
#include <string_view>

namespace kvferry::ctl {

struct JsonPlace {
  std::string path;     // "ranks[0].groups[1].block_ids[3]"; empty: the text as a whole
  std::string message;  // one line, of bounded length
};

// `refusal` is what protobuf's parser said of `text`. It names the field where a value does not fit
// its field; where the text is not JSON, or is nested deeper than any message, the text is read
// once more, as strict JSON, to find the place. Names are then those that the text has.
JsonPlace place_of(std::string_view text, std::string_view refusal);

}  // namespace kvferry::ctl
