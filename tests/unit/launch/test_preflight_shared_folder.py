"""The run folder as nodes see it: one for all, and about as fast for each."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.run_folder import location
from launch.preflight import coordination, shared_folder
from launch.preflight.coordination import Coordinator
from launch.preflight.findings import Finding, Verdict
from launch.preflight.shared_folder import FolderRates, judge_folder, read_file, too_full, write_file

RUN = Path("/runs/a")
SOUND = FolderRates(write_gb_per_s=1.0, read_gb_per_s=2.0)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there does not come later, and files are small."""
    monkeypatch.setattr(location, "LOOK_S", 0.2)
    monkeypatch.setattr(location, "RETRY_S", 0.05)
    monkeypatch.setattr(shared_folder, "FILE_BYTES", dict.fromkeys(shared_folder.FILE_BYTES, 10_000))
    monkeypatch.setattr(shared_folder, "FOLDER_TIMEOUT_S", 30.0)
    monkeypatch.setattr(coordination, "LEAVE_TIMEOUT_S", 1.0)


def tried_by(*runs: Path, checkpoints: str = "null") -> dict[int, list[Finding]]:
    """What nodes find, each of which sees the run folder at another path."""
    config, store = compose(["experiment=smoke", f"checkpoint.dir={checkpoints}"]), dist.HashStore()
    outcomes: dict[int, Any] = {}

    def body(rank: int, own: Config) -> None:
        coordinator = Coordinator(store, rank=rank, world_size=len(runs), local_rank=0, ranks_per_node=1)
        outcomes[rank] = shared_folder.try_shared_folder(own, coordinator)

    threads = []
    for rank, run in enumerate(runs):
        own = replace(config, run=replace(config.run, dir=str(run)))
        threads.append(threading.Thread(target=body, args=(rank, own)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert all(outcomes[rank] == {} for rank in range(1, len(runs)))
    found: dict[int, list[Finding]] = outcomes[0]
    return found


def test_one_folder_for_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    found = tried_by(tmp_path, tmp_path, tmp_path)
    for shared, speed in found.values():
        # On shared cores, one of three may be slow.
        assert shared.verdict is Verdict.passed and speed.verdict in (Verdict.passed, Verdict.warned)
        assert speed.found.startswith("writes ")
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]


def test_checkpoints_elsewhere_are_tried_where_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = tmp_path / "run", tmp_path / "scratch/checkpoints"
    written: list[Path] = []
    write = write_file

    def noted(path: Path, num_bytes: int, rates: FolderRates) -> None:
        written.append(path.resolve())
        write(path, num_bytes, rates)

    monkeypatch.setattr(shared_folder, "write_file", noted)
    found = tried_by(run, run, checkpoints=str(place))
    assert {one[0].verdict for one in found.values()} == {Verdict.passed}
    assert len(written) == 2 and all(path.is_relative_to(place) for path in written)
    assert list(place.iterdir()) == [] and (run / "checkpoints").samefile(place)
    # A run that would start from scratch there.
    found = tried_by(run, run, checkpoints=str(tmp_path / "other"))
    assert "the run would start from scratch" in found[0][0].found


def test_a_file_system_that_cannot_rename_folders_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(os, "rename", refuse)
    found = tried_by(tmp_path)
    assert found[0][0].verdict is Verdict.failed and "Function not implemented" in found[0][0].found


def test_an_object_store_is_tried_by_every_node(tmp_path: Path) -> None:
    found = tried_by(tmp_path, tmp_path, checkpoints="memory://bucket/run")
    assert {one[0].verdict for one in found.values()} == {Verdict.passed}
    found = tried_by(tmp_path / "b", tmp_path / "b", checkpoints="nosuch://bucket/run")
    assert {one[0].verdict for one in found.values()} == {Verdict.failed}
    assert "checkpoint.dir=nosuch://bucket/run cannot be used (ValueError: Protocol not" in found[1][0].found


def test_a_folder_that_is_not_shared_fails_on_that_node_alone(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    found = tried_by(run, run, other)
    assert [found[rank][0].verdict for rank in range(3)] == [Verdict.passed, Verdict.passed, Verdict.failed]
    assert "does not see what rank 0 has written there" in found[2][0].found
    assert {found[rank][1].verdict for rank in range(3)} == {Verdict.skipped}
    assert list(run.iterdir()) == list(other.iterdir()) == []


def test_a_folder_seen_one_way_is_looked_into_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise rank 0 would wait for each of hundreds of nodes in turn, and the others for it."""
    limits: list[float] = []

    def sees(_run: Path, _folders: object, _token: str, rank: int, limit_s: float) -> str | None:
        limits.append(limit_s)
        return None if rank == 0 else "writes there what rank 0 does not see"

    monkeypatch.setattr(location, "sees_tokens", sees)
    found = tried_by(tmp_path, tmp_path, tmp_path)
    assert limits == [0.2, 0.2, 0.0]
    assert [found[rank][0].verdict for rank in range(3)] == [Verdict.passed, Verdict.failed, Verdict.failed]


def test_a_folder_that_the_first_node_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = tried_by(tmp_path / "file", tmp_path / "file")
    assert {one[0].verdict for one in found.values()} == {Verdict.failed}
    assert "the first node cannot use it" in found[1][0].found


def test_one_node_has_a_speed_and_shares_with_nobody(tmp_path: Path) -> None:
    (shared, speed) = tried_by(tmp_path)[0]
    assert (shared.verdict, speed.verdict) == (Verdict.skipped, Verdict.passed)


@pytest.mark.parametrize(
    ("changed", "verdicts", "words"),
    [
        ({}, "pp", "writes 1 GB/s, reads 2 GB/s"),
        ({"write_gb_per_s": 0.1}, "pw", "the medians are 1 and 2 GB/s"),
        ({"read_gb_per_s": 0.2}, "pw", "writes 1 GB/s, reads 0.2 GB/s"),
        ({"write_gb_per_s": 0.8}, "pp", "writes 0.8 GB/s"),
        ({"unmeasured": "only 0.1 GB are free there", "write_gb_per_s": None}, "ps", "only 0.1 GB are free"),
        (
            {"trouble": "cannot write there (Read-only file system)", "write_gb_per_s": None},
            "fs",
            "Read-only",
        ),
        (
            {"trouble": "cannot read there what another node has written", "read_gb_per_s": None},
            "fs",
            "another",
        ),
        (None, "fs", "did not answer while the folder was tried"),
    ],
)
def test_one_node_of_eight(changed: dict[str, Any] | None, verdicts: str, words: str) -> None:
    found = {rank: replace(SOUND) for rank in range(0, 64, 8)}
    if changed is None:
        del found[8]
    else:
        found[8] = replace(SOUND, **changed)
    judged = judge_folder(RUN, found, range(0, 64, 8))
    assert "".join(one.verdict.name[0] for one in judged[8]) == verdicts
    assert any(words in str(one) for one in judged[8]), judged[8]
    assert all(one.verdict is Verdict.passed for rank, own in judged.items() if rank != 8 for one in own)


def test_a_full_disk_is_not_filled_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert too_full(tmp_path, 1) is None
    assert "GB are free there" in str(too_full(tmp_path, 2**60))
    assert "its free space is unknown (No such file" in str(too_full(tmp_path / "none", 1))
    rates = FolderRates()

    def full(_number: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fdatasync", full)
    write_file(tmp_path / "0.data", 10_000, rates)
    assert rates.trouble == "cannot write a file of 0 MiB there (No space left on device)"


def test_what_another_node_has_written_is_read(tmp_path: Path) -> None:
    rates = FolderRates()
    write_file(tmp_path / "0.data", 10_000, rates)
    read_file(tmp_path / "0.data", rates)
    assert rates.trouble is None and rates.write_gb_per_s and rates.read_gb_per_s
    read_file(tmp_path / "none", rates)
    assert "cannot read there what another node has written (No such file" in str(rates.trouble)
