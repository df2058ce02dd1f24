"""An SGLang transfer backend: KV cache goes from prefill to decode servers through the kvferry
daemon of the node. For SGLang 0.5.23.

    export KVFERRY_SGLANG_CONFIG='{"key_file": "/etc/kvferry/sglang.key"}'
    sglang serve --disaggregation-mode prefill --disaggregation-transfer-backend kvferry ...

SGLang finds it by its plugin mechanism once this package is installed. Settings are in
kvferry.sglang._config.Settings.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KVBootstrapServer", "KVManager", "KVReceiver", "KVSender"]


def __getattr__(name: str) -> Any:
    # SGLang loads plugins before it can be imported itself.
    if name == "KVBootstrapServer":
        from kvferry.sglang._bootstrap import KVBootstrapServer

        return KVBootstrapServer
    if name in __all__:
        from kvferry.sglang import _conn

        return getattr(_conn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
