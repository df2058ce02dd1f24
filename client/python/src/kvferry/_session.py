"""The life of a client's attachment: attach, notice the daemon's end, attach and register again.
What the parts of the client share."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any, Optional

from kvferry._attachment import HOST_SHM, Attachment, PoolDescriptor
from kvferry._connection import Connection, Message, Response, decode_error
from kvferry._pools import Pool, Pools
from kvferry._submitter import Submitter
from kvferry._transfers import Transfers
from kvferry.errors import Code, KvferryError, not_attached
from kvferry.types import ClientStats, EventKind, LayoutRef, Role
from kvferry.v1 import worker_pb2 as pb

DEFAULT_SOCKET = "/run/kvferry/kvferry.sock"
_FIRST_BACKOFF = 0.05
_LAST_BACKOFF = 2.0
_clients: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """Any thread. Knows pools and layouts only as what is to be registered again."""

    def __init__(
        self,
        socket: str = DEFAULT_SOCKET,
        *,
        name: str,
        role: Role = Role.RANK,
        daemon_uid: Optional[int] = None,
        reconnect: bool = True,
        attach_timeout: float = 5.0,
        call_timeout: float = 30.0,
        queue_operations: int = 16384,
        queue_bytes: int = 64 << 20,
    ) -> None:
        """Attaches; blocks at most `attach_timeout` seconds.

        `name`: of this worker, unique in its tenant. `daemon_uid`: the daemon's user, as this
        user namespace maps it; without it the process that listens must be the socket file's
        owner's, unless either is of a user that is not mapped here. `reconnect`: after the daemon's
        end attach and register everything again, with back-off. `queue_*`: what may wait to be
        sent; beyond it QUEUE_FULL. Errors: INVALID_ARGUMENT NAME_INVALID, ALREADY_EXISTS
        NAME_IN_USE, PERMISSION_DENIED (DAEMON_USER: of another user), UNAVAILABLE
        DAEMON_UNREACHABLE, FAILED_PRECONDITION PROTOCOL_MISMATCH.
        """
        self._socket = socket
        self._name = name
        self._role = role
        self._reconnect = reconnect
        self._attach_timeout = attach_timeout
        self._daemon_uid = daemon_uid
        self._call_timeout = call_timeout
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.RLock()
        self._connection: Optional[Connection] = None
        self._boot_id = b""
        self._layouts: dict[LayoutRef, pb.RegisterLayoutRequest] = {}
        self._layouts_left_out: set[LayoutRef] = set()
        self._timeline_used: set[int] = set()
        self._done_used: set[int] = set()
        self._timeline_values: dict[int, int] = {}
        self._lost_words: Optional[Any] = None
        self._reconnects = 0
        self._handles = itertools.count(1)
        self._ghosts: list[Connection] = []  # lost, their daemon has not exited yet
        self._woken = False
        self._event_fd_used = False
        attachment = Attachment(socket, name, role, attach_timeout, daemon_uid)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._transfers = Transfers(queue_operations)
        self._submitter = Submitter(queue_operations, queue_bytes, self._on_result)
        self._pools = Pools(call_timeout)
        self._use(Connection(attachment))
        self._watcher = threading.Thread(target=self._watch, name="kvferry-watch", daemon=True)
        self._watcher.start()
        _clients.add(self)

    def close(self) -> None:
        """Detaches: open transfers fail on the daemon's side with WORKER_LOST. Memory of pools goes
        when the last array in it goes. May be repeated."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
        os.eventfd_write(self._stop, 1)
        self._watcher.join()
        self._submitter.stop()
        with self._lock:
            connections = self._ghosts + ([self._connection] if self._connection else [])
            self._connection = None
            self._ghosts = []
        for connection in connections:
            connection.close()
            connection.attachment.close()
        self._pools.close()
        self._epoll.close()
        os.close(self._wake)
        os.close(self._stop)

    # ---- state -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """To a living daemon."""
        return self._connection is not None and not self._closed

    @property
    def draining(self) -> bool:
        """The daemon takes no new transfers."""
        return self._transfers.draining

    @property
    def boot_id(self) -> bytes:
        """The daemon's life; changes when it is restarted."""
        return self._boot_id

    def stats(self) -> ClientStats:
        t = self._transfers
        return ClientStats(
            self._submitter.sent,
            t.accepted,
            t.rejected,
            self._submitter.unanswered,
            t.events,
            t.overflows,
            self._reconnects,
            t.open,
        )

    # ---- within ------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._closed or os.getpid() != self._pid:
            raise not_attached()

    def _current(self) -> Connection:
        self._check_alive()
        with self._lock:
            if self._connection is None:
                raise not_attached()
            return self._connection

    def _call(self, method: str, request: Message, response: type[Response]) -> Response:
        return self._current().call(method, request, response, self._call_timeout)

    def _on_result(self, operation: pb.Operation, handle: int, result: pb.OperationResult) -> None:
        taken = (pb.OPERATION_OUTCOME_ACCEPTED, pb.OPERATION_OUTCOME_EXISTING)
        error = None if result.outcome in taken else decode_error(result.error)
        if self._transfers.answer(handle, error, operation.WhichOneof("kind")):
            self._notify()

    def _send_host_pools(self, connection: Connection, pools: Iterable[Pool]) -> None:
        deadline = time.monotonic() + self._call_timeout
        waiting = list(pools)
        for first in range(0, len(waiting), 16):
            some = waiting[first : first + 16]
            connection.attachment.send_pools(
                [PoolDescriptor(p.name, HOST_SHM, p.bytes, p.fd) for p in some], deadline
            )
            request = pb.RegisterPoolsRequest(
                pools=[
                    pb.PoolSpec(name=p.name, kind=pb.POOL_KIND_HOST_SHM, bytes=p.bytes)
                    for p in some
                ]
            )
            connection.call("RegisterPools", request, pb.RegisterPoolsResponse, self._call_timeout)

    def _notify(self) -> None:
        if not self._woken:
            self._woken = True
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    def _take_wake_ups(self) -> None:
        if self._woken:
            self._woken = False
            with contextlib.suppress(OSError):
                os.eventfd_read(self._wake)
        connection = self._connection
        if connection is not None:
            connection.attachment.drain_doorbell()

    def _block(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            if self._epoll.poll(min(left, 60.0)):
                self._take_wake_ups()
        return True

    # ---- the watcher -------------------------------------------------------------------------

    def _use(self, connection: Connection) -> None:
        attachment = connection.attachment
        self._epoll.register(attachment.doorbell_fd, select.EPOLLIN)
        self._transfers.attach(attachment)
        with self._lock:
            self._boot_id = attachment.boot_id
            # Conditions of new transfers go on counting where the words stood, whoever set them:
            # this client, or a stream of a GPU.
            for word in self._timeline_used:
                value = self._timeline_values.get(word, 0)
                if self._lost_words is not None and word < self._lost_words.timeline_words:
                    value = max(value, self._lost_words.timeline(word))
                if word < attachment.words.timeline_words:
                    attachment.words.set_timeline(word, value)
            self._lost_words = None
            self._connection = connection
        self._submitter.set_connection(connection)

    def _on_lost(self, connection: Connection) -> None:
        with self._lock:
            self._connection = None
            self._lost_words = connection.attachment.words
            self._ghosts.append(connection)
        self._submitter.set_connection(None)
        with contextlib.suppress(OSError):
            self._epoll.unregister(connection.attachment.doorbell_fd)
        self._transfers.lose()
        self._transfers.announce(EventKind.DAEMON_RESTARTED)
        self._notify()

    def _watch(self) -> None:
        connection = self._connection
        backoff = _FIRST_BACKOFF
        told = ""  # why attaching again was refused last
        while True:
            searching = connection is None and self._reconnect
            ready = self._watch_once(connection, backoff if searching else None)
            if self._stop in ready:
                return
            if connection is not None and (
                connection.attachment.lifeline_fd in ready
                or connection.attachment.daemon_pidfd in ready
            ):
                self._on_lost(connection)
                connection = None
                backoff = _FIRST_BACKOFF
                told = ""
            elif searching:
                backoff = min(backoff * 2, _LAST_BACKOFF)
                connection, problem = self._reattach()
                if connection is None:
                    # It is tried on; a refusal that stays the same is told once.
                    if problem is not None and problem.reason != told:
                        told = problem.reason
                        self._transfers.announce(EventKind.REJECTED, problem)
                        self._notify()
                    continue
                self._reconnects += 1
                self._use(connection)
                self._transfers.announce(EventKind.REATTACHED, problem)
                self._notify()

    def _watch_once(self, connection: Optional[Connection], timeout: Optional[float]) -> set[int]:
        poller = select.poll()
        poller.register(self._stop, select.POLLIN)
        for ghost in self._ghosts:
            poller.register(ghost.attachment.daemon_pidfd, select.POLLIN)
        if connection is not None:
            # Answers on the lifeline are for others to read: only its end is of interest.
            poller.register(connection.attachment.lifeline_fd, select.POLLRDHUP)
            poller.register(connection.attachment.daemon_pidfd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if timeout is None else timeout * 1000)}
        for ghost in [g for g in self._ghosts if g.attachment.daemon_pidfd in ready]:
            ready.discard(ghost.attachment.daemon_pidfd)
            ghost.attachment.words.release_waiters()
            self._transfers.exited(ghost.attachment)
            self._notify()
            with self._lock:
                self._ghosts.remove(ghost)
            ghost.close()
            ghost.attachment.close()
        return ready

    def _reattach(self) -> tuple[Optional[Connection], Optional[KvferryError]]:
        """Without a connection: the refusal, or None if no daemon answers."""
        try:
            attachment = Attachment(
                self._socket, self._name, self._role, self._attach_timeout, self._daemon_uid
            )
        except KvferryError as error:
            absent = error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
            return None, None if absent else error
        connection = Connection(attachment)
        try:
            return connection, self._register_again(connection)
        except KvferryError as error:
            # A daemon that goes away meanwhile is tried again; one that refuses is reported.
            if error.code is not Code.UNAVAILABLE:
                return connection, error
            connection.close()
            attachment.close()
            return None, None

    def _register_again(self, connection: Connection) -> Optional[KvferryError]:
        """What could not be registered again is left out and returned; what is raised is the
        daemon's that has gone again."""
        self._send_host_pools(connection, self._pools.host())
        problem = self._pools.register_devices_again(connection)
        with self._lock:
            left_out = self._pools.left_out()
            waiting = dict(self._layouts)
            self._layouts_left_out = {r for r, q in waiting.items() if uses(q, left_out)}
        for ref, request in waiting.items():
            if ref in self._layouts_left_out:
                continue
            try:
                connection.call(
                    "RegisterLayout", request, pb.RegisterLayoutResponse, self._call_timeout
                )
            except KvferryError as error:
                if error.code is Code.UNAVAILABLE:
                    raise
                problem = problem or error
        return problem

    def _forked(self) -> None:
        # Locks may be held by threads that do not exist here: descriptors only. A child must not
        # keep a dead worker's lifeline open.
        self._closed = True
        connections = list(self._ghosts)
        if self._connection is not None:
            connections.append(self._connection)
        for connection in connections:
            connection.attachment.close()


def uses(request: pb.RegisterLayoutRequest, pools: set[str]) -> bool:
    return any(pool.name in pools for pool in request.layout.pools)


def _close_in_child() -> None:
    for client in list(_clients):
        client._forked()


os.register_at_fork(after_in_child=_close_in_child)
