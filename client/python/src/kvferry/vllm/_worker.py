"""The connector in a worker process: a client of the daemon. Nothing here waits for a transfer; an
engine's step polls shared memory."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from kvferry.client import Client, Transfer
from kvferry.errors import KvferryError
from kvferry.layout import Group, KvPacking, LayoutBuilder
from kvferry.types import Event, EventKind, GroupBlocks, LayoutRef, Ready, TransferState
from kvferry.vllm._config import Settings
from kvferry.vllm._steps import Coming, Handshake, News, Receive, Send, Step

logger = logging.getLogger("vllm.kvferry")


@dataclass
class _Sending:
    """Its blocks stay vLLM's until `final` and `released`; then it is reported, once."""

    transfer: Optional[Transfer] = None
    begins: list[int] = field(default_factory=list)  # of each slice, by its index
    position: int = 0  # tokens before it were sent and not taken back
    final: bool = False  # nothing follows
    released: bool = False  # no gather reads its blocks, nor will


@dataclass
class _Receiving:
    transfer: Optional[Transfer] = None
    released: bool = False
    ok: bool = False


class WorkerSide:
    """One thread: the model runner's."""

    def __init__(self, settings: Settings, kv_cache_config: Any) -> None:
        self._settings = settings
        self._config = kv_cache_config
        self.client = Client(settings.socket, name=f"{settings.instance}-r{settings.rank}")
        self._layout: Optional[LayoutRef] = None
        self._windowed: list[bool] = []
        self._tensors: Optional[dict[str, torch.Tensor]] = None
        self._device_pools: list[str] = []
        self._news = News()
        self._ticket = ""
        self._word: Optional[int] = None
        self._word_value = 0
        self._sendings: dict[str, _Sending] = {}
        self._receivings: dict[str, _Receiving] = {}
        self._claims: dict[str, Transfer] = {}
        self._by_transfer: dict[Transfer, str] = {}
        self._finished: set[str] = set()

    # ---- memory and layout -------------------------------------------------------------------

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Blocks until the daemon has checked memory and layout."""
        self._tensors = kv_caches
        self._export_storages(kv_caches)
        builder = self.client.layout_builder(
            self._settings.fingerprint,
            rank=self._settings.rank,
            rank_count=self._settings.rank_count,
            dp_group=self._settings.dp_group,
        )
        self._windowed = []
        for group in self._config.transfer_groups:
            self._windowed.append(self._add_group(builder, group, kv_caches))
        self._register_layout(builder)
        device = next(iter(kv_caches.values())).device
        if device.type == "cuda" and self._word is None:
            self.client.register_words_with_device(device.index or 0)
            self._word = self.client.alloc_word()

    def _export_storages(self, kv_caches: dict[str, torch.Tensor]) -> None:
        # Layers of hybrid models are views of one storage: each goes once.
        known: set[int] = set()
        for tensor in kv_caches.values():
            storage = tensor.untyped_storage().data_ptr()
            if tensor.device.type != "cuda" or storage in known:
                continue  # host memory is the client's own, or the layout says where it is missing
            known.add(storage)
            name = f"kv{len(known) - 1}"
            # Without a place for the proof: after a restart it is made between two steps, since
            # what a null block holds is multiplied by masked attention too.
            self.client.export_tensor(name, tensor)
            self._device_pools.append(name)

    def _add_group(
        self, builder: LayoutBuilder, group: Any, kv_caches: dict[str, torch.Tensor]
    ) -> bool:
        """Whether it has a window."""
        out: Optional[Group] = None
        for name in group.layer_names:
            spec = group.kv_cache_spec
            spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)
            one = self._layer(builder, name, spec, kv_caches[name])
            if out is None:
                out = one
            else:
                out.planes += one.planes
        assert out is not None
        out.sliding_window = getattr(group.kv_cache_spec, "sliding_window", None) or 0
        builder.add_group(out)
        return out.sliding_window > 0

    def _layer(self, builder: LayoutBuilder, name: str, spec: Any, tensor: torch.Tensor) -> Group:
        kind = type(spec).__name__
        if not hasattr(spec, "num_kv_heads") or getattr(spec, "state_content_bytes", None):
            raise ValueError(f"kvferry: layer {name}: {kind} is not supported yet")
        # A manager's block may be several of the kernel's, whose ids the daemon expands.
        blocks_per_id = tensor.shape[0] // self._config.num_blocks
        tokens = spec.block_size // blocks_per_id
        layer = _layer_number(name)
        scratch = LayoutBuilder(builder._find_pool, "")
        scratch.layout.pools = builder.layout.pools
        if "MLA" in kind:
            return scratch.add_latent(
                {layer: tensor}, tokens_per_block=tokens, blocks_per_id=blocks_per_id
            )
        packing = self._settings.kv_packing
        if packing is None:
            raise ValueError(
                "kvferry: kv_connector_extra_config lacks kv_packing (per_token for FlashAttention "
                "and FlashInfer, per_head_block for CPU attention): shapes do not tell"
            )
        heads = spec.num_kv_heads
        total, begin = self._heads(heads)
        four = tensor.dim() == 4
        return scratch.add_attention(
            {layer: tensor},
            kv_packing=packing,
            tokens_per_block=tokens,
            heads=heads,
            heads_total=total,
            head_begin=begin,
            axes="bhnd" if four and packing is not KvPacking.SEPARATE else None,
            blocks_per_id=blocks_per_id,
        )

    def _heads(self, heads: int) -> tuple[int, int]:
        """Heads of the model, and the first of this rank's; with more ranks than heads, several
        ranks have the same."""
        tp, tp_rank = self._settings.tp_size, self._settings.rank % self._settings.tp_size
        total = self._settings_total(heads)
        if heads * tp == total:
            return total, heads * tp_rank
        return total, tp_rank * total // tp

    def _settings_total(self, heads: int) -> int:
        return (
            max(self.total_kv_heads, heads)
            if self.total_kv_heads
            else heads * (self._settings.tp_size)
        )

    total_kv_heads: int = 0
    """Of the model; set by the connector."""

    def _register_layout(self, builder: LayoutBuilder) -> None:
        registered = self.client.register_layout(
            self._settings.instance,
            builder.layout,
            incarnation=self._incarnation(),
            instance_key=self._instance_key(),
        )
        self._layout = registered.ref
        self._builder = builder
        self._card = registered.card
        self._ticket = ""

    def _incarnation(self) -> Optional[bytes]:
        # On one node the daemon draws it. vLLM draws an engine id for each start, unless told one.
        if not self._settings.spans_nodes:
            return None
        return hashlib.sha256(f"kvferry {self._settings.instance}".encode()).digest()[:16]

    def _instance_key(self) -> Optional[bytes]:
        path = self._settings.instance_key_file
        if path is None:
            return None
        secret = path.read_bytes()
        return hmac.digest(secret, self._settings.instance.encode(), "sha256")[:16]

    def unregister(self) -> None:
        """Before sleep mode takes the memory."""
        if self._layout is None:
            return
        self.client.unregister_layout(self._layout)
        if self._device_pools:
            self.client.unregister_pools(self._device_pools)
            self._device_pools = []
        self._layout = None

    def restore(self) -> None:
        if self._layout is None and self._tensors is not None:
            self.register(self._tensors)
            self._news.cards[self._settings.rank] = self._card

    def handshake(self) -> Optional[Handshake]:
        if self._layout is None:
            return None
        self._ask_ticket()
        return Handshake(self._settings.rank, self._card, self._ticket)

    def _ask_ticket(self) -> None:
        with contextlib.suppress(KvferryError):  # not complete yet: asked again with the next step
            self._ticket = self.client.ticket(self._settings.instance)

    def news(self) -> Optional[News]:
        """What the scheduler's side has to know after this step."""
        if not self._ticket and self._settings.rank == 0 and self._layout is not None:
            self._ask_ticket()
            self._news.ticket = self._ticket
        news, self._news = self._news, News()
        return news if news.cards or news.ticket else None

    # ---- a step ------------------------------------------------------------------------------

    def before_blocks_go(self, step: Step) -> None:
        """Preemption: returns when nobody reads the blocks of the requests any more."""
        for request_id in step.preempted:
            sending = self._sendings.get(request_id)
            if sending is None or sending.transfer is None or sending.released:
                continue
            try:
                dropped = sending.transfer.revoke(0)
            except KvferryError as error:
                if error.reason not in ("TRANSFER_ENDED", "TRANSFER_UNKNOWN"):
                    self._wait_released(sending, error)
                continue
            # Tokens before the first that was taken back are gathered: they count as sent.
            begins = [sending.begins[index] for index in dropped]
            sending.position = min([sending.position, *begins])

    def _wait_released(self, sending: _Sending, error: KvferryError) -> None:
        assert sending.transfer is not None
        logger.warning("kvferry: revoke failed (%s); the transfer is given up", error)
        with contextlib.suppress(KvferryError):
            sending.transfer.cancel()
        # The blocks are about to be overwritten: there is nothing else to do than to wait.
        sending.transfer.wait(self._settings.receive_deadline)
        sending.released = True

    def start(self, step: Step) -> None:
        """What does not depend on this step's forward; loads write after all that is queued."""
        if step.join is not None and self._settings.rank == 0:
            self._join(step.join)
        for coming in step.claims:
            self._claim(coming)
        for coming in step.declines:
            self._decline(coming)
        for request_id in step.given_up:
            receiving = self._receivings.get(request_id)
            if receiving is not None and receiving.transfer is not None:
                self._cancel(receiving.transfer)
        for receive in step.receives:
            self._receive(receive)

    def finish(self, step: Step) -> None:
        """After this step's forward was launched."""
        for send in step.sends:
            self._send(send)
        for request_id in step.taken_back:
            sending = self._sendings.setdefault(request_id, _Sending())
            sending.final = True
            if sending.transfer is None:
                sending.released = True
            elif not sending.released:
                self._cancel(sending.transfer)

    def _ready(self) -> Optional[Ready]:
        """When what is queued now on the GPU has run; None without one, as the CPU has computed."""
        if self._word is None:
            return None
        stream = torch.cuda.current_stream()
        try:
            self._word_value += 1
            self.client.signal_on_stream(stream.cuda_stream, self._word, self._word_value)
        except KvferryError as error:
            if error.reason != "STREAM_WORDS_UNSUPPORTED":
                raise
            stream.synchronize()
            return None
        return Ready.timeline(self._word, self._word_value)

    def _join(self, cards: list[bytes]) -> None:
        try:
            self.client.join_instance(self._settings.instance, cards, self._instance_key())
        except KvferryError as error:
            logger.error("kvferry: the ranks of this engine cannot be joined: %s", error)

    def _claim(self, coming: Coming) -> None:
        try:
            transfer = self.client.claim(coming.key, self._layout, coming.ticket)
            self._claims[coming.request_id] = transfer
        except KvferryError as error:  # the load will say what is wrong
            logger.warning("kvferry: %s: claim: %s", coming.request_id, error)

    def _decline(self, coming: Coming) -> None:
        try:
            self.client.decline(coming.key, self._layout, coming.ticket)
        except KvferryError as error:  # its lease ends by itself
            logger.warning("kvferry: %s: decline: %s", coming.request_id, error)
        self._claims.pop(coming.request_id, None)

    def _cancel(self, transfer: Transfer) -> None:
        with contextlib.suppress(KvferryError):  # ended meanwhile, or the daemon has
            transfer.cancel()

    def _receive(self, receive: Receive) -> None:
        receiving = self._receivings[receive.request_id] = _Receiving()
        assert self._layout is not None
        try:
            transfer = self.client.receive(
                receive.key,
                self._layout,
                receive.ticket,
                [
                    GroupBlocks(table, group, cached_tokens=receive.cached)
                    for group, table in enumerate(receive.tables)
                ],
                num_tokens=receive.num_tokens,
                ready=self._ready(),
                wait=self._settings.receive_wait,
                deadline=self._settings.receive_deadline,
            )
        except KvferryError as error:
            logger.warning("kvferry: %s: receive: %s", receive.request_id, error)
            receiving.released = True
            return
        self._claims.pop(receive.request_id, None)
        receiving.transfer = transfer
        self._by_transfer[transfer] = receive.request_id

    def _send(self, send: Send) -> None:
        sending = self._sendings.setdefault(send.request_id, _Sending())
        sending.final = sending.final or send.last
        if sending.released or (send.end <= sending.position and not send.last):
            return
        assert self._layout is not None
        begin = min(sending.position, send.end)
        groups = []
        for group, table in enumerate(send.tables):
            if not self._windowed[group]:
                groups.append(GroupBlocks(table, group))
            elif send.last:
                groups.append(GroupBlocks(table, group, tokens=(0, send.end)))
        try:
            transfer = self.client.send(
                send.key,
                self._layout,
                groups,
                num_tokens=send.num_tokens,
                tokens=(begin, send.end),
                index=len(sending.begins),
                last=send.last,
                ready=self._ready(),
                lease=self._settings.lease,
            )
        except KvferryError as error:
            logger.warning("kvferry: %s: send: %s", send.request_id, error)
            if sending.transfer is None:
                sending.released = True
            else:
                self._cancel(sending.transfer)
            return
        sending.transfer = transfer
        sending.begins.append(0 if send.last and any(self._windowed) else begin)
        sending.position = send.end
        self._by_transfer[transfer] = send.request_id

    # ---- results -----------------------------------------------------------------------------

    def results(self, finished: set[str]) -> tuple[set[str], set[str], set[str]]:
        """Sent, received and failed among these; each request once. No call is made but to close
        what has ended."""
        self._finished |= finished & self._sendings.keys()
        while events := self.client.poll():
            for event in events:
                self._take(event)
        sent = {
            request_id
            for request_id in self._finished
            if self._sendings[request_id].final and self._sendings[request_id].released
        }
        received = {r for r, receiving in self._receivings.items() if receiving.released}
        failed = {r for r in received if not self._receivings[r].ok}
        for request_id in sent:
            del self._sendings[request_id]
        for request_id in received:
            del self._receivings[request_id]
        self._finished -= sent
        return sent, received, failed

    def _take(self, event: Event) -> None:
        if event.kind is EventKind.REATTACHED:
            self._reattached(event)
        transfer = event.transfer
        if transfer is None:
            return
        request_id = self._by_transfer.get(transfer, "")
        sending = self._sendings.get(request_id)
        receiving = self._receivings.get(request_id)
        mine = sending if sending is not None and sending.transfer is transfer else receiving
        status = event.status
        if mine is not None and mine.transfer is transfer and status is not None:
            # The status is the page's, and may be ahead of the event that is told first.
            if status.released and not mine.released:
                mine.released = True
                if isinstance(mine, _Receiving):
                    mine.ok = status.state is TransferState.COMPLETED
                    if not mine.ok:
                        logger.warning("kvferry: load of %s: %s", request_id, status.reason)
            elif event.kind is EventKind.REJECTED:
                self._rejected(request_id, mine, event)
        if status is not None and status.state.terminal and status.released:
            self._by_transfer.pop(transfer, None)
            with contextlib.suppress(KvferryError):  # told again with a later event
                transfer.close()

    def _rejected(self, request_id: str, mine: _Sending | _Receiving, event: Event) -> None:
        logger.warning("kvferry: %s: %s", request_id, event.error)
        assert mine.transfer is not None
        if isinstance(mine, _Receiving):
            # Nothing was started by it; a claim of the same request is of no use any more.
            mine.released = True
            self._cancel(mine.transfer)
        elif event.status is not None and event.status.state is TransferState.NONE:
            mine.released = True
        else:
            self._cancel(mine.transfer)  # of earlier slices

    def _reattached(self, event: Event) -> None:
        """A new daemon: cards and ticket are new ones."""
        try:
            if event.error is not None and event.error.reason == "POOLS_LEFT_OUT":
                torch.cuda.synchronize()  # a proof is written into pages
                self.client.restore_pools()
            elif event.error is not None:
                raise event.error
            self._register_layout(self._builder)
            self._news.cards[self._settings.rank] = self._card
        except KvferryError as error:
            logger.error("kvferry: registering with the restarted daemon: %s", error)

    def close(self) -> None:
        self.client.close()


def _layer_number(name: str) -> int:
    """vLLM's rule: the one number among the parts of a layer's name."""
    numbers = [int(part) for part in name.split(".") if re.fullmatch(r"\d+", part)]
    if len(numbers) != 1:
        raise ValueError(f"kvferry: layer name {name!r} has not one number")
    return numbers[0]


def handshakes_of(metadata: Mapping[Any, Any]) -> dict[Any, Handshake]:
    return {key: value for key, value in metadata.items() if isinstance(value, Handshake)}
