"""The SGLang backend with SGLang's base classes; see sglang_harness.py. Needs sglang==0.5.23."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

pytest.importorskip(
    "sglang.srt.plugins", reason="sglang is not installed: deploy/test-engine.sh sglang"
)

import sglang_harness as harness
from daemons import Pair
from sglang.srt.disaggregation.base.conn import (
    BaseKVBootstrapServer,
    BaseKVManager,
    BaseKVReceiver,
    BaseKVSender,
    KVPoll,
    StateType,
)
from sglang_harness import KIND, MODE, PAGE, Decode, GpuRank, Prefill, Server, our, run

PROMPT = [(i * 37 + 11) % 1000 for i in range(27)]
rooms = itertools.count(1 << 62)


class Site:
    count = 0

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair = pair
        self.folder = folder
        self.servers: list[Server] = []

    def server(self, mode: Any, **options: Any) -> Server:
        Site.count += 1
        daemon = self.pair.prefill if mode is MODE.PREFILL else self.pair.decode
        name = f"{mode.value}{Site.count}"
        made = Server(mode, name, daemon.socket, self.folder, **options)
        self.servers.append(made)
        return made

    def both(self, **options: Any) -> tuple[Server, Server]:
        return self.server(MODE.PREFILL, **options), self.server(MODE.DECODE, **options)

    def close(self) -> None:
        for server in self.servers:
            server.close()


@pytest.fixture
def site(pair: Pair, tmp_path: Path) -> Iterator[Site]:
    made = Site(pair, tmp_path)
    yield made
    made.close()


def hand_off(source: Server, target: Server, prompt: list[int] = PROMPT, **options: Any) -> None:
    room = next(rooms)
    prefix = options.pop("prefix", 0)
    sending = Prefill(source, room, prompt, **options)
    receiving = Decode(target, source, room, prompt, prefix=prefix)
    run(lambda: None not in (sending.outcome, receiving.outcome), sending, receiving)
    assert (sending.outcome, receiving.outcome) == (KVPoll.Success, KVPoll.Success)
    assert sending.prefix == prefix


def wait_for_ticket(source: Server, target: Server) -> None:
    """Until decode is told what prefill's daemon says now."""

    def is_known() -> bool:
        now = set()
        for rank in target.ranks:
            rank.manager.forget_ticket(source.address, 0)
            now.add(rank.manager.ticket_of(source.address, 0))
        for rank in source.ranks:
            rank.manager.look()
            now.add(rank.manager.rank.ticket())
        return len(now) == 1

    run(is_known)


def test_sglang_finds_the_backend() -> None:
    from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
    from sglang.srt.managers import disagg_service

    assert "kvferry" in DISAGG_TRANSFER_BACKEND_CHOICES
    assert issubclass(our(KIND.MANAGER), BaseKVManager)
    assert issubclass(our(KIND.SENDER), BaseKVSender)
    assert issubclass(our(KIND.RECEIVER), BaseKVReceiver)
    assert issubclass(our(KIND.BOOTSTRAP_SERVER), BaseKVBootstrapServer)
    assert not disagg_service.rust_server_serves_kv_bootstrap("kvferry")
    fake = harness.utils.get_kv_class(harness.utils.TransferBackend("fake"), KIND.SENDER)
    assert fake.__name__ == "FakeKVSender"


@pytest.mark.parametrize(("tp_from", "tp_to"), [(1, 1), (2, 1), (1, 2), (2, 4), (4, 2), (2, 8)])
def test_decode_reads_what_prefill_wrote(site: Site, tp_from: int, tp_to: int) -> None:
    source = site.server(MODE.PREFILL, tp=tp_from)
    target = site.server(MODE.DECODE, tp=tp_to)
    hand_off(source, target)
    for rank in target.ranks:  # from the sender's rank whose heads it has
        assert rank.buffers.output_hidden_states[5, 0] == rank.tp_rank * tp_from // tp_to


def test_latent_cache(site: Site) -> None:
    hand_off(site.server(MODE.PREFILL, tp=2, mla=True), site.server(MODE.DECODE, mla=True))


def test_pipeline_stages_of_prefill(site: Site) -> None:
    hand_off(site.server(MODE.PREFILL, tp=2, pp=3), site.server(MODE.DECODE))


@pytest.mark.parametrize("chunk", [PAGE, 2 * PAGE])
def test_chunks_are_sent_as_they_are_computed(site: Site, chunk: int) -> None:
    source, target = site.server(MODE.PREFILL, tp=2), site.server(MODE.DECODE)
    hand_off(source, target, chunk=chunk)


@pytest.mark.parametrize("prefix", [PAGE, 6 * PAGE])
@pytest.mark.parametrize("chunk", [0, 3 * PAGE])
def test_a_prefix_that_decode_has_is_not_sent(site: Site, prefix: int, chunk: int) -> None:
    source, target = site.server(MODE.PREFILL), site.server(MODE.DECODE, tp=2)
    hand_off(source, target, prefix=prefix, chunk=chunk)


