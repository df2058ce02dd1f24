"""The CUDA driver through ctypes: what a pointer is, handles and descriptors for it, memory of our
own, small copies, words for streams. Loaded by the first call that needs it; works in the device's
primary context, that of CUDA's runtime, and leaves the caller's current context alone."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import Any, Optional

from kvferry import _memory
from kvferry._control_page import Words
from kvferry.errors import Code, KvferryError, invalid

PROOF_BYTES = 16
_MAX_GRANULES = 1 << 22
_MAX_PARTS = 4096
_POLL_SECONDS = 50e-6

_INVALID_VALUE, _NOT_READY, _NOT_SUPPORTED = 1, 600, 801
_CODES = {
    1: Code.INVALID_ARGUMENT,
    2: Code.RESOURCE_EXHAUSTED,
    3: Code.FAILED_PRECONDITION,
    4: Code.FAILED_PRECONDITION,
    100: Code.FAILED_PRECONDITION,
    101: Code.INVALID_ARGUMENT,
    400: Code.INVALID_ARGUMENT,
    800: Code.PERMISSION_DENIED,
    801: Code.UNIMPLEMENTED,
}
_VMM_SUPPORTED, _FD_SUPPORTED, _RDMA_VMM, _STREAM_WORDS = 102, 103, 110, 122
_MEMORY_TYPE, _IS_MANAGED, _ORDINAL, _IPC_CAPABLE, _MEMPOOL = 2, 8, 9, 10, 17
_HANDLE_FD, _HANDLE_FABRIC = 1, 8
_NON_BLOCKING = 1


class Kind(enum.Enum):
    """How a pool of a GPU goes to the daemon; all but VMM_FD are values, which are proven."""

    IPC = 3
    VMM_FD = 2
    FABRIC = 4


class _Handle64(ctypes.Structure):
    _fields_ = [("bytes", c_char * 64)]

    def value(self) -> bytes:
        return ctypes.string_at(byref(self), 64)


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", c_int)]


# name: (CUDA version of this form, parameters); all return a CUresult.
_FUNCTIONS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "cuInit": (2000, (c_uint,)),
    "cuDeviceGetCount": (2000, (POINTER(c_int),)),
    "cuDeviceGet": (2000, (POINTER(c_int), c_int)),
    "cuDeviceGetUuid": (11040, (c_void_p, c_int)),
    "cuDeviceGetAttribute": (2000, (POINTER(c_int), c_int, c_int)),
    "cuDevicePrimaryCtxRetain": (7000, (POINTER(c_void_p), c_int)),
    "cuCtxPushCurrent": (4000, (c_void_p,)),
    "cuCtxPopCurrent": (4000, (POINTER(c_void_p),)),
    "cuMemGetAddressRange": (3020, (POINTER(c_uint64), POINTER(c_size_t), c_uint64)),
    "cuPointerGetAttribute": (4000, (c_void_p, c_int, c_uint64)),
    "cuMemHostRegister": (6050, (c_void_p, c_size_t, c_uint)),
    "cuMemHostUnregister": (4000, (c_void_p,)),
    "cuMemHostGetDevicePointer": (3020, (POINTER(c_uint64), c_void_p, c_uint)),
    "cuMemCreate": (10020, (POINTER(c_uint64), c_size_t, POINTER(_Properties), c_uint64)),
    "cuMemRelease": (10020, (c_uint64,)),
    "cuMemAddressReserve": (
        10020,
        (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64),
    ),
    "cuMemAddressFree": (10020, (c_uint64, c_size_t)),
    "cuMemMap": (10020, (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64)),
    "cuMemUnmap": (10020, (c_uint64, c_size_t)),
    "cuMemSetAccess": (10020, (c_uint64, c_size_t, POINTER(_Access), c_size_t)),
    "cuMemGetAllocationGranularity": (
        10020,
        (POINTER(c_size_t), POINTER(_Properties), c_int),
    ),
    "cuMemExportToShareableHandle": (10020, (c_void_p, c_uint64, c_int, c_uint64)),
    "cuMemGetAllocationPropertiesFromHandle": (10020, (POINTER(_Properties), c_uint64)),
    "cuMemRetainAllocationHandle": (11000, (POINTER(c_uint64), c_void_p)),
    "cuIpcGetMemHandle": (4010, (POINTER(_Handle64), c_uint64)),
    "cuIpcGetEventHandle": (4010, (POINTER(_Handle64), c_void_p)),
    "cuMemcpyHtoDAsync": (3020, (c_uint64, c_void_p, c_size_t, c_void_p)),
    "cuMemcpyDtoHAsync": (3020, (c_void_p, c_uint64, c_size_t, c_void_p)),
    "cuMemsetD8Async": (3020, (c_uint64, ctypes.c_ubyte, c_size_t, c_void_p)),
    "cuStreamCreate": (2000, (POINTER(c_void_p), c_uint)),
    "cuStreamDestroy": (4000, (c_void_p,)),
    "cuStreamQuery": (2000, (c_void_p,)),
}
_OPTIONAL: dict[str, tuple[int, tuple[Any, ...]]] = {
    "cuStreamWriteValue64": (11070, (c_void_p, c_uint64, c_uint64, c_uint)),
    "cuStreamWaitValue64": (11070, (c_void_p, c_uint64, c_uint64, c_uint)),
}


class ArrayInterface:
    """Device memory as torch and others take it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class _Driver:
    def __init__(self, library: str) -> None:
        def refuse(message: str) -> KvferryError:
            return KvferryError(Code.FAILED_PRECONDITION, "NO_CUDA_DRIVER", message)

        try:
            # Local: nothing here may be taken for the functions of a CUDA runtime.
            self._library = ctypes.CDLL(library, mode=os.RTLD_LOCAL | os.RTLD_NOW)
        except OSError as error:
            raise refuse(f"no CUDA driver: {error}") from None
        version = c_int()
        try:
            self._library.cuDriverGetVersion(byref(version))
            find = self._library.cuGetProcAddress
        except AttributeError:
            raise refuse(f"{library} is no CUDA driver of CUDA 11.4 or later") from None
        self._functions: dict[str, Callable[..., int]] = {}
        self.error_name = self._text("cuGetErrorName")
        self.error_text = self._text("cuGetErrorString")
        for name, (since, parameters) in (_FUNCTIONS | _OPTIONAL).items():
            address = c_void_p()
            # An older driver may have an older form of the same name.
            if version.value >= since:
                found = find(name.encode(), byref(address), c_int(since), c_uint64(0))
                if found == 0 and address.value:
                    make = ctypes.CFUNCTYPE(c_int, *parameters)
                    self._functions[name] = make(address.value)
                    continue
            if name in _FUNCTIONS:
                raise refuse(f"{library} lacks {name} of CUDA {since // 1000}")
        result = self._functions["cuInit"](0)
        if result != 0:
            raise refuse(str(self.error(result, "cuInit")))

    def _text(self, name: str) -> Callable[[int], str]:
        function = getattr(self._library, name)

        def text(result: int) -> str:
            out = ctypes.c_char_p()
            if function(c_int(result), byref(out)) != 0 or out.value is None:
                return f"CUDA error {result}"
            return out.value.decode()

        return text

    def has(self, name: str) -> bool:
        return name in self._functions

    def raw(self, name: str, *arguments: Any) -> int:
        return self._functions[name](*arguments)

    def call(self, name: str, *arguments: Any) -> None:
        """KvferryError with the driver's own name as reason."""
        result = self._functions[name](*arguments)
        if result != 0:
            raise self.error(result, name)

    def error(self, result: int, call: str, more: str = "", where: str = "") -> KvferryError:
        name = self.error_name(result)
        prefix = "CUDA_ERROR_"
        reason = "CUDA_" + name[len(prefix) :] if name.startswith(prefix) else "CUDA_UNKNOWN"
        message = f"{call}: {name} ({result}): {self.error_text(result)}{more}"
        return KvferryError(_CODES.get(result, Code.INTERNAL), reason, message, where)


