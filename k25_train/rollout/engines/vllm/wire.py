"""vLLM's routes and fields, as its release 0.32.0 has them.

| route | what for |
|---|---|
| `POST /inference/v1/generate` | token ids and images in; ids, log-probabilities, spans of versions out |
| `POST /pause?mode=keep\\|abort`, `/resume` | between two tokens |
| `POST /collective_rpc` | `k25_prepare` and `k25_reload` of our extension in every worker |
| `POST /reset_prefix_cache`, `/reset_encoder_cache` | keys, and features of images, of older weights |
| `POST /update_weight_version`, `GET /weight_info` | the label |
| `GET /metrics` | running and waiting requests |

The first needs `--enable-scale-out`, most others `VLLM_SERVER_DEV_MODE=1`; log-probabilities are the
model's own with `--logprobs-mode raw_logprobs`. `serve` sets all of these.
"""

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from k25_train.rollout.engines.base import (
    FinishReason,
    PauseMode,
    ProbeSequence,
    Request,
    VersionSpan,
)
from k25_train.rollout.engines.checks import Answer
from k25_train.rollout.engines.faults import FaultKind
from k25_train.rollout.engines.http_client import HttpClient
from k25_train.rollout.engines.image_types import data_uri
from k25_train.rollout.engines.metrics_text import gauge, highest
from k25_train.rollout.engines.seeds import seed_at
from k25_train.rollout.engines.wire import Counted

GENERATE = "/inference/v1/generate"
FORBIDDING_BIAS = -100.0
"""The lowest that vLLM takes: exp(-100) is nothing in float32."""
POSITION = "k25_position"
SEED = "k25_seed"
"""Keys of `sampling_params.extra_args`, which vLLM hands on unread; ours draws by them."""
COUNTED, KV_USE = ("running", "waiting"), "vllm:kv_cache_usage_perc"
FINISH_REASONS = {
    "stop": FinishReason.stop,
    "length": FinishReason.length,
    "abort": FinishReason.aborted,
}

_REMEDY = "serve with what `make engine` installs, through `python -m k25_train.rollout serve`"


class VllmWire:
    """Speaks to one vLLM server."""

    def __init__(self, http: HttpClient, *, seconds: float) -> None:
        """`seconds`: time limit of everything but generating."""
        self._http, self._seconds = http, seconds
        self._num_experts = 0

    async def prepare(self) -> int:
        """As `Wire.prepare`: the extension has to be there, and a label that is a step's number."""
        for worker in await self._rpc("k25_prepare"):
            self._num_experts = int(worker["experts"])
        return await self._version()

    async def generate(self, request: Request) -> Answer:
        """As `Wire.generate`."""
        answer = await self._http.post_unlimited(GENERATE, generate_body(request), subject=request.key)
        return self._parsed(request.key, answer, answer_of)

    async def pause(self, mode: PauseMode) -> None:
        """As `Wire.pause`."""
        await self._http.post(f"/pause?mode={mode.value}", seconds=self._seconds)

    async def resume(self) -> None:
        """As `Wire.resume`."""
        await self._http.post("/resume", seconds=self._seconds)

    async def load(self, folder: Path, version: int) -> None:
        """As `Wire.load`."""
        for worker in await self._rpc("k25_reload", str(folder), str(version)):
            if int(worker["experts"]) != self._num_experts:
                raise self._no_weights(
                    f"{worker['experts']} of {self._num_experts} layers of experts were prepacked"
                )
        await self.adopt(version)

    async def adopt(self, version: int) -> None:
        """As `Wire.adopt`. The label is set last, so that weights are never older than it says."""
        answer = await self._http.post(
            "/reset_prefix_cache?reset_running_requests=true", seconds=self._seconds
        )
        if not (isinstance(answer, Mapping) and answer.get("success")):
            raise self._no_weights(f"/reset_prefix_cache answered {json.dumps(answer)}")
        await self._http.post("/reset_encoder_cache", seconds=self._seconds)
        await self._http.post("/update_weight_version", {"new_version": str(version)}, seconds=self._seconds)
        if (label := await self._version()) != version:
            raise self._no_weights(f"says version {label} after version {version} was committed")

    async def probe(self, sequence: ProbeSequence, subject: str) -> tuple[list[int], list[float]]:
        """As `Wire.probe`."""
        body = probe_body(sequence)
        answer = await self._http.post(GENERATE, body, subject=subject, seconds=self._seconds)
        return self._parsed(subject, answer, probed_of)

    async def counts(self) -> Counted:
        """As `Wire.counts`."""
        text = await self._http.get_text("/metrics", seconds=self._seconds)
        running, waiting, kv_use = self._parsed("/metrics", text, _counted)
        return Counted(await self._version(), running, waiting, kv_use)

    async def _version(self) -> int:
        answer = await self._http.get("/weight_info", seconds=self._seconds)
        return self._parsed("/weight_info", answer, lambda found: int(found["weight_version"]))

    async def _rpc(self, method: str, *arguments: str) -> list[dict[str, Any]]:
        body = {"method": method, "args": list(arguments)}
        subject = f"/collective_rpc {method}"
        answer = await self._http.post("/collective_rpc", body, subject=subject, seconds=self._seconds)
        return self._parsed(subject, answer, lambda found: [dict(each) for each in found["results"]])

    def _no_weights(self, answered: str) -> Exception:
        return self._http.faults.error(
            FaultKind.weights,
            "new weights",
            answered,
            "push them again, or rebuild the engine; one that `serve` starts has the extension it needs",
        )

    def _parsed[T](self, subject: str, answer: Any, parse: Callable[[Any], T]) -> T:
        return self._http.parsed(subject, answer, parse, "vLLM", _REMEDY)


