// Fields of messages by reflection: which a request has, which a row of a table changes, and
// whether the field that an error names exists. Used by the tables of wrong requests, so that a new
// field without a row fails a test. Paths are like "groups.tokens.begin": dots, no indices.
#pragma once

#include <google/protobuf/message.h>

#include <set>
#include <string>

namespace kvferry::bad_input {

using Paths = std::set<std::string>;

// Every field of the message that is no message itself, and of the messages in it.
Paths leaf_fields(const google::protobuf::Descriptor& type);

// The leaf fields that differ between two messages of one type. One that was added or taken away
// counts with all that was set in it.
Paths changed_fields(const google::protobuf::Message& before,
                     const google::protobuf::Message& after);

// "groups[2].block_ids[17]" without its indices.
std::string without_indices(const std::string& field);

// Whether a message of this type has the field, indices left out; messages and oneofs count too.
bool names_a_field(const google::protobuf::Descriptor& type, const std::string& field);

}  // namespace kvferry::bad_input
