"""SGLang's routes and fields. **Not run against a real SGLang**, which needs a GPU: against a stub.

Source: `docs/advanced_features/sglang_for_rl.md` (067bfe93), `python/sglang/srt/managers/io_struct.py`
(001067ff), `srt/sampling/sampling_params.py` (00c17caf) and `srt/utils/weight_versions.py` (19f93835) of
github.com/sgl-project/sglang, releases 0.5.2x of autumn 2026; older ones have no spans of versions, and their
answers are refused.

| route | what for |
|---|---|
| `POST /generate` | `input_ids` and `image_data` in; ids, log-probabilities and versions in `meta_info` |
| `POST /pause_generation` | `retract`, by which requests lose their keys and stay; `abort` |
| `POST /continue_generation` | on |
| `POST /update_weights_from_disk` | weights and label; with `flush_cache` all keys of older weights go |
| `POST /flush_cache`, `/update_weight_version` | the same for weights that came by another way |
| `GET /model_info` | the label |
| `GET /metrics` | running and waiting requests, with `--enable-metrics` |

Log-probabilities are the model's own where the server has SGLANG_RETURN_ORIGINAL_LOGPROB=1, and otherwise
those at the sampling temperature, without forbidden ids.
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

FORBIDDING_BIAS = -1e6
"""Far below every logit, and finite: JSON has no infinity."""
PAUSE_MODES = {PauseMode.keep: "retract", PauseMode.abort: "abort"}
FINISH_REASONS = {
    "stop": FinishReason.stop,
    "length": FinishReason.length,
    "abort": FinishReason.aborted,
}
COUNTED, KV_USE = ("sglang:num_running_reqs", "sglang:num_queue_reqs"), "sglang:token_usage"

_REMEDY = "use a release that has meta_info.weight_versions, with --weight-version 0 --enable-metrics"


class SglangWire:
    """Speaks to one SGLang server."""

    def __init__(self, http: HttpClient, *, seconds: float) -> None:
        """`seconds`: time limit of everything but generating."""
        self._http, self._seconds = http, seconds

    async def prepare(self) -> int:
        """As `Wire.prepare`."""
        return await self._version()

    async def generate(self, request: Request) -> Answer:
        """As `Wire.generate`."""
        answer = await self._http.post_unlimited("/generate", generate_body(request), subject=request.key)
        return self._parsed(request.key, answer, answer_of)

    async def pause(self, mode: PauseMode) -> None:
        """As `Wire.pause`."""
        await self._http.post("/pause_generation", {"mode": PAUSE_MODES[mode]}, seconds=self._seconds)

    async def resume(self) -> None:
        """As `Wire.resume`."""
        await self._http.post("/continue_generation", {}, seconds=self._seconds)

    async def load(self, folder: Path, version: int) -> None:
        """As `Wire.load`."""
        body = {
            "model_path": str(folder),
            "weight_version": str(version),
            "flush_cache": True,
            "abort_all_requests": False,
        }
        answer = await self._http.post("/update_weights_from_disk", body, seconds=self._seconds)
        if not (isinstance(answer, Mapping) and answer.get("success") is True):
            raise self._no_weights(f"/update_weights_from_disk answered {json.dumps(answer)}")
        await self._check_label(version)

    async def adopt(self, version: int) -> None:
        """As `Wire.adopt`."""
        await self._http.post("/flush_cache", {}, seconds=self._seconds)
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._http.post("/update_weight_version", body, seconds=self._seconds)
        await self._check_label(version)

    async def probe(self, sequence: ProbeSequence, subject: str) -> tuple[list[int], list[float]]:
        """As `Wire.probe`."""
        body = probe_body(sequence)
        answer = await self._http.post("/generate", body, subject=subject, seconds=self._seconds)
        return self._parsed(subject, answer, probed_of)

    async def counts(self) -> Counted:
        """As `Wire.counts`."""
        text = await self._http.get_text("/metrics", seconds=self._seconds)
        running, waiting, kv_use = self._parsed("/metrics", text, _counted)
        return Counted(await self._version(), running, waiting, kv_use)

    async def _check_label(self, version: int) -> None:
        if (label := await self._version()) != version:
            raise self._no_weights(f"says version {label} after version {version} was committed")

    async def _version(self) -> int:
        answer = await self._http.get("/model_info", seconds=self._seconds)
        return self._parsed("/model_info", answer, lambda found: int(found["weight_version"]))

    def _no_weights(self, answered: str) -> Exception:
        remedy = "push them again, or rebuild the engine; its log says why"
        return self._http.faults.error(FaultKind.weights, "new weights", answered, remedy)

    def _parsed[T](self, subject: str, answer: Any, parse: Callable[[Any], T]) -> T:
        return self._http.parsed(subject, answer, parse, "SGLang", _REMEDY)


def generate_body(request: Request) -> dict[str, Any]:
    """What is posted for a response."""
    sampling, position = request.sampling, len(request.response_ids)
    return {
        # Of this try alone: an earlier one may still be running.
        "rid": f"{request.key}.{uuid.uuid4().hex[:8]}",
        "input_ids": [*request.prompt_ids, *request.response_ids],
        "image_data": [data_uri(image) for image in request.images],
        "sampling_params": {
            "max_new_tokens": sampling.max_tokens - position,
            "temperature": sampling.temperature,
            "sampling_seed": seed_at(sampling.seed, position) >> 32,
            # The model's own ends are none of a request's, and the end is a token like others.
            "ignore_eos": True,
            "stop_token_ids": list(sampling.stop_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "logit_bias": {str(token): FORBIDDING_BIAS for token in sampling.forbidden_ids},
        },
        "return_logprob": True,
        "return_prompt_token_ids": True,
    }


def probe_body(sequence: ProbeSequence) -> dict[str, Any]:
    """What is posted for the log-probabilities of a sequence."""
    return {
        "input_ids": list(sequence.token_ids),
        "image_data": [data_uri(image) for image in sequence.images],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "return_prompt_token_ids": True,
    }


def answer_of(answer: Any) -> Answer:
    """What was answered to `generate_body`. Raises LookupError, TypeError or ValueError for another form."""
    meta = answer["meta_info"]
    # [log-probability, id, text] of each token: ids and log-probabilities cannot go apart.
    of_tokens = meta["output_token_logprobs"]
    return Answer(
        prompt_ids=_prompt_ids(answer),
        token_ids=[of[1] for of in of_tokens],
        logprobs=[of[0] for of in of_tokens],
        # A request that was aborted before its first token has an empty one.
        spans=[
            VersionSpan(int(span["version"]), span["start"], span["end"])
            for span in meta["weight_versions"]
            if span["end"] > span["start"]
        ],
        finish_reason=FINISH_REASONS[meta["finish_reason"]["type"]],
    )


def probed_of(answer: Any) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of an answer to `probe_body`; raises as `answer_of`. The first has none; ids
    of images are hashes there, and are taken from the prompt."""
    return _prompt_ids(answer), [of[0] for of in answer["meta_info"]["input_token_logprobs"][1:]]


def _prompt_ids(answer: Any) -> list[int]:
    found = answer.get("prompt_token_ids")
    return list(answer["meta_info"]["prompt_token_ids"] if found is None else found)


def _counted(metrics: str) -> tuple[int, int, float]:
    running, waiting = (gauge(metrics, name) for name in COUNTED)
    return running, waiting, highest(metrics, KV_USE)
