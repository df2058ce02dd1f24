"""The worker's end of a lifeline (proto/kvferry/lifeline.h): one attachment to one daemon, with the
control page that it mapped. Knows nothing of gRPC. Any thread."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from kvferry._control_page import StatusPage, Words
from kvferry.errors import Code, KvferryError, code_of, invalid
from kvferry.types import Role

_MAGIC = 0x4C46564B
_ATTACH, _ATTACH_REPLY, _POOLS, _POOLS_REPLY = 1, 2, 3, 4
_PROTOCOL = 1
NAME_BYTES = 64
MAX_DESCRIPTORS = 16
HOST_SHM, CUDA_VMM_FD = 1, 2

_ATTACH_REQUEST = struct.Struct("=IIIIII64s")
_ATTACH_ANSWER = struct.Struct("=IIII64s192s16s16sQQQQII128s")
_POOLS_HEAD = struct.Struct("=IIII")
_POOL_ENTRY = struct.Struct("=64sIIQ")
_POOLS_ANSWER = struct.Struct("=IIII64s192s")
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid
assert (_ATTACH_REQUEST.size, _ATTACH_ANSWER.size) == (88, 472)
assert _POOLS_HEAD.size + MAX_DESCRIPTORS * _POOL_ENTRY.size == 1296
assert _POOLS_ANSWER.size == 272


@dataclass(frozen=True)
class PoolDescriptor:
    """One descriptor of a pool; `part` counts those of one pool of kind CUDA_VMM_FD."""

    name: str
    kind: int
    bytes: int
    fd: int
    part: int = 0


def text_of(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")


def check_name(name: str, field: str) -> bytes:
    encoded = name.encode()
    if not 0 < len(encoded) < NAME_BYTES:
        raise invalid("NAME_INVALID", "a name has 1 to 63 characters", field)
    return encoded


def _unreachable(message: str) -> KvferryError:
    return KvferryError(Code.UNAVAILABLE, "DAEMON_UNREACHABLE", message, "socket")


def _overflow_uid() -> int:
    """As which every user appears that the reader's user namespace does not map."""
    try:
        with open("/proc/sys/kernel/overflowuid") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 65534


def why_not_served(owner: int, listener: int, overflow: int, wanted: Optional[int]) -> str:
    """Why a process of uid `listener` is not taken for the daemon at a socket of uid `owner`; empty
    if it is. Without `wanted`, a user that is not mapped here cannot be compared and passes."""
    if wanted is not None:
        if listener == wanted:
            return ""
        if listener == overflow:
            return (
                f"the daemon's user is not mapped in this user namespace (it appears as {overflow})"
                f", so that it cannot be told whether it is uid {wanted}, which is expected"
            )
        return (
            f"it is served by a process of uid {listener}, but the daemon that is expected is uid "
            f"{wanted}"
        )
    if listener == owner or overflow in (listener, owner):
        return ""
    return f"it is served by a process of uid {listener}, but the file's owner is uid {owner}"


