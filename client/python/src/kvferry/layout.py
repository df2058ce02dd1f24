"""How a rank's KV memory lies in its pools, and helpers that take it from tensors.

address(block, unit, token) = pool base + offset + block * block_stride
                            + (unit - unit_begin) * unit_stride + token * token_stride
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from kvferry.errors import invalid


class Granularity(enum.IntEnum):
    """How many cells a plane has."""

    TOKEN = 1  # one cell a unit and token
    BLOCK = 2  # one cell a unit and block (block scales)
    REQUEST = 3  # one cell a unit and transfer (recurrent state)


class Tail(enum.IntEnum):
    """What happens to the cells of a moved block at or past the prompt's end."""

    LEAVE = 1
    ZERO = 2


class KvPacking(enum.Enum):
    """Where K and V of one token and head lie. Two attention backends may share shape and strides
    and differ in this, so it is stated, never guessed."""

    SEPARATE = "separate"  # K and V apart: two tensors, or an axis of 2
    PER_TOKEN = "per_token"  # [block, head, token, K|V] (or token before head)
    PER_HEAD_BLOCK = "per_head_block"  # [block, head, K of all tokens | V of all tokens]
    HEAD_AXIS = "head_axis"  # [block, K heads then V heads, token, dim]


@dataclass
class Plane:
    """One role of one layer; offsets and strides are bytes. See layout.proto."""

    layer: int
    role: str
    cell_bytes: int
    type: str
    offset: int
    block_stride: int
    unit_stride: int = 0
    token_stride: int = 0
    units_total: int = 1
    unit_begin: int = 0
    unit_count: int = 1
    granularity: Granularity = Granularity.TOKEN
    optional: bool = False
    order: str = ""
    pool: int = 0


@dataclass
class Group:
    """Planes that share one block list per transfer, one block size and one attention window."""

    tokens_per_block: int
    block_count: int
    planes: list[Plane] = field(default_factory=list)
    sliding_window: int = 0  # tokens; 0: none
    cp_size: int = 1
    cp_index: int = 0
    cp_interleave: int = 0  # tokens; 0: tokens_per_block
    tail: Tail = Tail.LEAVE
    id_space: int = 0
    blocks_per_id: int = 1


@dataclass(frozen=True)
class PoolSpan:
    """A registered pool as a layout uses it."""

    name: str
    bytes: int


@dataclass
class Layout:
    """A rank's whole layout. `fingerprint`: model, revision, quantisation; equal on both sides."""

    fingerprint: Union[str, bytes]
    rank: int = 0
    rank_count: int = 1
    dp_group: int = 0
    groups: list[Group] = field(default_factory=list)
    pools: list[PoolSpan] = field(default_factory=list)

    @property
    def fingerprint_bytes(self) -> bytes:
        if isinstance(self.fingerprint, str):
            return self.fingerprint.encode()
        return self.fingerprint


# ---- tensors -------------------------------------------------------------------------------------

_TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "uint8": "u8",
    "int8": "i8",
}


