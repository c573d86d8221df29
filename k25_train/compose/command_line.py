"""How a command that takes settings reads its arguments and prints its usage."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from k25_train.compose.conf_files import group_choices
from k25_train.compose.overrides import not_a_setting
from k25_train.compose.resolve import compose, compose_values, describe, load
from k25_train.compose.sections import section_of
from k25_train.compose.trainable import check_trainable
from k25_train.compose.values import unquoted
from k25_train.compose.yaml_files import dump
from k25_train.config.schema import Config
from k25_train.entry import run_command, shared
from k25_train.errors import ConfigError
from k25_train.joining.environment import speaks

if TYPE_CHECKING:
    from upath import UPath


def hydra_app(
    task: Callable[[Config], None], *, check: Callable[[Config], object] = lambda _: None
) -> Callable[[], None]:
    """Make a command of `task`; its arguments are settings, an error ends it as `entry` says.

    Args:
        check: looks at the configuration before anything is made; raises `ConfigError`, on all ranks or none.
    """

    def body() -> None:
        arguments = sys.argv[1:]
        if {"-h", "--help"} & set(arguments):
            print(usage(task))
            return
        try:
            shown = _takes(arguments, ("--cfg", "-c"))
            if shown is not None:
                print_values(shown, arguments)
                return
            saved = _takes(arguments, ("--config",))
            config = compose(arguments) if saved is None else load_saved(Path(saved), arguments)
            check_trainable(config)
            check(config)
        except ConfigError as error:
            raise shared(error) from error
        task(config)

    def main() -> None:
        run_command(body, output_goes_on=not {"-h", "--help", "--cfg", "-c"} & set(sys.argv[1:]))

    return main


def print_values(what: str, arguments: Sequence[str]) -> None:
    """Print the values that arguments give, unchecked, as YAML; `ConfigError` for anything but `job`."""
    if what != "job":
        raise ConfigError(f"--cfg {what}: there is nothing else to show; write --cfg job")
    print(dump(unquoted(compose_values(arguments)[0])), end="")


def _takes(arguments: list[str], names: Sequence[str]) -> str | None:
    """The value of an option, which is taken out of the arguments; None without the option.

    Raises:
        ConfigError: the option has no value.
    """
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name not in names:
            continue
        if not equals:
            value = arguments.pop(index + 1) if index + 1 < len(arguments) else ""
        del arguments[index]
        if not value:
            what = "job" if "--cfg" in names else "FILE, the config.yaml of a run folder"
            raise ConfigError(f"{name}: is not followed by a value: write {name} {what}")
        return value
    return None


def read_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options of a command and its `overrides`.

    Raises:
        ConfigError: there is an option that the command does not have.
    """
    options, strays = parser.parse_known_intermixed_args(arguments)
    if strays:
        raise ConfigError(describe([not_a_setting(stray) for stray in strays], "the command line"))
    return options


def load_saved(path: "Path | UPath", overrides: Sequence[str] = ()) -> Config:
    """A saved configuration with overrides; the first rank prints what its version lacked.

    Raises `ConfigError` as `load` does.
    """
    config, notes = load(path, overrides)
    if speaks():
        for note in notes:
            print(f"{path}: {note}", flush=True)
    return config


def usage(task: Callable[[Config], None]) -> str:
    """What the command does, the groups with their choices, and the keys of every section."""
    module = sys.modules[task.__module__]
    lines = [
        (module.__doc__ or "").strip(),
        "",
        "Arguments: GROUP=CHOICE, SECTION.KEY=VALUE and ~SECTION.KEY, which takes a key away; or",
        "--config FILE SECTION.KEY=VALUE, the config.yaml of a run folder and the values to change in it.",
        "A VALUE is taken as typed, up to the end of the argument; numbers are decimal. null is null where",
        "the key may be null, {a: 1, b: 2} a mapping, [a, b] a list, ${oc.env:NAME} what the environment",
        "holds; a VALUE in quotes of its own ('...') is the text in them.",
        "",
        "Groups",
    ]
    lines += [f"  {group}={'|'.join(choices)}" for group, choices in group_choices().items()]
    lines += ["", "Sections"]
    for section in fields(Config):
        kind = section_of(section.type)
        assert kind is not None, "every field of the configuration is a section"
        keys = ", ".join(field.name for field in fields(kind))
        lines.append(f"  {section.name}: {keys}")
    return "\n".join([*lines, "", "`experiment=NAME --cfg job` prints the values that an experiment gives."])
