// Where in a JSON text something is wrong, for messages: the field's path, line and column.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace google::protobuf {
class Descriptor;
}

namespace kvferry::ctl {

struct JsonPlace {
  std::string path;     // "ranks[0].groups[1].block_ids[3]"; empty: the text as a whole
  std::string message;  // one line, of bounded length
};

// What protobuf's parser takes although it is no JSON form of the message: text that is not strict
// JSON, a field that is there twice, null or a list in a list, a single value for a list. It would
// drop or join values silently, and then number them otherwise than the text does.
std::optional<JsonPlace> misshapen(std::string_view text,
                                   const google::protobuf::Descriptor& message);

// `refusal` is what protobuf's parser said of `text`. It names the field where a value does not fit
// its field; where the text is not JSON, or is nested deeper than any message, the text is read
// once more, as strict JSON, to find the place. Names are then those that the text has.
JsonPlace place_of(std::string_view text, std::string_view refusal);

}  // namespace kvferry::ctl
