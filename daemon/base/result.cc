#include "daemon/base/result.h"

#include <cstring>

namespace kvferry {

std::string_view name_of(Code code) {
  switch (code) {
    case Code::kOk:
      return "OK";
    case Code::kCancelled:
      return "CANCELLED";
    case Code::kInvalidArgument:
      return "INVALID_ARGUMENT";
    case Code::kDeadlineExceeded:
      return "DEADLINE_EXCEEDED";
    case Code::kNotFound:
      return "NOT_FOUND";
    case Code::kAlreadyExists:
      return "ALREADY_EXISTS";
    case Code::kPermissionDenied:
      return "PERMISSION_DENIED";
    case Code::kResourceExhausted:
      return "RESOURCE_EXHAUSTED";
    case Code::kFailedPrecondition:
      return "FAILED_PRECONDITION";
    case Code::kAborted:
      return "ABORTED";
    case Code::kUnimplemented:
      return "UNIMPLEMENTED";
    case Code::kInternal:
      return "INTERNAL";
    case Code::kUnavailable:
      return "UNAVAILABLE";
    case Code::kDataLoss:
      return "DATA_LOSS";
  }
  // The services' own answer to a call without a token; below them nothing speaks of it.
  if (static_cast<int>(code) == 16) return "UNAUTHENTICATED";
  return "INTERNAL";
}

std::string Error::to_string() const {
  std::string out(name_of(code));
  out.append(" ").append(reason);
  if (!field.empty()) out.append(" ").append(field);
  if (!message.empty()) out.append(": ").append(message);
  return out;
}

tl::unexpected<Error> fail_errno(std::string reason, std::string_view call, int errno_value) {
  std::string message(call);
  message.append(": ").append(std::strerror(errno_value));
  return fail(Code::kInternal, std::move(reason), std::move(message));
}

}  // namespace kvferry
