"""What the commands that SLURM's steps start get from them, named where it is missing."""

import os
import sys

from k25_train.errors import ConfigError

REMEDY = "a job starts this command: submit a run with launch.slurm, or start ranks with launch.torchrun"


def arguments(names: str) -> list[str]:
    """The process's arguments, one for each word of `names`; further ones after a last word `...`.

    Raises:
        ConfigError: there is another number of them.
    """
    given, words = sys.argv[1:], names.split()
    least = len(words) - (words[-1] == "...")
    if len(given) < least or (len(given) > least and words[-1] != "..."):
        raise ConfigError(f"{len(given)} arguments were given, expected {names}\n  -> {REMEDY}")
    return given


def variable(name: str) -> str:
    """An environment variable. Raises `ConfigError` if it is not set."""
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"{name} is not set\n  -> {REMEDY}")
    return value


def number(name: str) -> int:
    """An environment variable that counts something. Raises `ConfigError` if it is no whole number."""
    return count(name, variable(name))


def count(name: str, value: str) -> int:
    """The number in a variable or argument. Raises `ConfigError` if it is no whole number."""
    if not (value.isascii() and value.isdecimal()):
        raise ConfigError(f"{name}={value!r}: must be a whole number\n  -> {REMEDY}")
    return int(value)
