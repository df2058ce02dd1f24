// Protobuf's own words about messages that it cannot read.
#pragma once

namespace kvferry::rpc {

// From now on protobuf writes nothing to standard error. It writes a line for each field with bytes
// that are no UTF-8, as often as somebody sends some, whoever it is: the caller's error says
// enough. Once, before the first server; the whole process.
void quiet_parser();

}  // namespace kvferry::rpc