class _Pinned:
    """Host memory that the device copies from and to by itself, in pages of its own."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self._mapping = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_DONTFORK)
        self.address = _memory.address_of(self._mapping)
        driver.call("cuMemHostRegister", self.address, mmap.PAGESIZE, 1)

    def put(self, data: bytes) -> None:
        self._mapping[: len(data)] = data

    def get(self, size: int) -> bytes:
        return self._mapping[:size]

    def close(self) -> None:
        # Locked pages that the driver does not let go are not given back either.
        if self._driver.raw("cuMemHostUnregister", self.address) != 0:
            _kept_for_good.append(self)


_kept_for_good: list[object] = []  # what a device may still touch


@dataclass
class Export:
    """How memory goes to the daemon. `parts`: (address, bytes) of each allocation, for VMM_FD."""

    kind: Kind
    gpu: Gpu
    offset: int = 0
    handle: bytes = b""
    parts: list[tuple[int, int]] = field(default_factory=list)


class Gpu:
    def __init__(self, driver: _Driver, ordinal: int) -> None:
        self.driver = driver
        self.ordinal = ordinal
        device = c_int()
        driver.call("cuDeviceGet", byref(device), ordinal)
        self.device = device.value
        uuid = ctypes.create_string_buffer(16)
        driver.call("cuDeviceGetUuid", uuid, self.device)
        self.uuid = uuid.raw
        context = c_void_p()
        # Kept until the process ends: pools and words live in it.
        driver.call("cuDevicePrimaryCtxRetain", byref(context), self.device)
        self._context = context

    def has(self, attribute: int) -> bool:
        value = c_int()
        got = self.driver.raw("cuDeviceGetAttribute", byref(value), attribute, self.device)
        return got == 0 and value.value != 0

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self.driver.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.driver.raw("cuCtxPopCurrent", byref(c_void_p()))

    # ---- small copies ------------------------------------------------------------------------

    def read(self, address: int, size: int, deadline: float) -> bytes:
        """On a stream of its own, so that it waits for nothing that others have queued; at most
        until the deadline: GPU_TIMEOUT. At most a page."""
        with self._pinned() as pinned:
            self._run("cuMemcpyDtoHAsync", deadline, pinned, pinned.address, address, size)
            return pinned.get(size)

    def write(self, address: int, data: bytes, deadline: float) -> None:
        """As read; one that has timed out may still happen."""
        with self._pinned() as pinned:
            pinned.put(data)
            self._run("cuMemcpyHtoDAsync", deadline, pinned, address, pinned.address, len(data))

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[_Pinned]:
        with self.current():
            pinned = _Pinned(self.driver)
            try:
                yield pinned
            finally:
                if pinned not in _kept_for_good:
                    pinned.close()

    def _run(self, name: str, deadline: float, used: Optional[object], *arguments: Any) -> None:
        stream = c_void_p()
        self.driver.call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        try:
            self.driver.call(name, *arguments, stream)
            while True:
                state = self.driver.raw("cuStreamQuery", stream)
                if state != _NOT_READY or time.monotonic() >= deadline:
                    break
                time.sleep(_POLL_SECONDS)
            if state != 0 and used is not None:
                _kept_for_good.append(used)  # whatever is wrong, the copy may not have ended
            if state == _NOT_READY:
                raise KvferryError(
                    Code.DEADLINE_EXCEEDED,
                    "GPU_TIMEOUT",
                    "work of a moment has not ended in time: the GPU is busy or stuck",
                )
            if state != 0:
                raise self.driver.error(state, name)
        finally:
            self.driver.raw("cuStreamDestroy", stream)

    # ---- memory ------------------------------------------------------------------------------

    def allocate(self, size: int, timeout: float) -> DeviceMemory:
        if not self.has(_VMM_SUPPORTED) or not self.has(_FD_SUPPORTED):
            raise KvferryError(
                Code.UNIMPLEMENTED,
                "VMM_UNSUPPORTED",
                "the device has no memory that is shared so: allocate with cudaMalloc and hand it "
                "over with export_tensor",
                "device",
            )
        return DeviceMemory(self, size, time.monotonic() + timeout)

    def _retain(self, address: int) -> Optional[int]:
        """A reference to the allocation there, to be released; None where nothing is mapped."""
        handle = c_uint64()
        result = self.driver.raw("cuMemRetainAllocationHandle", byref(handle), address)
        if result == _INVALID_VALUE:
            return None
        if result != 0:
            raise self.driver.error(result, "cuMemRetainAllocationHandle")
        return handle.value

    def _covers(self, handle: int, address: int) -> bool:
        other = self._retain(address)
        if other is None:
            return False
        self.driver.raw("cuMemRelease", other)
        return other == handle

    def export_part(self, address: int) -> int:
        """A descriptor of the allocation that is mapped there."""
        with self.current():
            handle = self._retain(address)
            if handle is None:
                raise invalid(
                    "POINTER_NOT_EXPORTABLE", "the memory has been unmapped meanwhile", "pointer"
                )
            try:
                fd = c_int(-1)
                self.driver.call("cuMemExportToShareableHandle", byref(fd), handle, _HANDLE_FD, 0)
            finally:
                self.driver.raw("cuMemRelease", handle)
        fcntl.fcntl(fd.value, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        return fd.value

    def describe_legacy(self, pointer: int, size: int) -> Export:
        base, whole = c_uint64(), c_size_t()
        self.driver.call("cuMemGetAddressRange", byref(base), byref(whole), pointer)
        left = whole.value - (pointer - base.value)
        if size > left:
            raise invalid(
                "POOL_TOO_SMALL",
                f"the allocation ends after {left} bytes: tensors of several allocations are "
                "several pools",
                "bytes",
            )
        handle = _Handle64()
        result = self.driver.raw("cuIpcGetMemHandle", byref(handle), base.value)
        if result != 0:
            more = (
                "; this device has no CUDA IPC: use alloc_device_pool"
                if result == _NOT_SUPPORTED
                else ""
            )
            raise self.driver.error(result, "cuIpcGetMemHandle", more, "pointer")
        return Export(Kind.IPC, self, pointer - base.value, handle.value())

    def describe_mapped(self, pointer: int, size: int) -> Export:
        out = Export(Kind.VMM_FD, self)
        at = pointer
        while at < pointer + size:
            handle = self._retain(at)
            if handle is None:
                if at != pointer:
                    raise invalid(
                        "POOL_TOO_SMALL",
                        f"the mapped range ends after {at - pointer} bytes",
                        "bytes",
                    )
                raise invalid(
                    "POINTER_NOT_EXPORTABLE",
                    "device memory that CUDA neither shares by IPC nor lets be exported, as what "
                    "was opened from another process: use cudaMalloc or alloc_device_pool",
                    "pointer",
                )
            try:
                if self._add_mapping(out, handle, at, pointer, size):
                    return out
            finally:
                self.driver.raw("cuMemRelease", handle)
            address, length = out.parts[-1]
            at = address + length
        return out

    def _add_mapping(self, out: Export, handle: int, at: int, pointer: int, size: int) -> bool:
        """True if the export is complete: by one fabric handle."""
        properties, granularity = _Properties(), c_size_t()
        self.driver.call("cuMemGetAllocationPropertiesFromHandle", byref(properties), handle)
        self.driver.call("cuMemGetAllocationGranularity", byref(granularity), byref(properties), 0)
        by_fd = properties.handle_types & _HANDLE_FD != 0
        if not by_fd and not properties.handle_types & _HANDLE_FABRIC:
            raise invalid(
                "POINTER_NOT_EXPORTABLE",
                "memory mapped with cuMemMap from an allocation that asked for no shareable "
                "handle, as PyTorch's expandable_segments and sleep modes may make it: allocate "
                "the KV cache with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, make the "
                "allocation with "
                "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, or use alloc_device_pool",
                "pointer",
            )
        step = max(1, granularity.value)
        begin = at - at % step
        end = begin + step
        for _ in range(_MAX_GRANULES):
            if begin < step or not self._covers(handle, begin - step):
                break
            begin -= step
        for _ in range(_MAX_GRANULES):
            if not self._covers(handle, end):
                break
            end += step
        if at == pointer:
            out.offset = pointer - begin
            out.kind = Kind.VMM_FD if by_fd else Kind.FABRIC
        if out.kind is Kind.FABRIC or not by_fd:
            if at != pointer or end < pointer + size:
                raise invalid(
                    "POOL_PARTS",
                    "the range lies in several allocations that have fabric handles only: export "
                    "each as a pool of its own, or let them allow POSIX file descriptors too",
                    "bytes",
                )
            fabric = _Handle64()
            result = self.driver.raw(
                "cuMemExportToShareableHandle", byref(fabric), handle, _HANDLE_FABRIC, 0
            )
            if result != 0:
                raise self.driver.error(
                    result,
                    "cuMemExportToShareableHandle",
                    "; fabric handles need an IMEX channel (kvferryctl doctor tells); memory that "
                    "also allows POSIX file descriptors needs none",
                    "pointer",
                )
            out.handle = fabric.value()
            return True
        if len(out.parts) == _MAX_PARTS:
            raise invalid(
                "POOL_PARTS",
                f"the range lies in more than {_MAX_PARTS} allocations: export it as several pools",
                "bytes",
            )
        out.parts.append((begin, end - begin))
        return False


class DeviceMemory:
    """Cleared memory of a device that goes to the daemon as a descriptor. Owns its mapping."""

    def __init__(self, gpu: Gpu, size: int, deadline: float) -> None:
        self._gpu = gpu
        self._driver = driver = gpu.driver
        self.address = 0
        self._handle = 0
        self._mapped = False
        self.bytes = 0
        properties = _Properties()
        properties.type = 1
        properties.handle_types = _HANDLE_FD
        properties.location = _Location(1, gpu.device)
        properties.rdma = 1 if gpu.has(_RDMA_VMM) else 0
        try:
            with gpu.current():
                granularity = c_size_t()
                driver.call(
                    "cuMemGetAllocationGranularity", byref(granularity), byref(properties), 0
                )
                step = granularity.value
                self.bytes = (size + step - 1) // step * step
                handle, address = c_uint64(), c_uint64()
                driver.call("cuMemCreate", byref(handle), self.bytes, byref(properties), 0)
                self._handle = handle.value
                driver.call("cuMemAddressReserve", byref(address), self.bytes, 0, 0, 0)
                self.address = address.value
                driver.call("cuMemMap", self.address, self.bytes, 0, self._handle, 0)
                self._mapped = True
                access = _Access(properties.location, 3)
                driver.call("cuMemSetAccess", self.address, self.bytes, byref(access), 1)
                gpu._run("cuMemsetD8Async", deadline, None, self.address, 0, self.bytes)
        except KvferryError as error:
            # What is still being cleared must stay mapped.
            if error.reason != "GPU_TIMEOUT":
                self.close()
            raise

    def close(self) -> None:
        """A process that is ending may have lost the driver by now: errors mean nothing here."""
        with contextlib.suppress(KvferryError), self._gpu.current():
            if self._mapped:
                self._driver.raw("cuMemUnmap", self.address, self.bytes)
            if self.address:
                self._driver.raw("cuMemAddressFree", self.address, self.bytes)
            if self._handle:
                self._driver.raw("cuMemRelease", self._handle)
        self._mapped, self.address, self._handle = False, 0, 0


class DeviceWords:
    """The control page's words as streams of one device reach them."""

    def __init__(self, gpu: Gpu, words: Words) -> None:
        self._gpu = gpu
        self._words = words
        self._host = _memory.address_of(words.mapping)
        address = c_uint64()
        with gpu.current():
            gpu.driver.call("cuMemHostRegister", self._host, len(words.mapping), 1 | 2)
            try:
                gpu.driver.call("cuMemHostGetDevicePointer", byref(address), self._host, 0)
            except KvferryError:
                gpu.driver.raw("cuMemHostUnregister", self._host)
                raise
        self._address = address.value

    def close(self) -> None:
        with contextlib.suppress(KvferryError), self._gpu.current():
            self._gpu.driver.raw("cuMemHostUnregister", self._host)

    def write(self, stream: int, word: int, value: int) -> None:
        self._queue("cuStreamWriteValue64", stream, word, 0, self._words.timeline_words, value)

    def wait(self, stream: int, word: int, value: int) -> None:
        first = self._words.timeline_words
        self._queue("cuStreamWaitValue64", stream, word, first, self._words.done_words, value)

    def _queue(self, name: str, stream: int, word: int, first: int, count: int, value: int) -> None:
        if not 0 <= word < count:
            raise invalid("WORD_OUT_OF_RANGE", "no such word", "word")
        if not self._gpu.driver.has(name) or not self._gpu.has(_STREAM_WORDS):
            raise KvferryError(
                Code.UNIMPLEMENTED,
                "STREAM_WORDS_UNSUPPORTED",
                "driver or device cannot use 64-bit words in streams: use an event, or synchronise "
                "and signal from the CPU",
            )
        with self._gpu.current():
            self._gpu.driver.call(name, stream, self._address + (first + word) * 8, value, 0)


