from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path

import pytest

from kvferry import _control_page as cp
from kvferry import _reasons

SLOTS, RING, AUX = 4, 8, 64
SLOTS_AT, RING_AT, AUX_AT = 4096, 4096 + SLOTS * 128, 4096 + SLOTS * 128 + RING * 4
BYTES = 8192
PROJECT = Path(__file__).resolve().parents[3]


class Writer:
    """What the daemon does, in plain steps."""

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, BYTES)
        self.header()

    def header(self, magic: int = cp.MAGIC, ring: int = RING, total: int = BYTES) -> None:
        struct.pack_into(
            "<QIIIIQQQQII16sQIIQ",
            self.page,
            0,
            magic,
            1,
            SLOTS,
            ring,
            AUX,
            SLOTS_AT,
            RING_AT,
            AUX_AT,
            total,
            2,
            2,
            b"b" * 16,
            0,
            0,
            0,
            0,
        )

    def slot(self, slot: int, sequence: int, handle: int, flags: int = 0, aux: int = 0) -> None:
        words = (sequence, handle, 1 | flags << 32, 2 | 2 << 8 | 18 << 32, 3, 100, 200, aux, 0)
        struct.pack_into("<9Q", self.page, SLOTS_AT + slot * 128, *words)

    def ring(self, head: int, slots: dict[int, int]) -> None:
        for entry, slot in slots.items():
            struct.pack_into("<I", self.page, RING_AT + 4 * (entry % RING), slot)
        struct.pack_into("<Q", self.page, 96, head)


def test_a_record_is_what_was_written() -> None:
    writer = Writer()
    writer.slot(2, 4, 77, cp.COMPLETED)
    record = cp.StatusPage(writer.page).read(2)
    assert record is not None
    assert record[:11] == (77, 1, cp.COMPLETED, 2, 2, 0, 18, 0, 3, 100, 200)


def test_a_record_that_is_being_written_is_not_returned() -> None:
    writer = Writer()
    writer.slot(2, 5, 77)
    assert cp.StatusPage(writer.page).read(2) is None


def test_changes_are_told_once_and_an_overflow_asks_for_the_whole_table() -> None:
    writer = Writer()
    page = cp.StatusPage(writer.page)
    writer.ring(3, {0: 1, 1: 3, 2: 9})
    assert page.take_changed(0) == (3, [1, 3])  # there is no slot 9
    assert page.take_changed(3) == (3, [])
    writer.ring(3 + RING + 1, {})
    assert page.take_changed(3) == (3 + RING + 1, None)


def test_aux_of_a_slot_that_has_another_record_is_not_returned() -> None:
    writer = Writer()
    page = cp.StatusPage(writer.page)
    writer.slot(1, 2, 5, cp.AUX_READY, 9)
    writer.page[AUX_AT + AUX : AUX_AT + AUX + 9] = b"nine char"
    record = page.read(1)
    assert record is not None
    assert page.read_aux(1, record) == b"nine char"
    writer.slot(1, 4, 6, cp.AUX_READY, 9)
    assert page.read_aux(1, record) is None


@pytest.mark.parametrize(
    "wrong", [{"magic": 1}, {"ring": 6}, {"total": BYTES + 1}, {"ring": 1 << 14}]
)
def test_a_malformed_page_is_refused(wrong: dict[str, int]) -> None:
    writer = Writer()
    writer.header(**wrong)
    with pytest.raises(ValueError):
        cp.StatusPage(writer.page)


def test_reasons_are_the_daemons() -> None:
    text = (PROJECT / "daemon/base/reason.cc").read_text()
    names = re.findall(r'"([A-Z_]+)"', text.split("kNames = {")[1].split("}")[0])
    assert tuple(names) == _reasons.NAMES
