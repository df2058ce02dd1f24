"""What a client has registered: what is needed to register it again, and where tensors lie."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from kvferry import _cuda
from kvferry._attachment import CUDA_VMM_FD, MAX_DESCRIPTORS, Attachment, PoolDescriptor
from kvferry._connection import Connection
from kvferry.errors import Code, KvferryError, invalid
from kvferry.layout import PoolSpan
from kvferry.v1 import worker_pb2 as pb

_KINDS = {
    _cuda.Kind.IPC: pb.POOL_KIND_CUDA_IPC,
    _cuda.Kind.FABRIC: pb.POOL_KIND_CUDA_FABRIC,
    _cuda.Kind.VMM_FD: pb.POOL_KIND_CUDA_VMM_FD,
}


@dataclass
class Pool:
    name: str
    bytes: int
    fd: int = -1
    mapping: Optional[mmap.mmap] = None
    address: Optional[int] = None  # in this process, or of the device
    device: bool = False
    scratch_offset: Optional[int] = None
    memory: Optional[_cuda.DeviceMemory] = None
    left_out: bool = False  # by the last registration after a restart


class Pools:
    """Any thread. Exports of a GPU are repeated, not kept: after a restart the driver is asked
    again, by pointer and size."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._pools: dict[str, Pool] = {}
        self._gpus: Optional[_cuda.Gpus] = None
        self._words_device: Optional[int] = None
        # The last is the present one. Earlier ones stay: streams may still write to them.
        self._words: list[tuple[Attachment, _cuda.DeviceWords]] = []

    def close(self) -> None:
        with self._lock:
            pools, self._pools = self._pools, {}
            words, self._words = self._words, []
        for _, registered in words:
            registered.close()
        for pool in pools.values():
            self._drop(pool)

    @staticmethod
    def _drop(pool: Pool) -> None:
        if pool.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(pool.fd)
        if pool.memory is not None:
            pool.memory.close()

    def get(self, name: str) -> Optional[Pool]:
        with self._lock:
            return self._pools.get(name)

    def add(self, pools: Sequence[Pool]) -> None:
        with self._lock:
            for pool in pools:
                self._pools[pool.name] = pool

    def remove(self, names: Sequence[str]) -> None:
        with self._lock:
            gone = [self._pools.pop(name) for name in names if name in self._pools]
        for pool in gone:
            self._drop(pool)

    def host(self) -> list[Pool]:
        with self._lock:
            return [pool for pool in self._pools.values() if not pool.device]

    def left_out(self) -> set[str]:
        with self._lock:
            return {pool.name for pool in self._pools.values() if pool.left_out}

    def find(self, address: int, size: int) -> tuple[PoolSpan, int]:
        with self._lock:
            for pool in self._pools.values():
                if pool.address is None:
                    continue
                offset = address - pool.address
                if offset >= 0 and offset + size <= pool.bytes:
                    return PoolSpan(pool.name, pool.bytes), offset
        raise invalid(
            "POINTER_NOT_IN_POOL",
            "the tensor lies in no registered pool: alloc_tensor or alloc_array make host memory, "
            "export_tensor hands over a GPU's",
            "tensors",
        )

    # ---- pools on a GPU ----------------------------------------------------------------------

    def gpus(self) -> _cuda.Gpus:
        with self._lock:
            if self._gpus is None:
                self._gpus = _cuda.Gpus()
            return self._gpus

    def register_device(self, connection: Connection, pool: Pool, *, in_use: bool) -> None:
        """`in_use`: a proof may only be written where the pool says, else POOLS_LEFT_OUT."""
        assert pool.address is not None
        exported = self.gpus().describe(pool.address, pool.bytes)
        proven = exported.kind is not _cuda.Kind.VMM_FD
        if proven and in_use and pool.scratch_offset is None:
            raise _left_out([pool.name])
        deadline = time.monotonic() + self._timeout
        if not proven:
            self._send_parts(connection, pool, exported, deadline)
        spec = pb.PoolSpec(
            name=pool.name,
            kind=_KINDS[exported.kind],
            bytes=pool.bytes,
            offset_bytes=exported.offset,
            handle=exported.handle,
            device_uuid=exported.gpu.uuid,
            proof_offset_bytes=pool.scratch_offset if proven else None,
        )
        answer = connection.call(
            "RegisterPools",
            pb.RegisterPoolsRequest(pools=[spec]),
            pb.RegisterPoolsResponse,
            self._timeout,
        )
        for challenge in answer.challenges:
            try:
                self._prove(connection, challenge, exported.gpu, pool, deadline)
            except KvferryError:
                # The daemon would drop it by itself, but only after some seconds.
                back = pb.UnregisterRequest(pools=pb.UnregisterRequest.Pools(names=[pool.name]))
                with contextlib.suppress(KvferryError):
                    connection.call("Unregister", back, pb.UnregisterResponse, self._timeout)
                raise

    def _send_parts(
        self, connection: Connection, pool: Pool, exported: _cuda.Export, deadline: float
    ) -> None:
        # Few descriptors are open at a time: a large range may have thousands of allocations.
        for first in range(0, len(exported.parts), MAX_DESCRIPTORS):
            fds: list[int] = []
            try:
                entries = []
                for number in range(first, min(first + MAX_DESCRIPTORS, len(exported.parts))):
                    address, size = exported.parts[number]
                    fds.append(exported.gpu.export_part(address))
                    entries.append(PoolDescriptor(pool.name, CUDA_VMM_FD, size, fds[-1], number))
                connection.attachment.send_pools(entries, deadline)
            finally:
                for fd in fds:
                    os.close(fd)

    def _prove(
        self,
        connection: Connection,
        challenge: pb.PoolChallenge,
        gpu: _cuda.Gpu,
        pool: Pool,
        deadline: float,
    ) -> None:
        offset = challenge.offset_bytes
        # Never into pages that may be in use, whatever is asked.
        if (
            len(challenge.nonce) != _cuda.PROOF_BYTES
            or offset > pool.bytes - _cuda.PROOF_BYTES
            or pool.scratch_offset not in (None, offset)
        ):
            raise KvferryError(
                Code.INTERNAL,
                "POOL_CHALLENGE",
                "the daemon asks for a proof that cannot be written",
                challenge.pool,
            )
        assert pool.address is not None
        address = pool.address + offset
        before = gpu.read(address, _cuda.PROOF_BYTES, deadline)
        try:
            gpu.write(address, challenge.nonce, deadline)
            connection.call(
                "ProvePools",
                pb.ProvePoolsRequest(pools=[challenge.pool]),
                pb.ProvePoolsResponse,
                self._timeout,
            )
        finally:
            # What engines rely on, such as zeros in pages that are not filled yet, is there again.
            gpu.write(address, before, deadline)

    def register_devices_again(self, connection: Connection) -> Optional[KvferryError]:
        with self._lock:
            pools = [pool for pool in self._pools.values() if pool.device]
            words_device = self._words_device
        problem: Optional[KvferryError] = None
        waiting: list[str] = []
        for pool in pools:
            pool.left_out = True
            try:
                self.register_device(connection, pool, in_use=True)
                pool.left_out = False
            except KvferryError as error:
                if error.code is Code.UNAVAILABLE:
                    raise
                if error.reason == "POOLS_LEFT_OUT":
                    waiting.append(pool.name)
                else:
                    problem = problem or error
        if words_device is not None:
            try:
                self._make_words(connection.attachment, words_device)
            except KvferryError as error:
                problem = problem or error
        return problem or (_left_out(waiting) if waiting else None)

    def restore(self, connection: Connection) -> Optional[KvferryError]:
        with self._lock:
            pools = [p for p in self._pools.values() if p.left_out and p.device]
        first: Optional[KvferryError] = None
        for pool in pools:
            try:
                self.register_device(connection, pool, in_use=False)
                pool.left_out = False
            except KvferryError as error:
                first = first or error
        return first

    # ---- words for streams -------------------------------------------------------------------

    def register_words(self, attachment: Attachment, device: int) -> None:
        with self._lock:
            if self._words_device not in (None, device):
                raise KvferryError(
                    Code.FAILED_PRECONDITION,
                    "WORDS_REGISTERED",
                    f"the words are registered with device {self._words_device}",
                    "device",
                )
            if any(known is attachment for known, _ in self._words):
                return
        self._make_words(attachment, device)
        with self._lock:
            self._words_device = device

    def _make_words(self, attachment: Attachment, device: int) -> None:
        words = _cuda.DeviceWords(self.gpus().gpu(device), attachment.words)
        with self._lock:
            self._words.append((attachment, words))

    def device_words(self, attachment: Attachment) -> _cuda.DeviceWords:
        with self._lock:
            for known, words in self._words:
                if known is attachment:
                    return words
        raise KvferryError(
            Code.FAILED_PRECONDITION,
            "WORDS_NOT_REGISTERED",
            "register_words_with_device has not been called",
        )


def _left_out(pools: Sequence[str]) -> KvferryError:
    return KvferryError(
        Code.FAILED_PRECONDITION,
        "POOLS_LEFT_OUT",
        "the daemon wants a proof written into pages that may be in use: "
        + ", ".join(pools)
        + "; call restore_pools when nothing uses them, or export with a scratch_offset",
        "pools",
    )
