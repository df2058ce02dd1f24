"""A worker's connection to the kvferry daemon of its node."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from kvferry import _cuda, _encode, _memory
from kvferry._attachment import HOST_SHM, Attachment, PoolDescriptor, check_name
from kvferry._connection import Connection, Message, Response, decode_error
from kvferry._encode import Blocks, milliseconds
from kvferry._pools import Pool, Pools
from kvferry._submitter import Submitter
from kvferry._transfers import Transfers
from kvferry.errors import Code, KvferryError, invalid, not_attached
from kvferry.layout import KvPacking, Layout, LayoutBuilder, PoolSpan
from kvferry.types import (
    CancelResult,
    ClientStats,
    DoneWord,
    Event,
    EventKind,
    GroupCommit,
    JoinedInstance,
    LayoutRef,
    PromptHashes,
    Ready,
    ReceiverNeeds,
    RegisteredLayout,
    Resolution,
    ReuseLookup,
    Role,
    Side,
    TokenRange,
    TransferKey,
    TransferState,
    TransferStatus,
)
from kvferry.v1 import worker_pb2 as pb

DEFAULT_SOCKET = "/run/kvferry/kvferry.sock"
_FIRST_BACKOFF = 0.05
_LAST_BACKOFF = 2.0
_clients: weakref.WeakSet[Client] = weakref.WeakSet()


class Transfer:
    """One side of one transfer, as a client names it: the same object in all calls and events of
    that side. Its methods are the client's."""

    __slots__ = ("__weakref__", "client", "handle", "key", "side")

    def __init__(self, client: Client, handle: int, side: Side, key: TransferKey) -> None:
        self.client = client
        self.handle = handle
        self.side = side
        self.key = key

    def __repr__(self) -> str:
        return f"<Transfer {self.handle} {self.side.name} {self.key.id!r}>"

    def wait(self, timeout: float) -> TransferStatus:
        """See Client.wait."""
        return self.client.wait(self, timeout)

    def status(self) -> TransferStatus:
        """See Client.status."""
        return self.client.status(self)

    def aux(self) -> bytes:
        """See Client.aux."""
        return self.client.aux(self)

    def cancel(self) -> CancelResult:
        """See Client.cancel."""
        return self.client.cancel(self)

    def revoke(self, from_token: int) -> list[int]:
        """See Client.revoke."""
        return self.client.revoke(self, from_token)

    def receiver_needs(self) -> list[ReceiverNeeds]:
        """See Client.receiver_needs."""
        return self.client.receiver_needs(self)

    def commit_reuse(self, groups: Sequence[GroupCommit]) -> None:
        """See Client.commit_reuse."""
        self.client.commit_reuse(self, groups)

    def close(self) -> None:
        """See Client.close_transfer."""
        self.client.close_transfer(self)


