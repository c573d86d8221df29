"""verifiers' tasksets, unmodified, in a Python of their own; the policy is reached through the gateway.

    controller: python verifiers_process.py tasks ─► rows
    attempt: verifiers server ── harness, runtime, tools, rewards ── OpenAI's API ─► gateway ─► turns

    family: verifiers    options: {python: V/bin/python, taskset: my_taskset, path: folder}

Its agents act, not our loop: the environment is `Driven`. Needs `uv` on PATH for harnesses, and the gateway
(`rollout.manager.gateway_*`). Source: verifiers 0.4.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k25_train.environments.adapters.messages import is_reward
from k25_train.environments.adapters.sources import Listed, need, one_of, read_object, read_seconds, read_text
from k25_train.environments.adapters.verifiers_server import list_tasks, server_of
from k25_train.environments.adapters.verifiers_wire import Trace, VerifiersWire
from k25_train.environments.base import Response, Task, Verdict, failed, scored
from k25_train.environments.environment import (
    Action,
    Endpoint,
    EnvironmentFaultError,
    Observation,
    Services,
    Tool,
)
from k25_train.environments.family import Options, read_range, user
from k25_train.errors import ConfigError

NAME = "verifiers"
CONFIG = {"agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}}
"""verifiers' `EnvConfig` unless options say otherwise: a chat with the taskset's tools, on this host."""


class VerifiersTasks(Listed[Mapping[str, Any]]):
    """Tasks of a taskset."""

    name = NAME

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `python` (with verifiers 0.4; required), `taskset` (required), `path` (folder that the
        taskset is in), `config` (JSON, over the default EnvConfig: harness, runtime, other roles), `address`
        (of a server that runs already), `workers` and `most` (processes of the server, episodes of each),
        `limit` (tasks that are read), `sampling` (JSON), `verbose` (true: what servers print is shown),
        `health_s`. Raises ConfigError."""
        need(NAME, options, "python", "/opt/verifiers/bin/python")
        need(NAME, options, "taskset", "my_taskset")
        given = Options(NAME, options)
        taskset = given.take("taskset", "my_taskset", read_text, "must name a taskset")
        config = given.take("config", "{}", read_object, "must be a JSON object")
        path = given.take("path", "", str, "must be a folder")
        self._setup: dict[str, Any] = {
            "python": given.take("python", "/opt/verifiers/bin/python", read_text, "must be a Python"),
            "path": str(Path(path).resolve()) if path else "",
            "config": {**CONFIG, **config, "taskset": {**config.get("taskset", {}), "id": taskset}},
            "address": given.take("address", "", str, "must be tcp://HOST:PORT"),
            "workers": given.take("workers", "4", read_range, "must be 1 or more")[-1],
            "most": given.take("most", "128", read_range, "must be 1 or more")[-1],
            "sampling": given.take("sampling", "{}", read_object, "must be a JSON object"),
            "verbose": given.take("verbose", "false", one_of("true", "false"), "must be true or false")
            == "true",
            "health_s": given.take("health_s", "60", read_seconds, "must be seconds above 0"),
        }
        self._limit = given.take("limit", "1000000", read_range, "must be 1 or more")[-1]
        given.end()

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """See `Listed`."""
        rows = list_tasks(self._setup, self._limit)
        if not rows:
            taskset = self._setup["config"]["taskset"]["id"]
            raise ConfigError(f"verifiers taskset {taskset}: it has no task\n  -> see its load()")
        return rows

    def asked(self, row: Mapping[str, Any]) -> object:
        """Its key, which verifiers derives from its content."""
        return row["key"]

    def make(self, key: str, row: Mapping[str, Any]) -> Task:
        """See `Listed`. Its messages are for people: what the policy sees is the harness's business."""
        return Task(
            key=key,
            family=f"{NAME}/{self._setup['config']['taskset']['id']}",
            messages=user(_shown(row["data"].get("prompt"))),
            judge="",
            environment=NAME,
            agent=(NAME, self._setup["config"]["taskset"]["id"]),
            setup={**self._setup, "task": row["data"]},
            thinking=True,
        )


class VerifiersEnvironment:
    """See `Driven`."""

    is_replayable = False
    tools: tuple[Tool, ...] = ()

    def __init__(self, task: Task, services: Services) -> None:
        self._task, self._setup = task, task.setup
        self._wire: VerifiersWire | None = None
        self._traces: list[Trace] = []
        self._why_not = "it was not played"
        """Why its rewards do not count; empty where they do."""

    async def reset(self) -> Observation:
        """Have a server, and see that it answers."""
        address = self._setup["address"]
        if not address:
            shared = {name: value for name, value in self._setup.items() if name != "task"}
            address = (await server_of(shared)).address
        self._wire = VerifiersWire(address)
        await self._wire.health(self._setup["health_s"])
        return Observation(messages=self._task.messages)

    async def step(self, action: Action) -> Observation:
        """Nobody calls it: its agents act."""
        raise EnvironmentFaultError(f"{self._task.key}: a verifiers taskset acts through the gateway alone")

    async def drive(self, endpoint: Endpoint) -> None:
        """Have the episode played. Raises EnvironmentFaultError where it does not end well by itself."""
        assert self._wire is not None, "it was reset"
        head, self._traces = await self._wire.run(
            self._setup["task"], endpoint.base_url, endpoint.model, self._setup["sampling"]
        )
        errors = [*(head.get("errors") or ()), *(each for trace in self._traces for each in trace.errors)]
        self._why_not = ""
        if not head.get("ok"):
            said = "; ".join(f"{each.get('type')}: {each.get('message')}"[:300] for each in errors[-2:])
            how = "it took too long" if head.get("is_timeout") else "the episode failed"
            self._why_not = f"{how}: {said}"
            raise self._wire.fault(
                "run", f"{how}: {said or 'without a word'}", "see the taskset and its runtime"
            )

    async def judge(self, response: Response) -> Verdict:
        """The mean over what the policy has played, each a weighted sum of rewards. An episode that ended
        early for want of room or turns, which is the policy's fault, has failed."""
        if self._why_not:
            return failed(f"ended early: {self._why_not}")
        played = [trace for trace in self._traces if trace.trainable]
        if not played:
            raise EnvironmentFaultError(f"{self._task.key}: the episode has no trace that the policy played")
        parts: dict[str, float] = {}
        reward = 0.0
        for trace in played:
            for name, each in trace.rewards.items():
                if not isinstance(each, Mapping) or not is_reward(each.get("score")):
                    raise EnvironmentFaultError(
                        f"{self._task.key}: its reward {name} is {each}\n  -> it has to be a finite number"
                    )
                reward += each["score"] * each.get("weight", 1.0) / len(played)
                parts[name] = parts.get(name, 0.0) + each["score"] / len(played)
        return scored(reward, parts)

    async def close(self) -> None:
        """Leave the server, which others share."""
        wire, self._wire = self._wire, None
        if wire is not None:
            # What a cancelled run has told the server goes out first.
            await asyncio.sleep(0)
            wire.close()


def _shown(prompt: object) -> str:
    if isinstance(prompt, str) and prompt:
        return prompt
    return json.dumps(prompt, ensure_ascii=False) if prompt else "(the taskset opens the conversation)"
