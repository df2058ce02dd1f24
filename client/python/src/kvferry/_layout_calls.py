"""The client's calls about layouts and instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from kvferry import _encode
from kvferry._connection import decode_error
from kvferry._pool_calls import PoolCalls
from kvferry.layout import KvPacking, Layout, LayoutBuilder
from kvferry.types import JoinedInstance, LayoutRef, RegisteredLayout, Resolution
from kvferry.v1 import worker_pb2 as pb


class LayoutCalls(PoolCalls):
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