def test_many_requests_use_pages_again(site: Site) -> None:
    source, target = site.both(tp=2)
    for i in range(12):
        hand_off(source, target, [(i * 101 + j * 7) % 1000 for j in range(1 + 5 * i)])


def test_prefill_waits_for_decode_and_computes_nothing_before(site: Site) -> None:
    source, target = site.both()
    room = next(rooms)
    sending = Prefill(source, room, PROMPT)
    for _ in range(100):
        sending.step()
    assert sending.poll() == KVPoll.Bootstrapping
    assert sending.table == []
    receiving = Decode(target, source, room, PROMPT)
    run(lambda: receiving.outcome is not None, sending, receiving)
    assert receiving.outcome == KVPoll.Success


def test_decode_may_come_first(site: Site) -> None:
    source, target = site.both()
    room = next(rooms)
    receiving = Decode(target, source, room, PROMPT)
    run(lambda: receiving.sent, receiving)
    sending = Prefill(source, room, PROMPT)
    run(lambda: receiving.outcome is not None, sending, receiving)
    assert receiving.outcome == KVPoll.Success


def test_decode_gives_up_before_it_has_pages(site: Site) -> None:
    source, target = site.both()
    room = next(rooms)
    sending = Prefill(source, room, PROMPT)
    receiving = Decode(target, source, room, PROMPT)
    run(lambda: receiving.ready, receiving)
    receiving.abort()
    run(lambda: None not in (sending.outcome, receiving.outcome), sending, receiving)
    assert (sending.outcome, receiving.outcome) == (KVPoll.Failed, KVPoll.Failed)
    assert "DECLINED" in sending.reasons[0]
    assert "Abort" in receiving.reasons[0]


def test_decode_gives_up_while_it_waits_for_pages(site: Site) -> None:
    source, target = site.both(tp=2)
    room = next(rooms)
    sending = Prefill(source, room, PROMPT, chunk=PAGE)
    receiving = Decode(target, source, room, PROMPT)
    run(lambda: sending.done > 0, sending, receiving)
    receiving.abort()
    run(lambda: None not in (sending.outcome, receiving.outcome), sending, receiving)
    assert (sending.outcome, receiving.outcome) == (KVPoll.Failed, KVPoll.Failed)
    hand_off(source, target)


def test_prefill_gives_up_after_a_chunk(site: Site) -> None:
    source, target = site.both(tp=2)
    room = next(rooms)
    sending = Prefill(source, room, PROMPT, chunk=PAGE)
    receiving = Decode(target, source, room, PROMPT)
    run(lambda: sending.done > PAGE, sending, receiving)
    sending.abort()
    run(lambda: None not in (sending.outcome, receiving.outcome), sending, receiving)
    assert (sending.outcome, receiving.outcome) == (KVPoll.Failed, KVPoll.Failed)
    assert "Abort" in sending.reasons[0]
    hand_off(source, target)


def test_a_rank_that_fails_takes_the_others_pages_back(site: Site) -> None:
    """SGLang fails a request on all ranks when one has failed."""
    source, target = site.both(tp=2)
    room = next(rooms)
    sending = Prefill(source, room, PROMPT, chunk=PAGE)
    receiving = Decode(target, source, room, PROMPT)
    run(lambda: sending.done > PAGE, sending, receiving)
    target.ranks[1].manager.fail(room, "a test")
    run(lambda: receiving.outcome is not None, receiving)
    half = receiving.receivers[0]._half
    assert half.released
    assert not half.ok
    assert receiving.outcome == KVPoll.Failed
    run(lambda: sending.outcome is not None, sending)
    hand_off(source, target)


def test_servers_with_different_keys_do_not_meet(site: Site) -> None:
    source = site.server(MODE.PREFILL, key=b"one key of 16 bytes")
    target = site.server(MODE.DECODE, key=b"another of 16 bytes")
    receiving = Decode(target, source, next(rooms), PROMPT)
    run(lambda: receiving.outcome is not None, receiving)
    assert receiving.outcome == KVPoll.Failed
    assert "key_file" in receiving.reasons[0]


def test_a_wrong_ticket_at_the_registry_is_put_right(site: Site) -> None:
    source, target = site.both()
    url = f"http://{source.address}/kvferry/ticket"

    def told() -> Any:
        return requests.get(url, params={"dp_rank": 0}, timeout=5)

    run(lambda: told().ok)
    right = told().json()
    wrong = {"dp_rank": 0, "ticket": "wrong", "proof": "wrong"}
    requests.put(url, json=wrong, timeout=5).raise_for_status()
    run(lambda: told().json() == right)
    hand_off(source, target)


