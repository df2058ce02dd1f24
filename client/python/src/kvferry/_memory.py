"""Shared memory for pools: a sealed memfd, all of it allocated, in huge pages if there are any."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from kvferry.errors import Code, KvferryError, invalid

_HUGE = 2 << 20
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_MAX_BYTES = 1 << 46


def check_size(size: int) -> None:
    if not 0 < size <= _MAX_BYTES:
        raise invalid("SIZE_INVALID", "a pool has 1 to 2^46 bytes", "bytes")


def _advise(mapping: mmap.mmap, advice: int) -> None:
    try:
        mapping.madvise(advice)
    except OSError:
        pass  # best effort: what is missing in the end is for fallocate to find


def allocate(size: int) -> tuple[int, mmap.mmap]:
    """The descriptor and the mapping of zeroed shared memory. RESOURCE_EXHAUSTED POOL_MEMORY."""
    check_size(size)
    fd = -1
    try:
        fd = os.memfd_create("kvferry-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        if size >= _HUGE:
            _advise(mapping, mmap.MADV_HUGEPAGE)
            _advise(mapping, _MADV_POPULATE_WRITE)
            _advise(mapping, _MADV_COLLAPSE)
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise KvferryError(
            Code.RESOURCE_EXHAUSTED, "POOL_MEMORY", f"shared memory: {error.strerror}"
        ) from None
    return fd, mapping


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
