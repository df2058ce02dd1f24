"""SGLang's description of its KV cache as a layout."""

from __future__ import annotations

from typing import Any

from kvferry._rank import Rank, heads_of
from kvferry.errors import KvferryError
from kvferry.layout import Group, LayoutBuilder, Plane, PoolSpan
from kvferry.sglang._config import Settings


def build(rank: Rank, settings: Settings, args: Any, is_mla: bool) -> LayoutBuilder:
    """`args`: KVArgs. Buffers that no pool holds are handed over. One group: pages of a request
    have the same number in the buffers of all layers. Blocks."""
    _check(args)
    builder = rank.builder()
    count = len(args.kv_data_ptrs)
    # Keys of all layers, then values of all layers; latent caches have one buffer a layer.
    layers = count if is_mla else count // 2
    numbers = list(args.kv_layer_ids) or [
        args.prefill_start_layer + i % layers for i in range(count)
    ]
    heads = 1 if is_mla else args.kv_head_num
    total, begin = (
        (1, 0)
        if is_mla
        else heads_of(
            heads, args.total_kv_head_num, settings.tp_size, settings.rank % settings.tp_size
        )
    )
    planes = []
    for i, (address, size, page) in enumerate(
        zip(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens)
    ):
        if page % (args.page_size * heads):
            raise ValueError(f"kvferry: a page of {page} bytes is not one of {heads} heads")
        token = page // args.page_size  # of all heads: SGLang has tokens before heads
        span, offset = _pool(rank, address, size)
        planes.append(
            Plane(
                layer=numbers[i],
                role="latent" if is_mla else "key" if i < layers else "value",
                cell_bytes=token // heads,
                type=str(args.kv_cache_dtype_str),
                offset=offset,
                block_stride=page,
                unit_stride=token // heads,
                token_stride=token,
                units_total=total,
                unit_begin=begin,
                unit_count=heads,
                pool=builder.add_pool(span),
            )
        )
    blocks = min(size // page for size, page in zip(args.kv_data_lens, args.kv_item_lens))
    builder.add_group(Group(args.page_size, blocks, planes))
    return builder


def _check(args: Any) -> None:
    unsupported = {
        f"state {[str(t.value) for t in args.state_types]}": bool(args.state_types),
        f"the layout {args.kv_layout}": getattr(args, "kv_layout", None) is not None,
        # Its layers have no numbers of the model's that both sides would draw alike.
        "a draft model's KV cache": getattr(args, "num_draft_entries", 0) > 0,
    }
    for what, used in unsupported.items():
        if used:
            raise ValueError(f"kvferry: {what} is not supported yet")


def _pool(rank: Rank, address: int, size: int) -> tuple[PoolSpan, int]:
    try:
        return rank.client.find_pool(address, size)
    except KvferryError as error:
        if error.reason != "POINTER_NOT_IN_POOL":
            raise
    rank.export(address, size)
    return rank.client.find_pool(address, size)
