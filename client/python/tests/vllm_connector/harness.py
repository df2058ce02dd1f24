"""An engine without a GPU: vLLM's real scheduler, output aggregator and connector driver, and a
model runner that writes to the pages what a model would have to, and checks what it reads."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

BLOCK, HEADS, DIM, LAYERS, WINDOW = 16, 4, 8, 4, 32
SECONDS = 10.0
init_none_hash(sha256)


def model_folder(folder: Path) -> str:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HEADS * DIM,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


class Rank:
    """One worker: its connector, driven as vLLM's model runner does it, and its pages."""

    def __init__(self, config: VllmConfig, caches: KVCacheConfig, tp: int) -> None:
        self.connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, caches)
        self.heads = HEADS // tp
        self.first_head = config.parallel_config.rank * self.heads
        client = self.connector.worker.client
        self.pages: dict[str, torch.Tensor] = {}
        for number, tensor in enumerate(caches.kv_cache_tensors):
            shape = (len(tensor.layers), caches.num_blocks, self.heads, BLOCK, 2 * DIM)
            flat = client.alloc_tensor(f"kv{number}", shape, torch.float32)
            # Hybrid groups overlay each other: the same bytes serve a layer of each.
            for i, name in enumerate(tensor.layers):
                self.pages[name] = flat[i]
        for alias, name in _aliases(caches).items():
            self.pages[alias] = self.pages[name]
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        self.driver = ActiveKVConnector(config, self.pages)

    def value(self, layer: int, token: int, position: int) -> torch.Tensor:
        """[heads, K|V]: what a model writes for this token."""
        head = torch.arange(self.first_head, self.first_head + self.heads).view(-1, 1)
        at = torch.arange(2 * DIM).view(1, -1)
        mixed = (layer * 7919 + token * 104729 + position * 1299709 + head * 31 + at * 3) % 65521
        return mixed.float()


def _aliases(caches: KVCacheConfig) -> dict[str, str]:
    """Layers of further groups share the pages of the first one's."""
    first = caches.kv_cache_groups[0].layer_names
    return {
        name: first[i]
        for group in caches.kv_cache_groups[1:]
        for i, name in enumerate(group.layer_names)
    }


