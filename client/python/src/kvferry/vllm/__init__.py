"""A vLLM connector: KV cache goes from prefill to decode engines through the node's kvferry daemon.

    --kv-transfer-config '{"kv_connector": "KvferryConnector",
        "kv_connector_module_path": "kvferry.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": {"kv_packing": "per_token", "trust_client_params": true}}'

For vLLM 0.33. Settings are in kvferry.vllm._config.Settings. The scheduler's side talks to no
daemon; the workers' never waits for a transfer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvferry.vllm._config import Settings
from kvferry.vllm._scheduler import SchedulerSide
from kvferry.vllm._steps import News, Step
from kvferry.vllm._worker import WorkerSide, handshakes_of

__all__ = ["KvferryConnector"]


class KvferryConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = Settings.of(vllm_config)
        self._scheduler: Any = None
        self._worker: Any = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(settings, kv_cache_config)
        else:
            heads = vllm_config.model_config.get_total_num_kv_heads()
            self._worker = WorkerSide(settings, kv_cache_config, heads)

    @property
    def worker(self) -> WorkerSide:
        """A worker's client, for engines that allocate KV cache in host memory of kvferry."""
        assert isinstance(self._worker, WorkerSide)
        return self._worker

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> Optional[str]:
        """Heads before tokens, so that the heads of a rank lie together in a block."""
        model = vllm_config.model_config
        return None if model is None or model.use_mla else "LBHNC"

    # ---- the scheduler's process -------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._scheduler.set_handshakes(handshakes_of(metadata))

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        self._scheduler.set_handshakes(handshakes_of(metadata))

    def on_new_request(self, request: Any) -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[Optional[int], bool]:
        answer: tuple[Optional[int], bool] = self._scheduler.get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        return answer

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """A request's own blocks are filled in all groups, so none is to be zeroed for it."""
        return tuple(self._kv_cache_config.transfer_group_ids)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        step: Step = self._scheduler.build_step(scheduler_output)
        return step

    def update_connector_output(self, connector_output: Any) -> None:
        news = connector_output.kv_connector_worker_meta
        if isinstance(news, News):
            self._scheduler.take_news(news)
        self._scheduler.forget_received(connector_output.finished_recving or ())

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, Optional[dict[str, Any]]]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: Iterable[list[int]]
    ) -> tuple[bool, Optional[dict[str, Any]]]:
        answer: tuple[bool, Optional[dict[str, Any]]] = self._scheduler.request_finished(
            request, tuple(block_ids)
        )
        return answer

    # ---- a worker's process ------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._worker.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        self._worker.unregister()

    def restore_kv_caches(self) -> None:
        self._worker.restore()

    def get_handshake_metadata(self) -> Any:
        return self._worker.handshake()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self._worker.before_blocks_go(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.start(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Slices are whole chunks: see wait_for_save."""

    def wait_for_save(self) -> None:
        self._worker.finish(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        sent, received, failed = self._worker.results(finished_req_ids)
        return KVConnectorTransferResults(
            finished_sending=sent, finished_recving=received, failed_recving=failed
        )

    def build_connector_worker_meta(self) -> Optional[News]:
        news: Optional[News] = self._worker.news()
        return news

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
