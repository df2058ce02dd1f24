"""The same client for asyncio: what blocks is awaited, events are an async iterator."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any, Optional, TypeVar

from kvferry._encode import Blocks
from kvferry.client import Client, Transfer
from kvferry.errors import Code, KvferryError, not_attached
from kvferry.types import Event, LayoutRef, TransferKey, TransferStatus

T = TypeVar("T")


class AsyncClient:
    """Wraps a Client, which `sync` is; use `sync` for the calls that never block (send, receive,
    claim, decline, close_transfer, status, signal, ...). For one event loop, whose thread takes
    events: not beside Client.poll or Client.wait.

    `run` awaits any other method in a thread: `await client.run(client.sync.ticket, "prefill")`.
    """

    def __init__(self, client: Client) -> None:
        self.sync = client
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._waiting: dict[int, tuple[Transfer, asyncio.Future[TransferStatus]]] = {}
        self._fd = client.event_fd()
        self._loop.add_reader(self._fd, self._readable)

    @classmethod
    async def attach(cls, socket: str, **options: Any) -> AsyncClient:
        """As Client(socket, **options), without blocking the loop."""
        return cls(await asyncio.to_thread(functools.partial(Client, socket, **options)))

    async def close(self) -> None:
        """Detaches. Waits in progress fail with NOT_ATTACHED."""
        self._loop.remove_reader(self._fd)
        waiting, self._waiting = self._waiting, {}
        for _, future in waiting.values():
            if not future.done():
                future.set_exception(not_attached())
        await asyncio.to_thread(self.sync.close)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def run(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Awaits a blocking call in a thread."""
        return await asyncio.to_thread(functools.partial(call, *arguments, **options))

    async def wait(self, transfer: Transfer, timeout: Optional[float] = None) -> TransferStatus:
        """As Client.wait; without a timeout as long as it takes."""
        future: asyncio.Future[TransferStatus] = self._loop.create_future()
        self._waiting[transfer.handle] = (transfer, future)
        try:
            self._readable()
            return await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            raise KvferryError(
                Code.DEADLINE_EXCEEDED, "WAIT_TIMEOUT", "the transfer has not ended in time"
            ) from None
        finally:
            self._waiting.pop(transfer.handle, None)

    async def receive_wait(
        self,
        key: TransferKey,
        layout: LayoutRef,
        ticket: str,
        groups: Blocks,
        *,
        timeout: float,
        **options: Any,
    ) -> bytes:
        """As Client.receive_wait. When the task is cancelled, so is the transfer."""
        transfer = self.sync.receive(key, layout, ticket, groups, **options)
        try:
            status = await self.wait(transfer, timeout)
        except (KvferryError, asyncio.CancelledError) as error:
            if not isinstance(error, KvferryError) or error.reason == "WAIT_TIMEOUT":
                await asyncio.shield(self.run(self.sync.cancel, transfer))
                await asyncio.shield(self.wait(transfer))
            self.sync.close_transfer(transfer)
            raise
        try:
            status.check()
            return await self.run(self.sync.aux, transfer) if status.aux_ready else b""
        finally:
            self.sync.close_transfer(transfer)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come, without those of transfers that somebody waits for."""
        while True:
            yield await self._events.get()

    def _readable(self) -> None:
        while events := self.sync.poll():
            for event in events:
                if event.transfer is None or event.transfer.handle not in self._waiting:
                    self._events.put_nowait(event)
        for transfer, future in list(self._waiting.values()):
            if future.done():
                continue
            try:
                status = self.sync._transfers.ended(transfer.handle)
            except KvferryError as error:
                future.set_exception(error)
            else:
                if status is not None:
                    future.set_result(status)
