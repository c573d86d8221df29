"""Files stay open between reads, and are opened again when they are other files."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from k25_train.data import open_files
from k25_train.data.open_files import OpenFiles


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were opened."""
    names: list[str] = []
    really_open = os.open

    def counted(path: str, flags: int) -> int:
        descriptor = really_open(path, flags)
        names.append(Path(path).name)
        return descriptor

    monkeypatch.setattr(open_files.os, "open", counted)
    return names


def write(folder: Path, *names: str) -> Iterator[str]:
    for name in names:
        (folder / name).write_bytes(name.encode() * 10)
        yield str(folder / name)


def test_each_file_is_opened_once(tmp_path: Path, opened: list[str]) -> None:
    files, paths = OpenFiles(), list(write(tmp_path, "ab", "cd"))
    for _ in range(5):
        assert [files.read(path, 1, 4) for path in paths] == [b"baba", b"dcdc"]
    assert opened == ["ab", "cd"]
    assert files.read(paths[0], 18, 100) == b"ab", "fewer bytes where it ends"


def test_their_number_is_bounded(tmp_path: Path, opened: list[str]) -> None:
    files, paths = OpenFiles(max_open=2), list(write(tmp_path, "a", "b", "c"))
    before = len(os.listdir("/proc/self/fd"))
    for path in (*paths, paths[2], paths[1], paths[0]):
        files.read(path, 0, 1)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert opened == ["a", "b", "c", "a"], "the one used longest ago was closed"


def test_a_replaced_file_is_read_anew_and_a_lost_one_missed(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, (path,) = OpenFiles(), write(tmp_path, "a")
    files.read(path, 0, 1)
    os.rename(tmp_path / "a", tmp_path / "old")
    assert files.read(path, 0, 1) == b"a", "within the time for which a file counts as the same"

    monkeypatch.setattr(open_files, "RECHECK_S", 0.0)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            files.read(path, 0, 1)
    (tmp_path / "a").write_bytes(b"new")
    assert files.read(path, 0, 9) == b"new"
    assert opened == ["a", "a"]


def test_a_read_that_fails_opens_the_file_again(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle that the file system has lost (ESTALE) never works again."""
    files, (path,) = OpenFiles(), write(tmp_path, "a")
    files.read(path, 0, 1)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="stale"):
        broken.setattr(open_files.os, "pread", lambda *_: (_ for _ in ()).throw(OSError(116, "stale")))
        files.read(path, 0, 1)
    assert files.read(path, 0, 1) == b"a"
    assert opened == ["a", "a"]


def test_where_descriptors_run_out_others_are_closed(tmp_path: Path) -> None:
    files, paths = OpenFiles(), list(write(tmp_path, *(f"{number}" for number in range(40))))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
    try:
        assert [files.read(path, 0, 1) for path in paths] == [Path(path).name[:1].encode() for path in paths]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
