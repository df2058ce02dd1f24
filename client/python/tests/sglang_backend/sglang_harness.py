"""Servers without a GPU: SGLang's real plugin loading, configuration, registry, metadata buffers
and base classes, and scheduling loops that call a backend in the order of SGLang's, with a model
that writes what it would compute and checks what it reads."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from daemons import free_port
from sglang.srt.disaggregation import utils
from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_parallel

import kvferry as kv

LAYERS, HEADS, DIM, PAGE, PAGES = 3, 4, 8, 4, 32
SECONDS = 15.0
BUFFERS = 8

# SGLang's registry leaves its tasks when it is closed.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
load_plugins()
MODE = utils.DisaggregationMode
KIND = utils.KVClassType


def our(kind: Any) -> Any:
    """As SGLang finds the classes of the backend that --disaggregation-transfer-backend names."""
    return utils.get_kv_class(utils.TransferBackend("kvferry"), kind)


class Rank:
    def __init__(self, server: Server, tp_rank: int, pp_rank: int) -> None:
        self.server = server
        self.tp_rank, self.pp_rank = tp_rank, pp_rank
        self.layers = LAYERS // server.pp
        self.first_layer = self.layers * pp_rank
        self.heads = max(1, HEADS // server.tp)
        self.first_head = tp_rank * HEADS // server.tp
        if server.mla:
            self.heads, self.first_head = 1, 0
        name = f"{server.name}-{pp_rank}-{tp_rank}"
        args: Any = KVArgs()
        kinds = 1 if server.mla else 2
        self.allocate(args, name, (kinds, self.layers, PAGES, PAGE, self.heads, DIM))
        flat = self.pages.reshape(kinds * self.layers, -1)
        args.kv_data_ptrs = [self.address + i * row.nbytes for i, row in enumerate(flat)]
        args.kv_data_lens = [row.nbytes for row in flat]
        args.kv_item_lens = [row.nbytes // PAGES for row in flat]
        self.buffers = utils.MetadataBuffers(BUFFERS, 16, torch.float32, 4)
        args.engine_rank = tp_rank
        args.pp_rank = pp_rank
        args.system_dp_rank = 0
        args.gpu_id = 0
        args.kv_cache_dtype_str = "float32"
        args.kv_layer_ids = []
        args.kv_head_num = self.heads
        args.total_kv_head_num = HEADS
        args.page_size = PAGE
        args.prefill_start_layer = self.first_layer
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = self.buffers.get_buf_infos()
        args.state_types, args.state_item_lens = [], []
        server.adapt(args)
        with self.placed():
            self.manager = our(KIND.MANAGER)(args, server.mode, server.args, server.mla)

    def allocate(self, args: Any, name: str, shape: tuple[int, ...]) -> None:
        args.kvferry_client = kv.Client(self.server.socket, name=name)
        self.pages = args.kvferry_client.alloc_array("kv", shape, "float32")
        self.address = self.pages.__array_interface__["data"][0]

    def write(self) -> None:
        """`pages` were changed."""

    def read(self) -> None:
        """`pages` are looked at."""

    def close(self) -> None:
        self.manager.close()

    def placed(self) -> Any:
        """The process of this rank."""
        s = self.server
        return get_parallel().override(
            tp_size=s.tp,
            tp_rank=self.tp_rank,
            attn_tp_size=s.tp,
            attn_tp_rank=self.tp_rank,
            attn_dp_rank=0,
            attn_cp_rank=0,
            attn_dcp_rank=0,
            pp_size=s.pp,
            pp_rank=self.pp_rank,
            pp_group=_Group(s, self.pp_rank),
            moe_ep_size=1,
            moe_tp_size=s.tp,
            moe_dp_size=1,
        )

    def computed(self, prompt: list[int], begin: int, end: int) -> np.ndarray[Any, Any]:
        """[K|V, layers, tokens, heads, dim]: what a model writes for tokens [begin, end)."""
        kinds = self.pages.shape[0]
        token = np.array(prompt[begin:end]).reshape(1, 1, -1, 1, 1)
        position = np.arange(begin, end).reshape(1, 1, -1, 1, 1)
        kind = np.arange(kinds).reshape(-1, 1, 1, 1, 1)
        layer = np.arange(self.first_layer, self.first_layer + self.layers).reshape(1, -1, 1, 1, 1)
        head = np.arange(self.first_head, self.first_head + self.heads).reshape(1, 1, 1, -1, 1)
        at = np.arange(DIM).reshape(1, 1, 1, 1, -1)
        mixed = kind * 17 + layer * 7919 + token * 104729 + position * 1299709 + head * 31 + at * 3
        return (mixed % 65521).astype(np.float32)

    def _slots(self, table: list[int], begin: int, end: int) -> tuple[Any, Any]:
        positions = np.arange(begin, end)
        return np.array(table)[positions // PAGE], positions % PAGE

    def forward(self, prompt: list[int], table: list[int], begin: int, end: int) -> None:
        pages, slots = self._slots(table, begin, end)
        self.pages[:, :, pages, slots] = self.computed(prompt, begin, end)
        self.write()

    def check(self, prompt: list[int], table: list[int]) -> None:
        self.read()
        pages, slots = self._slots(table, 0, len(prompt))
        read = self.pages[:, :, pages, slots]
        if not (read == self.computed(prompt, 0, len(prompt))).all():
            raise AssertionError(f"{self.server.name}: not what was computed")


class GpuRank(Rank):
    """Pages in one allocation on the fake driver's GPU, as a caching allocator has them."""

    def allocate(self, args: Any, name: str, shape: tuple[int, ...]) -> None:
        self._helper = kv.Client(self.server.socket, name=f"{name}-memory")
        self._gpu = self._helper._pools.gpus().gpu(0)
        self._driver = ctypes.CDLL(os.environ["KVFERRY_CUDA_DRIVER"])
        self.pages = np.zeros(shape, np.float32)
        pointer = ctypes.c_uint64()
        with self._gpu.current():
            assert self._driver.cuMemAlloc_v2(ctypes.byref(pointer), self.pages.nbytes) == 0
        self.address = pointer.value
        self.write()

    def write(self) -> None:
        data = self.pages.tobytes()
        for at in range(0, len(data), 4096):
            limit = time.monotonic() + SECONDS
            self._gpu.write(self.address + at, data[at : at + 4096], limit)

    def read(self) -> None:
        limit = time.monotonic() + SECONDS
        starts = range(0, self.pages.nbytes, 4096)
        data = b"".join(self._gpu.read(self.address + at, 4096, limit) for at in starts)
        self.pages[:] = np.frombuffer(data, np.float32).reshape(self.pages.shape)

    def close(self) -> None:
        super().close()
        with self._gpu.current():
            self._driver.cuMemFree_v2(ctypes.c_uint64(self.address))
        self._helper.close()


