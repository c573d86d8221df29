"""`python -m k25_train.data COMMAND` (also `k25-data`): make, show and check data."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from k25_train.compose.filled import check_filled_in
from k25_train.compose.resolve import compose
from k25_train.config.data import DataConfig
from k25_train.config.schema import Config
from k25_train.data.commands import chat, index, inspect, needles, prepare, stats, traces, verify
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.smoke_set.build import BuildOptions, build_dataset
from k25_train.data.smoke_set.overview import print_tables
from k25_train.subcommands import parser_of, run_subcommand

DEFAULT_DIRECTORY = Path("datasets/smoke")
MAKING = ("build", "needles", "chat", "traces", "prepare", "index")
"""Commands that make something."""
NO_EXPERIMENT = ("experiment=smoke", "optim.vision_tower.trained=false", "optim.mm_projector.trained=false")
"""What data alone are looked at with: nothing is trained, and the tower's rates are no matter of theirs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 after a fault found, or 2 after an error."""
    words = sys.argv[1:] if arguments is None else arguments
    # Data are made whether or not somebody reads about it; the others exist to print.
    makes = any(word in MAKING for word in words[:1])
    return run_subcommand(_parser(), arguments, output_goes_on=makes)


def _parser() -> argparse.ArgumentParser:
    return parser_of(
        "k25-data",
        __doc__,
        _add_build,
        lambda commands: inspect.add(commands, str(DEFAULT_DIRECTORY), _config_of),
        lambda commands: stats.add(commands, _config_of),
        lambda commands: verify.add(commands, _compose_data, str(DEFAULT_DIRECTORY)),
        prepare.add,
        lambda commands: needles.add(commands, DEFAULT_DIRECTORY),
        lambda commands: chat.add(commands, DEFAULT_DIRECTORY),
        traces.add,
        lambda commands: index.add(commands, _compose_data),
    )


def _add_build(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    build = commands.add_parser("build", help="make the smoke set from files of public packages")
    build.add_argument("--out", type=Path, default=DEFAULT_DIRECTORY, help="folder to make (%(default)s)")
    build.add_argument("--downloads", type=Path, help="folder that keeps the packages (next to --out)")
    build.add_argument(
        "--vocab-size", type=int, default=4096, help="vocabulary size of the tokenizer to train (%(default)s)"
    )
    build.add_argument(
        "--chat-tokens", action="store_true", help="give the vocabulary the special tokens of conversations"
    )
    build.add_argument("--force", action="store_true", help="build again even if the set exists")
    build.set_defaults(run=_build)


def _config_of(settings: Sequence[str]) -> Config:
    """The configuration that a command about data means: `experiment=smoke` unless another one is given.

    Raises ConfigError as `compose` does, and for a template that is not filled in.
    """
    chosen = any(each.startswith("experiment=") for each in settings)
    config = compose([*([] if chosen else NO_EXPERIMENT), *settings])
    check_filled_in(config.data)
    # Nothing is read ahead, and one process shows what it finds.
    return replace(config, data=replace(config.data, prefetch_steps=0, workers=0))


def _compose_data(settings: Sequence[str]) -> DataConfig:
    return _config_of(settings).data


def _build(options: argparse.Namespace, console: Console) -> int:
    started_s = time.monotonic()
    build_options = BuildOptions(
        out=options.out,
        downloads=options.downloads or options.out.parent / "downloads",
        vocab_size=options.vocab_size,
        chat_tokens=options.chat_tokens,
        force=options.force,
    )
    with console.status("building"):
        built = build_dataset(build_options, lambda line: console.print(escape(line)))
    print_tables(load_dataset(str(options.out)), console)
    num_bytes = sum(file.stat().st_size for file in options.out.iterdir())
    took = (
        f"built in {time.monotonic() - started_s:.0f} s"
        if built
        else "exists already (--force builds it again)"
    )
    console.print(f"{options.out}: {took}, {num_bytes / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
