"""SGLang's manager, sender and receiver over a rank's client. SGLang polls them in its scheduling
loop and takes the minimum over the ranks, so it may give pages away that this rank's transfer still
has: whatever it calls before that (abort, clear, failure_exception) returns when nobody touches
them."""

from __future__ import annotations

import ctypes
import hmac
import logging
import threading
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt
import requests
from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll, KVTransferDestination
from sglang.srt.disaggregation.common.conn import (
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
)
from sglang.srt.environ import envs

from kvferry._encode import MAX_AUX_BYTES
from kvferry._rank import Half, Rank
from kvferry.errors import Code, KvferryError
from kvferry.sglang import _layout
from kvferry.sglang._bootstrap import PATH
from kvferry.sglang._config import Settings
from kvferry.types import GroupBlocks, LayoutRef, TransferKey, to_text

logger = logging.getLogger("sglang.kvferry")

_CALL_SECONDS = 5.0
_SETTLE_SECONDS = 60.0  # a copy that runs takes milliseconds
_MALFORMED = (ValueError, KeyError, TypeError)
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 2.0


class KVManager(CommonKVManager):  # type: ignore[misc]
    """One of a rank. `args.kvferry_client`: the client of an engine that allocated its KV cache
    with it, as host memory has to be."""

    def __init__(
        self,
        args: KVArgs,
        disaggregation_mode: Any,
        server_args: Any,
        is_mla_backend: Optional[bool] = False,
    ) -> None:
        self.settings = Settings.of(args, disaggregation_mode.value, server_args)
        self.rank = Rank(self.settings, logger, getattr(args, "kvferry_client", None))
        self._tickets: dict[tuple[str, int], str] = {}
        self._registry_url = ""
        self._stop = threading.Event()
        self._ask_now = threading.Event()
        self._publisher: Optional[threading.Thread] = None
        if sum(args.aux_item_lens) > MAX_AUX_BYTES:
            raise ValueError(
                f"kvferry: {sum(args.aux_item_lens)} bytes of metadata a request; "
                f"{MAX_AUX_BYTES} are possible"
            )
        if envs.SGLANG_MOONCAKE_CUSTOM_MEM_POOL.get() == "INTRA_NODE_NVLINK":
            raise ValueError("kvferry: metadata buffers on a GPU are not supported")
        self.kv_args = args
        self.is_mla_backend = is_mla_backend
        self._register()
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self.server_socket.close()  # ranks talk through their daemons
        if self._registry_url and self.settings.rank == 0:
            self._publisher = threading.Thread(
                target=self._publish, name="kvferry-ticket", daemon=True
            )
            self._publisher.start()

    # ---- the instance ------------------------------------------------------------------------

    def _register(self) -> None:
        args = self.kv_args
        self.rank.register(_layout.build(self.rank, self.settings, args, bool(self.is_mla_backend)))
        if self.rank.on_device:
            self.rank.use_device(args.gpu_id)
        if self.settings.spans_nodes:
            self._join()

    def _join(self) -> None:
        """Collective: all ranks of the server get here."""
        from sglang.srt.runtime_context import get_parallel

        mine = (self.settings.instance, self.settings.rank, self.rank.card)
        everybody = get_parallel().world_group.all_gather_object(mine)
        cards = {rank: card for name, rank, card in everybody if name == self.settings.instance}
        if self.settings.rank == 0:
            self.rank.join([cards[rank] for rank in sorted(cards)])

    def _register_topology_row(self, url: str, payload: dict[str, Any]) -> None:
        super()._register_topology_row(url, payload)
        self._registry_url = url.removesuffix("/route")

    def _publish(self) -> None:
        """Gives the ticket to the registry once all ranks have registered, and again and again: it
        changes when any of them registers anew, and the registry keeps whatever it was told last,
        by whomever, and nothing when it was started again."""
        group = int(self.settings.instance.rpartition("-dp")[2])
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            self._ask_now.clear()
            ticket = self.rank.ticket()
            if ticket:
                proof = to_text(self.settings.mac(f"ticket {group} {ticket}"))
                entry = {"dp_rank": group, "ticket": ticket, "proof": proof}
                try:
                    url = self._registry_url + PATH
                    requests.put(url, json=entry, timeout=_CALL_SECONDS).raise_for_status()
                except requests.RequestException as error:
                    logger.warning("kvferry: the registry does not take the ticket: %s", error)
            if self._ask_now.wait(pause):
                pause = _FIRST_PAUSE
            pause = min(2 * pause, _LAST_PAUSE)

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """SGLang asks again while this is false. Blocks for calls the first time."""
        if not super().try_ensure_parallel_info(bootstrap_addr):
            return False
        try:
            for group in range(self.prefill_info_table[bootstrap_addr].dp_size):
                self.ticket_of(bootstrap_addr, group)
        except OSError as error:
            logger.info("kvferry: no ticket of %s yet: %s", bootstrap_addr, error)
            return False
        except _MALFORMED as error:  # each request will say so
            logger.error("kvferry: ticket of %s: %s", bootstrap_addr, error)
        return True

    def ticket_of(self, bootstrap_addr: str, dp_rank: int) -> str:
        """Of a prefill server's group; blocks for a call the first time. OSError, ValueError."""
        known = self._tickets.get((bootstrap_addr, dp_rank))
        if known is not None:
            return known
        answer = requests.get(
            f"http://{bootstrap_addr}{PATH}", params={"dp_rank": dp_rank}, timeout=_CALL_SECONDS
        )
        answer.raise_for_status()
        entry = answer.json()
        ticket, proof = str(entry["ticket"]), str(entry["proof"])
        if not hmac.compare_digest(
            proof.encode(), to_text(self.settings.mac(f"ticket {dp_rank} {ticket}")).encode()
        ):
            raise ValueError("the ticket's proof is not made with this server's key_file")
        self._tickets[bootstrap_addr, dp_rank] = ticket
        return ticket

    def forget_ticket(self, bootstrap_addr: str, dp_rank: int) -> None:
        """It may be of a server that was started again."""
        self._tickets.pop((bootstrap_addr, dp_rank), None)

    # ---- what senders and receivers share ----------------------------------------------------

    @property
    def layout(self) -> LayoutRef:
        if self.rank.layout is None:
            raise KvferryError(Code.FAILED_PRECONDITION, "UNREGISTERED", "memory is released")
        return self.rank.layout

    def key_of(self, room: int) -> TransferKey:
        """Both sides draw it from the room's number, which a request carries, and the key."""
        return TransferKey(f"room {room}", self.settings.mac(f"room {room}"))

    def look(self) -> None:
        """Takes events: shared memory, no call."""
        if self.rank.poll():
            self._ask_now.set()

    def fail(self, room: int, reason: str) -> None:
        self.record_failure(room, reason)
        self.update_status(room, KVPoll.Failed)

    def settle(self, half: Half) -> None:
        self.rank.settle(half, _SETTLE_SECONDS)

    def aux_row(self, index: Optional[int]) -> bytes:
        return b"".join(ctypes.string_at(address, size) for address, size in self.aux_parts(index))

    def put_aux_row(self, index: Optional[int], aux: bytes) -> None:
        at = 0
        for address, size in self.aux_parts(index):
            ctypes.memmove(address, aux[at : at + size], size)
            at += size

    def aux_parts(self, index: Optional[int]) -> list[tuple[int, int]]:
        if index is None:
            return []
        args = self.kv_args
        return [
            (address + index * size, size)
            for address, size in zip(args.aux_data_ptrs, args.aux_item_lens)
        ]

    # ---- sleep and end -----------------------------------------------------------------------

    def deregister_buffer_to_engine(self) -> None:
        """SGLang's name: before the memory of the KV cache is released."""
        self.rank.unregister()

    def register_buffer_to_engine(self) -> None:
        self._register()
        self._ask_now.set()

    def close(self) -> None:
        self._stop.set()
        self._ask_now.set()
        if self._publisher is not None:
            self._publisher.join()
        self.rank.close()


