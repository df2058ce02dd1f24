"""What the library raises."""

from __future__ import annotations

import enum


class Code(enum.IntEnum):
    """Canonical gRPC codes, as far as they occur."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class KvferryError(Exception):
    """A call or an operation that failed.

    Programs compare `code` and `reason` (a stable UPPER_SNAKE word); `field` names what was at
    fault, such as "groups[2].block_ids[17]", or is empty. `retry_after`, in seconds, is None where
    trying again makes no sense or is not known to.
    """

    def __init__(
        self,
        code: Code,
        reason: str,
        message: str = "",
        field: str = "",
        retry_after: float | None = None,
    ) -> None:
        text = f"{code.name} {reason}"
        if field:
            text += f" ({field})"
        if message:
            text += f": {message}"
        super().__init__(text)
        self.code = code
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[KvferryError], tuple[object, ...]]:
        return (
            type(self),
            (self.code, self.reason, self.message, self.field, self.retry_after),
        )


class TransferFailed(KvferryError):
    """A transfer ended otherwise than well; `reason` is the transfer's, such as "PEER_LOST"."""


def invalid(reason: str, message: str, field: str) -> KvferryError:
    return KvferryError(Code.INVALID_ARGUMENT, reason, message, field)


def not_attached() -> KvferryError:
    return KvferryError(Code.UNAVAILABLE, "NOT_ATTACHED", "not attached to a daemon")


def code_of(number: int) -> Code:
    """Numbers that are not canonical become UNKNOWN."""
    try:
        return Code(number)
    except ValueError:
        return Code.UNKNOWN