class Engine:
    def __init__(
        self,
        folder: Path,
        socket: str,
        engine_id: str,
        *,
        tp: int = 1,
        hybrid: bool = False,
        blocks: int = 64,
        max_batched: int = 2048,
        policy: str = "fail",
        **extra: Any,
    ) -> None:
        model = ModelConfig(
            model=model_folder(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=1024,
        )

        def config(rank: int) -> VllmConfig:
            parallel = ParallelConfig()
            # Set behind the checks, which ask for as many GPUs.
            parallel.tensor_parallel_size = tp
            parallel.world_size = tp
            parallel.rank = rank
            out = VllmConfig(
                model_config=model,
                cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
                scheduler_config=SchedulerConfig(
                    max_num_seqs=16,
                    max_num_batched_tokens=max_batched,
                    max_model_len=1024,
                    enable_chunked_prefill=True,
                    is_encoder_decoder=False,
                    async_scheduling=False,
                ),
                device_config=DeviceConfig("cpu"),
                kv_transfer_config=KVTransferConfig(
                    kv_connector="KvferryConnector",
                    kv_connector_module_path="kvferry.vllm",
                    kv_role="kv_both",
                    engine_id=engine_id,
                    kv_load_failure_policy=policy,
                    kv_connector_extra_config={
                        "socket": socket,
                        "kv_packing": "per_token",
                        "trust_client_params": True,
                        "fingerprint": "fake",
                        **extra,
                    },
                ),
            )
            out.parallel_config = parallel
            # Behind the check for a platform, of which there is none here.
            out.scheduler_config.disable_hybrid_kv_cache_manager = False
            out.cache_config.num_gpu_blocks = blocks
            return out

        names = [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
        spec = {"block_size": BLOCK, "head_size": DIM, "dtype": torch.float32}
        spec["num_kv_heads"] = HEADS // tp
        full = FullAttentionSpec(**spec)
        groups = [KVCacheGroupSpec(names, full)]
        if hybrid:
            window = SlidingWindowSpec(sliding_window=WINDOW, **spec)
            groups = [KVCacheGroupSpec(names[:2], full), KVCacheGroupSpec(names[2:], window)]
        page = full.page_size_bytes
        layers = groups[0].layer_names
        tensor = KVCacheTensor(
            size=page * blocks * len(layers),
            layers=layers,
            layer_stride=page * blocks,
            block_stride=page,
        )
        self.caches = KVCacheConfig(blocks, [tensor], groups)
        self.config = config(0)
        self.scheduler = Scheduler(
            self.config, self.caches, StructuredOutputManager(self.config), BLOCK, BLOCK
        )
        self.ranks = [Rank(config(rank), self.caches, tp) for rank in range(tp)]
        self.aggregator = KVOutputAggregator(tp)
        connector = self.scheduler.get_kv_connector()
        connector.set_xfer_handshake_metadata_pp_aware(
            {(0, i): r.connector.get_handshake_metadata() for i, r in enumerate(self.ranks)}
        )
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, list[list[int]]] = {}
        self.outputs: dict[str, Any] = {}
        self.reported: list[tuple[str, str]] = []
        self.computed: dict[str, int] = {}  # tokens that were run here
        self.loads: dict[str, Any] = {}  # what the connector was told to load

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: dict[str, Any] | None,
        max_tokens: int = 4,
    ) -> Request:
        sampling = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        sampling.update_from_generation_config({}, 999)
        request = Request(
            request_id,
            list(prompt),
            sampling,
            None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.requests[request_id] = request
        self.tokens[request_id] = list(prompt)
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.loads.update({r.request_id: r for r in output.kv_connector_metadata.receives})
        for request_id, count in output.num_scheduled_tokens.items():
            self.computed[request_id] = self.computed.get(request_id, 0) + count
        results = []
        for rank in self.ranks:
            # One process holds several engines here; each driver has its own connector.
            if output.total_num_scheduled_tokens == 0:
                # A copy, as comes from another process: the aggregator changes what it gets.
                results.append(copy.copy(rank.driver.no_forward(output)))
                continue
            rank.driver.pre_forward(output)
            sampled = self._forward(rank, output)
            rank.driver.finish_forward()
            ids = list(output.num_scheduled_tokens)
            kv = rank.driver.post_forward(output.finished_req_ids)
            results.append(
                ModelRunnerOutput(
                    req_ids=ids,
                    req_id_to_index={r: i for i, r in enumerate(ids)},
                    sampled_token_ids=[sampled[r] for r in ids],
                    kv_connector_output=kv,
                )
            )
        for request_id in output.num_scheduled_tokens:
            self.tokens[request_id] += results[0].sampled_token_ids[
                results[0].req_id_to_index[request_id]
            ]
        result = self.aggregator.aggregate(results)
        kv = result.kv_connector_output
        for kind in ("finished_sending", "finished_recving", "failed_recving"):
            self.reported += [(kind, r) for r in getattr(kv, kind, None) or ()]
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                if one.finish_reason is not None:
                    self.outputs[one.request_id] = one

    def _forward(self, rank: Rank, output: Any) -> dict[str, list[int]]:
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens))
        sampled = {}
        for request_id, count in output.num_scheduled_tokens.items():
            tables = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            tokens = self.tokens[request_id]
            begin, end = starts[request_id], starts[request_id] + count
            for group, table in zip(self.caches.kv_cache_groups, tables):
                window = getattr(group.kv_cache_spec, "sliding_window", None) or end
                for name in group.layer_names:
                    layer = int(name.split(".")[2])
                    pages = rank.pages[name]
                    for position in range(max(0, begin + 1 - window), end):
                        page = pages[table[position // BLOCK], :, position % BLOCK]
                        value = rank.value(layer, tokens[position], position)
                        if position >= begin:
                            page.copy_(value)
                        elif not torch.equal(page, value):
                            raise AssertionError(
                                f"{request_id}: layer {layer}, position {position}: not what was "
                                "computed"
                            )
            done = end >= len(tokens)
            sampled[request_id] = [(sum(tokens[-3:]) * 31 + end) % 1000] if done else []
        return sampled

    def finish(self, request_id: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    @property
    def idle(self) -> bool:
        return not self.scheduler.requests

    def close(self) -> None:
        for rank in self.ranks:
            rank.driver.kv_connector.shutdown()


def run(until: Callable[[], bool], *engines: Engine) -> None:
    """Steps the engines until a condition holds."""
    limit = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < limit, "the condition does not come about"
        for engine in engines:
            engine.step()