class _Group:
    """Pipeline stages that are made one after the other, in one process."""

    def __init__(self, server: Server, rank: int) -> None:
        self._told = server.told
        self.rank_in_group = rank
        self.world_size = server.pp

    def broadcast_object(self, value: Any, src: int) -> Any:
        if self.rank_in_group == src:
            self._told[:] = [value]
        return self._told[0]


class Server:
    """A prefill or decode server of tp * pp ranks in one process."""

    def __init__(
        self,
        mode: Any,
        name: str,
        socket: str,
        folder: Path,
        *,
        tp: int = 1,
        pp: int = 1,
        mla: bool = False,
        key: bytes = b"a secret of all servers",
        adapt: Callable[[Any], None] = lambda args: None,
        rank_type: type[Rank] = Rank,
    ) -> None:
        self.mode, self.name, self.socket, self.tp, self.pp = mode, name, socket, tp, pp
        self.mla, self.adapt = mla, adapt
        self.told: list[Any] = []
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        key_file = folder / f"{name}.key"
        key_file.write_bytes(key)
        os.environ["KVFERRY_SGLANG_CONFIG"] = json.dumps(
            {"socket": socket, "key_file": str(key_file), "fingerprint": "fake", "instance": name}
        )
        self._config = get_context().override_server_args(
            host="127.0.0.1",
            disaggregation_mode=mode.value,
            disaggregation_transfer_backend="kvferry",
            disaggregation_bootstrap_port=self.port,
        )
        self.args = self._config.install()
        self.registry = (
            our(KIND.BOOTSTRAP_SERVER)("127.0.0.1", self.port) if mode is MODE.PREFILL else None
        )
        self.ranks: list[Rank] = []
        try:
            for pp_rank in range(pp):
                for tp_rank in range(tp):
                    self.ranks.append(rank_type(self, tp_rank, pp_rank))
        finally:
            self._config.restore()
        self._free = list(range(1, PAGES))

    @contextlib.contextmanager
    def each(self) -> Iterator[list[Rank]]:
        """For calls that read the configuration, which is the process's."""
        with get_context().override_server_args(disaggregation_mode=self.mode.value):
            yield self.ranks

    def take_pages(self, tokens: int) -> list[int]:
        count = -(-tokens // PAGE)
        # Not in order, so that places are told by the lists only.
        taken, self._free = self._free[:count][::-1], self._free[count:]
        assert len(taken) == count, "no pages left"
        return taken

    def give_pages(self, table: list[int], garbage: float) -> None:
        """Freed, and written by whoever gets them: from here on nobody may read or write them."""
        for rank in self.ranks:
            rank.read()
            rank.pages[:, :, table] = garbage
            rank.write()
        self._free += table

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        if self.registry is not None:
            self.registry.close()


class Prefill:
    """One request of a prefill server, as SGLang's scheduler leads it."""

    def __init__(self, server: Server, room: int, prompt: list[int], *, chunk: int = 0) -> None:
        self.server, self.room, self.prompt = server, room, prompt
        self.chunk = chunk or len(prompt)
        with server.each() as ranks:
            self.senders = [self._sender(rank) for rank in ranks]
        self.table: list[int] = []
        self.done = 0
        self.prefix = -1
        self.outcome: int | None = None

    def _sender(self, rank: Rank) -> Any:
        with rank.placed():
            return our(KIND.SENDER)(rank.manager, self.server.address, self.room)

    def poll(self) -> int:
        return min(sender.poll() for sender in self.senders)

    def step(self) -> None:
        if self.outcome is not None:
            return
        state = self.poll()
        if state == KVPoll.Failed:
            self.fail()
        elif state == KVPoll.WaitingForInput and self.prefix < 0:
            self._start()
        elif state == KVPoll.Success:
            for sender in self.senders:
                sender.clear()
            self._end(state)
        elif self.prefix >= 0 and self.done < len(self.prompt):
            self._compute()

    def _start(self) -> None:
        prefixes = {sender.pop_decode_prefix_len() for sender in self.senders}
        assert len(prefixes) == 1, "ranks differ in what the other side has"
        self.prefix = prefixes.pop()
        self.table = self.server.take_pages(len(self.prompt))
        count = -(-(len(self.prompt) - self.prefix) // PAGE)
        for sender in self.senders:
            sender.init(count, 3)
        self._compute()

    def _compute(self) -> None:
        begin, self.done = self.done, min(self.done + self.chunk, len(self.prompt))
        last = self.done == len(self.prompt)
        first = max(begin, self.prefix) // PAGE
        end = -(-self.done // PAGE) if last else self.done // PAGE
        pages = np.array(self.table[first:end], dtype=np.int32)
        for rank, sender in zip(self.server.ranks, self.senders):
            rank.forward(self.prompt, self.table, begin, self.done)
            rank.buffers.output_ids[3, 0] = sum(self.prompt) % 1000
            rank.buffers.output_hidden_states[3] = rank.tp_rank
            rank.buffers.bootstrap_room[3, 0] = self.room
            if sender.should_send_kv_chunk(len(pages), last):
                sender.send(pages, None, num_kv_tokens=self.done - begin)

    def fail(self) -> None:
        self.reasons = []
        for sender in self.senders:
            try:
                sender.failure_exception()
            except Exception as error:
                self.reasons.append(str(error))
        self._end(KVPoll.Failed)

    def abort(self) -> None:
        for sender in self.senders:
            sender.abort()

    def _end(self, state: int) -> None:
        self.outcome = state
        self.server.give_pages(self.table, -1.0)


class Decode:
    """One request of a decode server."""

    def __init__(
        self, server: Server, source: Server, room: int, prompt: list[int], *, prefix: int = 0
    ) -> None:
        self.server, self.source, self.room, self.prompt = server, source, room, prompt
        self.prefix = prefix
        self.ready = self.sent = False
        self.table: list[int] = []
        self.outcome: int | None = None
        self.receivers = [
            our(KIND.RECEIVER)(rank.manager, source.address, room) for rank in server.ranks
        ]

    def poll(self) -> int:
        return min(receiver.poll() for receiver in self.receivers)

    def step(self) -> None:
        if self.outcome is not None:
            return
        if not self.ready:
            self._handshake()
            return
        state = self.poll()
        if state == KVPoll.Failed:
            self.fail()
        elif state == KVPoll.WaitingForInput and not self.sent:
            self.sent = True
            self.allocate()
        elif state == KVPoll.Success:
            for rank in self.server.ranks:
                rank.check(self.prompt, self.table)
                assert rank.buffers.bootstrap_room[5, 0] == self.room
                assert rank.buffers.output_ids[5, 0] == sum(self.prompt) % 1000
            for receiver in self.receivers:
                receiver.clear()
            self._end(state)

    def _handshake(self) -> None:
        if not all(
            rank.manager.try_ensure_parallel_info(self.source.address) for rank in self.server.ranks
        ):
            return  # it is not complete
        self.ready = True
        with self.server.each():
            for receiver in self.receivers:
                receiver.init(0)

    def allocate(self) -> None:
        self.table = self.server.take_pages(len(self.prompt))
        pages = np.array(self.table[self.prefix // PAGE :], dtype=np.int32)
        for rank, receiver in zip(self.server.ranks, self.receivers):
            rank.forward(self.prompt, self.table, 0, self.prefix)
            receiver.send_metadata(pages, 5, [], decode_prefix_len=self.prefix)

    def fail(self) -> None:
        self.reasons = []
        for receiver in self.receivers:
            try:
                receiver.failure_exception()
            except Exception as error:
                self.reasons.append(str(error))
        self._end(KVPoll.Failed)
        for receiver in self.receivers:
            receiver.clear()

    def abort(self) -> None:
        for receiver in self.receivers:
            receiver.abort()

    def _end(self, state: int) -> None:
        self.outcome = state
        for rank in self.server.ranks:
            rank.buffers.clear_slot(5)
        self.server.give_pages(self.table, -2.0)


def run(until: Callable[[], bool], *requests: Prefill | Decode) -> None:
    """Steps requests until a condition holds."""
    limit = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < limit, "the condition does not come about"
        for request in requests:
            request.step()
