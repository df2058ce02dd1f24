"""The client's calls about memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from kvferry import _cuda, _memory
from kvferry._attachment import check_name
from kvferry._pools import Pool
from kvferry._session import Session, uses
from kvferry.errors import Code, KvferryError, invalid, not_attached
from kvferry.layout import PoolSpan
from kvferry.v1 import worker_pb2 as pb


class PoolCalls(Session):
    def alloc_pool(self, name: str, size: int) -> memoryview:
        """Shared memory of `size` bytes, zeroed, handed to the daemon under `name` and registered.
        Blocks. ALREADY_EXISTS POOL_EXISTS, RESOURCE_EXHAUSTED, SIZE_INVALID."""
        check_name(name, "name")
        if self._pools.get(name) is not None:
            raise _pool_exists()
        fd, mapping = _memory.allocate(size)
        pool = Pool(name, size, fd=fd, mapping=mapping, address=_memory.address_of(mapping))
        try:
            self._register_host([pool])
        except BaseException:
            os.close(fd)
            raise
        return memoryview(mapping)

    def alloc_array(
        self, name: str, shape: Sequence[int], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """A NumPy array in a pool of its own. Blocks; errors as alloc_pool."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return np.frombuffer(self.alloc_pool(name, size), dtype=kind).reshape(shape)

    def alloc_tensor(self, name: str, shape: Sequence[int], dtype: Any, device: Any = "cpu") -> Any:
        """A torch tensor in a pool of its own, zeroed: shared memory, or, for a CUDA device, memory
        that goes to the daemon as a file descriptor. Blocks; errors as alloc_pool and, on a GPU,
        alloc_device_pool."""
        import torch

        where = torch.device(device)
        count = int(np.prod(shape, dtype=np.int64))
        size = count * torch.empty((), dtype=dtype).element_size()
        if where.type == "cpu":
            flat = torch.frombuffer(self.alloc_pool(name, size), dtype=torch.uint8)
        elif where.type == "cuda":
            ordinal = torch.cuda.current_device() if where.index is None else where.index
            address = self.alloc_device_pool(name, size, ordinal)
            flat = torch.as_tensor(_cuda.ArrayInterface(address, size), device=where)
        else:
            raise invalid("DEVICE_UNSUPPORTED", f"no pools on {where.type}", "device")
        return flat.view(dtype).reshape(tuple(shape))

    def export_pool(self, name: str, fd: int, size: int, *, address: Optional[int] = None) -> None:
        """Registers a file that the caller owns: tmpfs or hugetlbfs, sealed against shrinking, its
        blocks allocated. The descriptor is duplicated. `address`: where the caller has mapped it,
        for layouts from tensors in it. Blocks."""
        check_name(name, "name")
        if self._pools.get(name) is not None:
            raise _pool_exists()
        try:
            kept = os.dup(fd)
        except OSError:
            raise invalid("POOL_DESCRIPTOR", "not an open descriptor", "fd") from None
        try:
            self._register_host([Pool(name, size, fd=kept, address=address)])
        except BaseException:
            os.close(kept)
            raise

    def export_tensor(
        self, name: str, tensor: Any, *, scratch_offset: Optional[int] = None
    ) -> None:
        """Hands over the whole storage of a torch tensor on a GPU and registers it; see
        export_device_memory. CPU tensors cannot be handed over: POINTER_NOT_DEVICE; allocate them
        with alloc_tensor. Blocks."""
        storage = (
            tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else (tensor.storage())
        )
        self.export_device_memory(
            name, storage.data_ptr(), storage.nbytes(), scratch_offset=scratch_offset
        )

    def export_device_memory(
        self, name: str, pointer: int, size: int, *, scratch_offset: Optional[int] = None
    ) -> None:
        """Hands [pointer, pointer + size) of a GPU over and registers it: memory of cudaMalloc as
        its CUDA IPC handle, memory of cuMemMap (PyTorch's expandable segments, sleep modes) as file
        descriptors or one fabric handle. It must not be freed before unregister_pools has returned.

        IPC and fabric handles come with a proof: 16 bytes that the daemon drew are written into the
        pool, at `scratch_offset` or anywhere, and what was there is put back. Without
        `scratch_offset` call this before the pool's pages are in use; see restore_pools.

        Blocks. FAILED_PRECONDITION NO_CUDA_DRIVER; POINTER_NOT_DEVICE, POINTER_MANAGED,
        POINTER_STREAM_ORDERED, POINTER_NOT_EXPORTABLE, POOL_TOO_SMALL, POOL_PARTS,
        SCRATCH_OUT_OF_RANGE; errors of the driver have its name as reason.
        """
        check_name(name, "name")
        if scratch_offset is not None and not 0 <= scratch_offset <= size - _cuda.PROOF_BYTES:
            raise invalid(
                "SCRATCH_OUT_OF_RANGE",
                "16 bytes from there do not lie in the pool",
                "scratch_offset",
            )
        self._add_device(
            Pool(name, size, address=pointer, device=True, scratch_offset=scratch_offset)
        )

    def alloc_device_pool(self, name: str, size: int, device: int = 0) -> int:
        """Memory of the GPU with this number in this process, cleared, handed over as a file
        descriptor and registered; its device pointer. Blocks. UNIMPLEMENTED VMM_UNSUPPORTED, errors
        of the driver."""
        check_name(name, "name")
        _memory.check_size(size)
        memory = self._pools.gpus().gpu(device).allocate(size, self._call_timeout)
        self._add_device(Pool(name, size, address=memory.address, device=True, memory=memory))
        return memory.address

    def restore_pools(self) -> None:
        """Registers pools on a GPU that a re-registration after a daemon's restart left out
        (REATTACHED had the error POOLS_LEFT_OUT), with the layouts on them. Call it when nothing
        uses those pools, such as between two steps. Blocks; nothing to do is no error."""
        connection = self._current()
        problem = self._pools.restore(connection)
        with self._lock:
            left_out = self._pools.left_out()
            layouts = {
                ref: self._layouts[ref]
                for ref in self._layouts_left_out
                if ref in self._layouts and not uses(self._layouts[ref], left_out)
            }
        for ref, request in layouts.items():
            connection.call(
                "RegisterLayout", request, pb.RegisterLayoutResponse, self._call_timeout
            )
            with self._lock:
                self._layouts_left_out.discard(ref)
        if problem is not None:
            raise problem

    def unregister_pools(self, names: Sequence[str]) -> None:
        """Waits until nothing reads or writes the pools any more; their transfers fail with
        UNREGISTERED, and the layouts that use them are taken back. Blocks."""
        self._call(
            "Unregister",
            pb.UnregisterRequest(pools=pb.UnregisterRequest.Pools(names=names)),
            pb.UnregisterResponse,
        )
        gone = set(names)
        with self._lock:
            for ref in [r for r, request in self._layouts.items() if uses(request, gone)]:
                del self._layouts[ref]
        self._pools.remove(names)

    def find_pool(self, address: int, size: int) -> tuple[PoolSpan, int]:
        """The registered pool that holds [address, address + size), and the offset in it.
        INVALID_ARGUMENT POINTER_NOT_IN_POOL."""
        return self._pools.find(address, size)

    def _register_host(self, pools: Sequence[Pool]) -> None:
        self._send_host_pools(self._current(), pools)
        self._pools.add(pools)

    def _add_device(self, pool: Pool) -> None:
        if self._pools.get(pool.name) is not None:
            raise _pool_exists()
        connection = self._current()
        self._pools.register_device(connection, pool, in_use=False)
        with self._lock:
            # The registration was with a daemon that is gone, and the next one does not know it.
            if self._connection is not connection:
                raise not_attached()
            self._pools.add([pool])


def _pool_exists() -> KvferryError:
    return KvferryError(Code.ALREADY_EXISTS, "POOL_EXISTS", "a pool of this name exists", "name")
