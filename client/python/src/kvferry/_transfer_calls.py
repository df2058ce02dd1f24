"""The client's calls about transfers and the node's reuse index."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Optional, cast

from kvferry import _encode
from kvferry._connection import Message, Response
from kvferry._encode import Blocks, milliseconds
from kvferry._event_calls import EventCalls
from kvferry._transfer import Transfer
from kvferry.errors import KvferryError, invalid
from kvferry.types import (
    CancelResult,
    DoneWord,
    GroupCommit,
    LayoutRef,
    PromptHashes,
    Ready,
    ReceiverNeeds,
    ReuseLookup,
    Side,
    TokenRange,
    TransferKey,
    TransferState,
)
from kvferry.v1 import worker_pb2 as pb

if TYPE_CHECKING:
    from kvferry.client import Client


class TransferCalls(EventCalls):
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
        is given up by cancel(). The transfer that claim() returned is closed once the daemon has
        accepted this; a refusal comes as the event REJECTED without a transfer, and the claim
        stays. Never blocks."""
        self._check_alive()
        request = pb.DeclineRequest(
            transfer=_encode.transfer_ref(key),
            layout=_encode.layout_ref(layout),
            ticket=ticket,
        )
        claimed = self._transfers.handle_of(_encode.transfer_key(Side.RECEIVER, key, layout))
        self._submitter.enqueue(pb.Operation(decline=request), claimed, 256)

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
        fresh = Transfer(cast("Client", self), next(self._handles), side, key)
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
