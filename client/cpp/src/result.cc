#include "kvferry/result.h"

#include "kvferry/types.h"

namespace kvferry::client {

std::string_view name_of(Code code) {
  switch (code) {
    case Code::kOk:
      return "OK";
    case Code::kCancelled:
      return "CANCELLED";
    case Code::kUnknown:
      return "UNKNOWN";
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
    case Code::kOutOfRange:
      return "OUT_OF_RANGE";
    case Code::kUnimplemented:
      return "UNIMPLEMENTED";
    case Code::kInternal:
      return "INTERNAL";
    case Code::kUnavailable:
      return "UNAVAILABLE";
    case Code::kDataLoss:
      return "DATA_LOSS";
    case Code::kUnauthenticated:
      return "UNAUTHENTICATED";
  }
  return "UNKNOWN";
}

std::string Error::to_string() const {
  std::string out(name_of(code));
  out.append(" ").append(reason);
  if (!field.empty()) out.append(" ").append(field);
  if (!message.empty()) out.append(": ").append(message);
  return out;
}

std::string_view name_of(TransferState state) {
  switch (state) {
    case TransferState::kNone:
      return "NONE";
    case TransferState::kOpen:
      return "OPEN";
    case TransferState::kActive:
      return "ACTIVE";
    case TransferState::kDelivered:
      return "DELIVERED";
    case TransferState::kCompleted:
      return "COMPLETED";
    case TransferState::kFailed:
      return "FAILED";
    case TransferState::kCancelled:
      return "CANCELLED";
  }
  return "NONE";
}

std::string_view name_of(EventKind kind) {
  switch (kind) {
    case EventKind::kReceiverReady:
      return "RECEIVER_READY";
    case EventKind::kSliceReceived:
      return "SLICE_RECEIVED";
    case EventKind::kCompleted:
      return "COMPLETED";
    case EventKind::kSourceReleased:
      return "SOURCE_RELEASED";
    case EventKind::kDestReleased:
      return "DEST_RELEASED";
    case EventKind::kDelivered:
      return "DELIVERED";
    case EventKind::kFailed:
      return "FAILED";
    case EventKind::kCancelled:
      return "CANCELLED";
    case EventKind::kRejected:
      return "REJECTED";
    case EventKind::kDraining:
      return "DRAINING";
    case EventKind::kDaemonRestarted:
      return "DAEMON_RESTARTED";
    case EventKind::kReattached:
      return "REATTACHED";
  }
  return "UNKNOWN";
}

}  // namespace kvferry::client