class Client:
    """May be used from any number of threads; poll, events, wait and wait_any are for one consumer
    at a time. Calls that say so block, at most for `call_timeout`; the others queue or read shared
    memory.

    Who may touch which memory follows from the events alone: source pages belong to the transfer
    from send until SOURCE_RELEASED, destination pages from receive until DEST_RELEASED, whatever
    else is reported in between. Each comes exactly once for a transfer that was accepted, also when
    the daemon dies: then once its process has ended.

    In a child after fork() the client is dead: descriptors are closed, calls fail.
    """

    def __init__(
        self,
        socket: str = DEFAULT_SOCKET,
        *,
        name: str,
        role: Role = Role.RANK,
        reconnect: bool = True,
        attach_timeout: float = 5.0,
        call_timeout: float = 30.0,
        queue_operations: int = 16384,
        queue_bytes: int = 64 << 20,
    ) -> None:
        """Attaches; blocks at most `attach_timeout` seconds.

        `name`: of this worker, unique in its tenant. `reconnect`: after the daemon's end attach and
        register everything again, with back-off. `queue_*`: what may wait to be sent; beyond it
        QUEUE_FULL. Errors: INVALID_ARGUMENT NAME_INVALID, ALREADY_EXISTS NAME_IN_USE,
        PERMISSION_DENIED, UNAVAILABLE DAEMON_UNREACHABLE, FAILED_PRECONDITION PROTOCOL_MISMATCH.
        """
        self._socket = socket
        self._name = name
        self._role = role
        self._reconnect = reconnect
        self._attach_timeout = attach_timeout
        self._call_timeout = call_timeout
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.RLock()
        self._connection: Optional[Connection] = None
        self._boot_id = b""
        self._layouts: dict[LayoutRef, pb.RegisterLayoutRequest] = {}
        self._layouts_left_out: set[LayoutRef] = set()
        self._timeline_used: set[int] = set()
        self._done_used: set[int] = set()
        self._timeline_values: dict[int, int] = {}
        self._lost_words: Optional[Any] = None
        self._reconnects = 0
        self._handles = itertools.count(1)
        self._ghosts: list[Connection] = []  # lost, their daemon has not exited yet
        self._woken = False
        self._event_fd_used = False
        attachment = Attachment(socket, name, role, attach_timeout)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._transfers = Transfers(queue_operations)
        self._submitter = Submitter(queue_operations, queue_bytes, self._on_result)
        self._pools = Pools(call_timeout)
        self._use(Connection(attachment))
        self._watcher = threading.Thread(target=self._watch, name="kvferry-watch", daemon=True)
        self._watcher.start()
        _clients.add(self)

    def close(self) -> None:
        """Detaches: open transfers fail on the daemon's side with WORKER_LOST. Memory of pools goes
        when the last array in it goes. May be repeated."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
        os.eventfd_write(self._stop, 1)
        self._watcher.join()
        self._submitter.stop()
        with self._lock:
            connections = self._ghosts + ([self._connection] if self._connection else [])
            self._connection = None
            self._ghosts = []
        for connection in connections:
            connection.close()
            connection.attachment.close()
        self._pools.close()
        self._epoll.close()
        os.close(self._wake)
        os.close(self._stop)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- pools -------------------------------------------------------------------------------

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
                if ref in self._layouts and not _uses(self._layouts[ref], left_out)
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
            for ref in [r for r, request in self._layouts.items() if _uses(request, gone)]:
                del self._layouts[ref]
        self._pools.remove(names)

    def find_pool(self, address: int, size: int) -> tuple[PoolSpan, int]:
        """The registered pool that holds [address, address + size), and the offset in it.
        INVALID_ARGUMENT POINTER_NOT_IN_POOL."""
        return self._pools.find(address, size)

    # ---- layouts and instances ---------------------------------------------------------------

    def layout_builder(
        self,
        fingerprint: Union[str, bytes],
        *,
        rank: int = 0,
        rank_count: int = 1,
        dp_group: int = 0,
    ) -> LayoutBuilder:
        """For layouts from tensors that lie in this client's pools."""
        return LayoutBuilder(
            self.find_pool, fingerprint, rank=rank, rank_count=rank_count, dp_group=dp_group
        )

    def layout_from_tensors(
        self,
        tensors: Union[Mapping[int, Any], Any],
        *,
        kv_packing: KvPacking,
        fingerprint: Union[str, bytes],
        tokens_per_block: int,
        heads: int,
        rank: int = 0,
        rank_count: int = 1,
        dp_group: int = 0,
        **attention: Any,
    ) -> Layout:
        """The layout of one group of attention heads; `attention` as LayoutBuilder.add_attention.
        Torch tensors and NumPy arrays alike."""
        builder = self.layout_builder(
            fingerprint, rank=rank, rank_count=rank_count, dp_group=dp_group
        )
        builder.add_attention(
            tensors,
            kv_packing=kv_packing,
            tokens_per_block=tokens_per_block,
            heads=heads,
            **attention,
        )
        return builder.layout

    layout_from_torch = layout_from_tensors

    def register_layout(
        self,
        instance: str,
        layout: Layout,
        *,
        incarnation: Optional[bytes] = None,
        instance_key: Optional[bytes] = None,
        reuse_key: Optional[bytes] = None,
        reuse_hash_scheme: str = "",
    ) -> RegisteredLayout:
        """Says what lies where in the pools. `incarnation`, 16 bytes: absent only if all ranks are
        on this node. `instance_key`, 16 secret bytes: absent only if all ranks are of one user on
        this node. `reuse_hash_scheme`: names how block hashes are made; empty: no reuse. Blocks.
        INVALID_ARGUMENT naming the field of the layout."""
        request = pb.RegisterLayoutRequest(
            instance=instance,
            layout=_encode.layout_message(layout),
            incarnation=incarnation or b"",
            instance_key=instance_key or b"",
            reuse_key=reuse_key or b"",
            reuse_hash_scheme=reuse_hash_scheme,
        )
        answer = self._call("RegisterLayout", request, pb.RegisterLayoutResponse)
        ref = LayoutRef(instance, layout.rank)
        with self._lock:
            self._layouts[ref] = request
            self._layouts_left_out.discard(ref)
        return RegisteredLayout(
            ref,
            answer.card,
            answer.generation,
            answer.incarnation,
            answer.complete,
            answer.existing,
        )

    def unregister_layout(self, layout: LayoutRef) -> None:
        """Fails the layout's open transfers (UNREGISTERED) and waits until nothing reads or writes
        its memory. Blocks."""
        request = pb.UnregisterRequest(layout=_encode.layout_ref(layout))
        self._call("Unregister", request, pb.UnregisterResponse)
        with self._lock:
            self._layouts.pop(layout, None)

    def join_instance(
        self, instance: str, cards: Sequence[bytes], key: Optional[bytes] = None
    ) -> JoinedInstance:
        """Gives the cards of all ranks to this daemon, which tells the others; needed only where
        ranks are on several nodes. `key`: the registrations' instance key. Blocks."""
        request = pb.JoinInstanceRequest(instance=instance, cards=cards, instance_key=key or b"")
        answer = self._call("JoinInstance", request, pb.JoinInstanceResponse)
        return JoinedInstance(
            answer.incarnation, answer.complete, list(answer.missing_ranks), answer.existing
        )

    def ticket(self, instance: str) -> str:
        """What leads receivers to the instance: printable, fits an HTTP field. Blocks."""
        request = pb.GetTicketRequest(instance=instance)
        return self._call("GetTicket", request, pb.GetTicketResponse).ticket

    def resolve(self, ticket: str, layout: Optional[LayoutRef] = None) -> Resolution:
        """Whether the instance behind a ticket is reachable and fits a layout; warms the link.
        Blocks."""
        request = pb.ResolveRequest(ticket=ticket, layout=_encode.layout_ref(layout))
        answer = self._call("Resolve", request, pb.ResolveResponse)
        return Resolution(
            answer.reachable,
            answer.compatible,
            decode_error(answer.problem) if answer.HasField("problem") else None,
            answer.transport,
            answer.instance,
            answer.incarnation,
            answer.rank_count,
        )

    # ---- transfers ---------------------------------------------------------------------------

    def open_send(
        self,
        key: TransferKey,
        layout: LayoutRef,
        *,
        lease: float = 0,
        deadline: float = 0,
        max_receivers: int = 1,
    ) -> Transfer:
        """Announces a transfer before its blocks are known: RECEIVER_READY tells when a receiver
        has come. `lease`: how long pages are held for one that has not; `deadline`: from the first
        activity; 0: the daemon's default. Never blocks. QUEUE_FULL, NOT_ATTACHED; what the daemon
        refuses comes as the event REJECTED."""
        transfer, created = self._begin(Side.SENDER, key, layout)
        with self._undone_if_raised(transfer, created):
            request = pb.OpenSendRequest(
                client_handle=transfer.handle,
                transfer=_encode.transfer_ref(key),
                layout=_encode.layout_ref(layout),
                lease_ms=milliseconds(lease, "lease"),
                deadline_ms=milliseconds(deadline, "deadline"),
                max_receivers=max_receivers,
            )
            self._submitter.enqueue(pb.Operation(open_send=request), transfer.handle, 256)
        return transfer

    def send(
        self,
        key: TransferKey,
        layout: LayoutRef,
        groups: Blocks,
        *,
        num_tokens: int,
        tokens: Optional[TokenRange] = None,
        index: int = 0,
        layers: Optional[tuple[int, int]] = None,
        last: bool = True,
        aux: Optional[bytes] = None,
        ready: Optional[Ready] = None,
        packed_copy: bool = False,
        lease: float = 0,
        deadline: float = 0,
        max_receivers: int = 1,
        done: Optional[DoneWord] = None,
    ) -> Transfer:
        """Releases one slice to the receivers.

        `num_tokens`: of the whole prompt. `tokens`: of this slice, all by default. `index`: the
        caller's count of slices, 0, 1, ...; `last` on the final one. `layers`: half-open range of
        global numbers. `aux`: at most 64 KiB, with the last slice; every rank gives the same or
        none does. `ready`: when the pages may be read. `packed_copy`: SOURCE_RELEASED comes once
        the daemon has a copy, before anybody pulls. The ids are copied before the call returns.
        Never blocks; errors as open_send, and INVALID_ARGUMENT for ids, times and aux.
        """
        messages, size = _encode.groups_of(groups)
        if aux is not None:
            if len(aux) > _encode.MAX_AUX_BYTES:
                raise invalid("AUX_TOO_LONG", "aux has at most 65536 bytes", "aux")
            if not last:
                raise invalid("AUX_NOT_LAST", "aux rides on the last slice only", "aux")
            size += len(aux)
        begin, end = (0, num_tokens) if tokens is None else tokens
        transfer, created = self._begin(Side.SENDER, key, layout)
        with self._undone_if_raised(transfer, created):
            request = pb.SendRequest(
                client_handle=transfer.handle,
                transfer=_encode.transfer_ref(key),
                layout=_encode.layout_ref(layout),
                send_index=index,
                num_tokens=num_tokens,
                tokens=pb.TokenRange(begin=begin, end=end),
                groups=messages,
                layers=None if layers is None else pb.LayerRange(begin=layers[0], end=layers[1]),
                last=last,
                aux=aux,
                ready=_encode.ready_of(ready),
                packed_copy=packed_copy,
                lease_ms=milliseconds(lease, "lease"),
                deadline_ms=milliseconds(deadline, "deadline"),
                max_receivers=max_receivers,
                done=_encode.done_of(done),
            )
            self._submitter.enqueue(pb.Operation(send=request), transfer.handle, size)
        return transfer

    def receive(
        self,
        key: TransferKey,
        layout: LayoutRef,
        ticket: str,
        groups: Blocks,
        *,
        num_tokens: int,
        ready: Optional[Ready] = None,
        wait_for_arena: bool = True,
        wait: float = 0,
        deadline: float = 0,
        sender_dp_group: Optional[int] = None,
        done: Optional[DoneWord] = None,
        prompt_hashes: Sequence[PromptHashes] = (),
        reuse_pin: int = 0,
    ) -> Transfer:
        """Asks for a transfer into these blocks.

        `ticket`: the sender's, or its name form `kvferry:host:port/instance`. `ready`: when the
        pages may be written. `wait`: until the first slice, also for a sender that has not come;
        `deadline`: from the first slice on. `prompt_hashes`: blocks that workers of this node have
        committed under them are copied, and only the rest is asked of the sender. Never blocks;
        errors as send.
        """
        messages, size = _encode.groups_of(groups)
        hashes, hashes_size = _encode.hashes_of(prompt_hashes)
        transfer, created = self._begin(Side.RECEIVER, key, layout)
        with self._undone_if_raised(transfer, created):
            request = pb.ReceiveRequest(
                client_handle=transfer.handle,
                transfer=_encode.transfer_ref(key),
                layout=_encode.layout_ref(layout),
                ticket=ticket,
                sender_dp_group=sender_dp_group,
                num_tokens=num_tokens,
                groups=messages,
                ready=_encode.ready_of(ready),
                arena_full=pb.ARENA_FULL_WAIT if wait_for_arena else pb.ARENA_FULL_FAIL,
                wait_ms=milliseconds(wait, "wait"),
                deadline_ms=milliseconds(deadline, "deadline"),
                prompt_hashes=hashes,
                done=_encode.done_of(done),
                reuse_pin=reuse_pin,
            )
            operation = pb.Operation(receive=request)
            self._submitter.enqueue(operation, transfer.handle, size + hashes_size)
        return transfer

    def receive_wait(
        self,
        key: TransferKey,
        layout: LayoutRef,
        ticket: str,
        groups: Blocks,
        *,
        timeout: float,
        **options: Any,
    ) -> bytes:
        """receive(), and waits until pages and aux may be read; the aux, empty if none came. Raises
        TransferFailed if the transfer ends otherwise, and closes it. If the time is over it is
        cancelled, and WAIT_TIMEOUT raised once its memory is released. Blocks."""
        transfer = self.receive(key, layout, ticket, groups, **options)
        try:
            status = self.wait(transfer, timeout)
        except KvferryError as error:
            if error.reason == "WAIT_TIMEOUT":
                self.cancel(transfer)
                self.wait(transfer, self._call_timeout)
            self.close_transfer(transfer)
            raise
        try:
            status.check()
            return self.aux(transfer) if status.aux_ready else b""
        finally:
            self.close_transfer(transfer)

    def claim(
        self, key: TransferKey, layout: Optional[LayoutRef], ticket: str, *, ttl: float = 0
    ) -> Transfer:
        """ "I shall come": extends the sender's lease, renewed by the daemon until the receive, a
        decline or this worker's end; no loop of the engine is needed. A controller's has no layout
        and lasts its `ttl`. Never blocks."""
        transfer, created = self._begin(Side.RECEIVER, key, layout)
        with self._undone_if_raised(transfer, created):
            request = pb.ClaimRequest(
                client_handle=transfer.handle,
                transfer=_encode.transfer_ref(key),
                layout=_encode.layout_ref(layout),
                ticket=ticket,
                ttl_ms=milliseconds(ttl, "ttl"),
            )
            self._submitter.enqueue(pb.Operation(claim=request), transfer.handle, 256)
        return transfer

    def decline(self, key: TransferKey, layout: Optional[LayoutRef], ticket: str) -> None:
        """ "I shall not come": the sender's pages are freed at once. Takes a claim back; a receive
        is given up by cancel(). Never blocks."""
        self._check_alive()
        request = pb.DeclineRequest(
            transfer=_encode.transfer_ref(key),
            layout=_encode.layout_ref(layout),
            ticket=ticket,
        )
        self._submitter.enqueue(pb.Operation(decline=request), 0, 256)

    def commit_reuse(self, transfer: Transfer, groups: Sequence[GroupCommit]) -> None:
        """Publishes received blocks in the node's reuse index, after COMPLETED. Never blocks."""
        self._check_alive()
        request = pb.CommitReuseRequest(client_handle=transfer.handle)
        for group in groups:
            request.groups.add(group=group.group, tokens=group.tokens, hashes=group.hashes)
        self._transfers.begin_known(transfer.handle)
        with self._undone_if_raised(transfer, False):
            self._submitter.enqueue(
                pb.Operation(commit_reuse=request), transfer.handle, request.ByteSize() + 256
            )

    def close_transfer(self, transfer: Transfer) -> None:
        """The caller has seen the end and forgets the transfer: no event of it follows, its id
        stays dead. Never blocks. FAILED_PRECONDITION TRANSFER_OPEN."""
        self._check_alive()
        if self._transfers.may_close(transfer.handle):
            request = pb.CloseTransferRequest(client_handle=transfer.handle)
            self._submitter.enqueue(pb.Operation(close_transfer=request), 0, 256)
        self._transfers.forget(transfer.handle)

    def cancel(self, transfer: Transfer) -> CancelResult:
        """Ends this worker's part. Never interrupts a running copy: the answer says whether memory
        is still in use, and the RELEASED event when it is not. May be repeated. Blocks."""
        request = pb.CancelRequest(client_handle=transfer.handle)
        answer = self._call_about(transfer, "Cancel", request, pb.CancelResponse)
        return CancelResult(TransferState(answer.state), answer.memory_in_use, answer.reason)

    def revoke(self, transfer: Transfer, from_token: int) -> list[int]:
        """Preemption: drops slices that reach `from_token` and are not wholly gathered; their send
        indices, once no gather reads their pages. They may be sent again as new slices. Blocks."""
        request = pb.RevokeRequest(client_handle=transfer.handle, from_token=from_token)
        answer = self._call_about(transfer, "Revoke", request, pb.RevokeResponse)
        return list(answer.dropped_send_indices)

    def receiver_needs(self, transfer: Transfer) -> list[ReceiverNeeds]:
        """What the receivers that have come need of an open send. Blocks. TRANSFER_UNKNOWN,
        TRANSFER_ENDED."""
        request = pb.GetReceiverNeedsRequest(client_handle=transfer.handle)
        answer = self._call_about(
            transfer, "GetReceiverNeeds", request, pb.GetReceiverNeedsResponse
        )
        return [
            ReceiverNeeds(
                r.instance,
                r.incarnation,
                r.dp_group,
                r.ready,
                {g.group: [(t.begin, t.end) for t in g.ranges] for g in r.groups},
            )
            for r in answer.receivers
        ]

    def reserve(
        self,
        key: TransferKey,
        layout: LayoutRef,
        ticket: str,
        *,
        size: int = 0,
        wait_for_arena: bool = True,
        lease: float = 0,
    ) -> int:
        """Promises `size` bytes of arena (0: the streaming minimum) to a receive to come; the bytes
        promised. Blocks. RESERVATION_TOO_LARGE, ARENA_EXHAUSTED, RESERVATION_EXISTS."""
        request = pb.ReserveRequest(
            transfer=_encode.transfer_ref(key),
            layout=_encode.layout_ref(layout),
            ticket=ticket,
            bytes=size,
            arena_full=pb.ARENA_FULL_WAIT if wait_for_arena else pb.ARENA_FULL_FAIL,
            lease_ms=milliseconds(lease, "lease"),
        )
        return self._call("Reserve", request, pb.ReserveResponse).bytes

    def lookup_reuse(
        self,
        layout: LayoutRef,
        hashes: Sequence[PromptHashes],
        *,
        pin: float = 0,
        reuse_key: Optional[bytes] = None,
    ) -> ReuseLookup:
        """How much of a prompt workers of this node have committed. `pin`, at most a second: what
        was found stays so long, or until a receive names the pin. `reuse_key`: controllers only.
        Blocks."""
        request = pb.LookupReuseRequest(
            layout=_encode.layout_ref(layout),
            prompt_hashes=_encode.hashes_of(hashes)[0],
            pin_ms=milliseconds(pin, "pin"),
            reuse_key=reuse_key or b"",
        )
        answer = self._call("LookupReuse", request, pb.LookupReuseResponse)
        return ReuseLookup({g.group: g.tokens for g in answer.groups}, answer.pin)

    def withdraw_reuse(self, layout: LayoutRef, blocks: Blocks) -> int:
        """Before the memory of committed blocks is used for something else: returns when nobody
        reads them; how many could still be found. Blocks."""
        request = pb.WithdrawReuseRequest(
            layout=_encode.layout_ref(layout), groups=_encode.groups_of(blocks)[0]
        )
        return self._call("WithdrawReuse", request, pb.WithdrawReuseResponse).withdrawn_count

    def aux(self, transfer: Transfer) -> bytes:
        """Aux of a completed receive. Blocks only when it is longer than the control page carries.
        FAILED_PRECONDITION AUX_NOT_READY."""
        self._check_alive()
        local = self._transfers.aux(transfer.handle)
        if local is not None:
            return local
        request = pb.GetAuxRequest(client_handle=transfer.handle)
        return self._call("GetAux", request, pb.GetAuxResponse).aux

    # ---- events ------------------------------------------------------------------------------

    def poll(self, limit: int = 64) -> list[Event]:
        """Takes up to `limit` events without waiting and without a call."""
        if self._event_fd_used:
            # Somebody sleeps on the descriptor: it has to become unreadable before the page is
            # looked at.
            self._take_wake_ups()
        events = self._transfers.take(limit)
        if (len(events) == limit and self._event_fd_used) or self._transfers.unsettled:
            self._notify()
        return events

    def wait_any(self, timeout: float, limit: int = 64) -> list[Event]:
        """Waits until there are events, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            events = self.poll(limit)
            if events or self._closed:
                return events
            if not self._block(deadline):
                return self.poll(limit)

    def events(self, timeout: float) -> Iterator[Event]:
        """Events as they come, until none has come for `timeout` seconds."""
        while True:
            events = self.wait_any(timeout)
            if not events:
                return
            yield from events

    def wait(self, transfer: Transfer, timeout: float) -> TransferStatus:
        """Waits until the transfer's memory is the caller's again and its state is terminal; this
        transfer's events are consumed, others are kept. DEADLINE_EXCEEDED WAIT_TIMEOUT; the
        daemon's error if it was refused. A transfer that failed is returned: see
        TransferStatus.check()."""
        deadline = time.monotonic() + timeout
        while True:
            self._check_alive()
            status = self._transfers.ended(transfer.handle)
            if status is not None:
                # Events of others may have been seen on the way, and their wake-ups consumed.
                if self._transfers.pending:
                    self._notify()
                return status
            if self._transfers.unsettled:
                self._notify()
            if not self._block(deadline):
                status = self._transfers.ended(transfer.handle)
                if status is not None:
                    return status
                self._notify()
                raise KvferryError(
                    Code.DEADLINE_EXCEEDED, "WAIT_TIMEOUT", "the transfer has not ended in time"
                )

    def status(self, transfer: Transfer) -> TransferStatus:
        """What the control page says now. NOT_FOUND TRANSFER_UNKNOWN."""
        self._check_alive()
        return self._transfers.status(transfer.handle)

    def event_fd(self) -> int:
        """Readable when poll has something to take, for event loops; poll until it is empty."""
        self._event_fd_used = True
        self._notify()  # something may have been waiting from before the first call
        return self._epoll.fileno()

    # ---- timeline ----------------------------------------------------------------------------

    def alloc_word(self) -> int:
        """A timeline word for ready conditions, starting at 0. RESOURCE_EXHAUSTED NO_WORD."""
        attachment = self._current().attachment
        with self._lock:
            word = _first_free(self._timeline_used, attachment.words.timeline_words)
            self._timeline_values[word] = 0
            attachment.words.set_timeline(word, 0)
        return word

    def free_word(self, word: int) -> None:
        with self._lock:
            self._timeline_used.discard(word)

    def signal(self, word: int, value: int) -> None:
        """Advances a timeline word from the CPU. WORD_OUT_OF_RANGE."""
        attachment = self._current().attachment
        if not 0 <= word < attachment.words.timeline_words:
            raise invalid("WORD_OUT_OF_RANGE", "no such timeline word", "word")
        with self._lock:
            self._timeline_values[word] = value
        attachment.words.set_timeline(word, value)
        attachment.ring()

    def alloc_done_word(self) -> int:
        """A word that the daemon sets (DoneWord). RESOURCE_EXHAUSTED NO_WORD."""
        attachment = self._current().attachment
        with self._lock:
            word = _first_free(self._done_used, attachment.words.done_words)
            attachment.words.set_done(word, 0)
        return word

    def free_done_word(self, word: int) -> None:
        with self._lock:
            self._done_used.discard(word)

    def done_value(self, word: int) -> int:
        """The value of a done word; 0 while not attached."""
        with self._lock:
            connection = self._connection
        return 0 if connection is None else connection.attachment.words.done(word)

    def register_words_with_device(self, device: int = 0) -> None:
        """Registers the words with CUDA, for streams of one device, also after later restarts. May
        be repeated. Blocks. WORDS_REGISTERED for another device; errors of the driver."""
        self._pools.register_words(self._current().attachment, device)

    def signal_on_stream(self, stream: int, word: int, value: int) -> None:
        """`stream`, a cudaStream_t (torch: `stream.cuda_stream`), sets the timeline word when it
        gets there. WORDS_NOT_REGISTERED, STREAM_WORDS_UNSUPPORTED."""
        self._pools.device_words(self._current().attachment).write(stream, word, value)

    def wait_on_stream(self, stream: int, done_word: int, value: int) -> None:
        """`stream` waits until the done word has reached the value (below 2^63). Never blocks the
        caller; errors as signal_on_stream."""
        self._pools.device_words(self._current().attachment).wait(stream, done_word, value)

    def export_event(self, event: int) -> bytes:
        """The 64 bytes of a cudaEvent_t for Ready.cuda_event, made with the flags interprocess and
        disable-timing. EVENT_NOT_SHAREABLE."""
        self._check_alive()
        return self._pools.gpus().export_event(event)

    # ---- state -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """To a living daemon."""
        return self._connection is not None and not self._closed

    @property
    def draining(self) -> bool:
        """The daemon takes no new transfers."""
        return self._transfers.draining

    @property
    def boot_id(self) -> bytes:
        """The daemon's life; changes when it is restarted."""
        return self._boot_id

    def stats(self) -> ClientStats:
        t = self._transfers
        return ClientStats(
            self._submitter.sent,
            t.accepted,
            t.rejected,
            self._submitter.unanswered,
            t.events,
            t.overflows,
            self._reconnects,
            t.open,
        )

    # ---- within ------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._closed or os.getpid() != self._pid:
            raise not_attached()

    def _current(self) -> Connection:
        self._check_alive()
        with self._lock:
            if self._connection is None:
                raise not_attached()
            return self._connection

    def _call(self, method: str, request: Message, response: type[Response]) -> Response:
        return self._current().call(method, request, response, self._call_timeout)

    def _call_about(
        self, transfer: Transfer, method: str, request: Message, response: type[Response]
    ) -> Response:
        # Behind the operations that are queued for it.
        self._transfers.settle(transfer.handle, time.monotonic() + self._call_timeout)
        return self._call(method, request, response)

    def _begin(
        self, side: Side, key: TransferKey, layout: Optional[LayoutRef]
    ) -> tuple[Transfer, bool]:
        self._check_alive()
        fresh = Transfer(self, next(self._handles), side, key)
        return self._transfers.begin(_encode.transfer_key(side, key, layout), fresh)

    @contextlib.contextmanager
    def _undone_if_raised(self, transfer: Transfer, created: bool) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._transfers.undo(transfer.handle, created)
            if isinstance(error, (TypeError, ValueError)):
                raise invalid("FIELD_VALUE", str(error), "") from error
            raise

    def _on_result(self, handle: int, result: pb.OperationResult) -> None:
        taken = (pb.OPERATION_OUTCOME_ACCEPTED, pb.OPERATION_OUTCOME_EXISTING)
        error = None if result.outcome in taken else decode_error(result.error)
        if self._transfers.answer(handle, error):
            self._notify()

    def _register_host(self, pools: Sequence[Pool]) -> None:
        self._send_host_pools(self._current(), pools)
        self._pools.add(pools)

    def _send_host_pools(self, connection: Connection, pools: Iterable[Pool]) -> None:
        deadline = time.monotonic() + self._call_timeout
        waiting = list(pools)
        for first in range(0, len(waiting), 16):
            some = waiting[first : first + 16]
            connection.attachment.send_pools(
                [PoolDescriptor(p.name, HOST_SHM, p.bytes, p.fd) for p in some], deadline
            )
            request = pb.RegisterPoolsRequest(
                pools=[
                    pb.PoolSpec(name=p.name, kind=pb.POOL_KIND_HOST_SHM, bytes=p.bytes)
                    for p in some
                ]
            )
            connection.call("RegisterPools", request, pb.RegisterPoolsResponse, self._call_timeout)

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

    def _notify(self) -> None:
        if not self._woken:
            self._woken = True
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    def _take_wake_ups(self) -> None:
        if self._woken:
            self._woken = False
            with contextlib.suppress(OSError):
                os.eventfd_read(self._wake)
        connection = self._connection
        if connection is not None:
            connection.attachment.drain_doorbell()

    def _block(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            if self._epoll.poll(min(left, 60.0)):
                self._take_wake_ups()
        return True

    # ---- the watcher -------------------------------------------------------------------------

    def _use(self, connection: Connection) -> None:
        attachment = connection.attachment
        self._epoll.register(attachment.doorbell_fd, select.EPOLLIN)
        self._transfers.attach(attachment)
        with self._lock:
            self._boot_id = attachment.boot_id
            # Conditions of new transfers go on counting where the words stood, whoever set them:
            # this client, or a stream of a GPU.
            for word in self._timeline_used:
                value = self._timeline_values.get(word, 0)
                if self._lost_words is not None and word < self._lost_words.timeline_words:
                    value = max(value, self._lost_words.timeline(word))
                if word < attachment.words.timeline_words:
                    attachment.words.set_timeline(word, value)
            self._lost_words = None
            self._connection = connection
        self._submitter.set_connection(connection)

    def _on_lost(self, connection: Connection) -> None:
        with self._lock:
            self._connection = None
            self._lost_words = connection.attachment.words
            self._ghosts.append(connection)
        self._submitter.set_connection(None)
        with contextlib.suppress(OSError):
            self._epoll.unregister(connection.attachment.doorbell_fd)
        self._transfers.lose()
        self._transfers.announce(EventKind.DAEMON_RESTARTED)
        self._notify()

    def _watch(self) -> None:
        connection = self._connection
        backoff = _FIRST_BACKOFF
        while True:
            searching = connection is None and self._reconnect
            ready = self._watch_once(connection, backoff if searching else None)
            if self._stop in ready:
                return
            if connection is not None and (
                connection.attachment.lifeline_fd in ready
                or connection.attachment.daemon_pidfd in ready
            ):
                self._on_lost(connection)
                connection = None
                backoff = _FIRST_BACKOFF
            elif searching:
                backoff = min(backoff * 2, _LAST_BACKOFF)
                connection, problem = self._reattach()
                if connection is None:
                    continue
                self._reconnects += 1
                self._use(connection)
                self._transfers.announce(EventKind.REATTACHED, problem)
                self._notify()

    def _watch_once(self, connection: Optional[Connection], timeout: Optional[float]) -> set[int]:
        poller = select.poll()
        poller.register(self._stop, select.POLLIN)
        for ghost in self._ghosts:
            poller.register(ghost.attachment.daemon_pidfd, select.POLLIN)
        if connection is not None:
            # Answers on the lifeline are for others to read: only its end is of interest.
            poller.register(connection.attachment.lifeline_fd, select.POLLRDHUP)
            poller.register(connection.attachment.daemon_pidfd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if timeout is None else timeout * 1000)}
        for ghost in [g for g in self._ghosts if g.attachment.daemon_pidfd in ready]:
            ready.discard(ghost.attachment.daemon_pidfd)
            ghost.attachment.words.release_waiters()
            self._transfers.exited(ghost.attachment)
            self._notify()
            with self._lock:
                self._ghosts.remove(ghost)
            ghost.close()
            ghost.attachment.close()
        return ready

    def _reattach(self) -> tuple[Optional[Connection], Optional[KvferryError]]:
        try:
            attachment = Attachment(self._socket, self._name, self._role, self._attach_timeout)
        except KvferryError:
            return None, None
        connection = Connection(attachment)
        try:
            return connection, self._register_again(connection)
        except KvferryError as error:
            # A daemon that goes away meanwhile is tried again; one that refuses is reported.
            if error.code is not Code.UNAVAILABLE:
                return connection, error
            connection.close()
            attachment.close()
            return None, None

    def _register_again(self, connection: Connection) -> Optional[KvferryError]:
        """What could not be registered again is left out and returned; what is raised is the
        daemon's that has gone again."""
        self._send_host_pools(connection, self._pools.host())
        problem = self._pools.register_devices_again(connection)
        with self._lock:
            left_out = self._pools.left_out()
            waiting = dict(self._layouts)
            self._layouts_left_out = {r for r, q in waiting.items() if _uses(q, left_out)}
        for ref, request in waiting.items():
            if ref in self._layouts_left_out:
                continue
            try:
                connection.call(
                    "RegisterLayout", request, pb.RegisterLayoutResponse, self._call_timeout
                )
            except KvferryError as error:
                if error.code is Code.UNAVAILABLE:
                    raise
                problem = problem or error
        return problem

    def _forked(self) -> None:
        # Locks may be held by threads that do not exist here: descriptors only. A child must not
        # keep a dead worker's lifeline open.
        self._closed = True
        connections = list(self._ghosts)
        if self._connection is not None:
            connections.append(self._connection)
        for connection in connections:
            connection.attachment.close()


def _uses(request: pb.RegisterLayoutRequest, pools: set[str]) -> bool:
    return any(pool.name in pools for pool in request.layout.pools)


def _pool_exists() -> KvferryError:
    return KvferryError(Code.ALREADY_EXISTS, "POOL_EXISTS", "a pool of this name exists", "name")


def _first_free(used: set[int], count: int) -> int:
    for word in range(count):
        if word not in used:
            used.add(word)
            return word
    raise KvferryError(Code.RESOURCE_EXHAUSTED, "NO_WORD", "all words are in use")


def _close_in_child() -> None:
    for client in list(_clients):
        client._forked()


os.register_at_fork(after_in_child=_close_in_child)
