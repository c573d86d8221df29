"""Errors that a user can cause and fix: the text names key or file, value, rule and remedy."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upath import UPath


class K25Error(Exception):
    """Base of the errors below; entry points print its text without a traceback."""

    is_shared = False
    """Whether every rank raises it, so that rank 0 alone prints it."""
    of_ranks: tuple[int, ...] = ()
    """Ranks on which it happened, where others raise it because they agreed on it; empty if not known."""
    code = ""
    """Name of the system's error number behind it, such as EIO, where no cause has it; empty for none."""


class ConfigError(K25Error):
    """The configuration, or what it requires of this machine, breaks a rule."""


class DryRunError(K25Error):
    """The model of the configuration, built without memory for weights, breaks a rule."""


class DataError(K25Error):
    """A file of the training data is missing, truncated or not what the index says."""


class CheckpointError(K25Error):
    """A checkpoint is incomplete, does not fit the model, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written, or cannot be read; another may be."""

    def __init__(self, text: str, folder: "Path | UPath", instead: "Path | UPath | None") -> None:
        """`folder` does not load; `instead` is the newest other one that is sound and whole, None without."""
        super().__init__(text, folder, instead)
        self.folder = folder
        self.instead = instead

    def __str__(self) -> str:
        return str(self.args[0])


class TrainingError(K25Error):
    """A step failed in a way that continuing would only make worse."""


class MachineError(K25Error):
    """This machine refused something that was asked of it: a file, memory, room, a package, a connection."""


class RolloutError(K25Error):
    """A response or its verdict could not be had, or what was rolled out cannot be kept or read."""
