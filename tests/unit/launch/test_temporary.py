"""What attempts leave in temporary folders goes; nothing of others does."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import temporary
from launch.temporary import PREFIX, hold, remove_leftovers, remove_segments, temporary_folder

USER = """
import os, sys, time
from launch import temporary
{setup}
print(os.environ["TMPDIR"], flush=True)
time.sleep(600)
"""
AS_TORCHRUN = "context = temporary.temporary_folder(); context.__enter__()"
AS_RANK = "temporary.hold_own()"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    # So that it is restored.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(temporary, "_sees_all_processes", lambda: False)
    yield folder
    tempfile.tempdir = None


def user_of(base: Path, setup: str) -> tuple["subprocess.Popen[str]", Path]:
    """A process that uses a temporary folder, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER.format(setup=setup)],
        env=os.environ | {"TMPDIR": str(base)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_everything_temporary_is_in_one_folder_that_goes(base: Path) -> None:
    with temporary_folder() as folder:
        assert Path(tempfile.mkdtemp()).parent == folder == Path(os.environ["TMPDIR"])
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(f"{base}/torchinductor_")
        assert folder.stat().st_mode & 0o077 == 0
    assert not list(base.iterdir())
    assert os.environ["TMPDIR"] == str(base) and Path(tempfile.gettempdir()) == base


def test_a_killed_one_is_removed_once_its_ranks_are_gone_too(base: Path) -> None:
    torchrun, folder = user_of(base, AS_TORCHRUN)
    rank, same = user_of(folder, AS_RANK)
    assert same == folder and folder.parent == base and folder.name.startswith(PREFIX)
    (folder / "torchelastic_x").mkdir()
    try:
        remove_leftovers(base)
        assert folder.is_dir()
        torchrun.send_signal(signal.SIGKILL)
        torchrun.wait()
        remove_leftovers(base)
        assert (folder / "torchelastic_x").is_dir()
    finally:
        for process in (rank, torchrun):
            process.kill()
            process.communicate()
    with temporary_folder():
        assert not folder.exists()


def test_nothing_of_others_goes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = base / "precious"
    target.mkdir()
    (base / f"{PREFIX}link").symlink_to(target)
    (base / f"{PREFIX}file").write_text("x")
    (base / "torchelastic_of_another").mkdir()
    for name in ("k25", "k25_runs", "k25_1g7yiidg", ".k25"):
        (base / name).mkdir()
    (base / ".k25_new_just_made").mkdir()
    old = base / ".k25_new_old"
    old.mkdir()
    os.utime(old, (0, 0))
    before = sorted(path.name for path in base.iterdir())
    remove_leftovers(base)
    before.remove(old.name)
    assert sorted(path.name for path in base.iterdir()) == before
    # Another user's.
    (base / f"{PREFIX}theirs").mkdir()
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: os.getuid() + 1)
        remove_leftovers(base)
    assert (base / f"{PREFIX}theirs").is_dir()
    remove_leftovers(base)
    assert not (base / f"{PREFIX}theirs").exists()
    remove_leftovers(base / "nowhere")


def test_without_locks_nothing_is_removed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / f"{PREFIX}any").mkdir()

    def no_locks(*_: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    remove_leftovers(base)
    os.close(hold(base))
    assert (base / f"{PREFIX}any").is_dir()


def test_segments_of_dead_processes_go(tmp_path: Path) -> None:
    shm, proc = tmp_path / "shm", tmp_path / "proc"
    shm.mkdir()
    (proc / "41/fd").mkdir(parents=True)
    (proc / "uptime").write_text("1")
    kept = (
        "nccl-mapped", "nccl-opened", "torch_41_7_0", "psm_1234", "sem.mp-x", "data.nccl-abcdef",
        "nccl-fresh1",
    )  # fmt: skip
    lost = ("nccl-abcdef", "torch_40_99_0")
    for name in (*kept, *lost):
        (shm / name).write_text("x")
        if "fresh" not in name:
            os.utime(shm / name, (time.time() - 60, time.time() - 60))
    mapped = f"7f0000000000-7f0000001000 rw-s 00000000 00:18 41   {shm}/nccl-mapped\n7f1-7f2 rw-p 0 00:00 0\n"
    (proc / "41/maps").write_text(mapped)
    (proc / "41/fd/5").symlink_to(shm / "nccl-opened")
    remove_segments(shm, proc)
    assert {path.name for path in shm.iterdir()} == set(kept)
