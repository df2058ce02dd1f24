"""Reading and writing the control page (proto/kvferry/control_page.h) without a call.

Words are read one by one through a memoryview, each with a single load. A slot has a sequence lock:
the same even number before and after makes a consistent record.
"""

from __future__ import annotations

import mmap
import platform
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple, Optional

MAGIC = 0x314547415046564B
VERSION = 1
HEADER_BYTES = 4096
SLOT_BYTES = 128
MAX_SLOTS = 1 << 20
MAX_AUX_BYTES = 64 * 1024
_HEADER = struct.Struct("<QIIIIQQQQII16sQIIQ")
_DRAINING_WORD = 88 // 4
_RING_HEAD_WORD = 96 // 8
_READ_TRIES = 1000

SOURCE_RELEASED = 1
DEST_RELEASED = 2
COMPLETED = 4
AUX_READY = 8
AUX_BY_CALL = 16
MEMORY_IN_USE = 32
RECEIVER_READY = 64
RELEASED = SOURCE_RELEASED | DEST_RELEASED


def _no_fence() -> None:
    """x86 keeps loads in order, and stores in order."""


class _LockFence:
    """Loads before stay before, and loads after stay after: an unlock and a lock of one mutex."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            pass
        with self._lock:
            pass


fence: Callable[[], None] = _no_fence if platform.machine() in ("x86_64", "AMD64") else _LockFence()


class Record(NamedTuple):
    """What one slot says; numbers as in worker.proto. client_handle 0: the slot is free."""

    client_handle: int = 0
    generation: int = 0
    flags: int = 0
    state: int = 0
    role: int = 0
    delivery: int = 0
    reason: int = 0
    released_reason: int = 0
    slices: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    aux_length: int = 0


def _decode(w: list[int]) -> Record:
    return Record(
        w[0],
        w[1] & 0xFFFFFFFF,
        w[1] >> 32,
        w[2] & 0xFF,
        (w[2] >> 8) & 0xFF,
        (w[2] >> 16) & 0xFF,
        (w[2] >> 32) & 0xFFFF,
        w[2] >> 48,
        w[3],
        w[4],
        w[5],
        w[6] & 0xFFFFFFFF,
    )


class StatusPage:
    """A mapped status file. Any thread; never blocks, never writes."""

    def __init__(self, mapping: mmap.mmap) -> None:
        """ValueError for what is not a well-formed page of this version."""
        size = len(mapping)
        if size < HEADER_BYTES:
            raise ValueError("shorter than its header")
        (
            magic,
            version,
            self.slot_count,
            self.ring_capacity,
            self.aux_bytes,
            self._slots_offset,
            self._ring_offset,
            self._aux_offset,
            total_bytes,
            self.timeline_words,
            self.done_words,
            self.boot_id,
            _,
            _,
            _,
            _,
        ) = _HEADER.unpack_from(mapping)

        def inside(offset: int, length: int) -> bool:
            return offset % 8 == 0 and offset >= HEADER_BYTES and offset + length <= size

        if (
            magic != MAGIC
            or version != VERSION
            or total_bytes != size
            or not 0 < self.slot_count <= MAX_SLOTS
            or not 0 < self.ring_capacity <= 4 * MAX_SLOTS
            or self.ring_capacity & (self.ring_capacity - 1) != 0
            or self.aux_bytes % 8 != 0
            or self.aux_bytes > MAX_AUX_BYTES
            or not inside(self._slots_offset, self.slot_count * SLOT_BYTES)
            or not inside(self._ring_offset, self.ring_capacity * 4)
            or not inside(self._aux_offset, self.slot_count * self.aux_bytes)
        ):
            raise ValueError("not a control page of this version")
        view = memoryview(mapping)[: size // 8 * 8]
        self._bytes = view
        self._words = view.cast("Q")
        self._halves = view.cast("I")

    @property
    def ring_head(self) -> int:
        return self._words[_RING_HEAD_WORD]

    @property
    def draining(self) -> bool:
        return self._halves[_DRAINING_WORD] != 0

    def read(self, slot: int) -> Optional[Record]:
        """None if the writer was stopped in the middle; it notes the change in the ring later."""
        at = (self._slots_offset + slot * SLOT_BYTES) // 8
        words = self._words
        for _ in range(_READ_TRIES):
            before = words[at]
            if before & 1:
                continue
            fence()
            image = words[at + 1 : at + 9].tolist()
            fence()
            if words[at] == before:
                return _decode(image)
        return None

    def read_aux(self, slot: int, record: Record) -> Optional[bytes]:
        """The aux of `record`, read from `slot` before; None if the slot has another by now."""
        if (
            record.flags & AUX_READY == 0
            or record.flags & AUX_BY_CALL != 0
            or record.aux_length > self.aux_bytes
        ):
            return None
        at = self._aux_offset + slot * self.aux_bytes
        out = bytes(self._bytes[at : at + record.aux_length])
        fence()
        again = self.read(slot)
        if (
            again is None
            or again.generation != record.generation
            or again.client_handle != record.client_handle
        ):
            return None
        return out

    def take_changed(self, tail: int) -> tuple[int, Optional[list[int]]]:
        """The new tail and the slots written since `tail`; None: look at every slot."""
        head = self.ring_head
        if head == tail:
            return tail, []
        capacity = self.ring_capacity
        if head - tail > capacity:
            return head, None
        fence()
        ring = self._ring_offset // 4
        halves = self._halves
        slots = [halves[ring + (i & (capacity - 1))] for i in range(tail, head)]
        fence()
        # An entry is overwritten only once the head has gone a full round beyond it.
        now = self.ring_head
        if now - tail >= capacity:
            return now, None
        return head, [slot for slot in slots if slot < self.slot_count]


class Words:
    """The mapped words: the worker's timeline words, then the daemon's done words."""

    def __init__(self, mapping: mmap.mmap, timeline_words: int, done_words: int) -> None:
        if (timeline_words + done_words) * 8 > len(mapping):
            raise ValueError("the words file is too short")
        self.timeline_words = timeline_words
        self.done_words = done_words
        self.mapping = mapping
        self._words = memoryview(mapping)[: (timeline_words + done_words) * 8].cast("Q")

    def timeline(self, word: int) -> int:
        return self._words[word]

    def set_timeline(self, word: int, value: int) -> None:
        fence()
        self._words[word] = value

    def done(self, word: int) -> int:
        value = self._words[self.timeline_words + word]
        fence()
        return value

    def set_done(self, word: int, value: int) -> None:
        self._words[self.timeline_words + word] = value

    def release_waiters(self) -> None:
        """The daemon's process has ended: what waits for one of its words goes on. The value is
        the largest that a stream's comparison, of the signed difference, takes for later."""
        for word in range(self.done_words):
            self.set_done(word, (1 << 63) - 1)
