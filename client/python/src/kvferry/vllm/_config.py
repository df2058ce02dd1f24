"""The connector's settings, from vLLM's configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from kvferry._rank import RankSettings
from kvferry.client import DEFAULT_SOCKET
from kvferry.layout import KvPacking

_NAME = re.compile(r"[^A-Za-z0-9._:+-]")


@dataclass(frozen=True)
class Settings(RankSettings):
    """Keys of kv_connector_extra_config; times are seconds.

    socket               the daemon's, /run/kvferry/kvferry.sock
    kv_packing           how the attention backend lays K and V: per_token (FlashAttention,
                         FlashInfer), per_head_block (CPU attention), head_axis, separate. A must
                         but for MLA: shapes and strides do not tell
    trust_client_params  whether transfer parameters of requests are believed (false). Say so where
                         only the operator's router reaches this server
    chunked_push         offer each prefill chunk when it is computed (false: at the end)
    lease                how long pages are held for a decode side that has not come (the daemon's
                         default, 30 s)
    receive_wait         how long a load waits for its first slice (60)
    receive_deadline     and takes from there (300)
    fingerprint          of model, revision and cache type; both sides' must be equal
    instance_key_file    16 bytes or more that the ranks share; a must on several nodes
    """

    kv_packing: Optional[KvPacking]
    trust_client_params: bool
    chunked_push: bool
    lease: float
    receive_wait: float
    receive_deadline: float

    @classmethod
    def of(cls, vllm_config: Any) -> Settings:
        transfer = vllm_config.kv_transfer_config
        parallel = vllm_config.parallel_config
        model = vllm_config.model_config
        if getattr(parallel, "decode_context_parallel_size", 1) > 1:
            raise ValueError("kvferry: decode context parallelism is not supported yet")

        def get(key: str, default: Any) -> Any:
            return transfer.get_from_extra_config(key, default)

        packing = get("kv_packing", None)
        key_file = get("instance_key_file", None)
        cache = vllm_config.cache_config.cache_dtype
        return cls(
            instance=_NAME.sub("-", transfer.engine_id)[:48],
            rank=parallel.rank,
            rank_count=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
            tp_size=parallel.tensor_parallel_size,
            dp_group=0,  # each data-parallel engine is an instance of its own
            spans_nodes=bool(get("spans_nodes", getattr(parallel, "nnodes", 1) > 1)),
            socket=get("socket", DEFAULT_SOCKET),
            kv_packing=None if packing is None else KvPacking(packing),
            trust_client_params=bool(get("trust_client_params", False)),
            chunked_push=bool(get("chunked_push", False)),
            lease=float(get("lease", 0)),
            receive_wait=float(get("receive_wait", 60)),
            receive_deadline=float(get("receive_deadline", 300)),
            fingerprint=get(
                "fingerprint", f"{model.model}@{model.revision or ''}/{model.dtype}/{cache}"
            ),
            instance_key_file=None if key_file is None else Path(key_file),
        )
