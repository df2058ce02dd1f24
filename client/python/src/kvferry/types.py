"""What is handed to and comes back from a client. Plain data; times are seconds."""

from __future__ import annotations

import base64
import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional, Union

import numpy as np
import numpy.typing as npt

from kvferry.errors import Code, KvferryError, TransferFailed, invalid

if TYPE_CHECKING:
    from kvferry.client import Transfer

HOLE = -1
"""An entry of a block list with nothing behind it."""

BlockIds = Union[Sequence[int], npt.NDArray[np.integer[Any]]]
"""Block ids; an int32 array is the fast way."""

TokenRange = tuple[int, int]
"""Half-open range of tokens of the prompt."""


class Role(enum.IntEnum):
    """What attaches."""

    RANK = 1  # has pools and layouts
    CONTROLLER = 2  # a scheduler or router: joins, tickets, look-ups, claims, declines


class Side(enum.IntEnum):
    SENDER = 1
    RECEIVER = 2


class TransferState(enum.IntEnum):
    NONE = 0  # nothing is known yet
    OPEN = 1  # accepted
    ACTIVE = 2  # the counterpart is known
    DELIVERED = 3  # sender: every byte was scattered
    COMPLETED = 4  # receiver: pages and aux may be read
    FAILED = 5
    CANCELLED = 6

    @property
    def terminal(self) -> bool:
        return self >= TransferState.DELIVERED


class Delivery(enum.IntEnum):
    """What a sender that failed knows of the delivery."""

    NONE = 0
    NO = 1  # not every byte was offered
    UNKNOWN = 2  # every byte was offered, not every one acknowledged
    DELIVERED = 3


class EventKind(enum.Enum):
    RECEIVER_READY = "RECEIVER_READY"  # sender: a receiver has come
    SLICE_RECEIVED = "SLICE_RECEIVED"  # receiver: `slices` of them have been scattered
    COMPLETED = "COMPLETED"  # receiver: read pages and aux
    SOURCE_RELEASED = "SOURCE_RELEASED"  # sender: free or overwrite the source pages
    DEST_RELEASED = "DEST_RELEASED"  # receiver: read, free or give away the pages
    DELIVERED = "DELIVERED"  # sender: the end, well
    FAILED = "FAILED"  # the end; memory still follows the RELEASED events
    CANCELLED = "CANCELLED"  # the same
    # An operation was refused, or (without a transfer) a decline or attaching again: `error` says
    # why; nothing was started.
    REJECTED = "REJECTED"
    DRAINING = "DRAINING"  # the daemon takes no new transfers (no transfer)
    DAEMON_RESTARTED = "DAEMON_RESTARTED"  # the daemon has ended; open transfers have failed
    REATTACHED = "REATTACHED"  # attached to a daemon again and registered


def _bytes16(value: bytes, what: str) -> bytes:
    if len(value) != 16:
        raise invalid("KEY_SIZE", f"{what} has 16 bytes", what)
    return bytes(value)


@dataclass(frozen=True)
class TransferKey:
    """What both sides of a hand-off agree on. Drawn by a scheduler or router, never by the daemon.

    `id`: 1 to 64 bytes, text is encoded as UTF-8. `secret`: 16 bytes, never logged; see
    random_secret(). `instance`: the sender's; receivers may leave it to the ticket. `incarnation`:
    None means that of the layout (sender) or ticket (receiver).
    """

    id: Union[bytes, str]
    secret: bytes = field(repr=False)
    instance: str = ""
    incarnation: Optional[bytes] = None

    def __post_init__(self) -> None:
        _bytes16(self.secret, "secret")
        if self.incarnation is not None:
            _bytes16(self.incarnation, "incarnation")
        if not 1 <= len(self.id_bytes) <= 64:
            raise invalid("TRANSFER_ID", "a transfer id has 1 to 64 bytes", "key.id")

    @property
    def id_bytes(self) -> bytes:
        return self.id.encode() if isinstance(self.id, str) else bytes(self.id)


@dataclass(frozen=True)
class LayoutRef:
    """The caller's own registration."""

    instance: str
    rank: int = 0


@dataclass(frozen=True)
class Ready:
    """When pages may be read (sender) or written (receiver). Without one: now."""

    word: Optional[int] = None
    value: int = 0
    event_handle: Optional[bytes] = None

    @classmethod
    def timeline(cls, word: int, value: int) -> Ready:
        """When the timeline word has reached the value."""
        return cls(word=word, value=value)

    @classmethod
    def cuda_event(cls, handle: bytes) -> Ready:
        """When a CUDA event, recorded before the operation is called, has been reached.

        `handle`: Client.export_event's, or cudaIpcGetEventHandle's 64 bytes.
        """
        if len(handle) != 64:
            raise invalid("EVENT_HANDLE", "a handle has 64 bytes", "ready.event_handle")
        return cls(event_handle=handle)


