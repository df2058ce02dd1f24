"""Pools in memory of a GPU, over the fake driver of tests/fake_cuda (KVFERRY_FAKE_CUDA_LIBRARY)."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TIMEOUT
from daemons import Pair

import kvferry as kv
from kvferry import _cuda

LIBRARY = os.environ.get("KVFERRY_FAKE_CUDA_LIBRARY", "")
needs_fake = pytest.mark.skipif(not LIBRARY, reason="KVFERRY_FAKE_CUDA_LIBRARY is not set")
BLOCKS, HEADS, TOKENS, CELL = 16, 2, 8, 64
BLOCK_BYTES = 2 * HEADS * TOKENS * CELL
BYTES = BLOCKS * BLOCK_BYTES


@pytest.fixture(scope="module")
def gpu_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    # The processes share one machine of the fake driver; read once, when it is loaded.
    os.environ["KVFERRY_FAKE_CUDA_DIR"] = str(tmp_path_factory.mktemp("gpu"))
    os.environ["KVFERRY_CUDA_DRIVER"] = LIBRARY
    with Pair(extra=f'[gpu]\ndriver = "{LIBRARY}"\n') as pair:
        yield pair
    del os.environ["KVFERRY_CUDA_DRIVER"]


def layout() -> kv.Layout:
    planes = [
        kv.Plane(
            layer=0,
            role=role,
            cell_bytes=CELL,
            type="bytes",
            offset=i * BLOCK_BYTES // 2,
            block_stride=BLOCK_BYTES,
            unit_stride=TOKENS * CELL,
            token_stride=CELL,
            units_total=HEADS,
            unit_count=HEADS,
        )
        for i, role in enumerate(("key", "value"))
    ]
    group = kv.Group(TOKENS, BLOCKS, planes)
    return kv.Layout("gpu-model", groups=[group], pools=[kv.PoolSpan("kv", BYTES)])


class Rank:
    def __init__(self, socket: str, instance: str) -> None:
        self.client = kv.Client(socket, name=instance)
        self.gpu = self.client._pools.gpus().gpu(0)
        self.address = 0
        self.legacy = 0

    def allocate(self) -> None:
        self.address = self.client.alloc_device_pool("kv", BYTES, 0)

    def allocate_legacy(self, **options: int) -> None:
        pointer = ctypes.c_uint64()
        with self.gpu.current():
            assert ctypes.CDLL(LIBRARY).cuMemAlloc_v2(ctypes.byref(pointer), 4096 + BYTES) == 0
        self.legacy = pointer.value
        self.address = self.legacy + 4096
        self.client.export_device_memory("kv", self.address, BYTES, **options)

    def register(self, instance: str) -> None:
        self.layout = self.client.register_layout(instance, layout()).ref

    def fill(self) -> bytes:
        data = np.random.default_rng(5).integers(0, 256, BYTES, np.uint8).tobytes()
        for at in range(0, BYTES, 4096):
            self.gpu.write(self.address + at, data[at : at + 4096], time.monotonic() + TIMEOUT)
        return data

    def block(self, number: int) -> bytes:
        at = self.address + number * BLOCK_BYTES
        return self.gpu.read(at, BLOCK_BYTES, time.monotonic() + TIMEOUT)

    def close(self) -> None:
        self.client.close()
        if self.legacy:
            with self.gpu.current():
                ctypes.CDLL(LIBRARY).cuMemFree_v2(ctypes.c_uint64(self.legacy))


@needs_fake
@pytest.mark.parametrize("kind", ["descriptor", "ipc", "ipc with a place for the proof"])
def test_pages_move_between_gpus(gpu_pair: Pair, kind: str) -> None:
    name = kind.split()[-1]
    source = Rank(gpu_pair.prefill.socket, f"prefill-{name}")
    target = Rank(gpu_pair.decode.socket, f"decode-{name}")
    for rank in (source, target):
        if kind == "descriptor":
            rank.allocate()
        elif kind == "ipc":
            rank.allocate_legacy()
        else:
            rank.allocate_legacy(scratch_offset=BYTES - 16)
    assert not any(target.block(BLOCKS - 1)), "the proof is taken back"
    data = source.fill()
    source.register(f"prefill-{name}")
    target.register(f"decode-{name}")
    source.client.register_words_with_device(0)
    word = source.client.alloc_word()
    ticket = source.client.ticket(f"prefill-{name}")
    key = kv.TransferKey("request", kv.random_secret(), f"prefill-{name}")
    got = target.client.receive(key, target.layout, ticket, kv.GroupBlocks([4, 9]), num_tokens=16)
    source.client.send(
        key,
        source.layout,
        kv.GroupBlocks([1, 2]),
        num_tokens=16,
        ready=kv.Ready.timeline(word, 1),
    )
    with pytest.raises(kv.KvferryError, match="WAIT_TIMEOUT"):
        got.wait(0.2)
    stream = ctypes.c_void_p()
    with source.gpu.current():
        source.gpu.driver.call("cuStreamCreate", ctypes.byref(stream), 1)
    assert stream.value is not None
    source.client.signal_on_stream(stream.value, word, 1)
    got.wait(TIMEOUT).check()
    for at, number in ((1, 4), (2, 9)):
        assert target.block(number) == data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]
    with source.gpu.current():
        source.gpu.driver.call("cuStreamDestroy", stream)
    source.close()
    target.close()


@needs_fake
def test_host_memory_is_no_gpus(gpu_pair: Pair) -> None:
    rank = Rank(gpu_pair.prefill.socket, "host")
    host = np.zeros(4096, np.uint8)
    with pytest.raises(kv.KvferryError) as raised:
        rank.client.export_device_memory("kv", host.ctypes.data, 4096)
    assert (raised.value.reason, raised.value.field) == ("POINTER_NOT_DEVICE", "pointer")
    rank.allocate()
    with pytest.raises(kv.KvferryError, match="POOL_TOO_SMALL"):
        rank.client.export_device_memory("other", rank.address, 1 << 30)
    with pytest.raises(kv.KvferryError, match="SCRATCH_OUT_OF_RANGE"):
        rank.client.export_device_memory("other", rank.address, 64, scratch_offset=49)
    rank.close()


@needs_fake
def test_the_drivers_errors_have_its_names(gpu_pair: Pair) -> None:
    rank = Rank(gpu_pair.prefill.socket, "errors")
    with pytest.raises(kv.KvferryError) as raised:
        rank.client.alloc_device_pool("huge", 1 << 40, 0)
    assert (raised.value.code, raised.value.reason) == (
        kv.Code.RESOURCE_EXHAUSTED,
        "CUDA_OUT_OF_MEMORY",
    )
    with pytest.raises(kv.KvferryError, match="NO_SUCH_DEVICE"):
        rank.client.alloc_device_pool("none", 4096, 7)
    rank.close()


def test_a_machine_without_a_gpu_says_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_CUDA_DRIVER", "libno-such-driver.so.1")
    with kv.Client(pair.prefill.socket, name="no-gpu") as client:
        for call in (
            lambda: client.alloc_device_pool("kv", 4096),
            lambda: client.export_device_memory("kv", 4096, 4096),
            client.register_words_with_device,
        ):
            with pytest.raises(kv.KvferryError, match="NO_CUDA_DRIVER"):
                call()


def test_struct_sizes_are_the_drivers() -> None:
    assert ctypes.sizeof(_cuda._Properties) == 32
    assert ctypes.sizeof(_cuda._Access) == 12


@needs_fake
def test_every_function_that_is_called_is_known_to_the_project() -> None:
    table = (Path(__file__).resolve().parents[3] / "kernels/cuda/functions.h").read_text()
    for name, (version, _) in (_cuda._FUNCTIONS | _cuda._OPTIONAL).items():
        assert any(
            f"X({name}, " in line and f", {version}, " in line for line in table.splitlines()
        ), name
