"""Hand-offs through two daemons: what arrives, what is told, what is refused."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from conftest import TIMEOUT, Worker, Workers
from daemons import Pair

import kvferry as kv
from kvferry._attachment import why_not_served

SOURCE, DESTINATION, TOKENS = [5, 6, 2], [3, 1, 7], 20


def fill(worker: Worker) -> None:
    worker.pages[:] = np.random.default_rng(3).normal(size=worker.pages.shape)


def send(workers: Workers, key: kv.TransferKey, **options: object) -> kv.Transfer:
    sender = workers.sender
    blocks = kv.GroupBlocks(np.array(SOURCE, np.int32))
    options.setdefault("num_tokens", TOKENS)
    return sender.client.send(key, sender.layout, blocks, **options)  # type: ignore[arg-type]


def receive(workers: Workers, key: kv.TransferKey, **options: object) -> kv.Transfer:
    receiver = workers.receiver
    blocks = kv.GroupBlocks(DESTINATION)
    options.setdefault("num_tokens", TOKENS)
    return receiver.client.receive(  # type: ignore[arg-type]
        key, receiver.layout, workers.ticket, blocks, **options
    )


def taken(transfer: kv.Transfer) -> None:
    """Waits until the daemon has it."""
    limit = time.monotonic() + TIMEOUT
    while transfer.status().state is kv.TransferState.NONE:
        assert time.monotonic() < limit
        time.sleep(0.001)  # between two looks


def arrived(workers: Workers) -> bool:
    same = workers.receiver.pages[DESTINATION] == workers.sender.pages[SOURCE]
    return bool(same.all())


@pytest.mark.parametrize("first", ["sender", "receiver"])
def test_pages_and_aux_arrive_whoever_comes_first(workers: Workers, first: str) -> None:
    fill(workers.sender)
    key = workers.key()
    if first == "sender":
        sent, got = send(workers, key, aux=b"token"), receive(workers, key)
    else:
        got, sent = receive(workers, key), send(workers, key, aux=b"token")
    assert got.wait(TIMEOUT).check().state is kv.TransferState.COMPLETED
    assert got.aux() == b"token"
    assert sent.wait(TIMEOUT).check().delivery is kv.Delivery.DELIVERED
    assert arrived(workers)
    untouched = np.delete(workers.receiver.pages, DESTINATION, axis=0)
    assert not untouched.any()
    got.close()
    sent.close()
    assert workers.sender.client.stats().open_transfers == 0


def test_events_are_told_once_in_their_order(workers: Workers) -> None:
    key = workers.key()
    sent = send(workers, key)
    got = receive(workers, key)
    kinds: dict[kv.Transfer, list[str]] = {sent: [], got: []}
    for client, last in ((workers.receiver.client, got), (workers.sender.client, sent)):
        for event in client.events(TIMEOUT):
            assert event.transfer is last
            kinds[last].append(event.kind.name)
            if {"DELIVERED", "DEST_RELEASED"} & set(kinds[last]):
                break
        assert client.poll() == []
    assert kinds[got] == ["SLICE_RECEIVED", "COMPLETED", "DEST_RELEASED"]
    assert kinds[sent] == ["RECEIVER_READY", "SOURCE_RELEASED", "DELIVERED"]


def test_long_aux_comes_by_a_call(workers: Workers) -> None:
    key = workers.key()
    aux = bytes(range(256)) * 100
    sent = send(workers, key, aux=aux)
    receiver = workers.receiver
    got = receiver.client.receive_wait(
        key,
        receiver.layout,
        workers.ticket,
        kv.GroupBlocks(DESTINATION),
        num_tokens=TOKENS,
        timeout=TIMEOUT,
    )
    assert got == aux
    sent.wait(TIMEOUT).check()


def test_slices_by_layer_and_by_token(workers: Workers) -> None:
    fill(workers.sender)
    key = workers.key()
    got = receive(workers, key)
    slices = [((0, 8), (0, 1)), ((0, 8), (1, 2)), ((8, 20), None)]
    for index, (tokens, layers) in enumerate(slices):
        sent = send(workers, key, tokens=tokens, layers=layers, index=index, last=index == 2)
    assert got.wait(TIMEOUT).check().slices == 3
    sent.wait(TIMEOUT).check()
    assert arrived(workers)


def test_a_refused_operation_names_the_field(workers: Workers) -> None:
    sender = workers.sender
    key = workers.key()
    transfer = sender.client.send(key, sender.layout, kv.GroupBlocks([5, 16, 2]), num_tokens=TOKENS)
    with pytest.raises(kv.KvferryError) as raised:
        transfer.wait(TIMEOUT)
    error = raised.value
    assert (error.code, error.reason) == (kv.Code.INVALID_ARGUMENT, "BLOCK_OUT_OF_RANGE")
    assert error.field == "groups[0].block_ids[1]"
    transfer.close()  # nothing was started


def test_a_refusal_comes_as_an_event_too(workers: Workers) -> None:
    transfer = send(workers, workers.key(), index=3)
    (event,) = workers.sender.client.wait_any(TIMEOUT)
    assert event.kind is kv.EventKind.REJECTED
    assert event.transfer is transfer
    assert event.error is not None
    assert event.error.field


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"aux": b"x" * 65537}, "AUX_TOO_LONG"),
        ({"aux": b"x", "last": False}, "AUX_NOT_LAST"),
        ({"lease": -1.0}, "NEGATIVE_TIME"),
        ({"num_tokens": -1}, "FIELD_VALUE"),
    ],
)
def test_what_is_wrong_in_itself_is_refused_at_once(
    workers: Workers, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(kv.KvferryError) as raised:
        send(workers, workers.key(), **options)
    assert raised.value.reason == reason
    assert workers.sender.client.stats().open_transfers == 0


@pytest.mark.parametrize("ids", [[1 << 31], np.array([1 << 31]), np.array([1.5]), np.zeros((2, 2))])
def test_block_ids_that_are_none_are_refused(workers: Workers, ids: kv.types.BlockIds) -> None:
    sender = workers.sender
    with pytest.raises(kv.KvferryError, match="BLOCK_IDS"):
        sender.client.send(workers.key(), sender.layout, kv.GroupBlocks(ids), num_tokens=4)


def test_the_same_operation_again_starts_nothing_and_another_is_refused(workers: Workers) -> None:
    key = workers.key()
    sent = send(workers, key)
    assert send(workers, key) is sent
    got = receive(workers, key)
    got.wait(TIMEOUT).check()
    sent.wait(TIMEOUT).check()
    stats = workers.sender.client.stats()
    assert (stats.operations_accepted, stats.operations_rejected) == (2, 0)
    send(workers, key, num_tokens=TOKENS + 1)
    (event,) = workers.sender.client.wait_any(TIMEOUT)
    assert event.error is not None
    assert event.error.code is kv.Code.ALREADY_EXISTS


def test_cancelled_before_anybody_comes(workers: Workers) -> None:
    sent = send(workers, workers.key())
    assert sent.cancel().state is kv.TransferState.CANCELLED
    status = sent.wait(TIMEOUT)
    assert (status.state, status.reason, status.released) == (
        kv.TransferState.CANCELLED,
        "CANCELLED",
        True,
    )
    with pytest.raises(kv.TransferFailed, match="CANCELLED"):
        status.check()


def test_a_receive_that_nobody_answers_ends_in_its_time(workers: Workers) -> None:
    receiver = workers.receiver
    with pytest.raises(kv.TransferFailed) as raised:
        receiver.client.receive_wait(
            workers.key(),
            receiver.layout,
            workers.ticket,
            kv.GroupBlocks(DESTINATION),
            num_tokens=TOKENS,
            wait=0.2,
            timeout=TIMEOUT,
        )
    assert raised.value.reason in ("DEADLINE", "NO_SEND")
    assert receiver.client.stats().open_transfers == 0


def test_a_wait_that_is_over_cancels_the_receive(workers: Workers) -> None:
    receiver = workers.receiver
    with pytest.raises(kv.KvferryError, match="WAIT_TIMEOUT"):
        receiver.client.receive_wait(
            workers.key(),
            receiver.layout,
            workers.ticket,
            kv.GroupBlocks(DESTINATION),
            num_tokens=TOKENS,
            timeout=0.2,
        )
    assert receiver.client.stats().open_transfers == 0


def test_nothing_is_read_before_the_source_or_written_before_the_destination_is_ready(
    workers: Workers,
) -> None:
    source, destination = workers.sender.client, workers.receiver.client
    words = source.alloc_word(), destination.alloc_word()
    key = workers.key()
    got = receive(workers, key, ready=kv.Ready.timeline(words[1], 5))
    sent = send(workers, key, ready=kv.Ready.timeline(words[0], 5))
    with pytest.raises(kv.KvferryError, match="WAIT_TIMEOUT"):
        got.wait(0.3)
    fill(workers.sender)
    source.signal(words[0], 5)
    assert not workers.receiver.pages.any()
    with pytest.raises(kv.KvferryError, match="WAIT_TIMEOUT"):
        got.wait(0.3)
    destination.signal(words[1], 5)
    got.wait(TIMEOUT).check()
    sent.wait(TIMEOUT).check()
    assert arrived(workers)


def test_a_done_word_is_set_when_pages_are_free(workers: Workers) -> None:
    client = workers.receiver.client
    word = client.alloc_done_word()
    key = workers.key()
    got = receive(workers, key, done=kv.DoneWord(word, 9))
    assert client.done_value(word) == 0
    send(workers, key)
    got.wait(TIMEOUT).check()
    assert client.done_value(word) == 9


def test_open_send_learns_what_its_receiver_needs(workers: Workers) -> None:
    sender = workers.sender
    key = workers.key()
    sent = sender.client.open_send(key, sender.layout)
    receiver = workers.receiver
    blocks = kv.GroupBlocks(DESTINATION, cached_tokens=8)
    got = receiver.client.receive(key, receiver.layout, workers.ticket, blocks, num_tokens=TOKENS)
    (event,) = sender.client.wait_any(TIMEOUT)
    assert event.kind is kv.EventKind.RECEIVER_READY
    (needs,) = sent.receiver_needs()
    assert (needs.ready, needs.groups) == (True, {0: [(8, 24)]})
    send(workers, key)
    got.wait(TIMEOUT).check()
    assert sent.wait(TIMEOUT).ok


def test_revoked_slices_are_sent_again(workers: Workers) -> None:
    key = workers.key()
    sent = send(workers, key, tokens=(0, 8), last=False)
    send(workers, key, tokens=(8, 20), index=1)
    assert sent.revoke(8) == [1]
    fill(workers.sender)
    send(workers, key, tokens=(8, 20), index=2)
    got = receive(workers, key)
    got.wait(TIMEOUT).check()
    assert sent.wait(TIMEOUT).ok
    assert arrived(workers)


def test_a_declined_transfer_frees_its_pages_and_a_claimed_one_keeps_them(
    workers: Workers,
) -> None:
    receiver = workers.receiver
    kept, given_up = workers.key("kept"), workers.key("given-up")
    waiting = send(workers, kept, lease=1.0)
    leaving = send(workers, given_up)
    receiver.client.claim(kept, receiver.layout, workers.ticket, ttl=5)
    receiver.client.decline(given_up, receiver.layout, workers.ticket)
    assert leaving.wait(TIMEOUT).released_reason == "DECLINED"
    with pytest.raises(kv.KvferryError, match="WAIT_TIMEOUT"):
        waiting.wait(1.5)  # beyond its lease
    receive(workers, kept).wait(TIMEOUT).check()
    assert waiting.wait(TIMEOUT).ok


def test_committed_blocks_are_found_again(workers: Workers) -> None:
    key = workers.key()
    send(workers, key)
    got = receive(workers, key)
    got.wait(TIMEOUT).check()
    hashes = [b"one", b"two"]
    got.commit_reuse([kv.GroupCommit(16, hashes)])
    receiver = workers.receiver
    receiver.client.cancel(got)  # behind the commit
    found = receiver.client.lookup_reuse(receiver.layout, [kv.PromptHashes(hashes)])
    assert found.tokens == {0: 16}
    assert receiver.client.withdraw_reuse(receiver.layout, kv.GroupBlocks(DESTINATION)) == 2


def test_instances_of_two_ranks_need_both(pair: Pair) -> None:
    ranks = [Worker(pair.prefill.socket, "two-ranks", rank=i, rank_count=2) for i in range(2)]
    try:
        assert [r.registered.complete for r in ranks] == [False, True]
        resolved = ranks[0].client.resolve(ranks[1].client.ticket("two-ranks"))
        assert (resolved.reachable, resolved.rank_count) == (True, 2)
    finally:
        for rank in ranks:
            rank.close()


def test_incompatible_layouts_are_told_apart_before_any_transfer(pair: Pair) -> None:
    both = Workers(pair.prefill.socket, pair.decode.socket)
    other = Worker(pair.decode.socket, "other-heads", heads=3)
    try:
        problem = other.client.resolve(both.ticket, other.layout).problem
        assert problem is not None
        assert problem.reason == "INCOMPATIBLE"
    finally:
        both.close()
        other.close()


def test_names_are_one_workers(pair: Pair, workers: Workers) -> None:
    with pytest.raises(kv.KvferryError) as raised:
        kv.Client(pair.prefill.socket, name=f"{workers.sender.instance}-0")
    assert raised.value.reason == "NAME_IN_USE"
    with pytest.raises(kv.KvferryError, match="NAME_INVALID"):
        kv.Client(pair.prefill.socket, name="x" * 64)
    with pytest.raises(kv.KvferryError, match="DAEMON_UNREACHABLE"):
        kv.Client("/nowhere/kvferry.sock", name="x")


def test_a_socket_of_another_user_is_left_alone(pair: Pair, tmp_path: Path) -> None:
    own = os.geteuid()
    with pytest.raises(kv.KvferryError) as raised:
        kv.Client(pair.prefill.socket, name="uid", daemon_uid=own + 1)
    assert raised.value.reason == "DAEMON_USER"
    assert f"uid {own}, but the daemon that is expected is uid {own + 1}" in str(raised.value)
    kv.Client(pair.prefill.socket, name="uid", daemon_uid=own).close()
    if own != 0:
        pytest.skip("not root: no socket of another user was tried")
    # Somebody listens at what belongs to the daemon's user, and hears nothing.
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        os.chown(path, 12345, -1)
        with pytest.raises(kv.KvferryError, match="uid 0, but the file's owner is uid 12345"):
            kv.Client(path, name="uid")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(1) == b""
    # One who is expected is that one, whoever owns the file.
    owner = os.stat(pair.prefill.socket).st_uid
    os.chown(pair.prefill.socket, 12345, -1)
    try:
        kv.Client(pair.prefill.socket, name="uid", daemon_uid=own).close()
    finally:
        os.chown(pair.prefill.socket, owner, -1)


@pytest.mark.parametrize(
    ("owner", "listener", "wanted", "why"),
    [
        (1000, 1000, None, ""),
        (1000, 1001, None, "uid 1001, but the file's owner is uid 1000"),
        (1000, 65534, None, ""),
        (65534, 1000, None, ""),
        (65534, 65534, None, ""),
        (1000, 1001, 1001, ""),
        (65534, 1001, 1001, ""),
        (1000, 65534, 65534, ""),
        (1001, 1001, 1000, "uid 1001, but the daemon that is expected is uid 1000"),
        (65534, 1001, 1000, "uid 1001, but the daemon that is expected is uid 1000"),
        (1000, 65534, 1000, "not mapped in this user namespace"),
    ],
)
def test_who_serves_a_socket_is_compared_as_far_as_users_are_mapped_here(
    owner: int, listener: int, wanted: Optional[int], why: str
) -> None:
    told = why_not_served(owner, listener, 65534, wanted)
    assert why in told
    assert bool(why) == bool(told)


def test_pools_go_when_they_are_unregistered(workers: Workers) -> None:
    client = workers.sender.client
    with pytest.raises(kv.KvferryError, match="POOL_EXISTS"):
        client.alloc_pool("kv", 4096)
    sent = send(workers, workers.key())
    taken(sent)
    client.unregister_pools(["kv"])
    assert sent.wait(TIMEOUT).reason == "UNREGISTERED"
    workers.sender.pages[:] = 1  # the caller's still
    client.alloc_pool("kv", 4096)
    with pytest.raises(kv.KvferryError, match="POINTER_NOT_IN_POOL"):
        client.find_pool(workers.sender.pages.ctypes.data, 1)


def test_memory_that_the_daemon_cannot_trust_is_refused(workers: Workers) -> None:
    fd = os.memfd_create("not-sealed", os.MFD_ALLOW_SEALING)
    os.truncate(fd, 4096)
    with pytest.raises(kv.KvferryError) as raised:
        workers.sender.client.export_pool("other", fd, 4096)
    assert raised.value.field
    os.close(fd)
    with pytest.raises(kv.KvferryError, match="POOL_DESCRIPTOR"):
        workers.sender.client.export_pool("other", fd, 4096)


def test_a_descriptor_is_readable_when_there_is_something_to_take(workers: Workers) -> None:
    client = workers.receiver.client
    fd = client.event_fd()
    client.poll()
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(0) == []
    key = workers.key()
    receive(workers, key)
    send(workers, key)
    seen = set()
    while kv.EventKind.DEST_RELEASED not in seen:
        assert poller.poll(TIMEOUT * 1000)
        while events := client.poll(1):
            seen |= {event.kind for event in events}
    client.poll()
    assert poller.poll(0) == []


def test_many_threads_hand_over_at_once(workers: Workers) -> None:
    fill(workers.sender)
    keys = [workers.key(f"request-{i}") for i in range(40)]
    threads = [threading.Thread(target=send, args=(workers, key)) for key in keys]
    for thread in threads:
        thread.start()
    got = [receive(workers, key) for key in keys]
    assert all(transfer.wait(TIMEOUT).ok for transfer in got)
    for thread in threads:
        thread.join()
    assert arrived(workers)


def test_a_forked_child_has_no_client(workers: Workers) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            send(workers, workers.key())
            os.write(write, b"sent")
        except kv.KvferryError as error:
            os.write(write, error.reason.encode())
        finally:
            os._exit(0)
    assert os.read(read, 100) == b"NOT_ATTACHED"
    os.waitpid(child, 0)
    key = workers.key()
    send(workers, key)  # the parent's is as it was
    receive(workers, key).wait(TIMEOUT).check()


def test_a_closed_client_says_so(workers: Workers) -> None:
    client = workers.sender.client
    client.close()
    client.close()
    assert not client.attached
    with pytest.raises(kv.KvferryError, match="NOT_ATTACHED"):
        send(workers, workers.key())


def test_asyncio(pair: Pair) -> None:
    async def hand_over() -> None:
        both = Workers(pair.prefill.socket, pair.decode.socket)
        fill(both.sender)
        source = kv.AsyncClient(both.sender.client)
        target = kv.AsyncClient(both.receiver.client)
        ticket = await source.run(source.sync.ticket, both.sender.instance)
        key = both.key()
        receiving = asyncio.create_task(
            target.receive_wait(
                key,
                both.receiver.layout,
                ticket,
                kv.GroupBlocks(DESTINATION),
                num_tokens=TOKENS,
                timeout=TIMEOUT,
            )
        )
        sent = send(both, key, aux=b"async")
        assert await receiving == b"async"
        assert arrived(both)
        kinds = []
        async for event in source:
            assert event.transfer is sent
            kinds.append(event.kind.name)
            if "DELIVERED" in kinds:
                break
        assert kinds == ["RECEIVER_READY", "SOURCE_RELEASED", "DELIVERED"]
        # A task that is cancelled takes its transfer along.
        task = asyncio.create_task(
            target.receive_wait(
                both.key("nobody"),
                both.receiver.layout,
                ticket,
                kv.GroupBlocks(DESTINATION),
                num_tokens=TOKENS,
                timeout=TIMEOUT,
            )
        )
        await asyncio.sleep(0)  # lets it begin
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert target.sync.stats().open_transfers == 0
        await source.close()
        await target.close()

    asyncio.run(asyncio.wait_for(hand_over(), 2 * TIMEOUT))


def test_after_the_daemons_restart_everything_is_there_again() -> None:
    with Pair() as pair:
        both = Workers(pair.prefill.socket, pair.decode.socket)
        fill(both.sender)
        client = both.sender.client
        word = client.alloc_word()
        client.signal(word, 3)
        boot = client.boot_id
        sent = send(both, both.key("lost"))
        taken(sent)
        pair.prefill.kill()
        status = sent.wait(TIMEOUT)
        assert (status.state, status.reason) == (kv.TransferState.FAILED, "DAEMON_RESTARTED")
        assert status.released_reason == "DAEMON_RESTARTED"
        sent.close()
        pair.prefill.start()
        kinds = []
        for event in client.events(TIMEOUT):
            kinds.append(event.kind)
            if event.kind is kv.EventKind.REATTACHED:
                assert event.error is None
                break
        assert kv.EventKind.DAEMON_RESTARTED in kinds
        assert client.boot_id != boot
        both.ticket = client.ticket(both.sender.instance)
        key = both.key()
        sent = send(both, key, ready=kv.Ready.timeline(word, 3))  # words go on counting
        receive(both, key).wait(TIMEOUT).check()
        assert sent.wait(TIMEOUT).ok
        assert arrived(both)
        both.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: no socket of another user can be tried")
def test_another_users_daemon_after_a_restart_is_refused_and_that_is_told(tmp_path: Path) -> None:
    with Pair() as pair, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        client = kv.Client(pair.prefill.socket, name="left")
        beside = str(tmp_path / "socket")
        listener.bind(beside)
        listener.listen()
        os.chown(beside, 12345, -1)
        pair.prefill.kill()
        os.rename(beside, pair.prefill.socket)
        told = []
        for event in client.events(TIMEOUT):
            told.append((event.kind, event.transfer, event.reason))
            if event.kind is kv.EventKind.REJECTED:
                break
        assert told == [
            (kv.EventKind.DAEMON_RESTARTED, None, "NONE"),
            (kv.EventKind.REJECTED, None, "DAEMON_USER"),
        ]
        assert not client.attached
        client.close()
