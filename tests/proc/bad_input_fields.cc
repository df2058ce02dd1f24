#include "tests/proc/bad_input_fields.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/util/message_differencer.h>

#include <vector>

namespace kvferry::bad_input {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using google::protobuf::util::MessageDifferencer;

bool is_message(const FieldDescriptor& field) {
  return field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
}

std::string joined(const std::string& prefix, const FieldDescriptor& field) {
  return prefix.empty() ? field.name() : prefix + "." + field.name();
}

void add_leaves(const Descriptor& type, const std::string& prefix, Paths& out) {
  // An empty message is its own only leaf.
  if (type.field_count() == 0 && !prefix.empty()) out.insert(prefix);
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor& field = *type.field(i);
    if (is_message(field))
      add_leaves(*field.message_type(), joined(prefix, field), out);
    else
      out.insert(joined(prefix, field));
  }
}

// All leaves that are set in a message.
void add_set(const Message& message, const std::string& prefix, Paths& out) {
  const Reflection& reflection = *message.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  reflection.ListFields(message, &fields);
  if (fields.empty()) out.insert(prefix);
  for (const FieldDescriptor* field : fields) {
    const std::string path = joined(prefix, *field);
    if (!is_message(*field)) {
      out.insert(path);
    } else if (!field->is_repeated()) {
      add_set(reflection.GetMessage(message, field), path, out);
    } else {
      for (int i = 0; i < reflection.FieldSize(message, field); ++i)
        add_set(reflection.GetRepeatedMessage(message, field, i), path, out);
    }
  }
}

class Collector final : public MessageDifferencer::Reporter {
 public:
  explicit Collector(Paths& out) : out_(out) {}
  void ReportAdded(const Message&, const Message& after,
                   const std::vector<MessageDifferencer::SpecificField>& path) override {
    note(after, path, &MessageDifferencer::SpecificField::new_index);
  }
  void ReportDeleted(const Message& before, const Message&,
                     const std::vector<MessageDifferencer::SpecificField>& path) override {
    note(before, path, &MessageDifferencer::SpecificField::index);
  }
  void ReportModified(const Message& before, const Message&,
                      const std::vector<MessageDifferencer::SpecificField>& path) override {
    note(before, path, &MessageDifferencer::SpecificField::index);
  }

 private:
  // `parent` holds the last field of the path.
  void note(const Message& parent, const std::vector<MessageDifferencer::SpecificField>& path,
            int MessageDifferencer::SpecificField::*index) {
    if (path.empty()) return;
    std::string name;
    for (const MessageDifferencer::SpecificField& step : path) name = joined(name, *step.field);
    const MessageDifferencer::SpecificField& last = path.back();
    const Reflection& reflection = *parent.GetReflection();
    if (!is_message(*last.field))
      out_.insert(name);
    else if (last.field->is_repeated())
      add_set(reflection.GetRepeatedMessage(parent, last.field, last.*index), name, out_);
    else
      add_set(reflection.GetMessage(parent, last.field), name, out_);
  }

  Paths& out_;
};

}  // namespace

Paths leaf_fields(const Descriptor& type) {
  Paths out;
  add_leaves(type, {}, out);
  return out;
}

Paths changed_fields(const Message& before, const Message& after) {
  Paths out;
  Collector collector(out);
  MessageDifferencer differencer;
  // Presence counts: an empty message in a oneof says something.
  differencer.set_message_field_comparison(MessageDifferencer::EQUAL);
  differencer.ReportDifferencesTo(&collector);
  differencer.Compare(before, after);
  return out;
}

std::string without_indices(const std::string& field) {
  std::string out;
  bool inside = false;
  for (const char c : field) {
    if (c == '[') inside = true;
    if (!inside) out += c;
    if (c == ']') inside = false;
  }
  return out;
}

bool names_a_field(const Descriptor& type, const std::string& field) {
  const Descriptor* at = &type;
  std::string left = without_indices(field);
  for (;;) {
    const std::size_t dot = left.find('.');
    const std::string name = left.substr(0, dot);
    if (dot == std::string::npos && at->FindOneofByName(name) != nullptr) return true;
    const FieldDescriptor* found = at->FindFieldByName(name);
    if (found == nullptr) return false;
    if (dot == std::string::npos) return true;
    if (!is_message(*found)) return false;
    at = found->message_type();
    left.erase(0, dot + 1);
  }
}

}  // namespace kvferry::bad_input
