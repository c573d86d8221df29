"""Whatever fails while a checkpoint is written or read: every rank ends with the cause, and none is lost."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from k25_train.checkpoint.integrity import verify
from tests.helpers.interrupted_runs import ONE_RANK, SHORT, cut_off, short_run
from tests.helpers.old_checkpoints import (
    OLD,
    fit_with_old_files,
    write_old_manifest,
    write_oldest_manifest,
)
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, start_run
from tests.helpers.written_checkpoints import malicious_pickle

pytestmark = pytest.mark.distributed

NEXT = SHORT.saved_at + 2
"""Step of the saves that fail."""
TENSORS = "rank_00000_0.safetensors"
"""A file of tensors."""


@contextmanager
def full_after(num_bytes: int) -> Iterator[None]:
    """No file gets longer than that, which the system says at a write as it says that a disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def full_disk(files: str) -> Iterator[None]:
    """Writing fails from the first byte on where a file has `files` in its name."""
    real = open

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        file = real(path, mode, *more, **named)
        return Full(file) if {"w", "x"} & set(mode) and files in str(path) else file

    with mock.patch("builtins.open", opened), mock.patch("io.open", opened):
        yield


@contextmanager
def error_in(function: str, number: int) -> Iterator[None]:
    """A function of `os` or of the product raises OSError."""
    with mock.patch(function, side_effect=OSError(number, os.strerror(number))):
        yield


@contextmanager
def writing_elsewhere(elsewhere: Path) -> Iterator[None]:
    """This rank's files go to another folder, as they do where that of the checkpoints is not shared."""
    from k25_train.checkpoint.saving import Saving

    start = Saving._start

    def to_another_folder(self: Saving, *arguments: Any) -> None:
        self._folder = elsewhere
        start(self, *arguments)

    with mock.patch.object(Saving, "_start", to_another_folder):
        yield


WRITE_FAULTS: dict[str, tuple[int, str, Callable[[Path], Any]]] = {
    "a rank's file at its start": (1, "rank 1: [Errno 27] File too large: '", lambda _: full_after(1000)),
    "the first rank's amid a tensor": (0, "rank 0: [Errno 27] File too large", lambda _: full_after(200_000)),
    "the configuration": (0, "No space left", lambda _: full_disk("config.yaml")),
    "the manifest": (0, "No space left", lambda _: full_disk("manifest.json")),
    "a rank's file does not reach the disk": (
        1, "rank 1: [Errno 5] Input/output error: '", lambda _: error_in("os.fsync", 5)
    ),
    "the folder's names do not": (
        0, "Input/output error", lambda _: error_in("k25_train.checkpoint.storage.posix.sync_folder", 5)
    ),
    "the new name": (
        0, "Read-only file system",
        lambda _: error_in("k25_train.checkpoint.storage.posix.PosixStorage.commit", errno.EROFS)
    ),
    "a rank may not write": (
        1, "cannot be written to", lambda _: mock.patch("os.access", return_value=False)
    ),
    "a rank has another folder": (
        1, "the first rank does not see it: the place of the checkpoints must be one that all nodes share",
        lambda root: writing_elsewhere(root.parent / "elsewhere")
    ),
    "a rank does not see the folder": (
        1, "is not there: checkpoints must be in a folder that all nodes share",
        lambda root: writing_elsewhere(root.parent / "nowhere")
    ),
}  # fmt: skip
"""Fault -> the rank that has it, what all are told, and how to make it. All but those of the first rank leave
the others waiting if nothing is done about it."""


def saves_that_fail(context: RankContext, arguments: Sequence[str]) -> dict[str, str]:
    """What each fault leads to on this rank, and at last none."""
    from k25_train.checkpoint import publish
    from k25_train.errors import CheckpointError
    from k25_train.metrics.report import Report
    from k25_train.training.soundness import Verdict
    from k25_train.training.trainer import Trainer

    run = start_run(context, arguments)
    keeper = Trainer(run, Report(run.config, is_main=run.is_main, device_name="CPU")).keeper
    outcomes = {"resumed": f"after step {keeper.resume()}"}
    publish.PATIENCE_S = 0.0
    for name, (rank, _, fault) in (WRITE_FAULTS | {"none": (0, "", lambda _: mock.MagicMock())}).items():
        try:
            with fault(keeper.root) if context.rank == rank else mock.MagicMock():
                outcomes[name] = f"saved as {keeper.save(NEXT, Verdict())}"
        except CheckpointError as error:
            left = (keeper.root / f"step_{NEXT}.partial").exists()
            outcomes[name] = f"{error}{'; it stays' if left else ''}"
    return outcomes


