"""How a command that takes hydra overrides starts, prints its usage and reports errors."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from k25_train.compose.resolve import CONF_DIR, CONFIG_NAME, accept_new_keys, group_choices, load, resolve
from k25_train.config.schema import Config
from k25_train.errors import ConfigError, K25Error


def hydra_app(task: Callable[[Config], None]) -> Callable[[], None]:
    """Make a command of `task`: arguments are overrides, a user's error ends it without a traceback."""

    def run(build: Callable[[], Config]) -> None:
        try:
            config = build()
        except ConfigError as error:
            exit_with_shared(error)
        try:
            task(config)
        except K25Error as error:
            exit_with(error)

    @hydra.main(config_path=str(CONF_DIR), config_name=CONFIG_NAME, version_base="1.3")
    def app(cfg: DictConfig) -> None:
        run(lambda: resolve(cfg))

    def main() -> None:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(usage(task))
            return
        if sys.argv[1:2] == ["--config"]:
            run(lambda: load_saved(Path(*sys.argv[2:3]), sys.argv[3:]))
            return
        try:
            sys.argv[1:] = accept_new_keys(sys.argv[1:])
        except ConfigError as error:
            exit_with_shared(error)
        app()

    return main


def load_saved(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A saved configuration with overrides; the first rank prints what its version lacked.

    Raises `ConfigError` as `load` does.
    """
    config, notes = load(path, overrides)
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"{path}: {note}", flush=True)
    return config


def usage(task: Callable[[Config], None]) -> str:
    """What the command does, the groups with their choices, and the keys of every section."""
    module = sys.modules[task.__module__]
    lines = [
        (module.__doc__ or "").strip(),
        "",
        "Arguments: GROUP=CHOICE and SECTION.KEY=VALUE; or --config FILE SECTION.KEY=VALUE with the",
        "config.yaml of a run folder and the values to change in it",
        "",
        "Groups",
    ]
    lines += [f"  {group}={'|'.join(choices)}" for group, choices in group_choices().items()]
    lines += ["", "Sections"]
    for section in fields(Config):
        keys = ", ".join(field.name for field in fields(section.type))  # type: ignore[arg-type]
        lines.append(f"  {section.name}: {keys}")
    return "\n".join([*lines, "", "`experiment=NAME --cfg job` prints the values that an experiment gives."])


def exit_with(error: K25Error) -> NoReturn:
    """End the process with the error's text on stderr."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"{rank}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def exit_with_shared(error: ConfigError) -> NoReturn:
    """End the process with an error that every rank has and rank 0 alone prints.

    The others wait to be ended by torchrun: the first exit makes it end all, rank 0 perhaps before it spoke.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(30)
        sys.exit(2)
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
