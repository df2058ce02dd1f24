"""How a client's user learns what happened: polling, waiting, event loops."""

from __future__ import annotations

import time
from collections.abc import Iterator

from kvferry._session import Session
from kvferry._transfer import Transfer
from kvferry.errors import Code, KvferryError
from kvferry.types import Event, TransferStatus


class EventCalls(Session):
    def poll(self, limit: int = 64) -> list[Event]:
        """Takes up to `limit` events without waiting and without a call."""
        if self._event_fd_used:
            # Somebody sleeps on the descriptor: it has to become unreadable before the page is
            # looked at.
            self._take_wake_ups()
        events = self._transfers.take(limit)
        if (len(events) == limit and self._event_fd_used) or self._transfers.unsettled:
            self._notify()
        return events

    def wait_any(self, timeout: float, limit: int = 64) -> list[Event]:
        """Waits until there are events, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            events = self.poll(limit)
            if events or self._closed:
                return events
            if not self._block(deadline):
                return self.poll(limit)

    def events(self, timeout: float) -> Iterator[Event]:
        """Events as they come, until none has come for `timeout` seconds."""
        while True:
            events = self.wait_any(timeout)
            if not events:
                return
            yield from events

    def wait(self, transfer: Transfer, timeout: float) -> TransferStatus:
        """Waits until the transfer's memory is the caller's again and its state is terminal; this
        transfer's events are consumed, others are kept. DEADLINE_EXCEEDED WAIT_TIMEOUT; the
        daemon's error if it was refused. A transfer that failed is returned: see
        TransferStatus.check()."""
        deadline = time.monotonic() + timeout
        while True:
            self._check_alive()
            status = self._transfers.ended(transfer.handle)
            if status is not None:
                # Events of others may have been seen on the way, and their wake-ups consumed.
                if self._transfers.pending:
                    self._notify()
                return status
            if self._transfers.unsettled:
                self._notify()
            if not self._block(deadline):
                status = self._transfers.ended(transfer.handle)
                if status is not None:
                    return status
                self._notify()
                raise KvferryError(
                    Code.DEADLINE_EXCEEDED, "WAIT_TIMEOUT", "the transfer has not ended in time"
                )

    def status(self, transfer: Transfer) -> TransferStatus:
        """What the control page says now. NOT_FOUND TRANSFER_UNKNOWN."""
        self._check_alive()
        return self._transfers.status(transfer.handle)

    def event_fd(self) -> int:
        """Readable when poll has something to take, for event loops; poll until it is empty."""
        self._event_fd_used = True
        self._notify()  # something may have been waiting from before the first call
        return self._epoll.fileno()