def generate_body(request: Request) -> dict[str, Any]:
    """What is posted for a response."""
    sampling, position = request.sampling, len(request.response_ids)
    parameters = {
        "max_tokens": sampling.max_tokens - position,
        "temperature": sampling.temperature,
        "seed": seed_at(sampling.seed, position),
        "logprobs": 0,
        # The model's own ends are none of a request's.
        "ignore_eos": True,
        "stop_token_ids": list(sampling.stop_ids),
        "logit_bias": {str(token): FORBIDDING_BIAS for token in sampling.forbidden_ids},
        "detokenize": False,
        "extra_args": {SEED: sampling.seed, POSITION: position},
    }
    return {
        # Of this try alone: an earlier one may still be running.
        "request_id": f"{request.key}.{uuid.uuid4().hex[:8]}",
        "token_ids": [*request.prompt_ids, *request.response_ids],
        "content_parts": _parts(request.images),
        "sampling_params": parameters,
        "return_token_ids": True,
    }


def probe_body(sequence: ProbeSequence) -> dict[str, Any]:
    """What is posted for the log-probabilities of a sequence."""
    return {
        "token_ids": list(sequence.token_ids),
        "content_parts": _parts(sequence.images),
        "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
        "return_token_ids": True,
    }


def answer_of(answer: Any) -> Answer:
    """What was answered to `generate_body`. Raises LookupError, TypeError or ValueError for another form."""
    (choice,) = answer["choices"]
    token_ids = list(choice["token_ids"] or ())
    # What was aborted before its first token has none.
    content = (choice["logprobs"] or {}).get("content") or ()
    if any(of["token_id"] != token for of, token in zip(content, token_ids, strict=False)):
        raise ValueError("log-probabilities are of other tokens")
    return Answer(
        prompt_ids=list(answer["prompt_token_ids"]),
        token_ids=token_ids,
        logprobs=[of["logprob"] for of in content],
        spans=[
            VersionSpan(int(span["version"]), span["start"], span["end"])
            for span in choice["weight_versions"] or ()
        ],
        finish_reason=FINISH_REASONS[choice["finish_reason"]],
    )


def probed_of(answer: Any) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of an answer to `probe_body`; raises as `answer_of`."""
    ids = list(answer["prompt_token_ids"])
    of_tokens = zip(answer["prompt_logprobs"][1:], ids[1:], strict=True)
    return ids, [of[str(token)]["logprob"] for of, token in of_tokens]


def _parts(images: tuple[bytes, ...]) -> list[dict[str, str]]:
    return [{"type": "image_url", "url": data_uri(image)} for image in images]


def _counted(metrics: str) -> tuple[int, int, float]:
    running, waiting = (gauge(metrics, f"vllm:num_requests_{name}") for name in COUNTED)
    return running, waiting, highest(metrics, KV_USE)
