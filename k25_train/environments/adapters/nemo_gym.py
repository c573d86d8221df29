"""NeMo-Gym's resource servers over HTTP; a row of their JSON lines is a task.

    verify: POST /seed_session{row} ─► POST /TOOL{arguments} … ─► POST /verify{row, response} ─► reward
    step:   POST /reset{row} ─► POST /step{row, response} ─► observation, reward, terminated …

    family: nemo_gym    options: {url: 'http://host:8000', tasks: data/train.jsonl, style: verify}

A cookie tells the server which attempt asks. Source: nemo-gym 0.4, `base_resources_server.py`,
`resources_servers/gymnasium/base.py` and the agents that come with it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from k25_train.environments.adapters.messages import is_reward, refusal, result, verdict_of
from k25_train.environments.adapters.responses_form import items_of, messages_of, response_of, tools_of
from k25_train.environments.adapters.server import EnvironmentServer
from k25_train.environments.adapters.sources import (
    Listed,
    need,
    one_of,
    read_seconds,
    read_text,
    read_url,
    reward_rule,
)
from k25_train.environments.base import Response, Task, Verdict
from k25_train.environments.environment import Action, Observation, Services, Tool, ToolCall
from k25_train.environments.family import Options, read_range
from k25_train.errors import ConfigError

NAME = "nemo_gym"
OWN_ROUTES = frozenset({"verify", "seed_session", "aggregate_metrics", "mcp", "reset", "step", "close"})
"""Routes of servers that no tool may have for a name."""


class NemoGymTasks(Listed[Mapping[str, Any]]):
    """Rows of a file, judged by a server."""

    name = NAME

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `url` and `tasks` (JSON lines; both required), `style` (verify | step), `reward` (sum |
        last, of steps), `max_turns`, `patience_s`. Raises ConfigError."""
        need(NAME, options, "url", "http://127.0.0.1:8000")
        need(NAME, options, "tasks", "data/train.jsonl")
        given = Options(NAME, options)
        url = given.take("url", "http://127.0.0.1:8000", read_url, "must be http://HOST:PORT")
        self._path = Path(given.take("tasks", "data/train.jsonl", read_text, "must be a file"))
        self._setup = {
            "url": url,
            "style": given.take("style", "verify", one_of("verify", "step"), "must be verify or step"),
            "reward": reward_rule(given),
            "patience_s": given.take("patience_s", "120", read_seconds, "must be seconds above 0"),
        }
        self._max_turns = given.take("max_turns", "100", read_range, "must be 1 or more")[-1]
        given.end()

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """See `Listed`."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"options.tasks={self._path} of the family {NAME}: {error}\n"
                "  -> name a file of JSON lines, as `ng_prepare_data` of nemo-gym makes it"
            ) from error
        return [self._row(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def asked(self, row: Mapping[str, Any]) -> object:
        """What the policy is asked."""
        return json.dumps(row["responses_create_params"], sort_keys=True)

    def make(self, key: str, row: Mapping[str, Any]) -> Task:
        """See `Listed`."""
        messages, media = messages_of(row["responses_create_params"]["input"])
        return Task(
            key=key,
            family=NAME,
            messages=messages,
            media=media,
            judge="",
            environment=NAME,
            setup={**self._setup, "row": row},
            max_turns=self._max_turns,
            thinking=True,
        )

    def _row(self, number: int, line: str) -> Mapping[str, Any]:
        try:
            row = json.loads(line)
            messages_of(row["responses_create_params"]["input"])
            names = {
                each["function"]["name"] for each in tools_of(row["responses_create_params"].get("tools"))
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{self._path}, line {number}: {type(error).__name__}: {error}\n"
                '  -> a line is {"responses_create_params": {"input": …, "tools": …}, …}'
            ) from error
        if names & OWN_ROUTES:
            raise ConfigError(
                f"{self._path}, line {number}: a tool is called {', '.join(sorted(names & OWN_ROUTES))}, as a"
                " route of servers is\n  -> give it another name"
            )
        found: Mapping[str, Any] = row
        return found


class NemoGymEnvironment:
    """See `Environment`."""

    is_replayable = False

    def __init__(self, task: Task, services: Services) -> None:
        self._task, self._setup = task, task.setup
        self._row: Mapping[str, Any] = task.setup["row"]
        self._asked: Mapping[str, Any] = self._row["responses_create_params"]
        self._server = EnvironmentServer(
            "NeMo-Gym",
            self._setup["url"],
            timeout_s=services.tool_timeout_s,
            patience_s=self._setup["patience_s"],
        )
        self._steps = self._setup["style"] == "step"
        self._outputs: list[Mapping[str, Any]] = []
        self._num_turns = 0
        self._rewards: list[float] = []
        self.tools: tuple[Tool, ...] = tools_of(self._asked.get("tools"))

    async def reset(self) -> Observation:
        """The row's prompt; behind it, what a server that steps shows first."""
        if not self._steps:
            await self._server.post("/seed_session", self._row)
            return Observation(messages=self._task.messages, media=self._task.media)
        answer = await self._server.post("/reset", self._row)
        if not isinstance(answer, Mapping) or not isinstance(answer.get("observation"), str | None):
            raise self._server.form("POST /reset", "has no observation", answer)
        return Observation(
            messages=(*self._task.messages, *_user(answer.get("observation"))), media=self._task.media
        )

    async def step(self, action: Action) -> Observation:
        """What comes of its calls; with `style: step`, of the whole turn."""
        self._num_turns += 1
        turn = items_of(action, self._num_turns)
        if self._steps:
            return await self._step(action, turn)
        self._outputs += turn
        told = refusal(action, [each["function"]["name"] for each in self.tools])
        if told is None and not action.calls:
            return Observation(done=True)
        seen = told or Observation(messages=tuple([await self._called(call) for call in action.calls]))
        self._outputs += [_output(each) for each in seen.messages]
        return seen

    async def judge(self, response: Response) -> Verdict:
        """The server's verdict, or what the rewards of steps amount to."""
        if self._steps:
            return verdict_of(self._rewards, self._setup["reward"])
        whole = response_of(self._task.key, self._outputs, self._asked.get("tools"))
        answer = await self._server.post("/verify", {**self._row, "response": whole})
        if not isinstance(answer, Mapping) or not is_reward(answer.get("reward")):
            raise self._server.form("POST /verify", "has no reward that is a finite number", answer)
        return verdict_of([float(answer["reward"])], "last")

    async def close(self) -> None:
        """End the attempt there, where the server knows how to."""
        try:
            if self._steps:
                # Many servers have no such route: they close an attempt by themselves when it is over.
                await self._server.request("POST", "/close", {}, again=False)
        finally:
            await self._server.close()

    async def _called(self, call: ToolCall) -> Mapping[str, Any]:
        """What a tool answers, its refusals included: the policy reads them."""
        _, content = await self._server.request(
            "POST", f"/{quote(call.name, safe='')}", call.arguments, again=False
        )
        return result(call, content.decode(errors="replace"))

    async def _step(self, action: Action, turn: Sequence[Mapping[str, Any]]) -> Observation:
        whole = response_of(f"{self._task.key}_{self._num_turns}", turn, self._asked.get("tools"))
        answer = await self._server.post("/step", {**self._row, "response": whole}, again=False)
        sound = isinstance(answer, Mapping) and is_reward(answer.get("reward", 0.0))
        if not sound or not isinstance(answer.get("observation"), str | None):
            raise self._server.form("POST /step", "has no observation, or no finite reward", answer)
        self._rewards.append(float(answer.get("reward", 0.0)))
        if answer.get("terminated") or answer.get("truncated"):
            return Observation(done=True)
        info = answer.get("info") or {}
        outputs = {str(each["call_id"]): str(each["output"]) for each in info.get("tool_outputs", ())}
        results = [result(call, outputs.get(call.id, "no result")) for call in action.calls]
        messages = (*results, *_user(answer.get("observation")))
        if not messages:
            raise self._server.form("POST /step", "goes on, but shows nothing", answer)
        return Observation(messages=messages)


def _user(text: str | None) -> tuple[Mapping[str, Any], ...]:
    return ({"role": "user", "content": text},) if text else ()


def _output(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message that the policy got to see, in the list of outputs."""
    if message["role"] != "tool":
        return {"type": "message", "role": message["role"], "content": message["content"]}
    return {
        "type": "function_call_output",
        "call_id": message["tool_call_id"],
        "output": message["content"],
    }
