"""Sends operations in order over one bidirectional stream.

A bounded queue, and the thread that owns the stream. When the stream breaks but the attachment
lives, a new one is opened and what has no answer yet is sent again (the daemon knows repeated
operations by their key); without an attachment everything is dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import grpc

from kvferry._connection import Connection, SubmitCall
from kvferry.errors import Code, KvferryError, invalid, not_attached
from kvferry.v1 import worker_pb2 as pb

MAX_OPERATION_BYTES = 7 << 20
_BATCH_OPERATIONS = 256
_BATCH_BYTES = 1 << 20
_FIRST_BACKOFF = 0.01
_LAST_BACKOFF = 1.0


class _Item(NamedTuple):
    operation: pb.Operation
    handle: int
    bytes: int


class Submitter:
    def __init__(
        self,
        max_operations: int,
        max_bytes: int,
        on_result: Callable[[pb.Operation, int, pb.OperationResult], None],
    ) -> None:
        """`on_result` is called on the submitter's thread, without a lock: the operation and the
        handle given to enqueue, and the answer."""
        self._max_operations = max_operations
        self._max_bytes = max_bytes
        self._on_result = on_result
        self._changed = threading.Condition()
        self._connection: Optional[Connection] = None
        self._stream: Optional[object] = None  # the present one's mark
        self._call: Optional[SubmitCall] = None
        self._stopping = False
        self._items: dict[int, _Item] = {}  # not answered, in order
        self._waiting: list[int] = []  # of these, what is not on the stream yet
        self._next_op = 1
        self._bytes = 0
        self.sent = 0
        self._thread = threading.Thread(target=self._run, name="kvferry-submit", daemon=True)
        self._thread.start()

    def enqueue(self, operation: pb.Operation, handle: int, size: int) -> None:
        """`size`: about what the operation holds in memory. Never blocks beyond its lock.
        RESOURCE_EXHAUSTED QUEUE_FULL, UNAVAILABLE NOT_ATTACHED, OPERATION_TOO_LARGE."""
        if size > MAX_OPERATION_BYTES:
            raise invalid("OPERATION_TOO_LARGE", "too much for one operation", "")
        with self._changed:
            if self._connection is None:
                raise not_attached()
            if len(self._items) >= self._max_operations or self._bytes + size > self._max_bytes:
                raise KvferryError(
                    Code.RESOURCE_EXHAUSTED,
                    "QUEUE_FULL",
                    "too many operations wait to be sent or answered",
                    "",
                    0.001,
                )
            op_id = self._next_op
            self._next_op += 1
            operation.op_id = op_id
            self._items[op_id] = _Item(operation, handle, size)
            self._waiting.append(op_id)
            self._bytes += size
            self._changed.notify_all()

    def set_connection(self, connection: Optional[Connection]) -> None:
        """What is waiting or unanswered belonged to the former one and is dropped."""
        with self._changed:
            self._connection = connection
            self._items = {}
            self._waiting = []
            self._bytes = 0
            self._stream = None
            call = self._call
            self._changed.notify_all()
        if call is not None:
            call.cancel()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
        self.set_connection(None)
        self._thread.join()

    @property
    def unanswered(self) -> int:
        with self._changed:
            return len(self._items)

    def _run(self) -> None:
        backoff = _FIRST_BACKOFF
        while True:
            with self._changed:
                while not self._stopping and self._connection is None:
                    self._changed.wait()
                if self._stopping:
                    return
                connection = self._connection
            assert connection is not None
            if self._serve(connection):
                backoff = _FIRST_BACKOFF
            # A stream that ends at once, time after time, must not become a busy loop.
            until = time.monotonic() + backoff
            with self._changed:
                while not self._stopping and self._connection is connection:
                    left = until - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
                changed = self._connection is not connection
            backoff = _FIRST_BACKOFF if changed else min(backoff * 2, _LAST_BACKOFF)

    def _serve(self, connection: Connection) -> bool:
        """One stream, until it breaks or the connection changes. True if it carried an answer."""
        mark = object()
        with self._changed:
            if self._stopping or self._connection is not connection:
                return False
            self._stream = mark
            # What the former stream carried without an answer goes first, in its order.
            self._waiting = list(self._items)
        answered = False
        try:
            call = connection.submit(self._requests(mark))
            with self._changed:
                self._call = call
                current = self._stream is mark
            if not current:
                call.cancel()
            for response in call:
                answered = True
                for result in response.results:
                    self._answer(result)
        except (grpc.RpcError, ValueError):
            pass  # the stream is over; ValueError: the channel was closed
        with self._changed:
            self._call = None
            if self._stream is mark:
                self._stream = None
            self._changed.notify_all()
        return answered

    def _requests(self, mark: object) -> Iterator[pb.SubmitRequest]:
        # On a thread of gRPC, which encodes what is yielded.
        while True:
            with self._changed:
                while self._stream is mark and not self._waiting:
                    self._changed.wait()
                if self._stream is not mark:
                    return
                batch: list[pb.Operation] = []
                size = 0
                for op_id in self._waiting[:_BATCH_OPERATIONS]:
                    item = self._items[op_id]
                    if batch and size + item.bytes > _BATCH_BYTES:
                        break
                    batch.append(item.operation)
                    size += item.bytes
                del self._waiting[: len(batch)]
                self.sent += len(batch)
            yield pb.SubmitRequest(operations=batch)

    def _answer(self, result: pb.OperationResult) -> None:
        with self._changed:
            item = self._items.pop(result.op_id, None)
            if item is None:
                return  # dropped with a former connection, or answered twice
            self._bytes -= item.bytes
        self._on_result(item.operation, item.handle, result)
