"""Other systems' environments: attempts over their wires, and what is said of servers that fail."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from k25_train.compose.resolve import compose
from k25_train.environments.adapters.gymnasium import GymnasiumTasks, without_colours
from k25_train.environments.adapters.harbor import HarborTasks
from k25_train.environments.adapters.nemo_gym import NemoGymTasks
from k25_train.environments.adapters.openenv import OpenEnvTasks
from k25_train.environments.adapters.openenv_server import OpenEnvServer
from k25_train.environments.adapters.verifiers_server import server_of
from k25_train.environments.base import Response, Status, Task, Verdict, scored, unscored
from k25_train.environments.environment import Action, Environment, EnvironmentFaultError, Services, ToolCall
from k25_train.environments.family import Split, Tasks
from k25_train.environments.registry import make_environment, make_family
from k25_train.environments.sandboxes.base import Ending, Finished, SandboxLimits
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.environments.sandboxes.opening import open_sandboxes
from k25_train.errors import ConfigError
from k25_train.rl.workplace import open_workplace
from tests.helpers.gateway_parts import load_tiny_tokenizer

ANSWERED = Response(text="", num_tokens=1, ended=True)
LIMITS = SandboxLimits(
    cpus=1.0, memory_bytes=2**30, disk_bytes=2**26, processes=64, output_bytes=2**20, ttl_s=600
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Equal:
    """Judges by the reference; without one, not at all."""

    async def judge(self, task: Task, response: Response) -> Verdict:
        if "crash" in response.text:
            return unscored("judge raised: nothing")
        said = response.text.partition("</think>")[2].removesuffix("<|im_end|>")
        return scored(float(said == task.reference), {})


def services(timeout_s: float = 5.0, sandboxes: Any = None) -> Services:
    return Services(sandboxes=sandboxes or NoSandboxes(), judging=Equal(), tool_timeout_s=timeout_s)


def calls(name: str, *arguments: Mapping[str, Any]) -> Action:
    made = [
        ToolCall(id=f"functions.{name}:{at}", name=name, arguments=each) for at, each in enumerate(arguments)
    ]
    return Action(content="", calls=tuple(made))


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def routes(**handlers: Handler) -> web.Application:
    app = web.Application()
    for name, handler in handlers.items():
        app.router.add_route("*", f"/{name}", handler)
    return app


def always(body: str, status: int = 200) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(text=body, status=status, content_type="application/json")

    return handler


async def attempt(tasks: Tasks, given: Services, number: int = 0) -> Environment:
    return make_environment(tasks.task(Split.TRAIN, number), given)


def our_server(most: int = 4) -> web.Application:
    family = make_family("sums", None)
    server = OpenEnvServer(
        "sums", family.task, lambda task: make_environment(task, services()), most=most, idle_s=60
    )
    return server.app()


# --- OpenEnv, from both ends


def test_our_tasks_are_played_over_openenvs_wire() -> None:
    async def body() -> None:
        async with serving(our_server()) as url:
            environment = await attempt(OpenEnvTasks({"url": url}), services(), 3)
            seen = await environment.reset()
            asked = make_family("sums", None).task(Split.TRAIN, 3)
            assert asked.messages[0]["content"] in seen.messages[0]["content"]
            assert set(environment.tools[0]["function"]["parameters"]["properties"]) == {
                "content",
                "reasoning",
                "calls",
            }
            wrong = await environment.step(calls("step", {"answer": "7"}))
            assert "VALIDATION_ERROR" in wrong.messages[0]["content"] and not wrong.done
            other = await environment.step(calls("jump", {}))
            assert "there is no tool jump" in other.messages[0]["content"]
            last = await environment.step(calls("step", {"content": asked.reference}, {"content": "again"}))
            assert last.done and "Reward: 1." in last.messages[0]["content"]
            assert "it is over" in last.messages[1]["content"]
            assert (await environment.judge(ANSWERED)).reward == 1.0
            await environment.close()
            await environment.close()

    asyncio.run(body())


def test_an_attempt_waits_for_a_place_and_says_when_there_is_none() -> None:
    async def body() -> None:
        async with serving(our_server(most=1)) as url:
            first = await attempt(OpenEnvTasks({"url": url}), services())
            await first.reset()
            with pytest.raises(
                EnvironmentFaultError, match=r"(?s)CAPACITY_REACHED for 0.3 s.*max_concurrent"
            ):
                await (await attempt(OpenEnvTasks({"url": url, "patience_s": "0.3"}), services())).reset()
            waiting = await attempt(OpenEnvTasks({"url": url, "patience_s": "20"}), services(), 1)
            reset = asyncio.create_task(waiting.reset())
            await asyncio.sleep(0.2)
            assert not reset.done()
            await first.close()
            assert (await reset).messages
            await waiting.close()

    asyncio.run(body())


def test_a_verdict_that_there_is_not_is_an_error_and_no_reward() -> None:
    async def body() -> None:
        async with serving(our_server()) as url:
            environment = await attempt(OpenEnvTasks({"url": url}), services())
            await environment.reset()
            with pytest.raises(EnvironmentFaultError, match=r"SESSION_ERROR.*no verdict: judge raised"):
                await environment.step(calls("step", {"content": "crash"}))
            await environment.close()

    asyncio.run(body())


def test_attempts_over_http_have_names() -> None:
    async def body() -> None:
        async with serving(our_server(most=1)) as url, aiohttp.ClientSession(url) as client:
            asked = make_family("sums", None).task(Split.HELDOUT, 2)
            began = await (await client.post("/reset", json={"seed": 2, "split": "heldout"})).json()
            assert began["observation"]["messages"] == [dict(each) for each in asked.messages]
            assert (await client.post("/reset", json={})).status == 503
            key = began["metadata"]["episode_id"]
            state = await (await client.get("/state", params={"episode_id": key})).json()
            assert state == {"episode_id": asked.key, "step_count": 0}
            for wrong in ({"say": 1}, {"content": 1}, {"calls": [{}]}, None):
                answer = await client.post("/step", json={"episode_id": key, "action": wrong})
                assert answer.status == 422
            done = await client.post("/step", json={"episode_id": key, "action": {"content": "x"}})
            assert (await done.json())["reward"] == 0.0
            assert (await client.post("/step", json={"episode_id": key, "action": {}})).status == 404
            assert (await client.post("/reset", json={"seed": -1})).status == 422
            assert (await client.post("/reset", data="{")).status == 422
            assert (await client.post("/reset", json={"seed": 1})).status == 200

    asyncio.run(body())


HEALTHY = always('{"status": "healthy"}')
SCHEMA = always('{"action": {"properties": {"x": {}}}}')


def closes(answer: str | None) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        if answer is not None:
            await socket.send_str(answer)
            await socket.receive()
        await socket.close()
        return socket

    return handler


async def sleeps(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


@pytest.mark.parametrize(
    ("handlers", "said"),
    [
        ({"health": always("{}", 404)}, "GET /health: status 404"),
        ({"health": always('{"status": ')}, "GET /health: no JSON"),
        ({"health": always("[]")}, "GET /health: the answer has no status"),
        ({"health": sleeps}, "GET /health: no answer within 0.5 s"),
        ({"health": HEALTHY, "schema": always("{}")}, "GET /schema: the answer has no JSON schema"),
        ({"health": HEALTHY, "schema": SCHEMA}, "web socket /ws: status 404"),
        ({"health": HEALTHY, "schema": SCHEMA, "ws": closes(None)}, "reset: it closed the connection"),
        ({"health": HEALTHY, "schema": SCHEMA, "ws": closes('{"type"')}, "reset: no JSON"),
        ({"health": HEALTHY, "schema": SCHEMA, "ws": closes("[1]")}, "reset: the answer is no observation"),
        ({"health": HEALTHY, "schema": SCHEMA, "ws": sleeps}, "no answer within 0.5 s"),
        (
            {
                "health": HEALTHY,
                "schema": SCHEMA,
                "ws": closes('{"type": "error", "data": {"code": "FACTORY_ERROR"}}'),
            },
            "reset: FACTORY_ERROR",
        ),
    ],
)
def test_a_server_that_fails_is_named_with_request_and_remedy(
    handlers: dict[str, Handler], said: str
) -> None:
    async def body() -> None:
        async with serving(routes(**handlers)) as url:
            environment = await attempt(OpenEnvTasks({"url": url, "patience_s": "0.3"}), services(0.5))
            try:
                with pytest.raises(EnvironmentFaultError, match=rf"(?s){re.escape(url)}.*{said}.*->"):
                    await environment.reset()
            finally:
                await environment.close()

    asyncio.run(body())


def test_a_server_that_is_down_is_asked_again_for_a_while() -> None:
    async def body() -> None:
        environment = await attempt(
            OpenEnvTasks({"url": "http://127.0.0.1:9", "patience_s": "0.3"}), services()
        )
        with pytest.raises(EnvironmentFaultError, match=r"(?s)unreachable for 0.3 s.*start it"):
            await environment.reset()
        await environment.close()

    asyncio.run(body())


# --- NeMo-Gym


def gym_rows(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gym_row(number: int, **more: Any) -> dict[str, Any]:
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
    return {"responses_create_params": {"input": f"weather {number}?", "tools": [tool]}, **more}


def resources_server(seen: list[Any], reward: Any = 0.5) -> web.Application:
    """As nemo-gym 0.4 has it: a cookie, routes for tools, `/verify`."""

    async def seed(request: web.Request) -> web.StreamResponse:
        seen.append(await request.json())
        answer = web.json_response({})
        answer.set_cookie("session", "s1")
        return answer

    async def weather(request: web.Request) -> web.StreamResponse:
        city = (await request.json()).get("city")
        if request.cookies.get("session") != "s1" or city is None:
            return web.Response(text="no city", status=422)
        return web.json_response({"weather": f"{city} is cold"})

    async def verify(request: web.Request) -> web.StreamResponse:
        seen.append(await request.json())
        return web.json_response({"reward": reward})

    return routes(seed_session=seed, weather=weather, verify=verify)


def test_a_nemo_gym_row_is_played_and_verified(tmp_path: Path) -> None:
    path = gym_rows(tmp_path, [gym_row(number, answer=number) for number in range(30)])
    seen: list[Any] = []

    async def body() -> None:
        async with serving(resources_server(seen)) as url:
            environment = await attempt(NemoGymTasks({"url": url, "tasks": path}), services())
            await environment.reset()
            first = await environment.step(calls("weather", {"city": "Oslo"}, {}))
            assert [each["content"] for each in first.messages] == ['{"weather": "Oslo is cold"}', "no city"]
            assert (await environment.step(Action(content="cold", reasoning="so"))).done
            assert (await environment.judge(ANSWERED)).reward == 0.5
            await environment.close()

    asyncio.run(body())
    begun, verified = seen
    assert {name: verified[name] for name in begun} == begun and "answer" in begun
    kinds = [each["type"] for each in verified["response"]["output"]]
    assert kinds == [*["function_call"] * 2, *["function_call_output"] * 2, "reasoning", "message"]


@pytest.mark.parametrize("reward", [None, "1", "NaN"])
def test_a_reward_that_is_no_number_is_the_servers_fault(tmp_path: Path, reward: Any) -> None:
    path = gym_rows(tmp_path, [gym_row(number) for number in range(30)])

    async def body() -> None:
        async with serving(resources_server([], reward)) as url:
            environment = await attempt(NemoGymTasks({"url": url, "tasks": path}), services())
            await environment.reset()
            with pytest.raises(EnvironmentFaultError, match="POST /verify: the answer has no reward"):
                await environment.judge(ANSWERED)
            await environment.close()

    asyncio.run(body())


def test_a_nemo_gym_server_that_steps_adds_rewards(tmp_path: Path) -> None:
    path = gym_rows(tmp_path, [gym_row(number) for number in range(30)])
    answers = iter(
        [
            {
                "observation": None,
                "reward": 0.25,
                "info": {"tool_outputs": [{"call_id": "functions.weather:0", "output": "7"}]},
            },
            {"observation": "on", "reward": 0.25},
            {"observation": None, "reward": 0.5, "terminated": True},
        ]
    )

    async def step(_: web.Request) -> web.StreamResponse:
        return web.json_response(next(answers))

    async def body() -> None:
        app = routes(reset=always('{"observation": "begin"}'), step=step)
        async with serving(app) as url:
            tasks = NemoGymTasks({"url": url, "tasks": path, "style": "step"})
            environment = await attempt(tasks, services())
            assert (await environment.reset()).messages[-1] == {"role": "user", "content": "begin"}
            assert (await environment.step(calls("weather", {}))).messages[0]["content"] == "7"
            assert (await environment.step(Action(content="a"))).messages[0]["content"] == "on"
            assert (await environment.step(Action(content="b"))).done
            assert (await environment.judge(ANSWERED)).reward == 1.0
            await environment.close()

    asyncio.run(body())


# --- Harbor


def harbor_task(folder: Path, test: str, number: int) -> None:
    for name in ("environment", "tests"):
        (folder / f"task{number}" / name).mkdir(parents=True)
    task = folder / f"task{number}"
    (task / "instruction.md").write_text(f"Write {number} to /app/answer.txt.")
    (task / "task.toml").write_text(
        'version = "1.0"\n[agent]\ntimeout_sec = 60\n[verifier]\ntimeout_sec = 20\n'
    )
    (task / "environment/Dockerfile").write_text("FROM scratch")
    (task / "environment/given.txt").write_text("given")
    (task / "tests/test.sh").write_text(test)


TEST = (
    "grep -q 1 /app/answer.txt && echo 1 > /logs/verifier/reward.txt || echo 0 > /logs/verifier/reward.txt\n"
)
CHEAT = "mkdir -p .verifier; echo 1 > .verifier/reward.txt; ls /tests 2>&1; ls"


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_harbors_tests_judge_what_was_left_in_a_fresh_sandbox(tmp_path: Path) -> None:
    for number in range(20):
        harbor_task(tmp_path, TEST if number % 2 else "exit 3\n", number)
    tasks = HarborTasks({"path": str(tmp_path)})
    rows = [tasks.task(Split.TRAIN, number) for number in range(8)]
    honest = next(task for task in rows if int(task.key.rpartition("task")[2]) % 2)
    silent = next(task for task in rows if int(task.key.rpartition("task")[2]) % 2 == 0)

    async def verdict(boxes: Any, task: Task, command: str) -> tuple[str, Verdict]:
        environment = make_environment(task, services(10, boxes))
        try:
            assert "/work/answer.txt" in (await environment.reset()).messages[0]["content"]
            said = await environment.step(calls("bash", {"command": command}))
            assert (await environment.step(Action(content="done"))).done
            return said.messages[0]["content"], await environment.judge(ANSWERED)
        finally:
            await environment.close()

    async def body() -> None:
        boxes = open_sandboxes("bubblewrap", LIMITS, run="test", most=2, secret=())
        try:
            assert (await verdict(boxes, honest, "echo 1 > answer.txt"))[1].reward == 1.0
            said, cheated = await verdict(boxes, honest, CHEAT)
            assert "given.txt" in said and "No such file" in said and "Dockerfile" not in said
            assert (cheated.status, cheated.reward) == (Status.SCORED, 0.0)
            _, none = await verdict(boxes, silent, CHEAT)
            assert none.status is Status.FAILED and "no reward: tests ended with status 3" in none.reason
        finally:
            await boxes.close()

    asyncio.run(body())


class Failing:
    """A sandbox that cannot be read at first."""

    def __init__(self) -> None:
        self.num_closed, self.faults = 0, [OSError("no space left")]

    async def run(self, argv: Any, **_: Any) -> Finished:
        return Finished(ending=Ending.EXITED, status=0, stdout=b"", stderr=b"")

    async def snapshot(self, _: int) -> dict[str, bytes]:
        if self.faults:
            raise self.faults.pop()
        return {"answer.txt": b"1"}

    async def read(self, path: str, _: int) -> bytes:
        return b"1"

    async def close(self) -> None:
        self.num_closed += 1


def test_files_that_cannot_be_read_at_first_are_judged_when_a_judge_is_asked_again(tmp_path: Path) -> None:
    for number in range(20):
        harbor_task(tmp_path, TEST, number)
    box, specs = Failing(), []

    async def opened(spec: Any) -> Failing:
        specs.append(spec)
        return box

    async def body() -> None:
        boxes = SimpleNamespace(open=opened)
        environment = await attempt(HarborTasks({"path": str(tmp_path)}), services(sandboxes=boxes))
        await environment.reset()
        with pytest.raises(OSError, match="no space left"):
            await environment.judge(ANSWERED)
        assert box.num_closed == 0
        assert (await environment.judge(ANSWERED)).reward == 1.0
        assert specs[1].files["answer.txt"] == b"1" and box.num_closed == 2

    asyncio.run(body())


def test_servers_of_tasksets_end_with_the_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    served = json.dumps({"address": "tcp://127.0.0.1:9"})
    python.write_text(f"#!/bin/sh\necho '{served}'; exec cat\n")
    python.chmod(0o755)
    setup = {
        "python": str(python),
        "config": {"taskset": {"id": "toyset"}},
        "workers": 1,
        "most": 1,
        "verbose": False,
        "path": "",
    }
    load_tiny_tokenizer(tmp_path)
    config = compose(["experiment=rl_smoke", f"data.tokenizer={tmp_path}/tokenizer.json"])

    async def body() -> None:
        workplace = await open_workplace(config)
        server = await server_of(setup)
        assert server.is_alive
        await workplace.close()
        assert not server.is_alive

    asyncio.run(body())


# --- Gymnasium


@pytest.mark.parametrize("name", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1"])
def test_gymnasium_answers_the_same_actions_alike(name: str) -> None:
    async def played() -> list[str]:
        environment = await attempt(GymnasiumTasks({"id": name}), services(30), 5)
        assert environment.is_replayable
        seen = [str((await environment.reset()).messages)]
        for number in (0, 1, 1, 99, "left"):
            told = await environment.step(calls("step", {"action": number}))
            seen += [str(told.messages)]
        seen.append(str(await environment.judge(ANSWERED)))
        await environment.close()
        return seen

    first = asyncio.run(played())
    assert first == asyncio.run(played())
    assert "99 is not in" in first[4] or "over" in first[4]


def test_colours_are_told_in_letters() -> None:
    assert without_colours("\x1b[41mS\x1b[0mF\x1b[34;1mR\x1b[0m\x1b[35mY\x1b[0m") == "[S]F*R*<Y>"


# --- options


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (GymnasiumTasks, {}, "id is missing"),
        (GymnasiumTasks, {"id": "Nothing-v0"}, "NameNotFound.*pprint_registry"),
        (GymnasiumTasks, {"id": "FrozenLake-v1", "actions": "a,b"}, "2 names"),
        (OpenEnvTasks, {"url": "host:1"}, "options.url=host:1.*http://HOST:PORT"),
        (OpenEnvTasks, {"url": "http://a", "reward": "best"}, "one of sum, last"),
        (NemoGymTasks, {"url": "http://a"}, "tasks is missing"),
        (HarborTasks, {"path": "x", "image": "y"}, "it has no image"),
    ],
)
def test_wrong_options_are_named(make: Any, options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}.*" if "no image" not in said else said):
        make(options)


def test_rows_that_are_wrong_or_too_few_are_named(tmp_path: Path) -> None:
    given = {"url": "http://a", "tasks": gym_rows(tmp_path, [gym_row(1), {"input": 1}])}
    with pytest.raises(ConfigError, match=r"(?s)line 2: KeyError.*->"):
        NemoGymTasks(given).task(Split.TRAIN, 0)
    given["tasks"] = gym_rows(tmp_path, [gym_row(number) for number in range(20)])
    with pytest.raises(ConfigError, match=r"(?s)train task 99 .*lower num_tasks to 1\d and"):
        NemoGymTasks(given).check_sizes(100, 0)
    with pytest.raises(ConfigError, match=r"no folder in it has a task\.toml"):
        HarborTasks({"path": str(tmp_path)}).task(Split.TRAIN, 0)


def test_nothing_is_asked_of_a_judge_that_there_is_not() -> None:
    assert SimpleNamespace(**GymnasiumTasks({"id": "Taxi-v4"}).task(Split.TRAIN, 0).setup).seed == 0
    assert GymnasiumTasks({"id": "Taxi-v4"}).task(Split.HELDOUT, 0).setup["seed"] == 1 << 30
