"""The registry of a prefill server: SGLang's, and the tickets of its data-parallel groups."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from sglang.srt.disaggregation.base import BaseKVBootstrapServer
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

PATH = "/kvferry/ticket"
_MAX_GROUPS = 4096
_MAX_TEXT = 1024


class _Registry(CommonKVBootstrapServer):  # type: ignore[misc]
    def _setup_routes(self) -> None:
        super()._setup_routes()
        self._tickets: dict[int, dict[str, str]] = {}
        self.app.router.add_put(PATH, self._put)
        self.app.router.add_get(PATH, self._get)

    async def _put(self, request: web.Request) -> web.Response:
        # Who asks for it checks the proof; here it is kept only.
        try:
            data = await request.json()
            group = int(data["dp_rank"])
            entry = {"ticket": str(data["ticket"]), "proof": str(data["proof"])}
        except (KeyError, TypeError, ValueError):
            return web.Response(status=400)
        if not 0 <= group < _MAX_GROUPS or max(map(len, entry.values())) > _MAX_TEXT:
            return web.Response(status=400)
        self._tickets[group] = entry
        return web.Response()

    async def _get(self, request: web.Request) -> web.Response:
        try:
            entry = self._tickets.get(int(request.query["dp_rank"]))
        except (KeyError, ValueError):
            return web.Response(status=400)
        if entry is None:
            return web.Response(status=503, text="its ranks are not complete yet")
        return web.json_response(entry)


class KVBootstrapServer(BaseKVBootstrapServer):  # type: ignore[misc]
    """Not derived from SGLang's: its Rust server would take its place, and has no tickets."""

    def __init__(self, host: str, port: int) -> None:
        self._registry: Any = _Registry(host, port)

    def close(self) -> None:
        self._registry.close()