@dataclass(frozen=True)
class TensorView:
    """What a layout needs of a NumPy array or torch tensor: an address in this process or on a GPU,
    strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    type: str

    @classmethod
    def of(cls, tensor: Any) -> TensorView:
        """INVALID_ARGUMENT NOT_A_TENSOR for what is neither."""
        name = str(tensor.dtype).replace("torch.", "") if hasattr(tensor, "dtype") else ""
        if hasattr(tensor, "data_ptr"):
            size = tensor.element_size()
            strides = tuple(s * size for s in tensor.stride())
            address = tensor.data_ptr()
        elif hasattr(tensor, "__array_interface__"):
            size = tensor.dtype.itemsize
            strides = tuple(tensor.strides)
            address = tensor.__array_interface__["data"][0]
        else:
            raise invalid("NOT_A_TENSOR", f"{type(tensor).__name__} is no tensor", "tensors")
        if not tensor.shape or min(tensor.shape) < 1 or min(strides) < 0:
            raise invalid("LAYOUT_SHAPE", "empty, or strides below zero", "tensors")
        return cls(address, tuple(tensor.shape), strides, size, _TYPES.get(name, name))

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        return last + self.itemsize


PoolFinder = Callable[[int, int], tuple[PoolSpan, int]]
"""(address, bytes) -> the registered pool that holds them, and the offset in it."""


def infer_axes(
    shape: Sequence[int],
    *,
    kv_packing: KvPacking,
    heads: int,
    tokens_per_block: int,
    block_count: Optional[int] = None,
    layers: Optional[int] = None,
    kv_axis: bool = True,
) -> str:
    """Names the axes of a KV tensor by their sizes, one letter each: b block, h head, n token, k
    key and value, l layer, d the elements of a head, which come last.

    Raises INVALID_ARGUMENT LAYOUT_SHAPE where nothing fits, and LAYOUT_AMBIGUOUS where more than
    one reading does (as with as many heads as tokens in a block): then the caller states the axes.
    """
    sizes: dict[str, Optional[int]] = {"b": block_count, "n": tokens_per_block}
    sizes["h"] = heads * (2 if kv_packing is KvPacking.HEAD_AXIS else 1)
    if kv_packing is KvPacking.SEPARATE and kv_axis:
        sizes["k"] = 2
    if layers is not None:
        sizes["l"] = layers
    outer = tuple(shape[:-1])
    readings = []
    # A tensor of one head may have no axis for it.
    letters = [tuple(sizes)] + ([tuple(s for s in sizes if s != "h")] if sizes["h"] == 1 else [])
    for names in letters:
        if len(names) != len(outer):
            continue
        for order in itertools.permutations(names):
            if all(sizes[a] is None or sizes[a] == n for a, n in zip(order, outer)):
                readings.append("".join(order) + "d")
    if len(readings) == 1:
        return readings[0]
    expected = ", ".join(f"{a}={'any' if n is None else n}" for a, n in sizes.items())
    if not readings:
        raise invalid(
            "LAYOUT_SHAPE", f"{tuple(shape)} has no axes of {expected}, then d", "tensors"
        )
    raise invalid(
        "LAYOUT_AMBIGUOUS",
        f"{tuple(shape)} may be {' or '.join(sorted(readings))}: state the axes",
        "axes",
    )


class LayoutBuilder:
    """Makes a layout from tensors that lie in registered pools. Not thread-safe.

    Shapes and strides are taken from the tensors, so that views, permuted ones too, are what they
    are; how K and V are packed, which heads of the model a rank holds, and the block size are
    stated.
    """

    def __init__(
        self,
        find_pool: PoolFinder,
        fingerprint: Union[str, bytes],
        *,
        rank: int = 0,
        rank_count: int = 1,
        dp_group: int = 0,
    ) -> None:
        self._find_pool = find_pool
        self.layout = Layout(fingerprint, rank, rank_count, dp_group)

    def add_attention(
        self,
        tensors: Union[Mapping[int, Any], Any],
        *,
        kv_packing: KvPacking,
        tokens_per_block: int,
        heads: int,
        heads_total: Optional[int] = None,
        head_begin: int = 0,
        axes: Optional[str] = None,
        layers: Optional[Sequence[int]] = None,
        block_count: Optional[int] = None,
        type: Optional[str] = None,
        **group: Any,
    ) -> Group:
        """Adds a group of attention heads.

        `tensors`: layer number -> tensor, or -> (K, V); or one tensor of all `layers` with an axis
        for them. `heads`: those of this rank, of `heads_total` (all by default) from `head_begin`
        on. `axes`: as infer_axes() names them, where sizes do not tell. `type`: the element type,
        where the tensor's dtype does not tell (fp8 in uint8). `group`: further fields of Group.

        INVALID_ARGUMENT LAYOUT_SHAPE, LAYOUT_AMBIGUOUS, KV_PACKING, POINTER_NOT_IN_POOL.
        """
        planes: list[Plane] = []
        counts: set[int] = set()
        for layer, tensor in _layers(tensors, layers):
            pair = isinstance(tensor, tuple)
            views = [TensorView.of(t) for t in (tensor if pair else (tensor,))]
            if pair and (len(views) != 2 or kv_packing is not KvPacking.SEPARATE):
                raise invalid("KV_PACKING", "two tensors mean K and V apart", "kv_packing")
            for i, view in enumerate(views):
                names = axes or infer_axes(
                    view.shape,
                    kv_packing=kv_packing,
                    heads=heads,
                    tokens_per_block=tokens_per_block,
                    block_count=block_count,
                    layers=len(layer) if isinstance(layer, list) else None,
                    kv_axis=not pair,
                )
                role = ("key", "value")[i] if pair else None
                planes += self._planes(view, names, layer, kv_packing, heads, role)
                counts.add(view.shape[names.index("b")])
        if len(counts) != 1:
            raise invalid("LAYOUT_SHAPE", "tensors of a group have as many blocks each", "tensors")
        for plane in planes:
            plane.units_total = heads if heads_total is None else heads_total
            plane.unit_begin = head_begin
            plane.unit_count = heads
            plane.type = type or plane.type
        out = Group(tokens_per_block, counts.pop(), planes, **group)
        self.layout.groups.append(out)
        return out

    def add_latent(
        self,
        tensors: Mapping[int, Any],
        *,
        tokens_per_block: int,
        role: str = "latent",
        type: Optional[str] = None,
        **group: Any,
    ) -> Group:
        """Adds a group that is not sharded, such as the latent of MLA: layer number -> tensor
        [blocks, tokens, elements], axes of size 1 besides are ignored."""
        planes = []
        counts: set[int] = set()
        for layer, tensor in tensors.items():
            view = TensorView.of(tensor)
            keep = [i for i, n in enumerate(view.shape[:-1]) if n != 1 or i == 0]
            if tokens_per_block == 1 and len(keep) == 1:
                keep.append(1)
            if (
                len(keep) != 2
                or view.shape[keep[1]] != tokens_per_block
                or view.strides[-1] != view.itemsize
            ):
                raise invalid(
                    "LAYOUT_SHAPE",
                    f"{view.shape} is not [blocks, {tokens_per_block}, elements]",
                    "tensors",
                )
            pool, offset = self._pool(view)
            counts.add(view.shape[0])
            planes.append(
                Plane(
                    layer=layer,
                    role=role,
                    cell_bytes=view.shape[-1] * view.itemsize,
                    type=type or view.type,
                    offset=offset,
                    block_stride=view.strides[keep[0]],
                    token_stride=view.strides[keep[1]],
                    pool=pool,
                )
            )
        if len(counts) != 1:
            raise invalid("LAYOUT_SHAPE", "tensors of a group have as many blocks each", "tensors")
        out = Group(tokens_per_block, counts.pop(), planes, **group)
        self.layout.groups.append(out)
        return out

    def add_group(self, group: Group) -> Group:
        """Adds one that was made by hand; its planes name pools by add_pool()'s numbers."""
        self.layout.groups.append(group)
        return group

    def add_pool(self, pool: PoolSpan) -> int:
        """The number of a pool in this layout."""
        if pool not in self.layout.pools:
            self.layout.pools.append(pool)
        return self.layout.pools.index(pool)

    def _pool(self, view: TensorView) -> tuple[int, int]:
        span, offset = self._find_pool(view.address, view.span)
        return self.add_pool(span), offset

    def _planes(
        self,
        view: TensorView,
        axes: str,
        layer: Union[int, list[int]],
        packing: KvPacking,
        heads: int,
        role: Optional[str],
    ) -> list[Plane]:
        if len(axes) != len(view.shape) or len(set(axes)) != len(axes) or axes[-1:] != "d":
            raise invalid("AXES", f"{axes!r} does not name the axes of {view.shape}", "axes")
        if view.strides[-1] != view.itemsize:
            raise invalid("LAYOUT_SHAPE", "a head's elements must lie together", "tensors")
        stride = dict(zip(axes, view.strides))
        size = dict(zip(axes, view.shape))
        if "b" not in axes or "n" not in axes:
            raise invalid("AXES", f"{axes!r} lacks blocks or tokens", "axes")
        pool, offset = self._pool(view)
        cell = size["d"] * view.itemsize
        token = stride["n"]
        value = stride.get("k", 0)
        if packing in (KvPacking.PER_TOKEN, KvPacking.PER_HEAD_BLOCK):
            if size["d"] % 2:
                raise invalid("KV_PACKING", "K and V of a token have one size", "kv_packing")
            if packing is KvPacking.PER_HEAD_BLOCK and token != cell:
                raise invalid(
                    "KV_PACKING", "a head's block must lie together for per_head_block", "tensors"
                )
            cell //= 2
            value = cell
        if packing is KvPacking.PER_HEAD_BLOCK:
            value = size["n"] * cell
            token = cell
        if packing is KvPacking.HEAD_AXIS:
            if "h" not in axes:
                raise invalid("AXES", f"{axes!r} lacks heads", "axes")
            value = heads * stride["h"]
        if packing is KvPacking.SEPARATE and role is None and "k" not in axes:
            raise invalid("AXES", f"{axes!r} lacks the axis of key and value", "axes")
        roles = [(role, 0)] if role is not None else [("key", 0), ("value", value)]
        numbers = layer if isinstance(layer, list) else [layer]
        return [
            Plane(
                layer=number,
                role=name,
                cell_bytes=cell,
                type=view.type,
                offset=offset + i * stride.get("l", 0) + shift,
                block_stride=stride["b"],
                unit_stride=stride.get("h", cell),
                token_stride=token,
                pool=pool,
            )
            for i, number in enumerate(numbers)
            for name, shift in roles
        ]


def _layers(
    tensors: Union[Mapping[int, Any], Any], layers: Optional[Sequence[int]]
) -> Iterable[tuple[Union[int, list[int]], Any]]:
    if isinstance(tensors, Mapping):
        if not tensors:
            raise invalid("LAYOUT_SHAPE", "no layers", "tensors")
        return list(tensors.items())
    if not layers:
        raise invalid("LAYOUT_SHAPE", "one tensor for all layers needs their numbers", "layers")
    return [(list(layers), tensors)]
