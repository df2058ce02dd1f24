"""The vLLM connector under vLLM's real scheduler; see harness.py. Needs vllm==0.33.0."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip("vllm.config", reason="vllm is not installed: deploy/test-engine.sh vllm")

from daemons import Pair
from harness import BLOCK, Engine, run

from kvferry.errors import Code, KvferryError
from kvferry.types import GroupBlocks

PROMPT = [(i * 37 + 11) % 1000 for i in range(75)]
REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}


class Site:
    """Makes engines on the two daemons, with names of their own."""

    count = 0

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair = pair
        self.folder = folder
        self.engines: list[Engine] = []

    def engine(self, kind: str, **options: Any) -> Engine:
        Site.count += 1
        daemon = self.pair.prefill if kind == "prefill" else self.pair.decode
        engine = Engine(self.folder, daemon.socket, f"{kind}{Site.count}", **options)
        self.engines.append(engine)
        return engine


@pytest.fixture
def site(pair: Pair, tmp_path: Path) -> Iterator[Site]:
    made = Site(pair, tmp_path)
    yield made
    for engine in made.engines:
        engine.close()


def prefill(engine: Engine, request_id: str, prompt: list[int] = PROMPT) -> dict[str, Any]:
    """Runs a prompt; what the router carries to decode."""
    engine.add(request_id, prompt, dict(REMOTE_DECODE), max_tokens=1)
    run(lambda: request_id in engine.outputs, engine)
    params = engine.outputs[request_id].kv_transfer_params
    assert params is not None
    assert sum(len(str(value)) for value in params.values()) < 1024
    return dict(params)


def reports(engine: Engine, kind: str) -> list[str]:
    return [request_id for what, request_id in engine.reported if what == kind]


@pytest.mark.parametrize(("tp_from", "tp_to"), [(1, 1), (2, 1), (1, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("hybrid", [False, True])
def test_decode_reads_what_prefill_wrote(
    site: Site, tp_from: int, tp_to: int, hybrid: bool
) -> None:
    source = site.engine("prefill", tp=tp_from, hybrid=hybrid)
    target = site.engine("decode", tp=tp_to, hybrid=hybrid)
    free = source.free_blocks()
    params = prefill(source, "p0")
    assert source.free_blocks() < free, "blocks are kept for the decode side"
    target.add("d0", PROMPT, params)
    run(lambda: "d0" in target.outputs and source.idle, source, target)
    assert reports(source, "finished_sending") == ["p0"]
    assert reports(target, "finished_recving") == ["d0"]
    assert reports(target, "failed_recving") == []
    # The prompt's last token, for its logits, and three of the four new ones.
    assert target.computed["d0"] == 4
    assert source.free_blocks() == free
    assert target.idle


@pytest.mark.parametrize("hybrid", [False, True])
def test_chunks_are_pushed_while_the_next_is_computed(site: Site, hybrid: bool) -> None:
    source = site.engine("prefill", max_batched=32, chunked_push=True, hybrid=hybrid)
    target = site.engine("decode", hybrid=hybrid)
    params = prefill(source, "p0")
    (sending,) = source.ranks[0].connector.worker._sendings.values()
    assert len(sending.begins) >= 2
    target.add("d0", PROMPT, params)
    run(lambda: "d0" in target.outputs and source.idle, source, target)
    assert reports(target, "failed_recving") == []


def test_a_preempted_prefill_is_sent_again(site: Site) -> None:
    source = site.engine("prefill", max_batched=32, chunked_push=True)
    target = site.engine("decode")
    source.add("p0", PROMPT, dict(REMOTE_DECODE), max_tokens=1)
    source.step()
    sending = source.ranks[0].connector.worker._sendings["p0"]
    assert sending.position == 32
    assert source.scheduler.reset_prefix_cache(reset_running_requests=True)
    for page in source.ranks[0].pages.values():
        page.fill_(-1.0)  # as if others had the blocks meanwhile
    source.step()
    assert sending.begins[:2] == [0, 0], "what was not read was taken back"
    run(lambda: "p0" in source.outputs, source)
    target.add("d0", PROMPT, dict(source.outputs["p0"].kv_transfer_params))
    run(lambda: "d0" in target.outputs and source.idle, source, target)
    assert reports(target, "failed_recving") == []


def test_a_partial_local_hit_loads_the_rest(site: Site) -> None:
    source, target = site.engine("prefill"), site.engine("decode")
    target.add("warm", PROMPT[:40], None)
    run(lambda: target.idle, target)
    target.add("d0", PROMPT, prefill(source, "p0"))
    run(lambda: "d0" in target.outputs and source.idle, source, target)
    assert target.loads["d0"].cached == 2 * BLOCK
    assert target.computed["d0"] == 4


def test_a_full_local_hit_declines_and_is_not_reported(site: Site) -> None:
    source, target = site.engine("prefill"), site.engine("decode")
    prompt = PROMPT[: 4 * BLOCK]
    target.add("warm", [*prompt, 5], None)
    run(lambda: target.idle, target)
    params = prefill(source, "p0", prompt[:-1])
    params["remote_num_tokens"] = 3 * BLOCK  # all of it is here
    target.add("d0", prompt, params)
    run(lambda: "d0" in target.outputs and source.idle, source, target)
    assert reports(target, "finished_recving") == []
    assert reports(source, "finished_sending") == ["p0"]


def test_aborted_before_prefill_was_done(site: Site) -> None:
    source = site.engine("prefill", max_batched=32)
    source.add("p0", PROMPT, dict(REMOTE_DECODE), max_tokens=1)
    source.step()
    source.finish("p0")
    run(lambda: source.idle, source)
    assert reports(source, "finished_sending") == []


def test_aborted_after_a_chunk_was_pushed(site: Site) -> None:
    source = site.engine("prefill", max_batched=32, chunked_push=True)
    source.add("p0", PROMPT, dict(REMOTE_DECODE), max_tokens=1)
    source.step()
    source.finish("p0")
    run(lambda: source.idle, source)
    assert reports(source, "finished_sending") == ["p0"]


def test_decode_is_aborted_before_it_is_scheduled(site: Site) -> None:
    source, target = site.engine("prefill"), site.engine("decode")
    target.add("d0", PROMPT, prefill(source, "p0"))
    target.finish("d0")
    run(lambda: source.idle and target.idle, source, target)
    assert reports(target, "finished_recving") == []


def test_decode_is_aborted_while_it_waits(site: Site) -> None:
    source, target = site.engine("prefill", lease=60.0), site.engine("decode")
    params = prefill(source, "p0")
    params["kvferry_transfer_id"] = "AAAAAAAAAAAAAAAAAAAAAA"  # nobody sends that one
    free = target.free_blocks()
    target.add("d0", PROMPT, params)
    target.step()
    assert target.free_blocks() < free
    target.finish("d0")
    run(lambda: target.idle, target)
    assert reports(target, "finished_recving") == ["d0"]
    assert target.free_blocks() == free


def test_decode_never_comes(site: Site) -> None:
    source = site.engine("prefill", lease=0.5)
    prefill(source, "p0")
    run(lambda: source.idle, source)
    assert reports(source, "finished_sending") == ["p0"]


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_load_that_fails(site: Site, policy: str, hybrid: bool) -> None:
    source = site.engine("prefill", hybrid=hybrid)
    target = site.engine("decode", policy=policy, hybrid=hybrid, receive_wait=0.3)
    params = prefill(source, "p0")
    params["kvferry_secret"] = "AAAAAAAAAAAAAAAAAAAAAA"
    free = target.free_blocks()
    target.add("d0", PROMPT, params)
    run(lambda: "d0" in target.outputs and target.idle, target)
    assert reports(target, "finished_recving") == ["d0"]
    assert reports(target, "failed_recving") == ["d0"]
    reason = str(target.outputs["d0"].finish_reason)
    assert ("error" if policy == "fail" else "length") in reason.lower()
    assert target.free_blocks() == free


def test_a_load_that_cannot_be_asked_for_is_declined(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise KvferryError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "a test")

    source, target = site.engine("prefill", lease=60.0), site.engine("decode")
    worker = target.ranks[0].connector.worker
    monkeypatch.setattr(worker.client, "receive", full)
    target.add("d0", PROMPT, prefill(source, "p0"))
    run(lambda: "d0" in target.outputs and target.idle and source.idle, source, target)
    assert reports(target, "failed_recving") == ["d0"]
    assert reports(source, "finished_sending") == ["p0"]
    assert worker._claims == {}


def test_a_load_that_is_refused_is_declined(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = site.engine("prefill", lease=60.0), site.engine("decode")
    worker = target.ranks[0].connector.worker
    receive = worker.client.receive

    def with_wrong_blocks(key: Any, layout: Any, ticket: str, groups: Any, **options: Any) -> Any:
        wrong = [GroupBlocks([1 << 30] * len(group.ids), group.group) for group in groups]
        return receive(key, layout, ticket, wrong, **options)

    monkeypatch.setattr(worker.client, "receive", with_wrong_blocks)
    target.add("d0", PROMPT, prefill(source, "p0"))
    run(lambda: "d0" in target.outputs and target.idle and source.idle, source, target)
    assert reports(target, "failed_recving") == ["d0"]
    assert reports(source, "finished_sending") == ["p0"]
    assert worker._claims == {}
    assert worker.client.stats().open_transfers == 0


def test_untrusted_parameters_are_not_believed(site: Site) -> None:
    source = site.engine("prefill", lease=0.5)
    target = site.engine("decode", trust_client_params=False)
    target.add("d0", PROMPT, prefill(source, "p0"))
    run(lambda: "d0" in target.outputs and source.idle, source, target)
    assert reports(target, "finished_recving") == []


@pytest.mark.parametrize("missing", ["kvferry_ticket", "kvferry_secret", "remote_num_tokens"])
def test_malformed_parameters_mean_a_local_prefill(site: Site, missing: str) -> None:
    target = site.engine("decode")
    params = {
        "do_remote_prefill": True,
        "remote_engine_id": "x",
        "remote_num_tokens": 75,
        "kvferry_ticket": "x",
        "kvferry_transfer_id": "AAAAAAAAAAAAAAAAAAAAAA",
        "kvferry_secret": "AAAAAAAAAAAAAAAAAAAAAA",
    }
    del params[missing]
    target.add("d0", PROMPT, params)
    run(lambda: "d0" in target.outputs, target)


def test_many_requests_at_once(site: Site) -> None:
    source = site.engine("prefill", tp=2, blocks=256)
    target = site.engine("decode", blocks=256)
    prompts = {f"r{i}": [(i * 101 + j * 7) % 1000 for j in range(30 + 9 * i)] for i in range(8)}
    carried = {name: prefill(source, name, prompt) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        target.add(name, prompt, carried[name])
    run(lambda: target.idle and source.idle, source, target)
    assert sorted(reports(source, "finished_sending")) == sorted(prompts)
    assert sorted(reports(target, "finished_recving")) == sorted(prompts)
    assert reports(target, "failed_recving") == []


def test_a_daemon_that_dies_fails_the_load_and_the_next_one_works(tmp_path: Path) -> None:
    with Pair() as pair:
        site = Site(pair, tmp_path)
        source, target = site.engine("prefill"), site.engine("decode", receive_wait=3.0)
        params = prefill(source, "p0")
        pair.prefill.kill()
        run(lambda: source.idle, source)  # its blocks are free again
        target.add("d0", PROMPT, params)
        run(lambda: "d0" in target.outputs, target)
        assert "error" in str(target.outputs["d0"].finish_reason).lower()
        pair.prefill.start()
        old = params["kvferry_ticket"]
        scheduler = source.scheduler.get_kv_connector()._scheduler
        run(lambda: scheduler._ticket not in ("", old), source)
        params = prefill(source, "p1")
        target.add("d1", PROMPT, params)
        run(lambda: "d1" in target.outputs and source.idle, source, target)
        assert reports(target, "failed_recving") == ["d0"]
        for engine in site.engines:
            engine.close()


def test_the_harness_notices_pages_that_are_not_what_was_computed(site: Site) -> None:
    source, target = site.engine("prefill"), site.engine("decode")
    params = prefill(source, "p0")
    sent = source.ranks[0].pages["model.layers.2.self_attn"]
    sent[1:, 1, 3, 2] += 1.0
    target.add("d0", PROMPT, params)
    with pytest.raises(AssertionError, match=r"layer 2, position .*: not what was computed"):
        run(lambda: "d0" in target.outputs, source, target)