def test_metadata_of_another_size_is_refused(site: Site) -> None:
    def shorter(args: Any) -> None:
        args.aux_data_ptrs, args.aux_item_lens = args.aux_data_ptrs[:-1], args.aux_item_lens[:-1]

    source = site.server(MODE.PREFILL, adapt=shorter)
    target = site.server(MODE.DECODE)
    room = next(rooms)
    sending = Prefill(source, room, PROMPT)
    receiving = Decode(target, source, room, PROMPT)
    run(lambda: receiving.outcome is not None, sending, receiving)
    assert receiving.outcome == KVPoll.Failed
    assert "metadata" in receiving.reasons[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state_types", [StateType.MAMBA]),
        ("num_draft_entries", 2),
        ("kv_layout", "dsv4"),
        ("aux_item_lens", [70000]),
    ],
)
def test_what_is_not_supported_is_refused_at_the_start(site: Site, field: str, value: Any) -> None:
    def adapt(args: Any) -> None:
        setattr(args, field, value)

    with pytest.raises(ValueError, match="kvferry"):
        site.server(MODE.DECODE, adapt=adapt)


@pytest.mark.parametrize("given", ["{}", '{"key_fil": "x"}', "[]"])
def test_settings_are_checked(site: Site, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    from kvferry.sglang._config import Settings

    server = site.server(MODE.DECODE)
    monkeypatch.setitem(os.environ, "KVFERRY_SGLANG_CONFIG", given)
    with server.each() as ranks, ranks[0].placed(), pytest.raises(ValueError, match="kvferry"):
        Settings.of(ranks[0].manager.kv_args, "decode", server.args)


def test_memory_is_released_and_comes_back(site: Site) -> None:
    source, target = site.both(tp=2)
    hand_off(source, target)
    for rank in target.ranks:
        rank.manager.deregister_buffer_to_engine()
    receiving = Decode(target, source, next(rooms), PROMPT)
    run(lambda: receiving.outcome is not None, receiving)
    assert "UNREGISTERED" in receiving.reasons[0]
    for rank in (*target.ranks, *source.ranks):
        rank.manager.deregister_buffer_to_engine()
        rank.manager.register_buffer_to_engine()
    wait_for_ticket(source, target)
    hand_off(source, target)


def test_a_daemon_that_dies_fails_the_request_and_the_next_one_works(tmp_path: Path) -> None:
    with Pair() as pair:
        site = Site(pair, tmp_path)
        source, target = site.both()
        hand_off(source, target)
        room = next(rooms)
        sending = Prefill(source, room, PROMPT, chunk=PAGE)
        receiving = Decode(target, source, room, PROMPT)
        run(lambda: sending.done > 0, sending, receiving)
        pair.prefill.kill()
        run(lambda: None not in (sending.outcome, receiving.outcome), sending, receiving)
        assert (sending.outcome, receiving.outcome) == (KVPoll.Failed, KVPoll.Failed)
        # The second if another chunk was to be sent meanwhile.
        assert any(why in sending.reasons[0] for why in ("DAEMON_RESTARTED", "NOT_ATTACHED"))
        pair.prefill.start()
        wait_for_ticket(source, target)
        hand_off(source, target)
        site.close()


@pytest.mark.skipif(
    not Path(os.environ.get("KVFERRY_FAKE_CUDA_LIBRARY", "")).is_file(),
    reason="KVFERRY_FAKE_CUDA_LIBRARY is not set",
)
def test_pages_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the fake driver: the manager hands over what SGLang allocated, and what is queued on its
    stream comes before the daemon's copies."""
    library = os.environ["KVFERRY_FAKE_CUDA_LIBRARY"]
    monkeypatch.setenv("KVFERRY_FAKE_CUDA_DIR", str(tmp_path))
    monkeypatch.setenv("KVFERRY_CUDA_DRIVER", library)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: SimpleNamespace(cuda_stream=0))
    with Pair(extra=f'[gpu]\ndriver = "{library}"\n') as pair:
        site = Site(pair, tmp_path)
        source, target = site.both(tp=2, rank_type=GpuRank)
        hand_off(source, target, chunk=2 * PAGE)
        hand_off(source, target, prefix=PAGE)
        assert source.ranks[0].manager.rank._word_value > 3
        for rank in source.ranks:
            rank.manager.deregister_buffer_to_engine()
            rank.manager.register_buffer_to_engine()
        wait_for_ticket(source, target)
        hand_off(source, target)
        site.close()


def test_the_harness_notices_pages_that_are_not_what_was_computed(site: Site) -> None:
    source, target = site.both()
    room = next(rooms)
    sending = Prefill(source, room, PROMPT)
    receiving = Decode(target, source, room, PROMPT)
    compute = source.ranks[0].forward

    def wrong(prompt: list[int], table: list[int], begin: int, end: int) -> None:
        compute(prompt, table, begin, end)
        source.ranks[0].pages[1, 2, table[2], 1, 3, 2] += 1.0

    source.ranks[0].forward = wrong  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="not what was computed"):
        run(lambda: receiving.outcome is not None, sending, receiving)