def _check_daemon(sock: socket.socket, path: str, daemon_uid: Optional[int]) -> None:
    """Who listens must be who is expected, or else who the file says. Before anything is sent."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, listener, _ = _CREDENTIALS.unpack(credentials)
    try:
        owner = os.stat(path).st_uid
    except OSError as error:
        raise _unreachable(f"stat({path}): {error.strerror}") from None
    why = why_not_served(owner, listener, _overflow_uid(), daemon_uid)
    if why:
        raise KvferryError(Code.PERMISSION_DENIED, "DAEMON_USER", f"{path}: {why}", "socket")


def _closed() -> KvferryError:
    return KvferryError(Code.UNAVAILABLE, "DAEMON_UNREACHABLE", "the daemon closed the lifeline")


def _readable(fd: int, deadline: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _receive(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        data, fds, got_flags, _ = socket.recv_fds(sock, size + 1, MAX_DESCRIPTORS, flags)
    except ConnectionResetError:
        # A daemon that turns us away closes without reading what we sent; the kernel tells that
        # once, before the answer that still lies here.
        data, fds, got_flags, _ = socket.recv_fds(sock, size + 1, MAX_DESCRIPTORS, flags)
    if len(data) != size or got_flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise _closed()
    return data, list(fds)


class Attachment:
    """Owns its descriptors; close() ends the attachment, after which the mappings stay readable."""

    def __init__(
        self, path: str, name: str, role: Role, timeout: float, daemon_uid: Optional[int] = None
    ) -> None:
        """Connects and attaches; blocks at most `timeout`."""
        if not 0 < len(path.encode()) < 108:
            raise invalid("SOCKET_PATH", "a socket's path has 1 to 107 bytes", "socket")
        encoded = check_name(name, "name")
        deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._fds: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connect(path, timeout, daemon_uid)
            self._attach(encoded, role, deadline)
        except BaseException:
            self.close()
            raise

    def _connect(self, path: str, timeout: float, daemon_uid: Optional[int]) -> None:
        # Bounds connect and send on a daemon that has stopped accepting.
        limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6) + 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self._socket.connect(path)
        except OSError as error:
            raise _unreachable(f"connect({path}): {error.strerror}") from None
        _check_daemon(self._socket, path, daemon_uid)

    def _attach(self, name: bytes, role: Role, deadline: float) -> None:
        sent = True
        try:
            self._socket.send(
                _ATTACH_REQUEST.pack(_MAGIC, _ATTACH, _PROTOCOL, _PROTOCOL, role, 0, name),
                socket.MSG_NOSIGNAL,
            )
        except OSError:
            sent = False  # a daemon that turns us away may have answered and closed before this
        if not _readable(self._socket.fileno(), deadline):
            raise KvferryError(
                Code.DEADLINE_EXCEEDED, "ATTACH_TIMEOUT", "the daemon did not answer"
            )
        try:
            data, self._fds = _receive(self._socket, _ATTACH_ANSWER.size)
        except OSError:
            raise _closed() from None
        (
            magic,
            kind,
            code,
            _,
            reason,
            message,
            self.token,
            self.boot_id,
            self.worker_id,
            status_bytes,
            words_bytes,
            self.max_pool_bytes,
            self.max_descriptors,
            self.max_transfers,
            grpc_path,
        ) = _ATTACH_ANSWER.unpack(data)
        if magic != _MAGIC or kind != _ATTACH_REPLY:
            raise _closed()
        if code != 0:
            raise KvferryError(code_of(code), text_of(reason), text_of(message))
        if not sent:
            raise _closed()
        if len(self._fds) != 4:
            raise KvferryError(
                Code.INTERNAL, "ATTACH_REPLY", "the daemon's answer: wrong number of descriptors"
            )
        self.grpc_path = text_of(grpc_path)
        self.daemon_pidfd, self._doorbell, status_fd, words_fd = self._fds
        try:
            status = mmap.mmap(status_fd, status_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            words = mmap.mmap(words_fd, words_bytes, flags=mmap.MAP_SHARED)
            # A child must not look at the page of its parent's attachment.
            status.madvise(mmap.MADV_DONTFORK)
            words.madvise(mmap.MADV_DONTFORK)
            self.page = StatusPage(status)
            self.words = Words(words, self.page.timeline_words, self.page.done_words)
        except (OSError, ValueError) as error:
            raise KvferryError(
                Code.INTERNAL, "ATTACH_REPLY", f"the daemon's control page: {error}"
            ) from None

    @property
    def lifeline_fd(self) -> int:
        return self._socket.fileno()

    @property
    def doorbell_fd(self) -> int:
        return self._doorbell

    def ring(self) -> None:
        """Tells the daemon to look at the words; dropped when it has not taken earlier ones."""
        with contextlib.suppress(OSError):
            os.write(self._doorbell, b"\1")

    def drain_doorbell(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(self._doorbell, 16):
                pass

    def send_pools(self, pools: Sequence[PoolDescriptor], deadline: float) -> None:
        """Hands descriptors to the daemon and waits for its answer."""
        with self._lock:
            for first in range(0, len(pools), MAX_DESCRIPTORS):
                self._send_some(pools[first : first + MAX_DESCRIPTORS], first, deadline)

    def _send_some(self, pools: Sequence[PoolDescriptor], first: int, deadline: float) -> None:
        message = _POOLS_HEAD.pack(_MAGIC, _POOLS, len(pools), 0)
        for i, pool in enumerate(pools):
            name = check_name(pool.name, f"pools[{first + i}].name")
            message += _POOL_ENTRY.pack(name, pool.kind, pool.part, pool.bytes)
        message = message.ljust(1296, b"\0")
        try:
            socket.send_fds(self._socket, [message], [p.fd for p in pools], socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise invalid("POOL_DESCRIPTOR", "not an open descriptor", "fd") from None
            raise _closed() from None
        if not _readable(self._socket.fileno(), deadline):
            # An answer after this would be taken for the next question's.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            raise KvferryError(
                Code.DEADLINE_EXCEEDED,
                "LIFELINE_TIMEOUT",
                "the daemon did not answer on the lifeline",
            )
        try:
            data, fds = _receive(self._socket, _POOLS_ANSWER.size)
        except OSError:
            raise _closed() from None
        for fd in fds:
            os.close(fd)
        magic, kind, code, index, reason, text = _POOLS_ANSWER.unpack(data)
        if magic != _MAGIC or kind != _POOLS_REPLY:
            raise _closed()
        if code != 0:
            raise KvferryError(
                code_of(code), text_of(reason), text_of(text), f"pools[{first + index}]"
            )

    def close(self) -> None:
        """Ends the attachment. May be repeated."""
        self._socket.close()
        fds, self._fds = self._fds, []
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
