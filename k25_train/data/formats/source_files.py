"""The files of a source: where it begins, which files its path names, and how they are now."""

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from k25_train.config.basics import is_url
from k25_train.config.data import DataConfig
from k25_train.config.sources import GLOB, SAMPLE_KINDS, SourceConfig, folder_of, source_path
from k25_train.data.folder import DataFolder, locate
from k25_train.data.formats.braces import expand_braces
from k25_train.data.formats.index_layout import ShardInfo
from k25_train.data.storage.attempts import describe
from k25_train.data.storage.stamps import version_of
from k25_train.errors import DataError

INDEX_SUFFIX = ".k25index"


class SourceFiles:
    """Files of one source below its folder, local or at any fsspec URL."""

    def __init__(self, name: str, data: DataConfig) -> None:
        """`name` is a key of `data.sources`. Nothing is opened yet."""
        self.name = name
        self.key = f"data.sources.{name}.path"
        self.data = data
        self.config: SourceConfig = data.sources[name]
        self.path = data.path_of(self.config)
        self.root = self.path.rstrip("/") if self.config.is_folder else folder_of(self.path)
        """Folder or URL that names of files start from."""
        explicit = self.config.index
        self.index = self._index_path() if explicit is None else source_path(data.dir, explicit)
        """Path or URL of its index."""

    @cached_property
    def folder(self) -> DataFolder:
        """What reads the files. Raises DataError for a URL that cannot be opened."""
        return DataFolder(self.root)

    @property
    def kinds(self) -> list[str]:
        """Of a shard set, the kinds of sample that its index has; none named is all."""
        return [kind for kind in SAMPLE_KINDS if kind in self.config.kinds]

    def _index_path(self) -> str:
        if self.config.is_folder:
            name = "-".join([self.config.format.value, *self.kinds])
            return f"{self.root}/{name}{INDEX_SUFFIX}"
        pattern = self.path.removeprefix(self.root).strip("/")
        readable = re.sub(r"[^\w.-]+", "_", pattern).strip("_")
        if readable != pattern:
            readable += f"-{hashlib.sha256(pattern.encode()).hexdigest()[:8]}"
        return f"{self.root}/{readable}.{self.config.format.value}{INDEX_SUFFIX}"

    def find(self, suffixes: tuple[str, ...], *, in_folders: str = "*") -> list[str]:
        """Names below `root`, sorted, of the files that the path names and that end with one of `suffixes`.

        A path of a folder names all files in it that match `in_folders`. Raises DataError, naming it, if
        there is none.
        """
        fs, place = locate(self.path, self.key)
        _, root = locate(self.root, self.key)
        is_folder = self.config.is_folder or (not GLOB.search(self.path) and fs.isdir(place))
        patterns = [f"{place.rstrip('/')}/{in_folders}"] if is_folder else self._expanded(place)
        found: set[str] = set()
        for pattern in patterns:
            found.update(self._matching(fs, pattern, suffixes))
        names = sorted(path.removeprefix(root).lstrip("/") for path in found)
        if not names:
            raise DataError(
                f"{self.key}={self.path}: there is no file {' or '.join(f'*{each}' for each in suffixes)}. "
                "Correct the path, or bring the files there."
            )
        return names

    def _expanded(self, place: str) -> list[str]:
        try:
            return list(expand_braces(place))
        except ValueError as error:
            raise DataError(f"{self.key}={self.path}: {error}. Correct it, or use a glob.") from error

    def _matching(self, fs: Any, pattern: str, suffixes: tuple[str, ...]) -> Iterable[str]:
        stem = pattern
        for suffix in suffixes:
            stem = stem.removesuffix(suffix)
        try:
            if not GLOB.search(pattern):
                return [f"{stem}{suffix}" for suffix in suffixes if fs.exists(f"{stem}{suffix}")]
            # A prefix may end with a star, and a pattern with the suffix.
            names = [*fs.glob(pattern), *(name for suffix in suffixes for name in fs.glob(stem + suffix))]
        except Exception as error:  # as in DataFolder
            raise DataError(f"{self.key}={self.path}: cannot be listed ({describe(error)}).") from error
        return [str(name) for name in names if str(name).endswith(suffixes)]

    def info(self, name: str, **more: Any) -> ShardInfo:
        """A file as it is now. Raises DataError, naming it, if it is gone, or is none in the folder: an index
        may come from anyone."""
        self.folder.check_name(name)
        fs, root = locate(self.root, self.key)
        try:
            found = fs.info(f"{root}/{name}")
        except Exception as error:  # as in DataFolder
            problem = "no such file" if isinstance(error, FileNotFoundError) else describe(error)
            raise DataError(
                f"{self.root}/{name}: {problem}, though the source {self.name} has it. Bring it back, or "
                "index "
                f"the source again: {index_command(self.name)}."
            ) from error
        return ShardInfo(name=name, **version_of(found)._asdict(), **more)

    @property
    def is_remote(self) -> bool:
        """Whether it is at a URL."""
        return is_url(self.root)


def index_command(name: str) -> str:
    """How an index is made."""
    return f"`python -m k25_train.data index data=NAME --source {name}`"
