from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from daemons import Pair  # noqa: E402

import kvferry as kv  # noqa: E402

TIMEOUT = 30.0


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two daemons for tests that leave them alive."""
    assert "KVFERRY_BIN_DIR" in os.environ, "set KVFERRY_BIN_DIR to the folder of kvferryd"
    with Pair() as daemons:
        yield daemons


class Worker:
    """A rank with one array of [blocks, layers, 2, heads, tokens, dim]."""

    def __init__(
        self,
        socket: str,
        instance: str,
        *,
        blocks: int = 16,
        layers: int = 2,
        heads: int = 2,
        rank: int = 0,
        rank_count: int = 1,
        **options: object,
    ) -> None:
        self.client = kv.Client(socket, name=f"{instance}-{rank}", **options)  # type: ignore[arg-type]
        shape = (blocks, layers, 2, heads, 8, 16)
        self.pages = self.client.alloc_array("kv", shape, "float32")
        layout = self.client.layout_from_tensors(
            self.pages,
            layers=range(layers),
            kv_packing=kv.KvPacking.SEPARATE,
            axes="blkhnd",
            fingerprint="test-model",
            tokens_per_block=8,
            heads=heads,
            heads_total=heads * rank_count,
            head_begin=heads * rank,
            rank=rank,
            rank_count=rank_count,
        )
        self.registered = self.client.register_layout(instance, layout, reuse_hash_scheme="test")
        self.layout = self.registered.ref
        self.instance = instance

    def close(self) -> None:
        self.client.close()


class Workers:
    """A sender on one daemon and a receiver on the other; names are new for each."""

    count = 0

    def __init__(self, prefill: str, decode: str, **options: object) -> None:
        Workers.count += 1
        number = Workers.count
        self.sender = Worker(prefill, f"prefill{number}", **options)  # type: ignore[arg-type]
        self.receiver = Worker(decode, f"decode{number}", **options)  # type: ignore[arg-type]
        self.ticket = self.sender.client.ticket(self.sender.instance)

    def key(self, name: str = "request") -> kv.TransferKey:
        return kv.TransferKey(name, kv.random_secret(), self.sender.instance)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def workers(pair: Pair) -> Iterator[Workers]:
    both = Workers(pair.prefill.socket, pair.decode.socket)
    yield both
    both.close()