class KVSender(CommonKVSender):  # type: ignore[misc]
    """States: Bootstrapping until all ranks of the receiver have said what they need; Success when
    the pages are free, as the receiver's copy is in the daemons' hands."""

    _early_send_wait_event: Any

    def __init__(
        self,
        mgr: KVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)
        self._half = Half(f"room {bootstrap_room}")
        # The deadline counts from the receiver's coming, and prefill may wait for its turn then.
        self._lease = float(mgr.bootstrap_timeout)
        self._first_page = 0
        self._slices = 0
        if mgr.check_status(bootstrap_room) == KVPoll.Failed:
            return  # it was sent to another data-parallel group than its receiver will ask
        try:
            transfer = mgr.rank.client.open_send(
                mgr.key_of(bootstrap_room), mgr.layout, lease=self._lease, deadline=2 * self._lease
            )
        except KvferryError as error:
            mgr.fail(bootstrap_room, str(error))
            return
        mgr.rank.follow(self._half, transfer)

    def pop_decode_prefix_len(self) -> int:
        """Tokens that the receiver has. Blocks for a call."""
        begins = []
        try:
            for receiver in self._half.transfer.receiver_needs() if self._half.transfer else ():
                begins += [begin for begin, _ in receiver.groups.get(0, ())]
        except KvferryError as error:
            logger.info("kvferry: room %d: %s", self.bootstrap_room, error)  # told by poll
        prefix = min(begins, default=0)
        self._first_page = prefix // self.kv_mgr.kv_args.page_size
        return prefix

    def send(
        self,
        kv_indices: npt.NDArray[np.int32],
        state_indices: Optional[list[Any]] = None,
        num_kv_tokens: Optional[int] = None,
        indices_event: Optional[Any] = None,
    ) -> None:
        if self.conclude_state is not None or self._half.transfer is None:
            return
        if self._early_send_wait_event is not None:
            # An earlier forward may still write pages of a cached prefix.
            self._early_send_wait_event.synchronize()
            self._early_send_wait_event = None
        mgr = self.kv_mgr
        begin = self._first_page + self.curr_idx
        self.curr_idx += len(kv_indices)
        end = self._first_page + self.curr_idx
        last = self.curr_idx == self.num_kv_indices
        page = mgr.kv_args.page_size
        try:
            mgr.rank.client.send(
                mgr.key_of(self.bootstrap_room),
                mgr.layout,
                GroupBlocks(np.asarray(kv_indices, dtype=np.int32), first_block=begin),
                # Whole pages: neither side is told how many tokens the last one has.
                num_tokens=(self._first_page + self.num_kv_indices) * page,
                tokens=(begin * page, end * page),
                index=self._slices,
                last=last,
                aux=mgr.aux_row(self.aux_index) if last else None,
                ready=mgr.rank.ready(),
                lease=self._lease,
                deadline=2 * self._lease,
            )
        except KvferryError as error:
            mgr.fail(self.bootstrap_room, str(error))
            return
        self._slices += 1
        self._record_transfer_indices(kv_indices, None)

    def poll(self) -> KVPoll:
        self._look()
        return super().poll()

    def poll_pp_consensus(self) -> KVPoll:
        self._look()
        return super().poll_pp_consensus()

    def _look(self) -> None:
        mgr, half, room = self.kv_mgr, self._half, self.bootstrap_room
        if self.conclude_state is not None:
            return
        mgr.look()
        if half.released and half.ok:
            mgr.update_status(room, KVPoll.Success)
        elif half.released and mgr.request_status.get(room) != KVPoll.Failed:
            mgr.fail(room, f"kvferry: {half.reason}")
        elif self._slices:
            mgr.update_status(room, KVPoll.Transferring)
        elif half.receiver_ready:
            mgr.update_status(room, KVPoll.WaitingForInput)

    def abort(self) -> None:
        super().abort()
        self.kv_mgr.settle(self._half)

    def clear(self) -> None:
        self.kv_mgr.settle(self._half)
        super().clear()


