"""One rank of an engine, as the connectors for vLLM and SGLang share it: its client, what it has
registered, and what became of its transfers. Nothing here knows an engine."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from kvferry.client import Client, Transfer
from kvferry.errors import Code, KvferryError
from kvferry.layout import LayoutBuilder
from kvferry.types import Event, EventKind, LayoutRef, Ready, Side, TransferState, TransferStatus


@dataclass(frozen=True)
class RankSettings:
    instance: str
    rank: int  # within the instance
    rank_count: int
    tp_size: int
    dp_group: int
    spans_nodes: bool  # ranks of the instance are on several nodes
    socket: str
    fingerprint: str
    instance_key_file: Optional[Path]


@dataclass(eq=False)
class Half:
    """This rank's side of one transfer. Its pages are the transfer's until `released`."""

    name: str  # for logs
    transfer: Optional[Transfer] = None
    released: bool = False
    ok: bool = False  # once released: the receiver has everything, or the sender gave everything
    reason: str = ""  # once released and not ok
    refused: bool = False  # once released: nothing was begun, but a claim may stand
    receiver_ready: bool = False  # sender: what the receiver needs is known
    wants_aux: bool = False
    aux: Optional[bytes] = None  # once released, if wanted and there is some

    def give_up(self, reason: str) -> None:
        """For what was never started: nobody has its pages."""
        self.released = True
        self.reason = reason


def heads_of(heads: int, total: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """Heads of the model, and the first of this rank's `heads`; with more ranks than heads, several
    ranks have the same. `total` 0: not known, so none is held twice."""
    total = max(total, heads) if total else heads * tp_size
    if heads * tp_size == total:
        return total, heads * tp_rank
    return total, tp_rank * total // tp_size


class Rank:
    """One thread: the engine's. Waits for a transfer in settle() only."""

    def __init__(
        self, settings: RankSettings, logger: logging.Logger, client: Optional[Client] = None
    ) -> None:
        """`client`: an engine's that allocated its pages with it."""
        self._settings = settings
        self._logger = logger
        self.client = client or Client(
            settings.socket, name=f"{settings.instance}-r{settings.rank}"
        )
        self.layout: Optional[LayoutRef] = None
        self.card = b""
        self._builder: Optional[LayoutBuilder] = None
        self._device_pools: list[str] = []
        self._word: Optional[int] = None
        self._word_value = 0
        self._halves: dict[Transfer, Half] = {}

    # ---- memory and layout -------------------------------------------------------------------

    def export(self, pointer: int, size: int) -> None:
        """Memory of a GPU that the engine allocated. Blocks."""
        # Without a place for the proof: after a restart it is made between two steps, since what a
        # null block holds is multiplied by masked attention too.
        name = f"kv{len(self._device_pools)}"
        self.client.export_device_memory(name, pointer, size)
        self._device_pools.append(name)

    @property
    def on_device(self) -> bool:
        """Something was exported."""
        return bool(self._device_pools)

    def builder(self) -> LayoutBuilder:
        s = self._settings
        return self.client.layout_builder(
            s.fingerprint, rank=s.rank, rank_count=s.rank_count, dp_group=s.dp_group
        )

    def register(self, builder: LayoutBuilder) -> None:
        """Blocks until the daemon has checked memory and layout."""
        registered = self.client.register_layout(
            self._settings.instance,
            builder.layout,
            incarnation=self._incarnation(),
            instance_key=self._instance_key(),
        )
        self.layout = registered.ref
        self.card = registered.card
        self._builder = builder

    def use_device(self, device: int) -> None:
        """Pages are of this GPU: what is queued on it has to run before they are ready."""
        if self._word is None:
            self.client.register_words_with_device(device)
            self._word = self.client.alloc_word()

    def unregister(self) -> None:
        """Before the memory is taken away (sleep mode). Blocks until nobody uses it."""
        if self.layout is None:
            return
        self.client.unregister_layout(self.layout)
        if self._device_pools:
            self.client.unregister_pools(self._device_pools)
            self._device_pools = []
        self.layout = None

    def _incarnation(self) -> Optional[bytes]:
        # On one node the daemon draws it. Else an engine's start is told apart by its name.
        if not self._settings.spans_nodes:
            return None
        return hashlib.sha256(f"kvferry {self._settings.instance}".encode()).digest()[:16]

    def _instance_key(self) -> Optional[bytes]:
        path = self._settings.instance_key_file
        if path is None:
            return None
        return hmac.digest(path.read_bytes(), self._settings.instance.encode(), "sha256")[:16]

    def join(self, cards: list[bytes]) -> None:
        """Cards of all ranks, where these are on several nodes. Blocks."""
        try:
            self.client.join_instance(self._settings.instance, cards, self._instance_key())
        except KvferryError as error:
            self._logger.error("kvferry: the ranks of this engine cannot be joined: %s", error)

    def ticket(self) -> str:
        """Empty while the instance is not complete: to be asked again. Blocks for a call."""
        with contextlib.suppress(KvferryError):
            return self.client.ticket(self._settings.instance)
        return ""

    # ---- transfers ---------------------------------------------------------------------------

    def ready(self) -> Optional[Ready]:
        """When what is queued now on the GPU has run; None without one, as the CPU has computed."""
        if self._word is None:
            return None
        import torch

        stream = torch.cuda.current_stream()
        try:
            self._word_value += 1
            self.client.signal_on_stream(stream.cuda_stream, self._word, self._word_value)
        except KvferryError as error:
            if error.reason != "STREAM_WORDS_UNSUPPORTED":
                raise
            stream.synchronize()
            return None
        return Ready.timeline(self._word, self._word_value)

    def follow(self, half: Half, transfer: Transfer) -> None:
        half.transfer = transfer
        self._halves[transfer] = half

    def cancel(self, half: Half) -> None:
        """Its end comes by poll()."""
        if half.transfer is not None and not half.released:
            with contextlib.suppress(KvferryError):  # ended meanwhile, or the daemon has
                half.transfer.cancel()

    def settle(self, half: Half, timeout: float) -> None:
        """Ends it and waits until nobody touches its pages: for engines that are about to give them
        away. A copy that runs takes milliseconds; DEADLINE_EXCEEDED WAIT_TIMEOUT is for a daemon
        that hangs, and the pages are still its."""
        transfer = half.transfer
        if transfer is None:
            half.released = True
        if half.released or transfer is None:
            return
        self.cancel(half)
        try:
            half.reason = transfer.wait(timeout).reason
        except KvferryError as error:
            if error.code is Code.DEADLINE_EXCEEDED:
                raise
            half.reason = error.reason  # it was refused, or is not known any more
        half.released = True
        self._close(transfer)

    def poll(self) -> bool:
        """Takes all events, without a call but to close what has ended, and to cancel what was
        refused; whether the rank was registered anew with a daemon that had restarted: card and
        ticket are new then."""
        anew = False
        while events := self.client.poll():
            for event in events:
                if event.kind is EventKind.REATTACHED:
                    anew = self._reattached(event) or anew
                if event.transfer is not None:
                    self._take(event.transfer, event)
                elif event.kind is EventKind.REJECTED:  # a decline, or attaching again
                    self._logger.warning("kvferry: refused: %s", event.error)
        return anew

    def _take(self, transfer: Transfer, event: Event) -> None:
        half = self._halves.get(transfer)
        status = event.status
        if half is not None and status is not None:
            if event.kind is EventKind.RECEIVER_READY:
                half.receiver_ready = True
            # The status is the page's, and may be ahead of the event that is told first.
            if status.released and not half.released:
                self._released(half, transfer, status)
            elif event.kind is EventKind.REJECTED:
                self._rejected(half, transfer, event)
        ended = status is not None and status.state.terminal and status.released
        # What was refused has no end that would be told. Until the last of its operations has its
        # answer it stays open: each refusal tries.
        refused = event.kind is EventKind.REJECTED and (half is None or half.released)
        if ended or refused:
            self._close(transfer)

    def _released(self, half: Half, transfer: Transfer, status: TransferStatus) -> None:
        if transfer.side is Side.RECEIVER:
            half.ok = status.state is TransferState.COMPLETED
        else:
            # A source is normally released before the receiver's end is known.
            half.ok = status.state.terminal is status.ok and status.released_reason == "NONE"
        if not half.ok:
            half.reason = status.reason if status.state.terminal else status.released_reason
            # A sender may well be declined: the receiver's side knows what is wrong.
            level = logging.WARNING if transfer.side is Side.RECEIVER else logging.INFO
            self._logger.log(level, "kvferry: %s: %s", half.name, half.reason)
        elif half.wants_aux and status.aux_ready:
            try:
                half.aux = transfer.aux()
            except KvferryError as error:
                half.ok, half.reason = False, error.reason
        half.released = True

    def _rejected(self, half: Half, transfer: Transfer, event: Event) -> None:
        """What was accepted of the same transfer has the pages until its end is told."""
        self._logger.warning("kvferry: %s: %s", half.name, event.error)
        if half.released:
            return
        self.cancel(half)
        # Now, not when the event was made: an operation behind the refused one may have begun it.
        with contextlib.suppress(KvferryError):  # TRANSFER_OPEN
            if transfer.status().state is TransferState.NONE:
                transfer.close()
                half.give_up(event.reason)
                half.refused = True

    def _close(self, transfer: Transfer) -> None:
        self._halves.pop(transfer, None)
        with contextlib.suppress(KvferryError):  # told again with a later event
            transfer.close()

    def _reattached(self, event: Event) -> bool:
        try:
            if event.error is not None and event.error.reason == "POOLS_LEFT_OUT":
                import torch

                torch.cuda.synchronize()  # a proof is written into pages
                self.client.restore_pools()
            elif event.error is not None:
                raise event.error
            if self._builder is None or self.layout is None:
                return False
            self.register(self._builder)
        except KvferryError as error:
            self._logger.error("kvferry: registering with the restarted daemon: %s", error)
            return False
        return True

    def close(self) -> None:
        self.client.close()