def test_a_save_that_fails_on_one_rank_fails_on_all_and_costs_no_checkpoint(
    data: Path, run_alone: Path, tmp_path: Path
) -> None:
    run = cut_off(run_alone, tmp_path / "run")
    (run / "elsewhere").mkdir()
    command = short_run(data, run, *layout(ep=2, dp=2))

    by_rank = run_ranks(saves_that_fail, 2, command, timeout_s=240.0)

    partial, good = run / f"checkpoints/step_{NEXT}.partial", run / f"checkpoints/step_{SHORT.saved_at}"
    for outcomes in by_rank:
        assert outcomes.pop("resumed") == "after step 5"
        assert outcomes.pop("none") == f"saved as {run}/checkpoints/step_{NEXT}"
        for name, (_, told, _) in WRITE_FAULTS.items():
            found = outcomes.pop(name)
            assert ": could not be written (" in found, name
            if not name.startswith("a rank "):
                assert found.startswith(f"{partial}: "), name
            assert told in found and "it stays" not in found, (name, found)
            assert f"bytes are free there, {good} is complete" in found, name
            assert ("; make room" in found) == (told == "No space left"), name
    assert verify(good).step == SHORT.saved_at


def damage_each(run: Path, copies: Path) -> dict[str, str]:
    """Copies of the run, each with one kind of damage in its newest checkpoint -> what has to be told."""

    def copy(name: str) -> Path:
        return shutil.copytree(run, copies / name) / f"checkpoints/step_{SHORT.num_steps}"

    told: dict[str, str] = {}
    for name in (TENSORS, "config.yaml", "data_state.json"):
        file = copy(f"changed {name}") / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        told[f"changed {name}"] = f"{file}: "
    header = copy("garbage header") / TENSORS
    with header.open("r+b") as stream:
        stream.write(b"garbage" * 1000)
    told["garbage header"] = f"{header}: "
    return told


def resumes(context: RankContext, arguments: Sequence[str], cases: Sequence[str]) -> dict[str, str]:
    """For each run folder, the step from which the run goes on, or its error."""
    from k25_train.errors import K25Error
    from k25_train.metrics.report import Report
    from k25_train.training.trainer import Trainer

    run = start_run(context, arguments)
    outcomes = {}
    for folder in cases:
        run.config.run.dir = folder
        try:
            report = Report(run.config, is_main=run.is_main, device_name="CPU")
            outcomes[folder] = f"step {Trainer(run, report).keeper.resume()}"
        except K25Error as error:
            outcomes[folder] = f"{type(error).__name__}: {error}"
    return outcomes


def test_changed_content_is_named_with_the_newest_other_that_is_as_it_was(
    data: Path, run_alone: Path, tmp_path: Path
) -> None:
    told = damage_each(run_alone, tmp_path)
    both = tmp_path / "both"
    shutil.copytree(tmp_path / f"changed {TENSORS}", both)
    with (both / f"checkpoints/step_{SHORT.saved_at}/{TENSORS}").open("r+b") as stream:
        stream.write(b"garbage")
    command = short_run(data, tmp_path, *layout(ep=2, dp=2), "train.steps=30")

    by_rank = run_ranks(resumes, 2, command, [str(tmp_path / name) for name in (*told, "both")])

    for outcomes in by_rank:
        for name, text in told.items():
            found = outcomes[str(tmp_path / name)]
            assert found.startswith("DamagedCheckpointError: ") and text in found, found
            assert f"to resume from {tmp_path / name}/checkpoints/step_5, which is whole" in found
        assert "to start from scratch: no other is whole" in outcomes[str(both)]