class KVReceiver(CommonKVReceiver):  # type: ignore[misc]
    """Success when pages and metadata of this rank are complete."""

    def __init__(
        self, mgr: KVManager, bootstrap_addr: str, bootstrap_room: Optional[int] = None
    ) -> None:
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self._half = Half(f"room {bootstrap_room}", wants_aux=True)
        self._aux_index: Optional[int] = None
        self._ticket = ""

    def _setup_bootstrap_infos(self) -> None:
        """Instead of the addresses of all ranks: the ticket of their group."""
        self.bootstrap_infos: Optional[list[Any]] = None
        try:
            self._ticket = self.kv_mgr.ticket_of(self.bootstrap_addr, self.prefill_dp_rank)
        except (OSError, *_MALFORMED) as error:
            self.kv_mgr.fail(self.bootstrap_room, f"kvferry: no ticket: {error}")
            self.conclude_state = KVPoll.Failed
            return
        self.bootstrap_infos = []

    def send_metadata(
        self,
        kv_indices: npt.NDArray[np.int32],
        aux_index: Optional[int] = None,
        state_indices: Optional[list[Any]] = None,
        decode_prefix_len: Optional[int] = None,
        destination: Union[KVTransferDestination, str] = KVTransferDestination.DEVICE,
        device_kv_indices: Optional[npt.NDArray[np.int32]] = None,
    ) -> None:
        if destination != KVTransferDestination.DEVICE or device_kv_indices is not None:
            raise NotImplementedError("kvferry: pages in host memory are not supported")
        mgr = self.kv_mgr
        page = mgr.kv_args.page_size
        prefix = decode_prefix_len or 0
        self._aux_index = aux_index
        try:
            transfer = mgr.rank.client.receive(
                mgr.key_of(self.bootstrap_room),
                mgr.layout,
                self._ticket,
                GroupBlocks(
                    np.asarray(kv_indices, dtype=np.int32),
                    first_block=prefix // page,
                    cached_tokens=prefix,
                ),
                num_tokens=(prefix // page + len(kv_indices)) * page,
                ready=mgr.rank.ready(),
                wait=float(mgr.waiting_timeout),
                deadline=float(mgr.waiting_timeout),
            )
        except KvferryError as error:
            mgr.fail(self.bootstrap_room, str(error))
            return
        mgr.rank.follow(self._half, transfer)

    def poll(self) -> KVPoll:
        self._look()
        return super().poll()

    def _look(self) -> None:
        mgr, half, room = self.kv_mgr, self._half, self.bootstrap_room
        if self.conclude_state is not None or half.transfer is None:
            return
        mgr.look()
        if not half.released or mgr.request_status.get(room) == KVPoll.Failed:
            return
        expected = sum(size for _, size in mgr.aux_parts(self._aux_index))
        if not half.ok:
            mgr.forget_ticket(self.bootstrap_addr, self.prefill_dp_rank)
            mgr.fail(room, f"kvferry: {half.reason}")
        elif len(half.aux or b"") != expected:
            mgr.fail(room, f"kvferry: the sender's metadata has not {expected} bytes a request")
        else:
            mgr.put_aux_row(self._aux_index, half.aux or b"")
            mgr.update_status(room, KVPoll.Success)

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        """The sender need not wait any longer."""
        mgr = self.kv_mgr
        if self._half.transfer is not None:
            mgr.rank.cancel(self._half)
            return
        try:
            mgr.rank.client.decline(mgr.key_of(self.bootstrap_room), mgr.layout, self._ticket)
        except KvferryError as error:  # it ends by its own timeout
            logger.info("kvferry: room %d: decline: %s", self.bootstrap_room, error)

    def abort(self) -> None:
        super().abort()
        self.kv_mgr.settle(self._half)

    def clear(self) -> None:
        self.kv_mgr.settle(self._half)
        super().clear()
