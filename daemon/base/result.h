// Errors as values. An Error carries a canonical code, a stable UPPER_SNAKE reason that programs
// may compare, the name of the offending field where there is one, and a message for people.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace kvferry {

// The canonical codes of gRPC, with the same numbers.
enum class Code : uint8_t {
  kOk = 0,
  kCancelled = 1,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kAlreadyExists = 6,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kDataLoss = 15,
};

std::string_view name_of(Code code);

struct Error {
  Code code = Code::kInternal;
  std::string reason;   // stable, e.g. "BLOCK_OUT_OF_RANGE"
  std::string message;  // for people
  std::string field;    // e.g. "groups[2].block_ids[17]"; empty where no field is at fault

  // "INVALID_ARGUMENT BLOCK_OUT_OF_RANGE groups[2].block_ids[17]: ..."
  std::string to_string() const;
};

template <typename T>
using Result = tl::expected<T, Error>;
using Status = Result<void>;

inline tl::unexpected<Error> fail(Code code, std::string reason, std::string message,
                                  std::string field = {}) {
  return tl::unexpected<Error>(
      Error{code, std::move(reason), std::move(message), std::move(field)});
}

inline tl::unexpected<Error> invalid(std::string field, std::string reason, std::string message) {
  return fail(Code::kInvalidArgument, std::move(reason), std::move(message), std::move(field));
}

// fail() with the message of a C call: "open(/run/x): Permission denied".
tl::unexpected<Error> fail_errno(std::string reason, std::string_view call, int errno_value);

// Returns the error of `expr` (a Status or Result) from the enclosing function.
#define KVFERRY_RETURN_IF_ERROR(expr)                                              \
  do {                                                                             \
    if (auto&& kvferry_status_ = (expr); !kvferry_status_)                         \
      return tl::unexpected<::kvferry::Error>(std::move(kvferry_status_).error()); \
  } while (false)

}  // namespace kvferry
