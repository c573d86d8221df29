"""A server that speaks vLLM's wire and misbehaves in one way after another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from k25_train.rollout.engines.vllm.wire import GENERATE

Twist = Callable[[dict[str, Any]], Any]
"""From a right answer to what is answered instead."""


class BadEngine:
    """Right answers, but for what is set to go wrong."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        """Of the next requests for a response, before right ones."""
        self.twist: Twist = lambda answer: answer
        """What becomes of an answer; bytes go out as they are."""
        self.hangs: set[str] = set()
        """Routes that never answer."""
        self.breaks_off = False
        """Whether the connection closes in the middle of an answer."""
        self.versions = ["0"]
        """Labels that it tells, the last one again and again."""
        self.worker: dict[str, Any] = {"experts": 2}
        """What the extension answers."""
        self.num_requests = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post(GENERATE, self._generate), web.get("/weight_info", self._version)])
        app.add_routes([web.post("/collective_rpc", self._rpc), web.get("/metrics", self._metrics)])
        for path in ("/pause", "/resume", "/reset_prefix_cache", "/reset_encoder_cache"):
            app.router.add_post(path, self._done)
        app.router.add_post("/update_weight_version", self._done)
        return app

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        self.num_requests += 1
        await self._maybe_hang(http)
        body = await http.json()
        if self.statuses:
            return web.json_response({"error": "out of memory"}, status=self.statuses.pop(0))
        answer = self.twist(right_answer(body))
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if not self.breaks_off:
            return web.Response(body=data, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(http)
        await response.write(data[: len(data) // 2])
        assert http.transport is not None
        http.transport.close()
        return response

    async def _version(self, http: web.Request) -> web.Response:
        await self._maybe_hang(http)
        label = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
        return web.json_response({"weight_version": label})

    async def _rpc(self, http: web.Request) -> web.Response:
        await self._maybe_hang(http)
        return web.json_response({"results": [self.worker]})

    async def _metrics(self, _: web.Request) -> web.Response:
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return web.Response(text="".join(f"vllm:{name} 0\n" for name in names))

    async def _done(self, http: web.Request) -> web.Response:
        await self._maybe_hang(http)
        return web.json_response({"success": True})

    async def _maybe_hang(self, http: web.Request) -> None:
        if http.path in self.hangs:
            await asyncio.sleep(3600)


def right_answer(body: dict[str, Any]) -> dict[str, Any]:
    """A response of as many tokens 7 as may be."""
    ids, count = body["token_ids"], body["sampling_params"]["max_tokens"]
    choice = {
        "token_ids": [7] * count,
        "logprobs": {"content": [{"token_id": 7, "logprob": -1.0} for _ in range(count)]},
        "weight_versions": [{"version": "0", "start": 0, "end": count}],
        "finish_reason": "length",
    }
    probed = [None, *({str(token): {"logprob": -1.0}} for token in ids[1:])]
    return {"prompt_token_ids": ids, "prompt_logprobs": probed, "choices": [choice]}
