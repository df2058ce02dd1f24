"""Why transfers end, by the numbers of the control page (daemon/base/reason.h)."""

NAMES = (
    "NONE",
    "CANCELLED",
    "DEADLINE",
    "EXPIRED",
    "DECLINED",
    "RELEASED",
    "REFUSED",
    "PERMISSION",
    "NO_SEND",
    "STALE_CARDS",
    "INCOMPATIBLE",
    "NOT_OFFERED",
    "LAYOUT_MISMATCH",
    "PROTOCOL",
    "DATA_LOSS",
    "NOT_READY",
    "GATHER_FAILED",
    "SCATTER_FAILED",
    "PEER_LOST",
    "WORKER_LOST",
    "UNREGISTERED",
    "DAEMON_RESTARTED",
    "SHUTDOWN",
    "ARENA_EXHAUSTED",
    "AUX_MISSING",
    "TOO_FRAGMENTED",
    "PEER_NOT_ALLOWED",
    "PEER_UNREACHABLE",
    "UCX_MISMATCH",
    "INTERNAL",
)

DAEMON_RESTARTED = NAMES.index("DAEMON_RESTARTED")


def name_of(number: int) -> str:
    return NAMES[number] if number < len(NAMES) else "UNKNOWN"
