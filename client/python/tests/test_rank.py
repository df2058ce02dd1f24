"""What the connectors share: nothing is left of a transfer that was refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Optional

import pytest
from conftest import TIMEOUT, Worker, Workers

import kvferry as kv
from kvferry._rank import Half, Rank, RankSettings
from kvferry._transfers import Transfers

TOKENS = 20
BLOCKS = kv.GroupBlocks([5, 6, 2])
OUT_OF_RANGE = kv.GroupBlocks([5, 16, 2])


def rank_of(worker: Worker) -> Rank:
    settings = RankSettings(worker.instance, 0, 1, 1, 0, False, "", "test-model", None)
    return Rank(settings, logging.getLogger("kvferry.test"), worker.client)


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < limit, "the condition does not come about"
        time.sleep(0.001)  # between two looks


def poll_until_nothing_is_left(rank: Rank, rejected: int) -> None:
    transfers = rank.client._transfers
    limit = time.monotonic() + TIMEOUT
    while transfers.rejected < rejected or rank._halves or transfers._entries:
        assert time.monotonic() < limit, (rank._halves, transfers.rejected, transfers._entries)
        rank.poll()
        time.sleep(0.001)  # between two looks
    assert transfers.rejected == rejected
    assert transfers._by_key == {}


def send(
    rank: Rank, workers: Workers, half: Half, key: kv.TransferKey, index: int, *, bad: bool
) -> None:
    begin = 8 * index
    transfer = rank.client.send(
        key,
        workers.sender.layout,
        OUT_OF_RANGE if bad else BLOCKS,
        num_tokens=TOKENS,
        tokens=(begin, begin + 8),
        index=index,
        last=False,
    )
    rank.follow(half, transfer)


@pytest.mark.parametrize("slices", [1, 2])
def test_a_refused_send_leaves_nothing(workers: Workers, slices: int) -> None:
    rank, half, key = rank_of(workers.sender), Half("sent"), workers.key()
    for index in range(slices):
        send(rank, workers, half, key, index, bad=True)
    poll_until_nothing_is_left(rank, slices)
    assert (half.released, half.ok, half.reason) == (True, False, "BLOCK_OUT_OF_RANGE")


def test_a_refused_slice_ends_the_ones_before(workers: Workers) -> None:
    rank, half, key = rank_of(workers.sender), Half("sent"), workers.key()
    send(rank, workers, half, key, 0, bad=False)
    send(rank, workers, half, key, 1, bad=True)
    poll_until_nothing_is_left(rank, 1)
    assert (half.released, half.ok, half.reason) == (True, False, "CANCELLED")


def test_a_slice_after_a_refused_one_is_waited_for(workers: Workers) -> None:
    rank, half, key = rank_of(workers.sender), Half("sent"), workers.key()
    send(rank, workers, half, key, 0, bad=True)
    (event,) = rank.client.wait_any(TIMEOUT)
    send(rank, workers, half, key, 0, bad=False)  # of which the event does not know
    assert event.transfer is not None
    rank._take(event.transfer, event)
    poll_until_nothing_is_left(rank, 1)
    assert (half.released, half.ok, half.reason) == (True, False, "CANCELLED")


def test_pages_are_the_receives_though_its_claim_was_refused(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = workers.receiver
    rank, half, key = rank_of(receiver), Half("received"), workers.key()
    cancelled: list[Half] = []
    monkeypatch.setattr(rank, "cancel", cancelled.append)  # as while a copy runs: it ends nothing
    rank.client.claim(key, receiver.layout, "not a ticket")
    transfer = rank.client.receive(key, receiver.layout, workers.ticket, BLOCKS, num_tokens=TOKENS)
    rank.follow(half, transfer)
    wait_until(lambda: rank.client.stats().operations_accepted == 1)
    rank.poll()
    assert cancelled == [half]
    assert not half.released
    sent = workers.sender.client.send(key, workers.sender.layout, BLOCKS, num_tokens=TOKENS)
    poll_until_nothing_is_left(rank, 1)
    assert (half.released, half.ok) == (True, True)
    assert sent.wait(TIMEOUT).ok


def test_a_refused_receive_leaves_nothing(workers: Workers) -> None:
    receiver = workers.receiver
    rank, half, key = rank_of(receiver), Half("received"), workers.key()
    transfer = rank.client.receive(
        key, receiver.layout, workers.ticket, OUT_OF_RANGE, num_tokens=TOKENS
    )
    rank.follow(half, transfer)
    poll_until_nothing_is_left(rank, 1)
    assert (half.released, half.ok, half.reason) == (True, False, "BLOCK_OUT_OF_RANGE")


def test_a_refused_claim_that_nobody_follows_leaves_nothing(workers: Workers) -> None:
    rank = rank_of(workers.receiver)
    rank.client.claim(workers.key(), workers.receiver.layout, "not a ticket")
    poll_until_nothing_is_left(rank, 1)


@pytest.mark.parametrize("answered", [False, True])
def test_a_claim_that_is_declined_leaves_nothing(workers: Workers, answered: bool) -> None:
    receiver, key = workers.receiver, workers.key()
    rank = rank_of(receiver)
    rank.client.claim(key, receiver.layout, workers.ticket)
    if answered:
        wait_until(lambda: rank.client.stats().operations_accepted == 1)
    rank.client.decline(key, receiver.layout, workers.ticket)
    wait_until(lambda: rank.client.stats().operations_accepted == 2)
    poll_until_nothing_is_left(rank, 0)


def test_a_refused_receive_of_what_was_claimed_leaves_nothing(workers: Workers) -> None:
    receiver = workers.receiver
    rank, half, key = rank_of(receiver), Half("received"), workers.key()
    rank.client.claim(key, receiver.layout, workers.ticket)
    transfer = rank.client.receive(
        key, receiver.layout, workers.ticket, OUT_OF_RANGE, num_tokens=TOKENS
    )
    rank.follow(half, transfer)
    poll_until_nothing_is_left(rank, 1)
    assert (half.released, half.ok, half.reason) == (True, False, "BLOCK_OUT_OF_RANGE")


REFUSAL = kv.KvferryError(kv.Code.UNAVAILABLE, "DRAINING", "")


@pytest.mark.parametrize(
    ("answers", "left"),
    [
        ([("claim", None), ("decline", None)], 0),
        ([("decline", None), ("claim", None)], 0),
        ([("decline", None)], 1),
        ([("claim", None), ("decline", REFUSAL)], 1),
        ([("claim", None), ("decline", REFUSAL), ("decline", None)], 0),
        ([("claim", REFUSAL), ("decline", None)], 1),
    ],
)
def test_a_claim_goes_once_it_and_its_decline_are_accepted(
    workers: Workers, answers: list[tuple[str, Optional[kv.KvferryError]]], left: int
) -> None:
    transfers = Transfers(16)
    fresh = kv.Transfer(workers.receiver.client, 1, kv.Side.RECEIVER, workers.key())
    transfers.begin(b"key", fresh)
    assert (transfers.handle_of(b"key"), transfers.handle_of(b"another")) == (1, 0)
    for operation, error in answers:
        assert transfers.answer(1, error, operation) is (error is not None)
    assert transfers.open == left


def test_a_refusal_without_a_transfer_is_logged(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    rank = rank_of(workers.receiver)
    rank.client._transfers.announce(kv.EventKind.REJECTED, REFUSAL)
    rank.poll()
    assert "refused: " in caplog.text
    assert "DRAINING" in caplog.text


def test_a_refused_decline_is_told_and_leaves_the_claim(workers: Workers) -> None:
    client, key = workers.receiver.client, workers.key()
    claimed = client.claim(key, workers.receiver.layout, workers.ticket)
    client.decline(key, workers.receiver.layout, "not a ticket")
    event = client.wait_any(TIMEOUT)[0]
    assert (event.kind, event.transfer) == (kv.EventKind.REJECTED, None)
    assert claimed.status().state is kv.TransferState.NONE
    assert client.stats().open_transfers == 1
    client.decline(key, workers.receiver.layout, workers.ticket)
    wait_until(lambda: client.stats().open_transfers == 0)
