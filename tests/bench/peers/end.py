"""One end of a peer library's transfer: a process that compare.py starts twice, and drives by lines.

Every request and answer is one JSON object a line, on standard input and output. Libraries log to
standard output too, so answers go to a copy of it and the original is turned into standard error.
"""

import argparse
import json
import os
import sys
import time

import numpy as np

UNTOUCHED = 0xA5A5A5A5A5A5A5A5


def pattern(count, words):
    """Word j of fragment i: what identifies it wherever it lies."""
    first = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    step = np.arange(words, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return first[:, None] + step[None, :]


class Pool:
    """A side's memory: blocks of one fragment's size, of which some are the request's."""

    def __init__(self, places, side):
        self.fragment_bytes = places["fragment_bytes"]
        self.offsets = np.array(places[side], dtype=np.uint64)
        self.bytes = places["sender_pool_bytes" if side == "source" else "receiver_pool_bytes"]
        self.words = np.full(self.bytes // 8, UNTOUCHED, dtype=np.uint64)
        self.blocks = self.words.reshape(-1, self.fragment_bytes // 8)
        self.used = (self.offsets // np.uint64(self.fragment_bytes)).astype(np.int64)
        self.address = self.words.ctypes.data

    def fill(self):
        self.blocks[self.used] = pattern(len(self.used), self.blocks.shape[1])

    def clear(self):
        self.words.fill(UNTOUCHED)

    def verify(self):
        """Bytes that were right; raises at the first that is not."""
        expected = pattern(len(self.used), self.blocks.shape[1])
        if not np.array_equal(self.blocks[self.used], expected):
            raise RuntimeError("bytes of fragments are wrong")
        rest = np.ones(len(self.blocks), dtype=bool)
        rest[self.used] = False
        if not np.all(self.blocks[rest] == np.uint64(UNTOUCHED)):
            raise RuntimeError("bytes outside the fragments were changed")
        return int(len(self.used) * self.fragment_bytes)


class Nixl:
    """WRITE by the sender, over descriptor lists of all blocks made once, as its connectors do."""

    def __init__(self, side, pool, options):
        from nixl import nixl_agent, nixl_agent_config  # pylint: disable=import-outside-toplevel

        self.pool = pool
        config = nixl_agent_config(
            enable_prog_thread=options.progress_thread, num_threads=options.threads, backends=["UCX"]
        )
        self.agent = nixl_agent("kvferry-bench-" + side, config)
        self.memory = self.agent.register_memory([(pool.address, pool.bytes, 0, "")], "DRAM")
        self.peer = None
        self.local = self.remote = None
        self.backends = list(self.agent.backends)

    def card(self):
        return {
            "metadata": self.agent.get_agent_metadata().hex(),
            "address": self.pool.address,
            "offsets": self.pool.offsets.tolist(),
        }

    def _blocks(self, address, offsets):
        out = np.empty((len(offsets), 3), dtype=np.uint64)
        out[:, 0] = np.array(offsets, dtype=np.uint64) + np.uint64(address)
        out[:, 1] = self.pool.fragment_bytes
        out[:, 2] = 0
        return out

    def connect(self, card):
        name = self.agent.add_remote_agent(bytes.fromhex(card["metadata"]))
        self.peer = name.decode() if isinstance(name, bytes) else name
        self.local = self.agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", self._blocks(self.pool.address, self.pool.offsets), "DRAM"
        )
        self.remote = self.agent.prep_xfer_dlist(
            self.peer, self._blocks(card["address"], card["offsets"]), "DRAM"
        )

    def transfer(self):
        indices = np.arange(len(self.pool.offsets), dtype=np.int32)
        begin = time.perf_counter()
        handle = self.agent.make_prepped_xfer(
            "WRITE", self.local, indices, self.remote, indices, b"done"
        )
        made = time.perf_counter()
        state = self.agent.transfer(handle)
        posted = time.perf_counter()
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        end = time.perf_counter()
        self.agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError("NIXL says " + state)
        return {
            "seconds": end - begin,
            "seconds_without_making": end - made,
            "seconds_to_post": posted - made,
        }

    def progress(self):
        """Takes the notification; without a progress thread this is what moves the bytes."""
        return bool(self.agent.get_new_notifs())


class Mooncake:
    """batch_transfer_sync_write by the sender."""

    def __init__(self, side, pool, options):
        del side
        from mooncake.engine import TransferEngine  # pylint: disable=import-outside-toplevel

        self.pool = pool
        self.batch = options.batch
        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("Mooncake's engine does not start")
        if self.engine.register_memory(pool.address, pool.bytes) != 0:
            raise RuntimeError("Mooncake does not register memory")
        self.peer = None
        self.source = self.destination = None

    def card(self):
        return {
            "peer": "127.0.0.1:" + str(self.engine.get_rpc_port()),
            "address": self.pool.address,
            "offsets": self.pool.offsets.tolist(),
        }

    def connect(self, card):
        self.peer = card["peer"]
        self.source = [self.pool.address + int(offset) for offset in self.pool.offsets]
        self.destination = [card["address"] + offset for offset in card["offsets"]]

    def transfer(self):
        count = len(self.source)
        batch = self.batch or count
        lengths = [self.pool.fragment_bytes] * count
        begin = time.perf_counter()
        for at in range(0, count, batch):
            code = self.engine.batch_transfer_sync_write(
                self.peer,
                self.source[at : at + batch],
                self.destination[at : at + batch],
                lengths[at : at + batch],
            )
            if code != 0:
                raise RuntimeError("Mooncake says " + str(code))
        return {"seconds": time.perf_counter() - begin}

    def progress(self):
        return True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=["nixl", "mooncake"])
    parser.add_argument("side", choices=["sender", "receiver"])
    parser.add_argument("--places", required=True)
    parser.add_argument("--progress-thread", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    with open(options.places, encoding="utf-8") as file:
        places = json.load(file)
    pool = Pool(places, "source" if options.side == "sender" else "destination")
    if options.side == "sender":
        pool.fill()
    library = (Nixl if options.library == "nixl" else Mooncake)(options.side, pool, options)
    print(json.dumps({"card": library.card()}), file=answers)

    cpu = time.process_time()
    for line in sys.stdin:
        request = json.loads(line)
        word = request["do"]
        answer = {}
        if word == "connect":
            library.connect(request["card"])
        elif word == "clear":
            pool.clear()
        elif word == "begin":
            cpu = time.process_time()
        elif word == "transfer":
            answer = library.transfer()
        elif word == "await":
            limit = time.monotonic() + 60
            while not library.progress():
                if time.monotonic() > limit:
                    raise RuntimeError("the receiver is not told of the end")
        elif word == "end":
            answer = {"cpu_seconds": time.process_time() - cpu}
        elif word == "verify":
            answer = {"verified_bytes": pool.verify()}
        elif word == "quit":
            break
        print(json.dumps(answer), file=answers)
    # Neither library's threads end reliably by themselves.
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
