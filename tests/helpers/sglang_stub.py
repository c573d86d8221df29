"""Any engine behind SGLang's wire, as its documentation and source have it; fields it has not are refused.

Source: see `k25_train/rollout/engines/sglang/wire.py`. It is the other side of that client, so it proves that
both read the same documents, and nothing of SGLang itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from k25_train.rollout.engines.base import Engine, Generated, PauseMode, ProbeSequence, Request, Sampling
from k25_train.rollout.engines.image_types import of_data_uri
from k25_train.rollout.engines.served_model import ServedModel

GENERATE_FIELDS = {
    "rid": str,
    "input_ids": list,
    "image_data": list,
    "sampling_params": dict,
    "return_logprob": bool,
    "logprob_start_len": int,
    "return_prompt_token_ids": bool,
}
"""Those of `GenerateReqInput` that are used."""
SAMPLING_FIELDS = {
    "max_new_tokens": int,
    "temperature": float,
    "sampling_seed": int,
    "ignore_eos": bool,
    "stop_token_ids": list,
    "no_stop_trim": bool,
    "skip_special_tokens": bool,
    "logit_bias": dict,
}
"""Those of `SamplingParams` that are used."""
PAUSE_MODES = {"retract": PauseMode.keep, "abort": PauseMode.abort}
REASONS = {"stop": "stop", "length": "length", "aborted": "abort"}


def check(body: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Refuse what the route does not know, or has another type for."""
    for name, value in body.items():
        if name not in fields or not isinstance(value, fields[name]):
            raise web.HTTPUnprocessableEntity(text=f"{name}={value!r}")


class SglangStub:
    """Routes of one engine."""

    def __init__(self, engine: Engine, model: ServedModel) -> None:
        self._engine, self._model = engine, model

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.add_routes(
            [
                web.post("/generate", self._generate),
                web.post("/pause_generation", self._pause),
                web.post("/continue_generation", self._resume),
                web.post("/update_weights_from_disk", self._update),
                web.get("/model_info", self._model_info),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    async def _generate(self, http: web.Request) -> web.Response:
        body = await http.json()
        check(body, GENERATE_FIELDS)
        check(body["sampling_params"], SAMPLING_FIELDS)
        images = tuple(of_data_uri(image) for image in body["image_data"])
        assert body["return_logprob"] and body["return_prompt_token_ids"]
        ids = tuple(body["input_ids"])
        meta: dict[str, Any] = {}
        if body.get("logprob_start_len", -1) == 0:
            (values,) = await self._engine.probe([ProbeSequence(ids, images)])
            expanded = self._model.expanded(ids, images).tolist()
            of_tokens = zip([None, *values.tolist()], expanded, strict=True)
            # At images the engine's own ids are hashes of their content.
            meta["input_token_logprobs"] = [
                [value, 10**9 + token if token == self._model.media_pad else token, None]
                for value, token in of_tokens
            ]
            return web.json_response({"prompt_token_ids": expanded, "meta_info": meta})
        found = await self._engine.generate(self._request(body, ids, images))
        return web.json_response(self._answer(found))

    def _request(self, body: dict[str, Any], ids: tuple[int, ...], images: tuple[bytes, ...]) -> Request:
        parameters = body["sampling_params"]
        assert parameters["ignore_eos"] and parameters["no_stop_trim"]
        return Request(
            key=body["rid"],
            prompt_ids=ids,
            images=images,
            sampling=Sampling(
                max_tokens=parameters["max_new_tokens"],
                temperature=parameters["temperature"],
                seed=parameters["sampling_seed"],
                stop_ids=tuple(parameters["stop_token_ids"]),
                forbidden_ids=tuple(
                    int(token) for token, bias in parameters["logit_bias"].items() if bias <= -1e5
                ),
            ),
        )

    def _answer(self, found: Generated) -> dict[str, Any]:
        token_ids = found.token_ids.tolist()
        versions = [
            {"version": str(span.version), "start": span.start, "end": span.stop} for span in found.spans
        ] or [{"version": "0", "start": 0, "end": 0}]
        meta = {
            "finish_reason": {"type": REASONS[found.finish_reason.value]},
            "prompt_tokens": len(found.prompt_ids),
            "completion_tokens": len(token_ids),
            "output_token_logprobs": [
                [value, token, None] for value, token in zip(found.logprobs.tolist(), token_ids, strict=True)
            ],
            "weight_versions": versions,
            "weight_version": versions[-1]["version"],
        }
        return {
            "text": "",
            "output_ids": token_ids,
            "prompt_token_ids": found.prompt_ids.tolist(),
            "meta_info": meta,
        }

    async def _pause(self, http: web.Request) -> web.Response:
        await self._engine.pause(PAUSE_MODES[(await http.json())["mode"]])
        return web.json_response({"status": "ok"})

    async def _resume(self, _: web.Request) -> web.Response:
        await self._engine.resume()
        return web.json_response({"status": "ok"})

    async def _update(self, http: web.Request) -> web.Response:
        body = await http.json()
        fields = {"model_path": str, "weight_version": str, "flush_cache": bool, "abort_all_requests": bool}
        check(body, fields)
        assert body["flush_cache"] and not body["abort_all_requests"]
        version = int(body["weight_version"])
        await self._engine.stage(Path(body["model_path"]), version)
        await self._engine.commit(version)
        return web.json_response({"success": True, "message": "Succeeded.", "num_paused_requests": 0})

    async def _model_info(self, _: web.Request) -> web.Response:
        version = (await self._engine.state()).version
        return web.json_response({"model_path": "stub", "weight_version": str(version)})

    async def _metrics(self, _: web.Request) -> web.Response:
        state = await self._engine.state()
        gauges = {
            "num_running_reqs": state.running,
            "num_queue_reqs": state.waiting,
            "token_usage": state.kv_use,
        }
        labels = '{model_name="stub",tp_rank="0"}'
        return web.Response(text="".join(f"sglang:{k}{labels} {float(v)}\n" for k, v in gauges.items()))
