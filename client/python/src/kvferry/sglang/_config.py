"""The backend's settings, from the environment and SGLang's configuration."""

from __future__ import annotations

import hmac
import json
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_disagg, get_parallel, get_serving

from kvferry._rank import RankSettings
from kvferry.client import DEFAULT_SOCKET

VARIABLE = "KVFERRY_SGLANG_CONFIG"
_KEYS = {"socket", "key_file", "fingerprint", "instance", "instance_key_file"}
_NAME = re.compile(r"[^A-Za-z0-9._:+-]")
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class Settings(RankSettings):
    """Keys of the JSON object in the environment variable KVFERRY_SGLANG_CONFIG.

    key_file           16 bytes or more that all prefill and decode servers share, and nobody else:
                       what proves that a transfer is theirs is made from it and the request's room
                       number. A must
    socket             the daemon's, /run/kvferry/kvferry.sock
    fingerprint        of model, revision and cache type; both sides' must be equal (the model's
                       path and the type as SGLang has them)
    instance           name of this server, at most 32 characters (host and port)
    instance_key_file  16 bytes or more that the ranks of a server share; a must on several nodes
    """

    key: bytes = field(repr=False)

    @classmethod
    def of(cls, args: Any, mode: str, server_args: Any) -> Settings:
        given = json.loads(os.environ.get(VARIABLE) or "{}")
        if not isinstance(given, dict) or given.keys() - _KEYS:
            raise ValueError(f"kvferry: {VARIABLE} is a JSON object with keys of {sorted(_KEYS)}")
        if "key_file" not in given:
            raise ValueError(f"kvferry: {VARIABLE} lacks key_file, a secret of all servers")
        key = Path(given["key_file"]).read_bytes()
        if len(key) < _SHORTEST_KEY:
            raise ValueError(f"kvferry: key_file has less than {_SHORTEST_KEY} bytes")
        parallel = get_parallel()
        _check_parallel(parallel)
        dp = args.system_dp_rank if parallel.dp_size > 1 else parallel.attn_dp_rank
        instance = given.get("instance") or f"{socket.gethostname()[:20]}:{get_serving().port}"
        if parallel.nnodes > 1:
            # All ranks have to say the same, and a start's must not be another's.
            start = (instance, os.urandom(4).hex())
            instance = "-".join(parallel.world_group.broadcast_object(start, src=0))
        key_file = given.get("instance_key_file")
        return cls(
            # Data-parallel groups have KV cache of their own: each is an instance.
            instance=_NAME.sub("-", f"{mode}-{instance}-dp{dp or 0}"),
            rank=args.pp_rank * parallel.attn_tp_size + parallel.attn_tp_rank,
            rank_count=parallel.pp_size * parallel.attn_tp_size,
            tp_size=parallel.attn_tp_size,
            dp_group=0,
            spans_nodes=parallel.nnodes > 1,
            socket=given.get("socket", DEFAULT_SOCKET),
            fingerprint=given.get(
                "fingerprint", f"{server_args.model_path}/{args.kv_cache_dtype_str}"
            ),
            instance_key_file=None if key_file is None else Path(key_file),
            key=key,
        )

    def mac(self, text: str) -> bytes:
        return hmac.digest(self.key, text.encode(), "sha256")[:16]


def _check_parallel(parallel: Any) -> None:
    unsupported = {
        "attention context parallelism": parallel.attn_cp_size > 1,
        "decode context parallelism": parallel.attn_dcp_size > 1,
        "KV cache sharding": parallel.enable_kv_cache_sharding,
        "allocation policy prefill_complete": (
            get_disagg().disaggregation_decode_allocation_policy != "early"
        ),
    }
    for what, used in unsupported.items():
        if used:
            raise ValueError(f"kvferry: {what} is not supported yet")
