"""The connector in a worker process: a client of the daemon. Nothing here waits for a transfer; an
engine's step polls shared memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from kvferry._rank import Half, Rank, heads_of
from kvferry.client import Client, Transfer
from kvferry.errors import KvferryError
from kvferry.layout import Group, KvPacking, LayoutBuilder
from kvferry.types import GroupBlocks
from kvferry.vllm._config import Settings
from kvferry.vllm._steps import Coming, Handshake, News, Receive, Send, Step

logger = logging.getLogger("vllm.kvferry")


@dataclass(eq=False)
class _Sending(Half):
    """Its blocks stay vLLM's until `final` and `released`; then it is reported, once."""

    begins: list[int] = field(default_factory=list)  # of each slice, by its index
    position: int = 0  # tokens before it were sent and not taken back
    final: bool = False  # nothing follows


@dataclass(eq=False)
class _Receiving(Half):
    coming: Coming = field(kw_only=True)


class WorkerSide:
    """One thread: the model runner's."""

    def __init__(self, settings: Settings, kv_cache_config: Any, total_kv_heads: int) -> None:
        self._settings = settings
        self._config = kv_cache_config
        self._total_kv_heads = total_kv_heads  # of the model
        self.rank = Rank(settings, logger)
        self._windowed: list[bool] = []
        self._tensors: Optional[dict[str, torch.Tensor]] = None
        self._news = News()
        self._ticket = ""
        self._sendings: dict[str, _Sending] = {}
        self._receivings: dict[str, _Receiving] = {}
        self._claims: dict[str, Transfer] = {}
        self._finished: set[str] = set()

    @property
    def client(self) -> Client:
        return self.rank.client

    # ---- memory and layout -------------------------------------------------------------------

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Blocks until the daemon has checked memory and layout."""
        self._tensors = kv_caches
        self._export_storages(kv_caches)
        builder = self.rank.builder()
        self._windowed = []
        for group in self._config.transfer_groups:
            self._windowed.append(self._add_group(builder, group, kv_caches))
        self.rank.register(builder)
        self._ticket = ""
        device = next(iter(kv_caches.values())).device
        if device.type == "cuda":
            self.rank.use_device(device.index or 0)

    def _export_storages(self, kv_caches: dict[str, torch.Tensor]) -> None:
        # Layers of hybrid models are views of one storage: each goes once.
        known: set[int] = set()
        for tensor in kv_caches.values():
            storage = tensor.untyped_storage()
            if tensor.device.type != "cuda" or storage.data_ptr() in known:
                continue  # host memory is the client's own, or the layout says where it is missing
            known.add(storage.data_ptr())
            self.rank.export(storage.data_ptr(), storage.nbytes())

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
        tp_size = self._settings.tp_size
        total, begin = heads_of(heads, self._total_kv_heads, tp_size, self._settings.rank % tp_size)
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

    def unregister(self) -> None:
        """Before sleep mode takes the memory."""
        self.rank.unregister()

    def restore(self) -> None:
        if self.rank.layout is None and self._tensors is not None:
            self.register(self._tensors)
            self._new_card()

    def _new_card(self) -> None:
        self._ticket = ""
        self._news.cards[self._settings.rank] = self.rank.card

    def handshake(self) -> Optional[Handshake]:
        if self.rank.layout is None:
            return None
        self._ticket = self.rank.ticket()
        return Handshake(self._settings.rank, self.rank.card, self._ticket)

    def news(self) -> Optional[News]:
        """What the scheduler's side has to know after this step."""
        if not self._ticket and self._settings.rank == 0 and self.rank.layout is not None:
            # It was not complete yet.
            self._ticket = self._news.ticket = self.rank.ticket()
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
                    logger.warning("kvferry: revoke failed (%s); the transfer is given up", error)
                    # The blocks are about to be overwritten: there is nothing else to do.
                    self.rank.settle(sending, self._settings.receive_deadline)
                continue
            # Tokens before the first that was taken back are gathered: they count as sent.
            begins = [sending.begins[index] for index in dropped]
            sending.position = min([sending.position, *begins])

    def start(self, step: Step) -> None:
        """What does not depend on this step's forward; loads write after all that is queued."""
        if step.join is not None and self._settings.rank == 0:
            self.rank.join(step.join)
        for coming in step.claims:
            self._claim(coming)
        for coming in step.declines:
            self._decline(coming)
        for request_id in step.given_up:
            receiving = self._receivings.get(request_id)
            if receiving is not None:
                self.rank.cancel(receiving)
        for receive in step.receives:
            self._receive(receive)

    def finish(self, step: Step) -> None:
        """After this step's forward was launched."""
        for send in step.sends:
            self._send(send)
        for request_id in step.taken_back:
            sending = self._sendings.setdefault(request_id, _Sending(request_id))
            sending.final = True
            if sending.transfer is None:
                sending.released = True
            self.rank.cancel(sending)

    def _claim(self, coming: Coming) -> None:
        try:
            transfer = self.client.claim(coming.key, self.rank.layout, coming.ticket)
            self._claims[coming.request_id] = transfer
        except KvferryError as error:  # the load will say what is wrong
            logger.warning("kvferry: %s: claim: %s", coming.request_id, error)

    def _decline(self, coming: Coming) -> None:
        try:
            self.client.decline(coming.key, self.rank.layout, coming.ticket)
        except KvferryError as error:  # its lease ends by itself
            logger.warning("kvferry: %s: decline: %s", coming.request_id, error)
        self._claims.pop(coming.request_id, None)

    def _receive(self, receive: Receive) -> None:
        coming = Coming(receive.request_id, receive.key, receive.ticket)
        receiving = _Receiving(receive.request_id, coming=coming)
        self._receivings[receive.request_id] = receiving
        assert self.rank.layout is not None
        try:
            transfer = self.client.receive(
                receive.key,
                self.rank.layout,
                receive.ticket,
                [
                    GroupBlocks(table, group, cached_tokens=receive.cached)
                    for group, table in enumerate(receive.tables)
                ],
                num_tokens=receive.num_tokens,
                ready=self.rank.ready(),
                wait=self._settings.receive_wait,
                deadline=self._settings.receive_deadline,
            )
        except KvferryError as error:
            logger.warning("kvferry: %s: receive: %s", receive.request_id, error)
            receiving.give_up(error.reason)
            receiving.refused = True
            return
        self._claims.pop(receive.request_id, None)
        self.rank.follow(receiving, transfer)

    def _send(self, send: Send) -> None:
        sending = self._sendings.setdefault(send.request_id, _Sending(send.request_id))
        sending.final = sending.final or send.last
        if sending.released or (send.end <= sending.position and not send.last):
            return
        assert self.rank.layout is not None
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
                self.rank.layout,
                groups,
                num_tokens=send.num_tokens,
                tokens=(begin, send.end),
                index=len(sending.begins),
                last=send.last,
                ready=self.rank.ready(),
                lease=self._settings.lease,
            )
        except KvferryError as error:
            logger.warning("kvferry: %s: send: %s", send.request_id, error)
            if sending.transfer is None:
                sending.give_up(error.reason)
            self.rank.cancel(sending)
            return
        self.rank.follow(sending, transfer)
        sending.begins.append(0 if send.last and any(self._windowed) else begin)
        sending.position = send.end

    # ---- results -----------------------------------------------------------------------------

    def results(self, finished: set[str]) -> tuple[set[str], set[str], set[str]]:
        """Sent, received and failed among these; each request once. No call is made but those
        of Rank.poll()."""
        self._finished |= finished & self._sendings.keys()
        if self.rank.poll():
            self._new_card()
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
            receiving = self._receivings.pop(request_id)
            if receiving.refused:
                # It is not tried again: the sender need not keep its blocks, as a claim has it do.
                self._decline(receiving.coming)
        self._finished -= sent
        return sent, received, failed

    def close(self) -> None:
        self.rank.close()


def _layer_number(name: str) -> int:
    """vLLM's rule: the one number among the parts of a layer's name."""
    numbers = [int(part) for part in name.split(".") if re.fullmatch(r"\d+", part)]
    if len(numbers) != 1:
        raise ValueError(f"kvferry: layer name {name!r} has not one number")
    return numbers[0]


def handshakes_of(metadata: Mapping[Any, Any]) -> dict[Any, Handshake]:
    return {key: value for key, value in metadata.items() if isinstance(value, Handshake)}
