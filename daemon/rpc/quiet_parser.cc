#include "daemon/rpc/quiet_parser.h"

#include <google/protobuf/stubs/logging.h>

namespace kvferry::rpc {

void quiet_parser() {
  google::protobuf::SetLogHandler(nullptr);
}

}  // namespace kvferry::rpc
