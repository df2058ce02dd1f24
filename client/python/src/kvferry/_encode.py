"""The only place that knows both the public types and protobuf messages."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Optional, Union

import numpy as np

from kvferry.errors import invalid
from kvferry.layout import Layout
from kvferry.types import (
    BlockIds,
    DoneWord,
    GroupBlocks,
    LayoutRef,
    PromptHashes,
    Ready,
    Side,
    TransferKey,
)
from kvferry.v1 import layout_pb2
from kvferry.v1 import worker_pb2 as pb

MAX_AUX_BYTES = 64 * 1024
_MAX_MS = 0xFFFFFFFF

Blocks = Union[GroupBlocks, Iterable[GroupBlocks]]


def milliseconds(seconds: float, field: str) -> int:
    """Longer ones than fit mean "as long as the daemon allows"; 0 its default."""
    if seconds < 0:
        raise invalid("NEGATIVE_TIME", "a time cannot be negative", field)
    if seconds == 0:
        return 0
    return int(min(max(1.0, seconds * 1000), _MAX_MS))


def id_bytes(ids: BlockIds, field: str) -> bytes:
    """Little-endian int32, which is what every platform here has in memory."""
    if isinstance(ids, np.ndarray):
        if ids.dtype != np.int32:
            if ids.dtype.kind not in "iu":
                raise invalid("BLOCK_IDS", "block ids are integers", field)
            narrow = ids.astype(np.int32)
            if not np.array_equal(narrow, ids):
                raise invalid("BLOCK_IDS", "a block id does not fit 32 bits", field)
            ids = narrow
        if ids.ndim != 1:
            raise invalid("BLOCK_IDS", "block ids are a list", field)
        return ids.tobytes()
    try:
        return array("i", ids).tobytes()
    except (OverflowError, TypeError) as error:
        raise invalid("BLOCK_IDS", str(error), field) from None


def groups_of(blocks: Blocks) -> tuple[list[pb.GroupBlocks], int]:
    """The messages, and about their size in bytes."""
    out = []
    size = 256
    for i, group in enumerate([blocks] if isinstance(blocks, GroupBlocks) else blocks):
        ids = id_bytes(group.ids, f"groups[{i}].ids")
        message = pb.GroupBlocks(
            group=group.group,
            first_block=group.first_block,
            block_ids=ids,
            cached_tokens=group.cached_tokens,
        )
        if group.tokens is not None:
            message.tokens.begin, message.tokens.end = group.tokens
        out.append(message)
        size += len(ids) + 64
    return out, size


def transfer_ref(key: TransferKey) -> pb.TransferRef:
    return pb.TransferRef(
        instance=key.instance,
        incarnation=key.incarnation or b"",
        transfer_id=key.id_bytes,
        secret=key.secret,
    )


def layout_ref(layout: Optional[LayoutRef]) -> Optional[pb.LayoutRef]:
    return None if layout is None else pb.LayoutRef(instance=layout.instance, rank=layout.rank)


def ready_of(ready: Optional[Ready]) -> pb.ReadyCondition:
    if ready is not None and ready.event_handle is not None:
        return pb.ReadyCondition(
            cuda_ipc_event=pb.ReadyCondition.CudaIpcEvent(handle=ready.event_handle)
        )
    if ready is not None and ready.word is not None:
        return pb.ReadyCondition(
            timeline=pb.ReadyCondition.Timeline(word=ready.word, value=ready.value)
        )
    return pb.ReadyCondition(host_synced=pb.ReadyCondition.HostSynced())


def done_of(done: Optional[DoneWord]) -> Optional[pb.DoneWord]:
    return None if done is None else pb.DoneWord(word=done.word, value=done.value)


def hashes_of(hashes: Sequence[PromptHashes]) -> tuple[list[pb.PromptHashes], int]:
    out = [pb.PromptHashes(group=h.group, hashes=h.hashes) for h in hashes]
    return out, sum(8 + len(value) for h in hashes for value in h.hashes)


def layout_message(layout: Layout) -> layout_pb2.RankLayout:
    out = layout_pb2.RankLayout(
        topology=layout_pb2.Topology(
            rank=layout.rank, rank_count=layout.rank_count, dp_group=layout.dp_group
        ),
        fingerprint=layout.fingerprint_bytes,
        pools=[layout_pb2.PoolSpan(name=p.name, bytes=p.bytes) for p in layout.pools],
    )
    for group in layout.groups:
        to = out.groups.add(
            tokens_per_block=group.tokens_per_block,
            sliding_window_tokens=group.sliding_window,
            cp_size=group.cp_size,
            cp_index=group.cp_index,
            cp_interleave_tokens=group.cp_interleave,
            tail=layout_pb2.Tail.Name(group.tail),
            block_count=group.block_count,
            id_space=group.id_space,
            blocks_per_id=group.blocks_per_id,
        )
        for plane in group.planes:
            to.planes.add(
                layer=plane.layer,
                role=plane.role,
                units_total=plane.units_total,
                unit_begin=plane.unit_begin,
                unit_count=plane.unit_count,
                granularity=layout_pb2.Granularity.Name(plane.granularity),
                cell_bytes=plane.cell_bytes,
                type=plane.type,
                optional=plane.optional,
                order=plane.order,
                pool=plane.pool,
                offset_bytes=plane.offset,
                block_stride_bytes=plane.block_stride,
                unit_stride_bytes=plane.unit_stride,
                token_stride_bytes=plane.token_stride,
            )
    return out


def transfer_key(side: Side, key: TransferKey, layout: Optional[LayoutRef]) -> bytes:
    """What makes two operations ones on the same transfer."""
    parts = [
        key.instance.encode(),
        key.id_bytes,
        key.secret,
        key.incarnation or b"",
        b"" if layout is None else layout.instance.encode(),
    ]
    head = struct.pack("=BI", side, 0 if layout is None else layout.rank)
    return head + b"".join(struct.pack("=I", len(part)) + part for part in parts)