@dataclass(frozen=True)
class DoneWord:
    """A word that the daemon sets when pages may be touched again, for waits on a GPU."""

    word: int
    value: int


@dataclass(frozen=True)
class GroupBlocks:
    """Block ids of one group. Entry j stands for the group's local positions
    [(first_block + j) * B, (first_block + j + 1) * B); HOLE: nothing there.

    `tokens`: send only, where the group's range differs from the slice's. `cached_tokens`: receive
    only, what this rank has already.
    """

    ids: BlockIds
    group: int = 0
    first_block: int = 0
    tokens: Optional[TokenRange] = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class PromptHashes:
    """Hash j names the prompt up to the end of block j of the group; 1 to 32 bytes each."""

    hashes: Sequence[bytes]
    group: int = 0


@dataclass(frozen=True)
class GroupCommit:
    """Received blocks to be found by others: hash j belongs to entry j of the block list."""

    tokens: int
    hashes: Sequence[bytes]
    group: int = 0


@dataclass(frozen=True)
class ReuseLookup:
    """Tokens of the prompt's beginning that this node has, of each group; pin 0: none."""

    tokens: dict[int, int]
    pin: int = 0


@dataclass(frozen=True)
class ReceiverNeeds:
    """What one receiver needs of an open send's rank, by the sender's own groups: ranges of tokens,
    rounded outward to whole blocks. `ready`: nothing will be added."""

    instance: str
    incarnation: bytes
    dp_group: int
    ready: bool
    groups: dict[int, list[TokenRange]]


@dataclass(frozen=True)
class RegisteredLayout:
    """`card`: for join_instance(). `complete`: all ranks are on this node, no join is needed."""

    ref: LayoutRef
    card: bytes
    generation: int
    incarnation: bytes
    complete: bool
    existing: bool


@dataclass(frozen=True)
class JoinedInstance:
    incarnation: bytes
    complete: bool
    missing_ranks: list[int]
    existing: bool


@dataclass(frozen=True)
class Resolution:
    """`problem` says why, if either `reachable` or `compatible` is false."""

    reachable: bool
    compatible: bool
    problem: Optional[KvferryError]
    transport: str
    instance: str
    incarnation: bytes
    rank_count: int


@dataclass(frozen=True)
class TransferStatus:
    """What the control page says of a transfer. Bytes; `bytes_total` is 0 while unknown."""

    state: TransferState
    side: Side
    reason: str
    released_reason: str
    released: bool
    aux_ready: bool
    memory_in_use: bool
    delivery: Delivery
    slices: int
    bytes_done: int
    bytes_total: int

    @property
    def ok(self) -> bool:
        return self.state in (TransferState.COMPLETED, TransferState.DELIVERED)

    def check(self) -> TransferStatus:
        """Itself if the transfer ended well, else raises TransferFailed."""
        if self.ok:
            return self
        raise TransferFailed(
            Code.CANCELLED if self.state is TransferState.CANCELLED else Code.ABORTED,
            self.reason,
            f"the transfer is {self.state.name}",
        )


@dataclass(frozen=True)
class Event:
    """Something that happened. `transfer` is None for what concerns the daemon."""

    kind: EventKind
    transfer: Optional[Transfer]
    status: Optional[TransferStatus]
    reason: str = "NONE"
    slices: int = 0
    error: Optional[KvferryError] = None


@dataclass(frozen=True)
class CancelResult:
    """`memory_in_use`: a copy may still touch the pages; wait for the RELEASED event."""

    state: TransferState
    memory_in_use: bool
    reason: str


@dataclass(frozen=True)
class ClientStats:
    operations_sent: int
    operations_accepted: int
    operations_rejected: int
    operations_queued: int
    events: int
    ring_overflows: int
    reconnects: int
    open_transfers: int


def random_secret() -> bytes:
    """16 random bytes, for secrets, incarnations and keys."""
    return os.urandom(16)


def to_text(value: bytes) -> str:
    """Base64url without padding: a secret becomes 22 characters that fit an HTTP field."""
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def from_text(text: str) -> bytes:
    """The reverse of to_text(); ValueError for what is none."""
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
