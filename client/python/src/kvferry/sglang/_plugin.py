"""Adds the backend's name to those that SGLang knows; run by SGLang in each of its processes."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

BACKEND = "kvferry"


def register() -> None:
    """The entry point, of group sglang.srt.plugins."""
    from sglang.srt.arg_groups.choices import add_disagg_transfer_backend_choices
    from sglang.srt.disaggregation import utils
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    known = {backend.name: backend.value for backend in utils.TransferBackend}
    # Values cannot be added to an enumeration, so it is replaced by a longer one.
    longer = enum.Enum(  # type: ignore[misc]
        "TransferBackend", {**known, "KVFERRY": BACKEND}, module=utils.__name__
    )
    add_disagg_transfer_backend_choices([BACKEND])
    HookRegistry.register(f"{utils.__name__}.TransferBackend", longer, HookType.REPLACE)
    HookRegistry.register(f"{utils.__name__}.get_kv_class", _get_kv_class, HookType.AROUND)


def _get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    from kvferry import sglang

    ours = {
        "manager": "KVManager",
        "sender": "KVSender",
        "receiver": "KVReceiver",
        "bootstrap_server": "KVBootstrapServer",
    }
    if transfer_backend.value != BACKEND or class_type.value not in ours:
        return original(transfer_backend, class_type)
    return getattr(sglang, ours[class_type.value])
