"""What checkpoints lie on, and what is asked of it: a folder of a file system, or a prefix of a store.

A local folder is a `pathlib.Path`, anything else a `UPath` (universal_pathlib 0.3), which names objects like
files. Needs no torch; the object store's client is imported when a URL is met.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upath import UPath

type Place = Path | UPath
"""A file or folder, local or in an object store."""

MANIFEST = "manifest.json"
"""The last file of a checkpoint (`manifest.py`)."""
PARTIAL = ".partial"
UNSOUND = ".unsound"
DAMAGED = ".damaged"
STEP = re.compile(r"step_(0|[1-9][0-9]*)")
LEFT_OVER = re.compile(r"step_\d+(\.unsound)?(\.[0-9a-f]{8})?\.partial")
"""Folders that are being written, or deleted: those have eight more digits in their names."""


class Storage[P: (Path, UPath)](ABC):
    """What folders of checkpoints can do on one kind of storage. Raises OSError where storage fails."""

    has_rename: bool
    """Whether a folder gets another name at once. If not, a checkpoint counts while its manifest is there."""

    @abstractmethod
    def entries(self, root: P) -> list[P]:
        """Everything directly in a folder; nothing without the folder."""

    @abstractmethod
    def is_complete(self, folder: P) -> bool:
        """Whether something with the name of a checkpoint counts as one."""

    @abstractmethod
    def sizes(self, folder: P, names: Collection[str]) -> Mapping[str, int]:
        """Bytes of the files of these names in a folder; those that cannot be seen are missing."""

    @abstractmethod
    def prepare(self, root: P, step: int) -> P:
        """An empty folder for the files of a step; what an earlier save left there goes."""

    @abstractmethod
    def read(self, path: P) -> str:
        """A small text file. Raises FileNotFoundError without it, UnicodeDecodeError."""

    @abstractmethod
    def write(self, path: P, text: str) -> None:
        """Write a file that is there for good when this returns."""

    @abstractmethod
    def replace(self, path: P, text: str) -> None:
        """Write a file, or replace one, so that readers find the old or the new content and nothing else."""

    @abstractmethod
    def commit(self, written: P, final: P, name: str, text: str) -> None:
        """Give the files in `written` their last one, `name`, and the name `final`, at once.

        Raises FileExistsError if the name is another's; it stays as it was.
        """

    @abstractmethod
    def set_unsound_aside(self, folder: P) -> P:
        """Where a checkpoint is kept whose manifest says that it is unsound; another one there goes."""

    @abstractmethod
    def set_damaged_aside(self, folder: P) -> P:
        """Keep a damaged checkpoint where nothing resumes from it; returns what has the new name."""

    @abstractmethod
    def discard(self, folder: P, keep: str = "") -> None:
        """Delete a checkpoint so that no half of it is ever taken for one; of a link, the link alone.

        `keep` names a folder in it that stays, of an object store.
        """

    @abstractmethod
    def remove(self, path: P) -> None:
        """Delete what counts for nothing: a file, a folder or a link; nothing if nothing is there."""

    @abstractmethod
    def left_overs(self, root: P) -> list[P]:
        """What interrupted saves and deletions left."""
