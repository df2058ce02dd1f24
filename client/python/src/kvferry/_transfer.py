"""One side of one transfer, as a client names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvferry.types import (
    CancelResult,
    GroupCommit,
    ReceiverNeeds,
    Side,
    TransferKey,
    TransferStatus,
)

if TYPE_CHECKING:
    from kvferry.client import Client


class Transfer:
    """One side of one transfer, as a client names it: the same object in all calls and events of
    that side. Its methods are the client's."""

    __slots__ = ("__weakref__", "client", "handle", "key", "side")

    def __init__(self, client: Client, handle: int, side: Side, key: TransferKey) -> None:
        self.client = client
        self.handle = handle
        self.side = side
        self.key = key

    def __repr__(self) -> str:
        return f"<Transfer {self.handle} {self.side.name} {self.key.id!r}>"

    def wait(self, timeout: float) -> TransferStatus:
        """See Client.wait."""
        return self.client.wait(self, timeout)

    def status(self) -> TransferStatus:
        """See Client.status."""
        return self.client.status(self)

    def aux(self) -> bytes:
        """See Client.aux."""
        return self.client.aux(self)

    def cancel(self) -> CancelResult:
        """See Client.cancel."""
        return self.client.cancel(self)

    def revoke(self, from_token: int) -> list[int]:
        """See Client.revoke."""
        return self.client.revoke(self, from_token)

    def receiver_needs(self) -> list[ReceiverNeeds]:
        """See Client.receiver_needs."""
        return self.client.receiver_needs(self)

    def commit_reuse(self, groups: Sequence[GroupCommit]) -> None:
        """See Client.commit_reuse."""
        self.client.commit_reuse(self, groups)

    def close(self) -> None:
        """See Client.close_transfer."""
        self.client.close_transfer(self)
