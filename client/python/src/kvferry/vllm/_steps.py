"""What the scheduler's side of the connector tells the workers' each step, and they it. Plain data,
pickled by vLLM; secrets have no printer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvferry.types import HOLE, TransferKey

NULL_BLOCK = 0
Tables = tuple[npt.NDArray[np.int32], ...]
"""Block ids of each transferred group, in the order of the layout's groups."""


def tables_of(block_ids: Any) -> Tables:
    """vLLM's null block, which stands where a window has passed, is nothing to send or fill."""
    out = []
    for ids in block_ids:
        table = np.array(ids, dtype=np.int32)
        table[table == NULL_BLOCK] = HOLE
        out.append(table)
    return tuple(out)


@dataclass
class Send:
    """Tokens [what was sent before, end) may be read after this step's forward. Each rank knows by
    itself what it has sent, as a preemption may take back different slices from each."""

    request_id: str
    key: TransferKey
    num_tokens: int
    end: int
    tables: Tables
    last: bool


@dataclass
class Receive:
    """Tokens [cached, num_tokens) into these blocks."""

    request_id: str
    key: TransferKey
    ticket: str = field(repr=False)
    num_tokens: int
    cached: int
    tables: Tables


@dataclass
class Coming:
    """A request that will receive, or, declined, will not."""

    request_id: str
    key: TransferKey
    ticket: str = field(repr=False)


@dataclass
class Step(KVConnectorMetadata):  # type: ignore[misc]
    preempted: list[str] = field(default_factory=list)  # senders whose blocks go
    claims: list[Coming] = field(default_factory=list)
    declines: list[Coming] = field(default_factory=list)
    receives: list[Receive] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)  # receivers that were aborted
    taken_back: list[str] = field(default_factory=list)  # senders that were, after a slice was sent
    join: Optional[list[bytes]] = None  # cards of all ranks, for the first


@dataclass
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """A rank's card, and the ticket once its instance is complete."""

    rank: int
    card: bytes
    ticket: str = field(default="", repr=False)


@dataclass
class News(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """After a daemon's restart or a wake-up: new cards, a new ticket."""

    cards: dict[int, bytes] = field(default_factory=dict)
    ticket: str = field(default="", repr=False)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return News({**self.cards, **other.cards}, self.ticket or other.ticket)
