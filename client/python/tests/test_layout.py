from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kvferry as kv
from kvferry.layout import LayoutBuilder, TensorView

HEADS, TOKENS, DIM, BLOCKS = 3, 4, 6, 5


def builder(pool: NDArray[Any]) -> LayoutBuilder:
    view = TensorView.of(pool)

    def find(address: int, size: int) -> tuple[kv.PoolSpan, int]:
        offset = address - view.address
        assert offset >= 0
        assert offset + size <= pool.nbytes
        return kv.PoolSpan("kv", pool.nbytes), offset

    return LayoutBuilder(find, "model")


def cell(pool: NDArray[Any], plane: kv.Plane, block: int, unit: int, token: int) -> NDArray[Any]:
    at = (
        plane.offset
        + block * plane.block_stride
        + unit * plane.unit_stride
        + token * plane.token_stride
    )
    raw = pool.reshape(-1).view(np.uint8)[at : at + plane.cell_bytes]
    return raw.view(pool.dtype)


def check(
    pool: NDArray[Any], group: kv.Group, key: NDArray[Any], value: NDArray[Any], layer: int = 0
) -> None:
    """Key and value: [blocks, heads, tokens, dim] views of the pool."""
    planes = {plane.role: plane for plane in group.planes if plane.layer == layer}
    assert group.block_count == len(key)
    for role, view in (("key", key), ("value", value)):
        for b, h, t in np.ndindex(*view.shape[:3]):
            assert np.array_equal(cell(pool, planes[role], b, h, t), view[b, h, t])


def filled(*shape: int) -> NDArray[Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def add(pool: NDArray[Any], tensors: Any, packing: kv.KvPacking, **more: Any) -> kv.Group:
    return builder(pool).add_attention(
        tensors, kv_packing=packing, tokens_per_block=TOKENS, heads=HEADS, **more
    )


def test_separate_with_the_axis_of_two_outside_or_inside_and_either_order() -> None:
    pool = filled(2, BLOCKS, HEADS, TOKENS, DIM)
    check(pool, add(pool, {0: pool}, kv.KvPacking.SEPARATE), pool[0], pool[1])
    pool = filled(BLOCKS, 2, TOKENS, HEADS, DIM)
    nhd = pool.transpose(0, 1, 3, 2, 4)
    check(pool, add(pool, {0: pool}, kv.KvPacking.SEPARATE), nhd[:, 0], nhd[:, 1])


def test_permuted_views_are_what_their_strides_say() -> None:
    pool = filled(2, BLOCKS, HEADS, TOKENS, DIM)
    logical = pool.transpose(0, 1, 3, 2, 4)  # NHD to look at, HND in memory
    check(pool, add(pool, {0: logical}, kv.KvPacking.SEPARATE), pool[0], pool[1])


def test_pairs_of_tensors_and_layers_in_one_pool() -> None:
    pool = filled(4, BLOCKS, HEADS, TOKENS, DIM)
    group = add(pool, {0: (pool[0], pool[1]), 7: (pool[2], pool[3])}, kv.KvPacking.SEPARATE)
    check(pool, group, pool[0], pool[1])
    check(pool, group, pool[2], pool[3], layer=7)


def test_packed_per_token() -> None:
    pool = filled(BLOCKS, HEADS, TOKENS, 2 * DIM)
    group = add(pool, {0: pool}, kv.KvPacking.PER_TOKEN)
    check(pool, group, pool[..., :DIM], pool[..., DIM:])


def test_packed_per_head_block_differs_from_per_token_in_the_bytes_alone() -> None:
    pool = filled(BLOCKS, HEADS, TOKENS, 2 * DIM)
    group = add(pool, {0: pool}, kv.KvPacking.PER_HEAD_BLOCK)
    halves = pool.reshape(BLOCKS, HEADS, 2, TOKENS, DIM)
    check(pool, group, halves[:, :, 0], halves[:, :, 1])


def test_packed_on_the_head_axis() -> None:
    pool = filled(BLOCKS, 2 * HEADS, TOKENS, DIM)
    group = add(pool, {0: pool}, kv.KvPacking.HEAD_AXIS)
    check(pool, group, pool[:, :HEADS], pool[:, HEADS:])


def test_cross_layer_blocks() -> None:
    pool = filled(BLOCKS, 7, 2, HEADS, TOKENS, DIM)
    group = add(pool, pool, kv.KvPacking.SEPARATE, layers=range(10, 17))
    assert [p.layer for p in group.planes] == [n for n in range(10, 17) for _ in "kv"]
    check(pool, group, pool[:, 3, 0], pool[:, 3, 1], layer=13)


def test_latent() -> None:
    pool = filled(2, BLOCKS, TOKENS, 9)
    group = builder(pool).add_latent({0: pool[0], 1: pool[1]}, tokens_per_block=TOKENS)
    plane = group.planes[1]
    assert (plane.role, plane.units_total, plane.cell_bytes) == ("latent", 1, 36)
    assert np.array_equal(cell(pool, plane, 3, 0, 2), pool[1, 3, 2])


def test_ambiguous_sizes_are_refused_until_the_axes_are_stated() -> None:
    pool = filled(2, BLOCKS, HEADS, TOKENS, DIM)
    square = {"kv_packing": kv.KvPacking.SEPARATE, "tokens_per_block": HEADS, "heads": HEADS}
    tensor = pool[:, :, :, :HEADS]
    with pytest.raises(kv.KvferryError, match="bhn") as raised:
        builder(pool).add_attention({0: tensor}, **square)
    assert (raised.value.reason, raised.value.field) == ("LAYOUT_AMBIGUOUS", "axes")
    group = builder(pool).add_attention({0: tensor}, axes="kbhnd", **square)
    check(pool, group, tensor[0], tensor[1])


@pytest.mark.parametrize(
    ("shape", "packing", "reason"),
    [
        ((BLOCKS, HEADS, TOKENS + 1, DIM), kv.KvPacking.PER_TOKEN, "LAYOUT_SHAPE"),
        ((BLOCKS, HEADS, TOKENS, 7), kv.KvPacking.PER_TOKEN, "KV_PACKING"),
        ((BLOCKS, HEADS, TOKENS, DIM), kv.KvPacking.HEAD_AXIS, "LAYOUT_SHAPE"),
        ((3, BLOCKS, HEADS, TOKENS, DIM), kv.KvPacking.SEPARATE, "LAYOUT_SHAPE"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], packing: kv.KvPacking, reason: str
) -> None:
    pool = filled(*shape)
    with pytest.raises(kv.KvferryError) as raised:
        add(pool, {0: pool}, packing)
    assert raised.value.reason == reason


def test_torch_tensors_are_taken_as_numpy_arrays_are() -> None:
    torch = pytest.importorskip("torch")
    pool = torch.zeros((2, BLOCKS, TOKENS, HEADS, DIM), dtype=torch.bfloat16)
    view = TensorView.of(pool.transpose(2, 3))
    assert view.shape == (2, BLOCKS, HEADS, TOKENS, DIM)
    assert view.strides[2:] == (DIM * 2, HEADS * DIM * 2, 2)
    assert (view.type, view.itemsize, view.span) == ("bf16", 2, pool.numel() * 2)