def poison_each(old: Path, copies: Path, witness: Path) -> dict[str, Path]:
    """Runs with an old checkpoint, in both formats, that has code in a file that was once unpickled, and a
    manifest that fits -> the file that has to be named."""
    payload, poisoned = malicious_pickle(witness), {}
    for format_version in (1, 2):
        for name in (".metadata", "__0_0.distcp", "common.pt", "__0.metadata"):
            folder = copies / f"{name} {format_version}/checkpoints/step_{SHORT.num_steps}"
            shutil.copytree(old, folder)
            file = folder / name
            if name == "__0_0.distcp":
                hide_in_common_state(file, payload)
            else:
                file.write_bytes(payload)
            if name == "__0.metadata":
                (folder / ".metadata").write_bytes(b"garbage")
            (write_oldest_manifest if format_version == 1 else write_old_manifest)(folder, SHORT.num_steps)
            poisoned[f"{name} {format_version}"] = folder / (".metadata" if name.startswith("__0.") else name)
    return poisoned


def hide_in_common_state(file: Path, payload: bytes) -> None:
    """Put code where the checkpoint holds what is no tensor: an archive at the start of the first file."""
    import io
    import zipfile

    content = file.read_bytes()
    end = content.index(b"PK\x05\x06") + 22
    old, new = zipfile.ZipFile(io.BytesIO(content[:end])), io.BytesIO()
    with zipfile.ZipFile(new, "w") as rewritten:
        for entry in old.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            rewritten.writestr(entry.filename, payload if is_pickle else old.read(entry))
    assert len(new.getvalue()) <= end, "the archive must fit where the old one was"
    # A comment of the archive fills the rest.
    rest = end - len(new.getvalue())
    archive = new.getvalue()[:-2] + rest.to_bytes(2, "little") + b" " * rest
    file.write_bytes(archive + content[end:])


def evaluations(_context: RankContext, checkpoints: Sequence[str]) -> dict[str, str]:
    """The error of evaluating each."""
    from k25_train.errors import K25Error
    from k25_train.eval import evaluate, read_arguments

    outcomes = {}
    for checkpoint in checkpoints:
        try:
            evaluate(*read_arguments([f"checkpoint={checkpoint}", "train.eval_sequences=2"]))
            outcomes[checkpoint] = "evaluated"
        except K25Error as error:
            outcomes[checkpoint] = f"{type(error).__name__}: {error}"
    return outcomes


def test_no_code_of_a_foreign_checkpoint_runs(data: Path, tmp_path: Path) -> None:
    import pickle

    witness = tmp_path / "code ran"
    pickle.loads(malicious_pickle(witness))
    witness.unlink()
    run_ranks(fit_with_old_files, 1, short_run(data, tmp_path / "run", *ONE_RANK))
    poisoned = poison_each(tmp_path / f"run/{OLD}/step_{SHORT.num_steps}", tmp_path, witness)
    command = short_run(data, tmp_path, *ONE_RANK, "train.steps=30")

    folders = [str(tmp_path / name) for name in poisoned]
    (resumed,) = run_ranks(resumes, 1, command, folders)

    assert not witness.exists()
    for name, file in poisoned.items():
        if name.startswith("common.pt"):
            # Nothing reads it any more.
            assert resumed[str(tmp_path / name)] == f"step {SHORT.num_steps}"
            continue
        assert "CheckpointError: " in resumed[str(tmp_path / name)], name
        assert file.name in resumed[str(tmp_path / name)], name
    first = next(iter(poisoned.values())).parent
    (evaluated,) = run_ranks(evaluations, 1, [str(first)])
    assert not witness.exists()
    assert "posix" not in first.name
    assert f"{first}/.metadata: it asks for pathlib" in evaluated[str(first)]


def test_a_full_disk_leaves_nothing_behind_at_the_next_start(
    data: Path, run_alone: Path, tmp_path: Path
) -> None:
    run = cut_off(run_alone, tmp_path / "run")
    (run / f"checkpoints/step_{NEXT}.partial").mkdir()
    command = short_run(data, run, *ONE_RANK)

    run_ranks(fit, 1, [*command, "train.steps=6", "optim.warmup=0", "optim.decay=0"])

    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_5", "step_6"]
