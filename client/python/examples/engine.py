"""The two engines of the example, each in a process of its own: one prefills and hands over, the
other receives and decodes. What an inference engine does at these moments, and nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from tiny_model import Cache, Config, Model

import kvferry as kv

TIMEOUT = 60.0
FINGERPRINT = "tiny-transformer@seed7"


@dataclass(frozen=True)
class Request:
    """What a router carries: everything here fits an HTTP request."""

    key: kv.TransferKey
    ticket: str
    prompt: list[int]
    generate: int


@dataclass
class Sequence:
    """Blocks of a sequence that is kept, with its tokens, so that its prefix can be used again."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class Engine:
    """Ranks of one engine: each has a client, a pool and a layout of its own."""

    def __init__(self, config: Config, socket: str, instance: str, tp: int, style: str) -> None:
        torch.set_num_threads(1)
        self.config = config
        self.instance = instance
        self.model = Model(config, tp)
        self.free = list(range(config.blocks))
        self.free.reverse()
        self.kept = Sequence()
        self.clients: list[kv.Client] = []
        self.layouts: list[kv.LayoutRef] = []
        self.caches: list[Cache] = []
        # One life of the engine; a key that its ranks share.
        incarnation, instance_key = os.urandom(16), os.urandom(16)
        heads = config.kv_heads // tp
        for rank in range(tp):
            client = kv.Client(socket, name=f"{instance}-rank{rank}")
            tensors, axes, cache = self._pages(client, heads, style)
            layout = client.layout_from_torch(
                tensors,
                axes=axes,
                layers=range(config.layers),
                kv_packing=kv.KvPacking.SEPARATE,
                fingerprint=FINGERPRINT,
                tokens_per_block=config.tokens_per_block,
                heads=heads,
                heads_total=config.kv_heads,
                head_begin=rank * heads,
                rank=rank,
                rank_count=tp,
            )
            registered = client.register_layout(
                instance, layout, incarnation=incarnation, instance_key=instance_key
            )
            self.clients.append(client)
            self.layouts.append(registered.ref)
            self.caches.append(cache)

    def _pages(self, client: kv.Client, heads: int, style: str) -> tuple[object, str, Cache]:
        """The KV tensors of a rank, what their axes are, and the model's view of them."""
        c = self.config
        if style == "cross-layer":  # a block's bytes lie together, heads first
            shape = (c.blocks, c.layers, 2, heads, c.tokens_per_block, c.head_dim)
            pages = client.alloc_tensor("kv", shape, torch.float32)
            keys = [pages[:, layer, 0] for layer in range(c.layers)]
            values = [pages[:, layer, 1] for layer in range(c.layers)]
            return pages, "blkhnd", Cache(keys, values)
        # A tensor of [2, blocks, tokens, heads, dim] for each layer.
        shape = (c.layers, 2, c.blocks, c.tokens_per_block, heads, c.head_dim)
        pages = client.alloc_tensor("kv", shape, torch.float32)
        keys = [pages[layer, 0].transpose(1, 2) for layer in range(c.layers)]
        values = [pages[layer, 1].transpose(1, 2) for layer in range(c.layers)]
        return dict(enumerate(pages)), "kbnhd", Cache(keys, values)

    def ticket(self) -> str:
        return self.clients[0].ticket(self.instance)

    def start(self, prompt: list[int], count: int) -> tuple[Sequence, int]:
        """Blocks for a prompt and `count` more tokens, and how many of its tokens are in them:
        whole blocks of the sequence that was kept, as far as it begins alike."""
        c = self.config
        same = 0
        while same < min(len(prompt) - 1, len(self.kept.tokens)) and (
            prompt[same] == self.kept.tokens[same]
        ):
            same += 1
        shared = same // c.tokens_per_block
        total = -(-(len(prompt) + count) // c.tokens_per_block)
        self.free += self.kept.blocks[shared:]
        blocks = self.kept.blocks[:shared]
        blocks += [self.free.pop() for _ in range(total - shared)]
        self.kept = Sequence()
        return Sequence(prompt, blocks), shared * c.tokens_per_block

    def keep(self, sequence: Sequence) -> None:
        self.kept = sequence

    def drop(self, sequence: Sequence) -> None:
        self.free += sequence.blocks

    def wait_reattached(self) -> None:
        """After the daemon has been restarted: until all ranks are registered again."""
        for client in self.clients:
            for event in client.events(TIMEOUT):
                if event.kind is kv.EventKind.REATTACHED:
                    if event.error is not None:
                        raise event.error
                    break
            else:
                raise TimeoutError("no daemon has come")

    def finish(self, transfers: list[kv.Transfer]) -> None:
        """Waits until the pages of all are ours again; raises what went wrong first."""
        statuses = [transfer.wait(TIMEOUT) for transfer in transfers]
        for transfer in transfers:
            transfer.close()
        for status in statuses:
            status.check()


class Prefill(Engine):
    def run(self, request: Request, chunk: int, pipe: Connection | None) -> None:
        """Prefills and hands over. `chunk` 0: all at once, sent when it is done. Else so many
        tokens at a time, each layer of each chunk being sent as soon as it is computed, while the
        next is. With `pipe`: tells it when a chunk is out, and waits for its word before the next.
        """
        prompt = request.prompt
        sequence, begin = self.start(prompt, 0)
        table = sequence.blocks
        transfers: dict[int, kv.Transfer] = {}
        index = 0

        def offer(begin: int, end: int, layers: tuple[int, int] | None, aux: bytes | None) -> None:
            nonlocal index
            last = aux is not None
            for rank, client in enumerate(self.clients):
                transfers[rank] = client.send(
                    request.key,
                    self.layouts[rank],
                    kv.GroupBlocks(table),
                    num_tokens=len(prompt),
                    tokens=(begin, end),
                    index=index,
                    layers=layers,
                    last=last,
                    aux=aux,
                )
            index += 1

        try:
            if chunk == 0:
                first = self.model.forward(prompt[begin:], begin, table, self.caches)
                # What the prefix cache had is offered too: the receiver may lack it.
                offer(0, len(prompt), None, first.to_bytes(4, "little"))
            else:
                if begin > 0:
                    offer(0, begin, None, None)
                for at in range(begin, len(prompt), chunk):
                    end = min(at + chunk, len(prompt))
                    first = self.model.forward(
                        prompt[at:end],
                        at,
                        table,
                        self.caches,
                        lambda layer, at=at, end=end: offer(at, end, (layer, layer + 1), None),
                    )
                    if pipe is not None:
                        pipe.send("chunk")
                        pipe.recv()
                # Nothing is left but the first token.
                offer(len(prompt), len(prompt), None, first.to_bytes(4, "little"))
        finally:
            try:
                self.finish(list(transfers.values()))
            finally:
                self.keep(sequence)


class Decode(Engine):
    def run(self, request: Request, pipe: Connection | None) -> tuple[list[int], int]:
        """Receives, and generates; the tokens, and how many of the prompt's were here already. With
        `pipe`: tells it when the first slice has come."""
        prompt = request.prompt
        sequence, cached = self.start(prompt, request.generate)
        table = sequence.blocks
        blocks = kv.GroupBlocks(table, cached_tokens=cached)
        transfers = [
            client.receive(
                request.key,
                self.layouts[rank],
                request.ticket,
                blocks,
                num_tokens=len(prompt),
            )
            for rank, client in enumerate(self.clients)
        ]
        if pipe is not None:
            for event in self.clients[0].events(TIMEOUT):
                if event.kind is kv.EventKind.SLICE_RECEIVED:
                    pipe.send("slice")
                    break
        try:
            statuses = [transfer.wait(TIMEOUT) for transfer in transfers]
            for status in statuses:
                status.check()
            first = int.from_bytes(transfers[0].aux(), "little")
        except kv.KvferryError:
            self.drop(sequence)
            raise
        finally:
            for transfer in transfers:
                transfer.close()
        tokens = self.model.generate(first, len(prompt), request.generate, table, self.caches)
        self.keep(sequence)
        return tokens, cached


def serve(kind: str, config: Config, socket: str, tp: int, pipe: Connection) -> None:
    """A process: answers the router's commands until it says stop. Errors go back as they are."""
    engine: Prefill | Decode
    if kind == "prefill":
        engine = Prefill(config, socket, "prefill", tp, "cross-layer")
    else:
        engine = Decode(config, socket, "decode", tp, "layers")
    pipe.send("ready")
    while (command := pipe.recv()) != "stop":
        name, *arguments = command
        watch = pipe if arguments and arguments[-1] else None
        try:
            if name == "ticket":
                pipe.send(engine.ticket())
            elif name == "reattached":
                pipe.send(engine.wait_reattached())
            elif isinstance(engine, Prefill):
                pipe.send(engine.run(arguments[0], arguments[1], watch))
            else:
                pipe.send(engine.run(arguments[0], watch))
        except kv.KvferryError as error:
            pipe.send(error)
    for client in engine.clients:
        client.close()