class Gpus:
    """The driver that KVFERRY_CUDA_DRIVER names, or libcuda.so.1. FAILED_PRECONDITION
    NO_CUDA_DRIVER."""

    def __init__(self) -> None:
        self._driver = _Driver(os.environ.get("KVFERRY_CUDA_DRIVER") or "libcuda.so.1")
        self._lock = threading.Lock()
        self._open: dict[int, Gpu] = {}

    def gpu(self, ordinal: int) -> Gpu:
        count = c_int()
        self._driver.call("cuDeviceGetCount", byref(count))
        if not 0 <= ordinal < count.value:
            raise invalid("NO_SUCH_DEVICE", f"this process sees {count.value} GPUs", "device")
        with self._lock:
            if ordinal not in self._open:
                self._open[ordinal] = Gpu(self._driver, ordinal)
            return self._open[ordinal]

    def _attribute(self, which: int, pointer: int) -> Optional[int]:
        value = c_uint64()  # attributes are of different widths, none above 64 bits
        if self._driver.raw("cuPointerGetAttribute", byref(value), which, pointer) != 0:
            return None
        return value.value

    def describe(self, pointer: int, size: int) -> Export:
        if size <= 0 or pointer + size >= 1 << 64:
            raise invalid("SIZE_INVALID", "not a size that memory can have", "bytes")
        if self._attribute(_IS_MANAGED, pointer):
            raise invalid(
                "POINTER_MANAGED",
                "managed memory cannot be shared between processes: allocate it with cudaMalloc or "
                "alloc_device_pool",
                "pointer",
            )
        kind = self._attribute(_MEMORY_TYPE, pointer)
        ordinal = self._attribute(_ORDINAL, pointer)
        if kind != 2 or ordinal is None:
            what = "pinned host memory" if kind is not None else "not memory that CUDA knows"
            raise invalid(
                "POINTER_NOT_DEVICE",
                f"{what}: host pools are made with alloc_tensor, alloc_array or alloc_pool; GPU "
                "pools need a pointer from cudaMalloc, cuMemMap or alloc_device_pool",
                "pointer",
            )
        gpu = self.gpu(ordinal & 0xFFFFFFFF)
        with gpu.current():
            # A driver that does not know the attribute has no such memory.
            if self._attribute(_MEMPOOL, pointer):
                raise invalid(
                    "POINTER_STREAM_ORDERED",
                    "memory of a stream-ordered allocator (cudaMallocAsync) has no handle for "
                    "other processes: allocate it with cudaMalloc or alloc_device_pool",
                    "pointer",
                )
            if self._attribute(_IPC_CAPABLE, pointer):
                return gpu.describe_legacy(pointer, size)
            return gpu.describe_mapped(pointer, size)

    def export_event(self, event: int) -> bytes:
        handle = _Handle64()
        with self.gpu(0).current():
            result = self._driver.raw("cuIpcGetEventHandle", byref(handle), event)
        if result == 0:
            return handle.value()
        error = self._driver.error(result, "cuIpcGetEventHandle", "", "event")
        if error.code is Code.INVALID_ARGUMENT:
            raise invalid(
                "EVENT_NOT_SHAREABLE",
                f"{error.message}; make it with cudaEventInterprocess | cudaEventDisableTiming",
                "event",
            )
        raise error
