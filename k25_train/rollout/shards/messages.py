"""What passes between the first rank and its shards, as records (`records.py`): JSON and arrays, nothing that
could run.

    first rank ──► begin   what the shard is built from            hello, built                     ◄── shard
                   work    a response to go on with                record    of a response, in order
                   generated, refused                              generate  a request for an engine
                   version of the engines' weights                 done, failed
                   alive, drain                                    alive     with figures
"""

import dataclasses
from collections.abc import Mapping
from typing import get_origin, get_type_hints

import numpy as np

from k25_train.environments.base import Task, Verdict
from k25_train.rollout.branches import Branch
from k25_train.rollout.engines.base import (
    FinishReason,
    Generated,
    Request,
    Sampling,
    VersionSpan,
)
from k25_train.rollout.records import Record
from k25_train.rollout.trajectory import Ended, Response
from k25_train.rollout.work import Round, Work

Arrays = dict[str, np.ndarray]
_TUPLES = [name for name, kind in get_type_hints(Task).items() if get_origin(kind) is tuple]
"""Fields of a task that JSON has as lists."""
_OF_BRANCH = ("token_ids", "logprobs", "versions")
_OF_RESPONSE = [
    each.name for each in dataclasses.fields(Response) if each.name not in ("branches", "ended", "verdict")
]
"""Its numbers, all of them: what a shard goes on from is what the first rank has."""


def work_message(number: int, work: Work) -> Record:
    """A response to go on with; `number` names it in answers."""
    arrays: Arrays = {}
    task = dataclasses.asdict(work.task) | {"media": _put(arrays, "task", work.task.media)}
    response = work.response
    branches = []
    for index, branch in enumerate(response.branches):
        arrays |= {f"branch{index}.{name}": getattr(branch, name) for name in _OF_BRANCH}
        branches.append({"media": list(branch.media), "num_shared": branch.num_shared})
    header = {
        "kind": "work",
        "number": number,
        "task": task,
        "group": work.group,
        "sample": work.sample,
        "seed": work.seed,
        "source": work.source,
        "allowed": [work.allowed.number, work.allowed.cap],
        "response": {name: getattr(response, name) for name in _OF_RESPONSE}
        | {"ended": response.ended, "verdict": response.verdict.as_json() if response.verdict else None},
        "branches": branches,
        "media": list(work.media),
    }
    _put(arrays, "seen", tuple(work.media.values()))
    return Record(header, arrays)


def work_of(message: Record) -> Work:
    """What `work_message` wrote."""
    header, arrays = message.header, message.arrays
    task = dict(header["task"])
    task["media"] = _take(arrays, "task", task["media"])
    task |= {name: tuple(task[name]) for name in _TUPLES}
    kept = dict(header["response"])
    ended, verdict = kept.pop("ended"), kept.pop("verdict")
    branches = [
        Branch(
            **{name: arrays[f"branch{index}.{name}"] for name in _OF_BRANCH},
            media=tuple(each["media"]),
            num_shared=each["num_shared"],
        )
        for index, each in enumerate(header["branches"])
    ]
    seen = _take(arrays, "seen", len(header["media"]))
    return Work(
        task=Task(**task),
        group=header["group"],
        sample=header["sample"],
        seed=header["seed"],
        source=header["source"],
        allowed=Round(number=header["allowed"][0], cap=header["allowed"][1]),
        response=Response(
            branches=branches,
            ended=Ended(ended) if ended else None,
            verdict=Verdict.from_json(verdict) if verdict else None,
            **kept,
        ),
        media=dict(zip(header["media"], seen, strict=True)),
    )


def record_message(number: int, record: Record) -> Record:
    """A record of the response of a work."""
    return Record({"kind": "record", "number": number, "record": dict(record.header)}, record.arrays)


def record_of(message: Record) -> Record:
    """What `record_message` wrote."""
    return Record(message.header["record"], message.arrays)


def request_message(number: int, request: Request) -> Record:
    """A request for an engine."""
    arrays: Arrays = {
        "prompt_ids": np.array(request.prompt_ids, np.int32),
        "response_ids": np.array(request.response_ids, np.int32),
    }
    header = {
        "kind": "generate",
        "number": number,
        "key": request.key,
        "images": _put(arrays, "image", request.images),
        "sampling": dataclasses.asdict(request.sampling),
    }
    return Record(header, arrays)


def request_of(message: Record) -> Request:
    """What `request_message` wrote."""
    header, arrays = message.header, message.arrays
    sampling = dict(header["sampling"])
    for name in ("stop_ids", "forbidden_ids"):
        sampling[name] = tuple(sampling[name])
    return Request(
        key=header["key"],
        prompt_ids=tuple(arrays["prompt_ids"].tolist()),
        images=_take(arrays, "image", header["images"]),
        response_ids=tuple(arrays["response_ids"].tolist()),
        sampling=Sampling(**sampling),
    )


def generated_message(number: int, generated: Generated) -> Record:
    """What an engine has answered."""
    header = {
        "kind": "generated",
        "number": number,
        "spans": [list(span) for span in generated.spans],
        "finish_reason": generated.finish_reason.value,
    }
    names = ("prompt_ids", "token_ids", "logprobs")
    return Record(header, {name: np.asarray(getattr(generated, name)) for name in names})


def generated_of(message: Record) -> Generated:
    """What `generated_message` wrote."""
    return Generated(
        prompt_ids=message.arrays["prompt_ids"],
        token_ids=message.arrays["token_ids"],
        logprobs=message.arrays["logprobs"],
        spans=tuple(VersionSpan(*span) for span in message.header["spans"]),
        finish_reason=FinishReason(message.header["finish_reason"]),
    )


def _put(arrays: Arrays, name: str, files: tuple[bytes, ...]) -> int:
    """Files as arrays; how many they are."""
    arrays |= {f"{name}.{number}": np.frombuffer(file, np.uint8) for number, file in enumerate(files)}
    return len(files)


def _take(arrays: Mapping[str, np.ndarray], name: str, count: int) -> tuple[bytes, ...]:
    return tuple(arrays[f"{name}.{number}"].tobytes() for number in range(count))
