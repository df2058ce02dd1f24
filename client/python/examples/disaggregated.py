"""Prefill in one process, decode in another, at different tensor-parallel degrees; the KV cache
goes through two kvferry daemons of this machine. Each generated token is compared with what a
single process generates.

    KVFERRY_BIN_DIR=build/dev/bin python client/python/examples/disaggregated.py [tp2:tp1 ...]
"""

from __future__ import annotations

import multiprocessing
import random
import sys
from multiprocessing.connection import Connection
from typing import Any

from daemons import Pair
from engine import TIMEOUT, Request, serve
from tiny_model import Config, reference

import kvferry as kv

GENERATE = 12
CHUNK = 12  # not a multiple of the block


class Router:
    """Starts the two engines, and carries what they need to know of each other."""

    def __init__(self, pair: Pair, prefill_tp: int, decode_tp: int) -> None:
        self.pair = pair
        self.config = Config()
        self.random = random.Random(11)
        context = multiprocessing.get_context("spawn")
        self.processes = []
        pipes: list[Connection] = []
        for kind, daemon, tp in (
            ("prefill", pair.prefill, prefill_tp),
            ("decode", pair.decode, decode_tp),
        ):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(kind, self.config, daemon.socket, tp, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            pipes.append(mine)
        self.prefill, self.decode = pipes
        for pipe in pipes:
            assert self.answer(pipe) == "ready"

    def answer(self, pipe: Connection) -> Any:
        if not pipe.poll(2 * TIMEOUT):
            raise TimeoutError("an engine does not answer")
        return pipe.recv()

    def close(self) -> None:
        for pipe in (self.prefill, self.decode):
            pipe.send("stop")
        for process in self.processes:
            process.join(TIMEOUT)
            process.kill()

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(self.config.vocabulary) for _ in range(length)]

    def request(self, prompt: list[int]) -> Request:
        self.prefill.send(("ticket",))
        ticket = self.answer(self.prefill)
        key = kv.TransferKey(kv.random_secret(), kv.random_secret(), "prefill")
        return Request(key, ticket, prompt, GENERATE)

    def check(self, title: str, prompt: list[int], chunk: int, prefix: int = 0) -> None:
        """Hands one prompt over and compares. `prefix`: tokens that decode must have already."""
        request = self.request(prompt)
        self.decode.send(("run", request, False))
        self.prefill.send(("run", request, chunk, False))
        for outcome in (sent := self.answer(self.prefill), got := self.answer(self.decode)):
            if isinstance(outcome, kv.KvferryError):
                raise outcome
        assert sent is None
        tokens, cached = got
        expected = reference(self.config, prompt, GENERATE)
        if tokens != expected or cached != prefix:
            raise SystemExit(f"{title}: got {tokens}, {cached} cached; not {expected}, {prefix}")
        print(f"  {title}: {len(tokens)} tokens equal, {cached} of {len(prompt)} were there")

    def check_killed_daemon(self, prompt: list[int]) -> None:
        """The prefill side's daemon dies when a part has arrived; the next request works."""
        request = self.request(prompt)
        self.decode.send(("run", request, True))
        self.prefill.send(("run", request, CHUNK, True))
        assert self.answer(self.prefill) == "chunk"
        assert self.answer(self.decode) == "slice"
        self.pair.prefill.kill()
        got = self.answer(self.decode)
        assert isinstance(got, kv.TransferFailed), got
        self.prefill.send("go on")
        sent = self.answer(self.prefill)
        while sent == "chunk":  # it had not noticed yet
            self.prefill.send("go on")
            sent = self.answer(self.prefill)
        assert isinstance(sent, kv.KvferryError), sent
        print(f"  daemon killed: decode has {got.reason}, prefill {sent.reason}")
        self.pair.prefill.start()
        self.prefill.send(("reattached",))
        assert self.answer(self.prefill) is None


def run(pair: Pair, prefill_tp: int, decode_tp: int) -> None:
    print(f"prefill tp{prefill_tp}, decode tp{decode_tp}")
    router = Router(pair, prefill_tp, decode_tp)
    try:
        prompt = router.prompt(45)
        router.check("whole prompt", prompt, 0)
        router.check("prefix used again", prompt[:30] + router.prompt(21), 0, prefix=24)
        router.check("chunks, layer by layer", router.prompt(53), CHUNK)
        router.check_killed_daemon(router.prompt(53))
        router.check("after the restart", router.prompt(45), CHUNK)
    finally:
        router.close()


def main(arguments: list[str]) -> None:
    with Pair() as pair:
        for words in arguments or ["tp2:tp1", "tp1:tp2"]:
            prefill, decode = (int(word.removeprefix("tp")) for word in words.split(":"))
            run(pair, prefill, decode)
    print("kvferry example: OK")


if __name__ == "__main__":
    main(sys.argv[1:])
