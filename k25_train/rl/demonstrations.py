"""`python -m k25_train.rl.demonstrations experiment=NAME --out FILE`: what to fine-tune on before.

Writes a demonstration of each training task of the experiment's `environment` as a line of JSON, in the form
of `format: chat` (`k25_train/data/chat`), which fine-tuning reads; images are in the lines. None shows a
held-out task. Where a policy has tools, its turns are played in the task's environment, so that what real
tools answer is shown, too. Equal settings give equal bytes, as far as tools answer the same; the file appears
under its name only when it is complete.
"""

import argparse
import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from k25_train.compose.command_line import read_arguments
from k25_train.compose.resolve import compose
from k25_train.config.environment import EnvironmentConfig
from k25_train.config.schema import Config
from k25_train.entry import run_command
from k25_train.environments.environment import Services
from k25_train.environments.family import Family, Split
from k25_train.environments.playing import Played, play
from k25_train.environments.registry import make_environment
from k25_train.errors import ConfigError
from k25_train.rl.rewards.judges import open_judges
from k25_train.rl.sandboxes import sandboxes_of
from k25_train.rl.tasks import family_of

AT_ONCE = 8
"""Demonstrations that are played at once. Our choice."""


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run)


def conversation(played: Played) -> dict[str, Any]:
    """What was played, as a line of a chat file has it."""
    media = iter(played.media)
    line: dict[str, Any] = {
        "messages": [_with_media(message, media) for message in played.messages],
        "chat_template_kwargs": {"thinking": played.thinking},
    }
    if played.tools:
        line["tools"] = [dict(tool) for tool in played.tools]
    return line


async def conversations(config: EnvironmentConfig, services: Services) -> AsyncIterator[dict[str, Any]]:
    """One for each training task of all sources, in order; some are played ahead. Raises ConfigError for
    families and options, and as environments do."""
    for name, source in config.tasks.items():
        family = family_of(name, source)
        for first in range(0, source.num_tasks, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, source.num_tasks))
            for line in await asyncio.gather(*(_shown(family, number, services) for number in numbers)):
                yield line


async def _shown(family: Family[Any], number: int, services: Services) -> dict[str, Any]:
    """How a training task may be answered, as a line."""
    task = family.task(Split.TRAIN, number)
    environment = make_environment(task, services)
    try:
        return conversation(await play(task, environment, family.demonstration(Split.TRAIN, number)))
    finally:
        await environment.close()


async def write_demonstrations(config: EnvironmentConfig, services: Services, out: Path) -> int:
    """Write them to `out`, whose folder is made; an existing file is replaced. Returns how many there are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        async for line in conversations(config, services):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    partial.replace(out)
    return count


def _with_media(message: Mapping[str, Any], media: Iterator[bytes]) -> dict[str, Any]:
    """The message with its images in it, as `data:` URIs."""
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    parts = [
        {"type": "image", "image": _data_uri(next(media))} if part["type"] == "image" else part
        for part in content
    ]
    return {**message, "content": parts}


def _data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _run() -> None:
    parser = argparse.ArgumentParser(prog="python -m k25_train.rl.demonstrations", description=__doc__)
    parser.add_argument("overrides", nargs="+", metavar="SETTING", help="experiment=NAME, SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, .jsonl")
    options = read_arguments(parser)
    config = compose(options.overrides)
    if config.environment is None:
        raise ConfigError(
            "environment: must be chosen, demonstrations are of its tasks\n  -> e.g. environment=sums"
        )
    count = asyncio.run(_write(config, options.out))
    print(f"{options.out}: {count:,} demonstrations, {options.out.stat().st_size / 1e6:.1f} MB")


async def _write(config: Config, out: Path) -> int:
    assert config.environment is not None and config.rollout is not None
    judges = open_judges(config.rollout.judge_timeout_s, 1, places=1)
    sandboxes = sandboxes_of(config)
    services = Services(
        sandboxes=sandboxes, judging=judges, tool_timeout_s=config.rollout.manager.tool_timeout_s
    )
    try:
        return await write_demonstrations(config.environment, services, out)
    finally:
        await sandboxes.close()
        await judges.close()


if __name__ == "__main__":
    main()
