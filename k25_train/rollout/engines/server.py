"""Any engine behind vLLM's wire, so that an engine of ours is a process of its own, and can be killed.

    python -m k25_train.rollout serve CKPT --engine in_process     the in-process engine, in another process
    VllmWire ──HTTP──► these routes ──► Engine.generate, pause, stage + commit, probe, …

It answers what `vllm/wire.py` asks, in the words of vLLM 0.32.0, and no more. The position in the response
and the seed come in `extra_args`, so that tokens are drawn as if the engine was called directly.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from k25_train.rollout.engines.base import (
    Engine,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
    Sampling,
)
from k25_train.rollout.engines.image_types import of_data_uri
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.vllm.wire import FINISH_REASONS, GENERATE, POSITION, SEED

LARGEST_BODY = 2**30
"""Bytes of a request: images come in it."""
SHUTDOWN_S = 1.0
"""Seconds that requests have to end when the server does."""
REASON_NAMES = {reason: name for name, reason in FINISH_REASONS.items()}


class EngineServer:
    """Routes of one engine."""

    def __init__(self, engine: Engine, model: ServedModel) -> None:
        """`model`: what the engine serves."""
        self._engine, self._model = engine, model

    def app(self) -> web.Application:
        """The application, to be run with `handler_cancellation`: who hangs up is not generated for."""
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[_errors])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.post(GENERATE, self._generate),
                web.post("/pause", self._pause),
                web.post("/resume", self._resume),
                web.post("/collective_rpc", self._rpc),
                web.post("/reset_prefix_cache", self._nothing_cached),
                web.post("/reset_encoder_cache", self._nothing_cached),
                web.post("/update_weight_version", self._label),
                web.get("/weight_info", self._weight_info),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    async def _health(self, _: web.Request) -> web.Response:
        await self._engine.state()
        return web.Response()

    async def _generate(self, http: web.Request) -> web.Response:
        body = await http.json()
        if body["sampling_params"].get("prompt_logprobs") is not None:
            return web.json_response(await self._probe(body))
        request = request_of(body)
        return web.json_response(answer_to(request, await self._engine.generate(request)))

    async def _probe(self, body: dict[str, Any]) -> dict[str, Any]:
        sequence = ProbeSequence(tuple(body["token_ids"]), _images(body))
        (values,) = await self._engine.probe([sequence])
        ids = self._model.expanded(*sequence).tolist()
        of_tokens = zip(ids[1:], values.tolist(), strict=True)
        found = [None, *({str(token): {"logprob": value}} for token, value in of_tokens)]
        return {"prompt_token_ids": ids, "prompt_logprobs": found, "choices": []}

    async def _pause(self, http: web.Request) -> web.Response:
        await self._engine.pause(PauseMode(http.query["mode"]))
        return web.json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        await self._engine.resume()
        return web.json_response({"status": "resumed"})

    async def _rpc(self, http: web.Request) -> web.Response:
        body = await http.json()
        if body["method"] == "k25_reload":
            folder, label = body["args"]
            await self._engine.stage(Path(folder), int(label))
            await self._engine.commit(int(label))
        # Nothing is prepacked here.
        return web.json_response({"results": [{"experts": 0}]})

    async def _nothing_cached(self, _: web.Request) -> web.Response:
        """A commit has dropped everything already."""
        return web.json_response({"success": True})

    async def _label(self, http: web.Request) -> web.Response:
        label, version = (await http.json())["new_version"], (await self._engine.state()).version
        if label != str(version):
            raise ValueError(f"the weights are of version {version}, not {label}")
        return web.json_response({"success": True, "new_version": label})

    async def _weight_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": str((await self._engine.state()).version)})

    async def _metrics(self, _: web.Request) -> web.Response:
        state = await self._engine.state()
        gauges = {
            "num_requests_running": state.running,
            "num_requests_waiting": state.waiting,
            "kv_cache_usage_perc": state.kv_use,
        }
        return web.Response(text="".join(f"vllm:{name} {value}\n" for name, value in gauges.items()))


def request_of(body: dict[str, Any]) -> Request:
    """The request that a client has put into vLLM's form (`generate_body`)."""
    parameters = body["sampling_params"]
    position, ids = int(parameters["extra_args"][POSITION]), body["token_ids"]
    border = len(ids) - position
    return Request(
        key=body["request_id"],
        prompt_ids=tuple(ids[:border]),
        images=_images(body),
        response_ids=tuple(ids[border:]),
        sampling=Sampling(
            max_tokens=int(parameters["max_tokens"]) + position,
            temperature=float(parameters["temperature"]),
            seed=int(parameters["extra_args"][SEED]),
            stop_ids=tuple(parameters["stop_token_ids"]),
            forbidden_ids=tuple(int(token) for token in parameters["logit_bias"]),
        ),
    )


def answer_to(request: Request, generated: Generated) -> dict[str, Any]:
    """A response in vLLM's form."""
    token_ids = generated.token_ids.tolist()
    of_tokens = zip(token_ids, generated.logprobs.tolist(), strict=True)
    choice = {
        "index": 0,
        "token_ids": token_ids,
        "logprobs": {"content": [{"token_id": token, "logprob": value} for token, value in of_tokens]},
        "weight_versions": [
            {"version": str(span.version), "start": span.start, "end": span.stop} for span in generated.spans
        ],
        "finish_reason": REASON_NAMES[generated.finish_reason],
    }
    ids = [*generated.prompt_ids.tolist(), *request.response_ids]
    return {"request_id": request.key, "prompt_token_ids": ids, "choices": [choice]}


def _images(body: dict[str, Any]) -> tuple[bytes, ...]:
    return tuple(of_data_uri(part["url"]) for part in body.get("content_parts", ()))


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What is asked for wrongly is a 400, what fails a 500, both with the reason, as vLLM has them."""
    try:
        return await handler(request)
    except web.HTTPException:
        raise
    except (LookupError, TypeError, ValueError) as error:
        return web.json_response({"error": {"message": f"{type(error).__name__}: {error}"}}, status=400)
    except Exception as error:
        return web.json_response({"error": {"message": f"{type(error).__name__}: {error}"}}, status=500)


async def run_server(engine: Engine, model: ServedModel, host: str, port: int) -> web.AppRunner:
    """Start serving; `cleanup` of what is returned ends it. Raises OSError if the port is taken."""
    app = EngineServer(engine, model).app()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
