"""The client's view of its transfers: what the control page said last, and what has been reported.

Turns changes of records into events, so that each is reported once and progress that nobody asked
for in between is folded together. Any thread; knows nothing of gRPC.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Optional

from kvferry import _control_page as cp
from kvferry import _reasons
from kvferry._attachment import Attachment
from kvferry.errors import Code, KvferryError
from kvferry.types import (
    Delivery,
    Event,
    EventKind,
    Side,
    TransferState,
    TransferStatus,
)

if TYPE_CHECKING:
    from kvferry.client import Transfer

_END_EVENTS = {
    TransferState.DELIVERED: EventKind.DELIVERED,
    TransferState.COMPLETED: EventKind.COMPLETED,
    TransferState.CANCELLED: EventKind.CANCELLED,
}
_FAILED = int(TransferState.FAILED)
_FIRST_END = int(TransferState.DELIVERED)


def unknown_transfer() -> KvferryError:
    return KvferryError(Code.NOT_FOUND, "TRANSFER_UNKNOWN", "no such transfer is open", "transfer")


def _state(record: cp.Record) -> TransferState:
    return TransferState(record.state) if record.state <= 6 else TransferState.FAILED


class _Entry:
    """One open transfer."""

    __slots__ = (
        "accepted",
        "declined",
        "dirty",
        "home",
        "key",
        "lost",
        "operations",
        "refusal",
        "rejections",
        "seen",
        "slot",
        "told_end",
        "told_flags",
        "told_slices",
        "transfer",
    )

    def __init__(self, transfer: Transfer, key: bytes, home: Optional[Attachment]) -> None:
        self.transfer = transfer
        self.key = key
        self.home = home  # whose daemon has it
        self.slot: Optional[int] = None
        self.seen = cp.Record()  # what the page said last, or what the loss of the daemon made
        self.told_flags = 0
        self.told_slices = 0
        self.told_end = False
        self.operations = 1  # without an answer yet
        self.accepted = False  # the daemon has it; it has none for a claim alone
        self.declined = False
        self.lost = False
        self.dirty = False
        self.rejections: deque[KvferryError] = deque()  # not reported yet
        self.refusal: Optional[KvferryError] = None  # the last one

    @property
    def refused(self) -> bool:
        return not self.accepted and self.operations == 0 and self.refusal is not None

    @property
    def over(self) -> bool:
        return self.seen.state >= _FIRST_END and self.seen.flags & cp.RELEASED != 0

    def status(self) -> TransferStatus:
        seen = self.seen
        return TransferStatus(
            state=_state(seen),
            side=self.transfer.side,
            reason=_reasons.name_of(seen.reason),
            released_reason=_reasons.name_of(seen.released_reason),
            released=seen.flags & cp.RELEASED != 0,
            aux_ready=seen.flags & cp.AUX_READY != 0,
            memory_in_use=seen.flags & cp.MEMORY_IN_USE != 0,
            delivery=Delivery(seen.delivery) if seen.delivery <= 3 else Delivery.UNKNOWN,
            slices=seen.slices,
            bytes_done=seen.bytes_done,
            bytes_total=seen.bytes_total,
        )

    def next_event(self) -> Optional[Event]:
        transfer = self.transfer
        if self.rejections:
            error = self.rejections.popleft()
            return Event(EventKind.REJECTED, transfer, self.status(), error.reason, 0, error)
        seen = self.seen
        fresh = seen.flags & ~self.told_flags
        if fresh & cp.RECEIVER_READY:
            self.told_flags |= cp.RECEIVER_READY
            return self._event(EventKind.RECEIVER_READY)
        if transfer.side is Side.RECEIVER and seen.slices > self.told_slices:
            self.told_slices = seen.slices
            return self._event(EventKind.SLICE_RECEIVED)
        state = _state(seen)
        ends = state.terminal and not self.told_end
        # A source is normally released before the end is known; a destination only after it.
        if fresh & cp.RELEASED and (not ends or state is TransferState.DELIVERED):
            self.told_flags |= cp.RELEASED
            return self._event(
                EventKind.SOURCE_RELEASED
                if transfer.side is Side.SENDER
                else EventKind.DEST_RELEASED,
                seen.released_reason,
            )
        if ends:
            self.told_end = True
            return self._event(_END_EVENTS.get(state, EventKind.FAILED))
        return None

    def _event(self, kind: EventKind, reason: Optional[int] = None) -> Event:
        status = self.status()
        name = status.reason if reason is None else _reasons.name_of(reason)
        return Event(kind, self.transfer, status, name, status.slices)


class Transfers:
    """`max_unread`: refusals that may wait to be polled before no more operations are taken."""

    def __init__(self, max_unread: int) -> None:
        self._max_unread = max_unread
        self._lock = threading.Condition()
        self._entries: dict[int, _Entry] = {}
        self._by_key: dict[bytes, _Entry] = {}
        self._dirty: deque[_Entry] = deque()
        self._global: deque[Event] = deque()
        self._attachment: Optional[Attachment] = None
        self._tail = 0
        self._retry: list[int] = []  # slots that could not be read
        self._draining = False
        self._unread = 0
        self.events = 0
        self.overflows = 0
        self.accepted = 0
        self.rejected = 0

    # ---- operations --------------------------------------------------------------------------

    def begin(self, key: bytes, fresh: Transfer) -> tuple[Transfer, bool]:
        """The transfer under this key, `fresh` if there is none, with one more operation under
        way; whether it is new. RESOURCE_EXHAUSTED EVENTS_UNREAD."""
        with self._lock:
            if self._unread >= self._max_unread:
                raise KvferryError(
                    Code.RESOURCE_EXHAUSTED,
                    "EVENTS_UNREAD",
                    "too many refusals wait to be polled",
                )
            entry = self._by_key.get(key)
            if entry is not None:
                entry.operations += 1
                return entry.transfer, False
            entry = _Entry(fresh, key, self._attachment)
            self._by_key[key] = entry
            self._entries[fresh.handle] = entry
            return fresh, True

    def begin_known(self, handle: int) -> None:
        with self._lock:
            self._find(handle).operations += 1

    def undo(self, handle: int, created: bool) -> None:
        """The operation was never queued."""
        with self._lock:
            entry = self._entries.get(handle)
            if entry is None:
                return
            entry.operations = max(0, entry.operations - 1)
            if created and entry.operations == 0:
                self._remove(entry)

    def answer(self, handle: int, error: Optional[KvferryError], operation: Optional[str]) -> bool:
        """An answer has come; handle 0 for operations without a transfer; `operation`: its field's
        name. Whether there is an event. A refused decline leaves its claim as it was."""
        declines = operation == "decline"
        with self._lock:
            self._lock.notify_all()
            entry = self._entries.get(handle)
            if entry is not None and not declines:
                entry.operations = max(0, entry.operations - 1)
            if error is None:
                self.accepted += 1
                if entry is not None:
                    if declines:
                        entry.declined = True
                    elif operation != "claim":
                        entry.accepted = True
                    self._remove_if_declined(entry)
                return False
            self.rejected += 1
            self._unread += 1
            if entry is not None and not declines:
                entry.refusal = error
                entry.rejections.append(error)
                self._mark(entry)
            else:
                self._global.append(Event(EventKind.REJECTED, None, None, error.reason, 0, error))
            return True

    def handle_of(self, key: bytes) -> int:
        """What a decline under this key takes back; 0: nothing of this client. Once the daemon has
        accepted both, the claim is forgotten; one that it has refused is told and stays."""
        with self._lock:
            entry = self._by_key.get(key)
            return 0 if entry is None else entry.transfer.handle

    def settle(self, handle: int, deadline: float) -> None:
        """Waits until no operation of the transfer is without an answer: a call about it must not
        overtake the operation that opened it."""
        with self._lock:
            while True:
                entry = self._entries.get(handle)
                left = deadline - time.monotonic()
                if entry is None or entry.lost or entry.operations == 0 or left <= 0:
                    return
                self._lock.wait(left)

    # ---- the daemon's life -------------------------------------------------------------------

    def attach(self, attachment: Attachment) -> None:
        with self._lock:
            self._attachment = attachment
            self._tail = 0
            self._retry = []
            self._draining = False

    def lose(self) -> None:
        """The daemon is lost: after a last look at its page all open transfers have failed. Their
        memory is released by exited()."""
        with self._lock:
            self._lock.notify_all()
            if self._attachment is None:
                return
            self._look()
            self._retry = []
            self._attachment = None
            for entry in self._entries.values():
                if entry.lost or entry.refused:
                    continue
                entry.lost = True
                entry.operations = 0
                entry.accepted = True
                if entry.seen.state < _FIRST_END:
                    entry.seen = entry.seen._replace(
                        state=_FAILED, reason=_reasons.DAEMON_RESTARTED
                    )
                self._mark(entry)

    def exited(self, attachment: Attachment) -> None:
        """That daemon's process has ended: it touches no memory any more."""
        with self._lock:
            for entry in self._entries.values():
                if not entry.lost or entry.home is not attachment or entry.seen.flags & cp.RELEASED:
                    continue
                flag = (
                    cp.SOURCE_RELEASED if entry.transfer.side is Side.SENDER else cp.DEST_RELEASED
                )
                entry.seen = entry.seen._replace(
                    flags=(entry.seen.flags | flag) & ~cp.MEMORY_IN_USE,
                    released_reason=_reasons.DAEMON_RESTARTED,
                )
                self._mark(entry)

    def announce(self, kind: EventKind, error: Optional[KvferryError] = None) -> None:
        """An event without a transfer. Restarts that nobody polls for are told once."""
        with self._lock:
            if error is None and any(
                waiting.kind is kind and waiting.error is None for waiting in self._global
            ):
                return
            if len(self._global) < self._max_unread + 16:
                if kind is EventKind.REJECTED:
                    self._unread += 1
                self._global.append(
                    Event(kind, None, None, "NONE" if error is None else error.reason, 0, error)
                )

    # ---- events ------------------------------------------------------------------------------

    def take(self, limit: int) -> list[Event]:
        """Takes up to `limit` events, reading the page if need be. Does not block."""
        with self._lock:
            self._look()
            if not self._dirty and not self._global:
                return []
            out: list[Event] = []
            while len(out) < limit and self._global:
                event = self._global.popleft()
                if event.kind is EventKind.REJECTED:
                    self._unread -= 1
                out.append(event)
            while len(out) < limit and self._dirty:
                entry = self._dirty[0]
                taken = (
                    self._next_event(entry)
                    if self._entries.get(entry.transfer.handle) is entry
                    else None
                )
                if taken is not None:
                    out.append(taken)
                    continue
                entry.dirty = False
                self._dirty.popleft()
            self.events += len(out)
            return out

    def ended(self, handle: int) -> Optional[TransferStatus]:
        """For waiting: what is known once the transfer has come to its end, whose events are
        consumed by this; None while it goes on. Raises the refusal of a refused one."""
        with self._lock:
            self._look()
            entry = self._find(handle)
            refusal = entry.refusal if entry.refused else None
            if not entry.over and refusal is None:
                return None
            while self._next_event(entry) is not None:
                self.events += 1
            if refusal is not None:
                raise refusal
            return entry.status()

    def _next_event(self, entry: _Entry) -> Optional[Event]:
        event = entry.next_event()
        if event is not None and event.kind is EventKind.REJECTED:
            self._unread -= 1
        return event

    @property
    def pending(self) -> bool:
        with self._lock:
            return bool(self._dirty or self._global)

    @property
    def unsettled(self) -> bool:
        """Whether a slot could not be read as its writer was at work: nothing rings for it."""
        return bool(self._retry)

    def status(self, handle: int) -> TransferStatus:
        with self._lock:
            entry = self._find(handle)
            self._refresh(entry)
            return entry.status()

    def aux(self, handle: int) -> Optional[bytes]:
        """None if it must be fetched. FAILED_PRECONDITION AUX_NOT_READY."""
        with self._lock:
            entry = self._find(handle)
            self._refresh(entry)
            if entry.seen.flags & cp.AUX_READY == 0:
                raise KvferryError(
                    Code.FAILED_PRECONDITION,
                    "AUX_NOT_READY",
                    "the transfer is not completed, or came without aux",
                )
            if entry.slot is None or entry.home is None:
                return None
            # Also after the daemon's end: its page is still mapped.
            return entry.home.page.read_aux(entry.slot, entry.seen)

    def may_close(self, handle: int) -> bool:
        """Whether the daemon has to be told. FAILED_PRECONDITION TRANSFER_OPEN."""
        with self._lock:
            entry = self._find(handle)
            self._refresh(entry)
            if not entry.over and not entry.refused:
                raise KvferryError(
                    Code.FAILED_PRECONDITION,
                    "TRANSFER_OPEN",
                    "the transfer has not ended, or its memory is not released",
                    "transfer",
                )
            return not entry.lost and not entry.refused

    def forget(self, handle: int) -> None:
        with self._lock:
            entry = self._entries.get(handle)
            if entry is not None:
                self._unread -= len(entry.rejections)
                self._remove(entry)

    @property
    def draining(self) -> bool:
        with self._lock:
            return self._attachment is not None and self._attachment.page.draining

    @property
    def open(self) -> int:
        with self._lock:
            return len(self._entries)

    # ---- with the lock -----------------------------------------------------------------------

    def _find(self, handle: int) -> _Entry:
        entry = self._entries.get(handle)
        if entry is None:
            raise unknown_transfer()
        return entry

    def _remove(self, entry: _Entry) -> None:
        self._by_key.pop(entry.key, None)
        self._entries.pop(entry.transfer.handle, None)

    def _remove_if_declined(self, entry: _Entry) -> None:
        if entry.declined and not (entry.accepted or entry.operations or entry.refusal):
            self._remove(entry)

    def _mark(self, entry: _Entry) -> None:
        if not entry.dirty:
            entry.dirty = True
            self._dirty.append(entry)

    def _look(self) -> None:
        if self._attachment is None:
            return
        page = self._attachment.page
        if self._retry:
            again, self._retry = self._retry, []
            for slot in again:
                self._look_at(slot)
        if page.ring_head != self._tail:
            self._tail, changed = page.take_changed(self._tail)
            if changed is None:
                self.overflows += 1
            for slot in range(page.slot_count) if changed is None else dict.fromkeys(changed):
                self._look_at(slot)
        if not self._draining and page.draining:
            self._draining = True
            self._global.append(Event(EventKind.DRAINING, None, None))

    def _look_at(self, slot: int) -> None:
        assert self._attachment is not None
        record = self._attachment.page.read(slot)
        if record is None:
            self._retry.append(slot)
            return
        entry = self._entries.get(record.client_handle)
        if entry is None or entry.lost:
            return
        entry.slot = slot
        entry.seen = record
        entry.accepted = True
        self._mark(entry)

    def _refresh(self, entry: _Entry) -> None:
        if entry.lost or self._attachment is None or entry.home is not self._attachment:
            return
        if entry.slot is None:
            self._look()
        else:
            self._look_at(entry.slot)
