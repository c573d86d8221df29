"""`python -m k25_train.rl.demonstrations experiment=NAME --out FILE`: what to fine-tune on before.

Writes a demonstration of each training task of the experiment's `environment` as a line of JSON, in the form
of `format: chat` (`k25_train/data/chat`), which fine-tuning reads; images are in the lines. None shows a
held-out task. Equal settings give equal bytes; the file appears under its name only when it is complete.
"""

import argparse
import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from k25_train.compose.command_line import read_arguments
from k25_train.compose.resolve import compose
from k25_train.config.environment import EnvironmentConfig
from k25_train.entry import run_command
from k25_train.environments.base import Task
from k25_train.environments.family import Demonstration, Split
from k25_train.errors import ConfigError
from k25_train.rl.tasks import family_of


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run)


def conversation(task: Task, shown: Demonstration) -> dict[str, Any]:
    """A task and an answer to it, as a line of a chat file has them."""
    media = iter(task.media)
    messages = [_with_media(message, media) for message in task.messages]
    answer = {"role": "assistant", "reasoning_content": shown.reasoning, "content": shown.content}
    return {"messages": [*messages, answer], "chat_template_kwargs": {"thinking": task.thinking}}


def conversations(config: EnvironmentConfig) -> Iterator[dict[str, Any]]:
    """One for each training task of all sources. Raises ConfigError for families and options."""
    for name, source in config.tasks.items():
        family = family_of(name, source)
        for number in range(source.num_tasks):
            yield conversation(family.task(Split.TRAIN, number), family.demonstration(Split.TRAIN, number))


def write_demonstrations(config: EnvironmentConfig, out: Path) -> int:
    """Write them to `out`, whose folder is made; an existing file is replaced. Returns how many there are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for line in conversations(config):
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
    count = write_demonstrations(config.environment, options.out)
    print(f"{options.out}: {count:,} demonstrations, {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
