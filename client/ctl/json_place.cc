#include "client/ctl/json_place.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

namespace kvferry::ctl {
namespace {

constexpr std::size_t kMaxDepth = 100;     // protobuf's own
constexpr std::size_t kMaxPathSteps = 16;  // no message is nested so deep
constexpr std::size_t kMaxLineBytes = 300;
constexpr std::size_t kMaxNameBytes = 64;

// What came from a file, fit for a line on a terminal.
std::string one_line(std::string_view from, std::size_t limit = kMaxLineBytes) {
  std::string text(from.substr(0, limit));
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  return from.size() > limit ? text + "..." : text;
}

void append_name(std::string& path, std::string_view name) {
  if (!path.empty()) path += '.';
  path += one_line(name, kMaxNameBytes);
}

bool take_prefix(std::string_view& text, std::string_view prefix) {
  if (text.substr(0, prefix.size()) != prefix) return false;
  text.remove_prefix(prefix.size());
  return true;
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// Protobuf says "(path): what is wrong with the value", "(path) name: what is wrong with the name"
// (without "(path)" in the outermost message), and of text that is no JSON something else.
std::optional<JsonPlace> named_by(std::string_view refusal) {
  JsonPlace place;
  const bool has_path = take_prefix(refusal, "(");
  if (has_path) {
    const std::size_t end = refusal.find(')');
    if (end == std::string_view::npos) return std::nullopt;
    place.path = refusal.substr(0, end);
    refusal.remove_prefix(end + 1);
  }
  if (take_prefix(refusal, ": ")) {
    std::string_view name = refusal;
    // The one refusal of a value that has its field's name for a type.
    if (take_prefix(name, "invalid value Starting an object on a scalar field for type ")) {
      append_name(place.path, name);
      refusal = "an object where a value is expected";
    }
    place.message = one_line(refusal);
    return place;
  }
  for (const std::string_view what :
       {"Cannot find field.", "Proto field is not repeating, cannot start list."}) {
    if (!ends_with(refusal, what)) continue;
    std::string_view name = refusal.substr(0, refusal.size() - what.size());
    take_prefix(name, " ");
    if (!ends_with(name, ": ")) continue;
    name.remove_suffix(2);
    append_name(place.path, name);
    place.message = what;
    return place;
  }
  return std::nullopt;
}

// Follows the text as far as it is JSON and remembers the way to where it stands. With a message's
// descriptor it stops where the text has another shape than that message.
class Walker : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Walker(const google::protobuf::Descriptor* message = nullptr) : message_type_(message) {}

  bool null() override {
    value();
    return fits(way_.empty() || !way_.back().array, "null in a list");
  }
  bool boolean(bool) override { return value(); }
  bool number_integer(number_integer_t) override { return value(); }
  bool number_unsigned(number_unsigned_t) override { return value(); }
  bool number_float(number_float_t, const string_t&) override { return value(); }
  bool string(string_t&) override { return value(); }
  bool binary(binary_t&) override { return value(); }
  bool start_object(std::size_t) override { return enter(false); }
  bool start_array(std::size_t) override { return enter(true); }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }
  bool key(string_t& name) override {
    Step& step = way_.back();
    step.name = std::move(name);
    if (step.type == nullptr) return true;
    step.field = step.type->FindFieldByName(step.name);
    if (step.field == nullptr) step.field = step.type->FindFieldByCamelcaseName(step.name);
    if (step.field == nullptr) return true;  // the parser says so
    const bool fresh = std::find(step.seen.begin(), step.seen.end(), step.field) == step.seen.end();
    step.seen.push_back(step.field);
    return fits(fresh, "the field is there twice");
  }
  bool parse_error(std::size_t, const std::string&,
                   const nlohmann::json::exception& error) override {
    std::string_view said = error.what();
    const std::size_t place = said.find("at line ");
    const std::size_t library = said.find("] ");
    if (place != std::string_view::npos)
      said.remove_prefix(place);
    else if (library != std::string_view::npos)
      said.remove_prefix(library + 2);
    message_ = one_line(said);
    return false;
  }

  const std::string& message() const { return message_; }
  std::string path() const {
    std::string path;
    for (std::size_t i = 0; i < way_.size(); ++i) {
      const Step& step = way_[i];
      if (i == kMaxPathSteps) return path + "...";
      if (!step.array && !step.name.empty()) append_name(path, step.name);
      if (step.array && step.count > 0) path += "[" + std::to_string(step.count - 1) + "]";
    }
    return path;
  }

 private:
  struct Step {
    bool array = false;
    uint64_t count = 0;  // elements begun
    std::string name;    // last key read
    // Where a message is followed: what this object is, the field of the last key (of a list: the
    // list's), and the fields that have been read.
    const google::protobuf::Descriptor* type = nullptr;
    const google::protobuf::FieldDescriptor* field = nullptr;
    std::vector<const google::protobuf::FieldDescriptor*> seen;
  };

  bool fits(bool right, const char* wrong) {
    if (message_type_ == nullptr || right) return true;
    message_ = wrong;
    return false;
  }
  // Whether the field that a value begins for is a list.
  bool in_list() const {
    return !way_.empty() && !way_.back().array && way_.back().field != nullptr &&
           way_.back().field->is_repeated();
  }
  bool value() {
    if (!way_.empty()) ++way_.back().count;
    if (way_.empty()) return fits(false, "an object is expected");
    return fits(!in_list(), "a list is expected");
  }
  bool enter(bool array) {
    if (!way_.empty()) ++way_.back().count;
    if (way_.size() == kMaxDepth) {
      message_ = "nested more than 100 deep";
      return false;
    }
    if (!fits(!array || !way_.empty(), "an object is expected")) return false;
    if (!fits(array || !in_list(), "a list is expected")) return false;
    const bool nested = array && way_.back().array && way_.back().field != nullptr;
    if (!fits(!nested, "a list in a list")) return false;
    Step step;
    step.array = array;
    if (way_.empty()) {
      step.type = message_type_;
    } else if (const auto* field = way_.back().field; field != nullptr) {
      if (array)
        step.field = field;
      else if (field->type() == google::protobuf::FieldDescriptor::TYPE_MESSAGE)
        step.type = field->message_type();
    }
    way_.push_back(std::move(step));
    return true;
  }
  bool leave() {
    way_.pop_back();
    return true;
  }

  const google::protobuf::Descriptor* const message_type_;
  std::vector<Step> way_;
  std::string message_;
};

}  // namespace

std::optional<JsonPlace> misshapen(std::string_view text,
                                   const google::protobuf::Descriptor& message) {
  Walker walker(&message);
  if (nlohmann::json::sax_parse(text.begin(), text.end(), &walker)) return std::nullopt;
  return JsonPlace{walker.path(), walker.message()};
}

JsonPlace place_of(std::string_view text, std::string_view refusal) {
  if (auto place = named_by(refusal)) return std::move(*place);
  Walker walker;
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &walker))
    return {walker.path(), walker.message()};
  // JSON that protobuf's parser does not take: its first line, the rest shows the text.
  return {{}, one_line(refusal.substr(0, refusal.find('\n')))};
}

}  // namespace kvferry::ctl
