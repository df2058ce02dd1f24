"""A worker's connection to the kvferry daemon of its node."""

from __future__ import annotations

from kvferry._layout_calls import LayoutCalls
from kvferry._session import DEFAULT_SOCKET
from kvferry._transfer import Transfer
from kvferry._transfer_calls import TransferCalls
from kvferry._word_calls import WordCalls

__all__ = ["DEFAULT_SOCKET", "Client", "Transfer"]


class Client(LayoutCalls, TransferCalls, WordCalls):
    """May be used from any number of threads; poll, events, wait and wait_any are for one consumer
    at a time. Calls that say so block, at most for `call_timeout`; the others queue or read shared
    memory.

    Who may touch which memory follows from the events alone: source pages belong to the transfer
    from send until SOURCE_RELEASED, destination pages from receive until DEST_RELEASED, whatever
    else is reported in between. Each comes exactly once for a transfer that was accepted, also when
    the daemon dies: then once its process has ended.

    In a child after fork() the client is dead: descriptors are closed, calls fail.
    """

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
