"""What `python -m k25_train.environments` does: families with judges and sandboxes around them.

list                                  families, adapters, environments, toolsets
play FAMILY NUMBER [name=value …]     a task, its tools, its reference solution, and the verdict on it
serve FAMILY [name=value …]           our tasks behind OpenEnv's wire
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from rich.console import Console

from k25_train.compose.resolve import compose
from k25_train.environments.adapters.openenv_server import OpenEnvServer
from k25_train.environments.adapters.registry import ADAPTERS
from k25_train.environments.adapters.served_attempt import text_of
from k25_train.environments.base import Response, Status, Verdict
from k25_train.environments.environment import Environment, Services
from k25_train.environments.family import Split
from k25_train.environments.registry import ENVIRONMENTS, FAMILIES, make_environment, make_family, make_tasks
from k25_train.environments.toolsets.registry import TOOLSETS
from k25_train.errors import ConfigError
from k25_train.rl.rewards.judges import open_judges
from k25_train.rl.sandboxes import sandboxes_of
from k25_train.subcommands import parser_of, run_subcommand

EXPERIMENT = "experiment=rl_smoke"
"""Whose sandboxes and limits are used, unless `--with` says otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    description = "environments: families of tasks, other systems' environments, and what policies act in"
    parser = parser_of("k25-environments", description, _add_list, _add_play, _add_serve)
    return run_subcommand(parser, arguments, output_goes_on=True)


def _add_list(commands: Any) -> None:
    commands.add_parser("list", help="what there is").set_defaults(run=_list)


def _add_play(commands: Any) -> None:
    parser = commands.add_parser("play", help="one task with its reference solution and its verdict")
    parser.add_argument("family")
    parser.add_argument("number", type=int)
    _add_common(parser)
    parser.set_defaults(run=_play)


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser("serve", help="a family behind OpenEnv's wire")
    parser.add_argument("family")
    parser.add_argument("--host", default="127.0.0.1", help="address that it listens at; default %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 for a free one")
    parser.add_argument("--most", type=int, default=256, help="attempts at once; default %(default)s")
    parser.add_argument(
        "--idle-s", type=float, default=600, help="of an attempt over HTTP; default %(default)s"
    )
    _add_common(parser)
    parser.set_defaults(run=_serve)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("options", nargs="*", metavar="name=value", help="options of the family")
    parser.add_argument("--with", dest="overrides", action="append", default=[], help="override of a run")


def _list(options: argparse.Namespace, console: Console) -> int:
    for title, names in (
        ("families", FAMILIES),
        ("other systems", ADAPTERS),
        ("environments", ENVIRONMENTS),
        ("toolsets", TOOLSETS),
    ):
        console.print(f"[bold]{title}[/bold]")
        for name, made in names.items():
            documented = getattr(made, "__init__", made) if isinstance(made, type) else made
            said = " ".join((documented.__doc__ or made.__doc__ or "").split())
            console.print(f"  {name}: {said}", markup=False)
    return 0


def _play(options: argparse.Namespace, console: Console) -> int:
    return asyncio.run(_played(options, console))


async def _played(options: argparse.Namespace, console: Console) -> int:
    family = make_family(options.family, _given(options.options))
    task = family.task(Split.TRAIN, options.number)
    solution = family.solve(family.content(Split.TRAIN, options.number))
    async with _services(options.overrides) as services:
        environment = make_environment(task, services)
        try:
            seen = await environment.reset()
            console.print(f"task {task.key}, environment {task.environment}", markup=False)
            _show(console, seen.messages)
            for each in environment.tools:
                console.print(f"  tool {json.dumps(each['function'], ensure_ascii=False)}", markup=False)
            messages = list(seen.messages)
            for action in solution:
                called = [{"name": call.name, "arguments": dict(call.arguments)} for call in action.calls]
                console.print(f"policy: {action.content} {called or ''}", markup=False)
                seen = await environment.step(action)
                messages += seen.messages
                _show(console, seen.messages)
            text = text_of(solution[-1], thinking=task.thinking)
            response = Response(text=text, num_tokens=0, ended=True, messages=tuple(messages))
            verdict: Verdict = await environment.judge(response)
        finally:
            await environment.close()
    console.print(f"verdict: {json.dumps(verdict.as_json())}", markup=False)
    return 0 if verdict.status is Status.SCORED and verdict.reward >= 1 else 1


def _show(console: Console, messages: Sequence[Any]) -> None:
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        console.print(f"{message['role']}: {text}", markup=False)


def _serve(options: argparse.Namespace, console: Console) -> int:
    asyncio.run(_served(options, console))
    return 0


async def _served(options: argparse.Namespace, console: Console) -> None:
    tasks = make_tasks(options.family, _given(options.options))
    async with _services(options.overrides) as services:

        def make(task: Any) -> Environment:
            return make_environment(task, services)

        server = OpenEnvServer(options.family, tasks.task, make, most=options.most, idle_s=options.idle_s)
        runner = web.AppRunner(server.app())
        await runner.setup()
        try:
            site = web.TCPSite(runner, options.host, options.port)
            await site.start()
            host, port = runner.addresses[0][:2]
            console.print(f"serving {options.family} at http://{host}:{port}")
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


@asynccontextmanager
async def _services(overrides: Sequence[str]) -> AsyncIterator[Services]:
    """What environments use, closed again."""
    config = compose(overrides or [EXPERIMENT])
    rollout = config.rollout
    if rollout is None:
        raise ConfigError("--with: it names no experiment of reinforcement learning\n  -> e.g. " + EXPERIMENT)
    judges = open_judges(rollout.judge_timeout_s, 1, places=1)
    sandboxes = sandboxes_of(config, 1)
    try:
        yield Services(sandboxes=sandboxes, judging=judges, tool_timeout_s=rollout.manager.tool_timeout_s)
    finally:
        await sandboxes.close()
        await judges.close()


def _given(words: Sequence[str]) -> dict[str, str]:
    """`name=value` each. Raises ConfigError."""
    if wrong := [word for word in words if "=" not in word]:
        raise ConfigError(f"{wrong[0]}: is no option\n  -> write name=value, e.g. digits=3-6")
    return dict(word.split("=", 1) for word in words)
