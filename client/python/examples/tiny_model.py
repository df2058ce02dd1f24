"""A small transformer with grouped heads and a paged KV cache, on the CPU: random weights of a
fixed seed, sharded over tensor-parallel ranks of one process.

It computes in double precision, so that the order in which ranks are summed changes no token; pages
are single precision, as an engine's are narrower than its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 64
    query_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    hidden: int = 128
    vocabulary: int = 211
    positions: int = 256
    tokens_per_block: int = 8
    blocks: int = 64
    seed: int = 7


@dataclass
class Cache:
    """One rank's pages: of each layer keys and values, as [blocks, heads, tokens, dim] views of
    whatever lies in memory."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def private(cls, config: Config, tp: int) -> Cache:
        shape = (config.blocks, config.kv_heads // tp, config.tokens_per_block, config.head_dim)
        return cls(
            [torch.zeros(shape) for _ in range(config.layers)],
            [torch.zeros(shape) for _ in range(config.layers)],
        )


class Model:
    def __init__(self, config: Config, tp: int) -> None:
        self.config = config
        self.tp = tp
        generator = torch.Generator().manual_seed(config.seed)

        def weight(*shape: int) -> torch.Tensor:
            scale = shape[-2] ** -0.5
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        c = config
        q, kv = c.query_heads * c.head_dim, c.kv_heads * c.head_dim
        self.embedding = weight(c.vocabulary, c.width) * c.vocabulary**0.5
        self.position = weight(c.positions, c.width) * c.positions**0.5
        self.output = weight(c.width, c.vocabulary)
        # Of each layer and rank: columns of what widens, rows of what narrows again.
        self.query = self._columns(weight(c.layers, c.width, q))
        self.key = self._columns(weight(c.layers, c.width, kv))
        self.value = self._columns(weight(c.layers, c.width, kv))
        self.project = self._rows(weight(c.layers, q, c.width))
        self.up = self._columns(weight(c.layers, c.width, c.hidden))
        self.down = self._rows(weight(c.layers, c.hidden, c.width))

    def _columns(self, weight: torch.Tensor) -> list[torch.Tensor]:
        return list(weight.chunk(self.tp, dim=2))

    def _rows(self, weight: torch.Tensor) -> list[torch.Tensor]:
        return list(weight.chunk(self.tp, dim=1))

    def forward(
        self,
        tokens: Sequence[int],
        begin: int,
        table: Sequence[int],
        caches: Sequence[Cache],
        after_layer: Callable[[int], None] = lambda layer: None,
    ) -> int:
        """Runs `tokens`, which stand at `begin` and after in the sequence whose blocks are `table`;
        all before is in the pages. The token that follows. `after_layer(l)` is called when all
        ranks have written layer l's pages."""
        count = len(tokens)
        x = self.embedding[list(tokens)] + self.position[begin : begin + count]
        for layer in range(self.config.layers):
            h = _norm(x)
            x = x + sum(
                self._attend(h, layer, rank, begin, table, caches[rank]) for rank in range(self.tp)
            )
            after_layer(layer)
            h = _norm(x)
            x = x + sum(
                torch.relu(h @ self.up[rank][layer]) @ self.down[rank][layer]
                for rank in range(self.tp)
            )
        return int((_norm(x[-1]) @ self.output).argmax())

    def _attend(
        self,
        h: torch.Tensor,
        layer: int,
        rank: int,
        begin: int,
        table: Sequence[int],
        cache: Cache,
    ) -> torch.Tensor:
        c = self.config
        count, end = len(h), begin + len(h)
        heads, groups = c.kv_heads // self.tp, c.query_heads // c.kv_heads
        query = (h @ self.query[rank][layer]).view(count, heads, groups, c.head_dim)
        key = (h @ self.key[rank][layer]).view(count, heads, c.head_dim)
        value = (h @ self.value[rank][layer]).view(count, heads, c.head_dim)
        at = torch.arange(begin, end)
        pages = torch.tensor(table)
        block, offset = pages[at // c.tokens_per_block], at % c.tokens_per_block
        cache.keys[layer][block, :, offset] = key.float()
        cache.values[layer][block, :, offset] = value.float()
        used = pages[: -(-end // c.tokens_per_block)]
        keys, values = (
            view[used].transpose(0, 1).reshape(heads, -1, c.head_dim)[:, :end].double()
            for view in (cache.keys[layer], cache.values[layer])
        )
        scores = torch.einsum("thgd,hsd->thgs", query, keys) * c.head_dim**-0.5
        hidden = torch.arange(end)[None, :] > at[:, None]
        scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
        mixed = torch.einsum("thgs,hsd->thgd", scores.softmax(dim=-1), values)
        return mixed.reshape(count, -1) @ self.project[rank][layer]

    def generate(
        self, first: int, begin: int, count: int, table: Sequence[int], caches: Sequence[Cache]
    ) -> list[int]:
        """`count` tokens, of which `first`, at position `begin`, is known."""
        out = [first]
        while len(out) < count:
            out.append(self.forward([out[-1]], begin + len(out) - 1, table, caches))
        return out


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


def reference(config: Config, prompt: Sequence[int], count: int) -> list[int]:
    """What a single process generates."""
    model = Model(config, 1)
    table = list(range(config.blocks // 2))
    caches = [Cache.private(config, 1)]
    first = model.forward(prompt, 0, table, caches)
    return model.generate(first, len(prompt), count, table, caches)
