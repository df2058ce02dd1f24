#include "daemon/ops/version.h"

namespace kvferry::ops {

std::string_view version() {
  return KVFERRY_VERSION;
}
std::string_view commit() {
  return KVFERRY_COMMIT;
}

}  // namespace kvferry::ops
