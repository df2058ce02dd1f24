"""The connector in the scheduler's process. It talks to no daemon: tickets come from the workers,
ids and secrets are drawn here, and each step's metadata carries the calls to the ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from vllm.v1.request import RequestStatus

from kvferry.errors import KvferryError
from kvferry.types import TransferKey, from_text, to_text
from kvferry.vllm._config import Settings
from kvferry.vllm._steps import Coming, Handshake, News, Receive, Send, Step, tables_of

logger = logging.getLogger("vllm.kvferry")

_DONE = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass
class _Prefill:
    request: Any
    key: TransferKey
    slices: bool = False  # some were told to the workers


@dataclass
class _Decode:
    coming: Coming
    num_tokens: int  # that the other side has
    receiving: bool = False


class SchedulerSide:
    """One thread: the scheduler's. Nothing here blocks or knows a daemon."""

    def __init__(self, settings: Settings, kv_cache_config: Any) -> None:
        self._settings = settings
        self._config = kv_cache_config
        self._ticket = ""
        self._cards: dict[int, bytes] = {}
        self._step = Step()
        self._prefills: dict[str, _Prefill] = {}
        self._decodes: dict[str, _Decode] = {}

    # ---- the instance ------------------------------------------------------------------------

    def set_handshakes(self, handshakes: Mapping[Any, Handshake]) -> None:
        self._take_cards({h.rank: h.card for h in handshakes.values()})
        self._ticket = next((h.ticket for h in handshakes.values() if h.ticket), self._ticket)

    def take_news(self, news: News) -> None:
        if news.cards:
            self._ticket = ""
            self._take_cards(news.cards)
        self._ticket = news.ticket or self._ticket

    def _take_cards(self, cards: dict[int, bytes]) -> None:
        self._cards.update(cards)
        # On one node the daemon has them all anyway.
        if self._settings.spans_nodes and len(self._cards) == self._settings.rank_count:
            self._step.join = [self._cards[rank] for rank in sorted(self._cards)]

    # ---- requests ----------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        params = request.kv_transfer_params
        if not params:
            return
        if params.get("do_remote_decode"):
            self._prefills[request.request_id] = _Prefill(request, self._new_key(params))
        elif params.get("do_remote_prefill"):
            decode = self._decode_of(request)
            if decode is None:
                params["do_remote_prefill"] = False  # the prompt is computed here
                return
            self._decodes[request.request_id] = decode
            # Renewed by the daemons from now on, however long this request waits for its turn.
            self._step.claims.append(decode.coming)

    def _new_key(self, params: dict[str, Any]) -> TransferKey:
        instance = self._settings.instance
        if self._settings.trust_client_params and "kvferry_transfer_id" in params:
            try:  # a router's own, so that decode may come first
                return TransferKey(
                    from_text(params["kvferry_transfer_id"]),
                    from_text(params["kvferry_secret"]),
                    instance,
                )
            except (KeyError, TypeError, ValueError, KvferryError):
                logger.warning("kvferry: a request's own transfer id or secret is malformed")
        return TransferKey(os.urandom(16), os.urandom(16), instance)

    def _decode_of(self, request: Any) -> Optional[_Decode]:
        params = request.kv_transfer_params
        if not self._settings.trust_client_params:
            logger.warning(
                "kvferry: %s asks for a remote prefill; its parameters are not trusted "
                "(trust_client_params), so the prompt is computed here",
                request.request_id,
            )
            return None
        try:
            key = TransferKey(
                from_text(params["kvferry_transfer_id"]),
                from_text(params["kvferry_secret"]),
                params["remote_engine_id"],
            )
            coming = Coming(request.request_id, key, str(params["kvferry_ticket"]))
            return _Decode(coming, int(params["remote_num_tokens"]))
        except (KeyError, TypeError, ValueError, KvferryError):
            logger.warning(
                "kvferry: the transfer parameters of %s are malformed", request.request_id
            )
            return None

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[Optional[int], bool]:
        """May be asked many times; changes nothing."""
        if request.request_id in self._prefills and not self._ticket:
            return None, False  # there is nothing to hand to the decode side yet
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.receiving:
            return 0, False
        count = min(decode.num_tokens, request.num_prompt_tokens) - num_computed_tokens
        return (count, True) if count > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external: int) -> None:
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.receiving:
            return  # the second call, after the load
        # Also after a failure it is not tried again: this side computes then.
        request.kv_transfer_params["do_remote_prefill"] = False
        if num_external == 0:
            # All is here: nobody waits for a load, so none is ever reported.
            self._step.declines.append(decode.coming)
            del self._decodes[request.request_id]
            return
        decode.receiving = True
        end = min(decode.num_tokens, request.num_prompt_tokens)
        tables = tables_of(self._config.select_transfer_block_ids(blocks.get_block_ids()))
        self._step.receives.append(
            Receive(
                request.request_id,
                decode.coming.key,
                decode.coming.ticket,
                end,
                end - num_external,
                tables,
            )
        )

    def forget_received(self, request_ids: Iterable[str]) -> None:
        """Loads that every rank has reported."""
        for request_id in request_ids:
            self._decodes.pop(request_id, None)

    def request_finished(
        self, request: Any, block_ids: Any
    ) -> tuple[bool, Optional[dict[str, Any]]]:
        """Whether the blocks stay until they are reported, and what the router carries."""
        request_id = request.request_id
        decode = self._decodes.pop(request_id, None)
        if decode is not None:
            if not decode.receiving:
                self._step.declines.append(decode.coming)
            elif request.status == RequestStatus.FINISHED_ABORTED:
                # vLLM keeps the blocks until the load is reported, which it is when nothing writes
                # them any more. A load that has been reported is not known to the workers.
                self._step.given_up.append(request_id)
        prefill = self._prefills.pop(request_id, None)
        if prefill is None:
            return False, None
        count = request.num_prompt_tokens
        if request.status not in _DONE or request.num_computed_tokens < count:
            if prefill.slices:
                self._step.taken_back.append(request_id)
            return prefill.slices, None
        tables = tables_of(self._config.select_transfer_block_ids(block_ids))
        self._step.sends.append(Send(request_id, prefill.key, count, count, tables, True))
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self._settings.instance,
            "remote_num_tokens": count,
            "kvferry_ticket": self._ticket,
            "kvferry_transfer_id": to_text(prefill.key.id_bytes),
            "kvferry_secret": to_text(prefill.key.secret),
        }

    # ---- steps -------------------------------------------------------------------------------

    def build_step(self, output: Any) -> Step:
        step, self._step = self._step, Step()
        for request_id in output.preempted_req_ids or ():
            prefill = self._prefills.get(request_id)
            if prefill is not None and prefill.slices:
                step.preempted.append(request_id)
        if self._settings.chunked_push:
            self._add_chunks(step, output)
        return step

    def _add_chunks(self, step: Step, output: Any) -> None:
        """Windows move on while a prompt is computed, and blocks behind them are given away: groups
        with one are offered at the end only, when what the other side needs is what is left."""
        computed = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens))
        for request_id, before in computed.items():
            prefill = self._prefills.get(request_id)
            if prefill is None:
                continue
            block_ids = output.kv_connector_block_state.get_block_ids(request_id)
            if block_ids is None:
                continue
            prefill.slices = True
            total = prefill.request.num_prompt_tokens
            end = min(before + output.num_scheduled_tokens[request_id], total)
            tables = tables_of(self._config.select_transfer_block_ids(block_ids))
            step.sends.append(Send(request_id, prefill.key, total, end, tables, False))
