"""What a rank leaves for its torchrun: its error in a form for programs, and that it was done."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25_train.entry import run_command, shared
from k25_train.errors import CheckpointError, ConfigError, DamagedCheckpointError, DataError, K25Error
from k25_train.farewell import DETAILS, RUNNING


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchrun's file for the error of this rank, which runs."""
    (tmp_path / RUNNING).touch()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def raising(error: BaseException, cause: BaseException | None = None) -> Callable[[], None]:
    def body() -> None:
        raise error from cause

    return body


def told(error_file: Path, body: Callable[[], None]) -> dict[str, Any]:
    """What a command that ends with an error leaves."""
    with pytest.raises(SystemExit):
        run_command(body)
    assert (error_file.parent / RUNNING).exists()
    facts: dict[str, Any] = json.loads(error_file.read_text())[DETAILS]
    return facts


def of_rank_3(error: K25Error, code: str = "") -> K25Error:
    error.of_ranks, error.code = (3,), code
    return error


EIO = OSError(5, "Input/output error", "/d/x")
DAMAGED = DamagedCheckpointError("x; restore it", Path("/run/step_8"), Path("/run/step_4"))
CASES: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
    "settings": (
        raising(shared(ConfigError("a=1: no"))),
        {"kind": "ConfigError", "text": "a=1: no", "is_shared": True},
    ),
    "disk": (raising(EIO), {"kind": "MachineError", "code": "EIO", "path": "/d/x", "is_of_peer": False}),
    "disk behind an error": (
        raising(DataError("x"), EIO),
        {"kind": "DataError", "code": "EIO", "path": "/d/x"},
    ),
    "agreed on": (
        raising(CheckpointError("y"), of_rank_3(CheckpointError("x"), "EROFS")),
        {"of_ranks": [3], "code": "EROFS"},
    ),
    "damaged": (
        raising(DAMAGED),
        {"kind": "DamagedCheckpointError", "path": "/run/step_8", "instead": "/run/step_4"},
    ),
    "peer": (
        raising(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:7")),
        {"is_of_peer": True},
    ),
    "peer in a checkpoint": (
        raising(CheckpointError("rank 0: RuntimeError: Connection reset by peer")),
        {"is_of_peer": True},
    ),
    "fault": (
        raising(ValueError("oops")),
        {"kind": "ValueError", "is_fault": True, "raw": "oops", "text": "oops"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_is_told(case: str, error_file: Path) -> None:
    body, expected = CASES[case]
    found = told(error_file, body)
    assert {name: found[name] for name in expected} == expected


def test_what_was_handled_before_is_no_cause(error_file: Path) -> None:
    def body() -> None:
        try:
            raise EIO
        except OSError:
            raise DataError("x") from None

    assert told(error_file, body)["code"] == ""


def test_a_rank_that_only_waits_for_the_first_to_speak_tells_too(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("k25_train.entry.speaks", lambda: False)
    monkeypatch.setattr("k25_train.entry.WAIT_FOR_FIRST_RANK_S", 0.0)
    assert told(error_file, raising(shared(ConfigError("no"))))["is_shared"]
    assert capsys.readouterr().err == ""


def test_a_command_that_is_done_says_so(error_file: Path) -> None:
    run_command(lambda: 0)
    assert not (error_file.parent / RUNNING).exists() and not error_file.exists()


def test_leaving_with_status_0_is_not_being_done(error_file: Path) -> None:
    """Nor for a command around it, such as launch.rank."""
    with pytest.raises(SystemExit) as left:
        run_command(lambda: run_command(lambda: sys.exit(0)))
    assert not left.value.code and (error_file.parent / RUNNING).exists()


def test_a_damaged_checkpoint_travels_between_ranks() -> None:
    found = pickle.loads(pickle.dumps(DAMAGED))
    assert (str(found), found.folder, found.instead) == (str(DAMAGED), DAMAGED.folder, DAMAGED.instead)
