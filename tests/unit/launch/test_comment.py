"""The comment of a job: what squeue shows of a run, without holding anything up."""

import time
from pathlib import Path

import pytest

from launch import comment
from launch.comment import MAX_LENGTH, JobComment, plain

SCONTROL = '#!/bin/sh\necho "$*" >> "{folder}/calls"\n{then}\n'


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a scontrol that writes down its calls; returns the script."""
    script = tmp_path / "scontrol"
    script.write_text(SCONTROL.format(folder=tmp_path, then=""))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(comment, "SHORTEST_S", 0.02)
    monkeypatch.setattr(comment, "EVERY_S", 0.05)
    return script


def calls(script: Path) -> list[str]:
    """Arguments of each call."""
    path = script.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_state_and_step_follow_the_sites_own_words(scontrol: Path) -> None:
    steps = iter(range(1, 1000))
    shown = JobComment(7, "project=llm, Bert", lambda: f"step {next(steps)} of 1,000")
    shown.say("attempt 1: nodes are checked")
    while len(calls(scontrol)) < 1:
        time.sleep(0.01)
    shown.say("attempt 1 trains", with_progress=True)
    while len(calls(scontrol)) < 3:
        time.sleep(0.01)
    shown.say("finished")
    shown.close()
    first, second, *_, last = calls(scontrol)
    front = "update JobId=7 Comment=project=llm, Bert | k25: "
    assert first == f"{front}attempt 1: nodes are checked"
    assert second == f"{front}attempt 1 trains, step 1 of 1,000"
    assert last == f"{front}finished"


def test_what_does_not_change_is_not_sent_again(scontrol: Path) -> None:
    shown = JobComment(7, None, lambda: "step 3 of 9")
    for _ in range(50):
        shown.say("trains", with_progress=True)
        time.sleep(0.005)
    shown.close()
    shown.close()
    assert calls(scontrol) == ["update JobId=7 Comment=k25: trains, step 3 of 9"]


def test_states_that_change_quickly_are_few_requests(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comment, "SHORTEST_S", 0.2)
    shown = JobComment(7, None, str)
    for number in range(100):
        shown.say(f"state {number}")
        time.sleep(0.002)
    shown.close()
    assert len(calls(scontrol)) <= 4 and calls(scontrol)[-1].endswith("k25: state 99")


@pytest.mark.parametrize("then", ["sleep 30", "echo 'Access/permission denied' >&2; exit 1"])
def test_a_scontrol_that_hangs_or_refuses_holds_nothing_up(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    monkeypatch.setattr(comment, "CLOSE_S", 0.1)
    scontrol.write_text(SCONTROL.format(folder=scontrol.parent, then=then))
    start_s = time.monotonic()
    shown = JobComment(7, None, str)
    shown.say("trains")
    shown.close()
    assert time.monotonic() - start_s < 5


def test_without_scontrol_nothing_happens(scontrol: Path) -> None:
    scontrol.unlink()
    shown = JobComment(7, None, str)
    shown.say("trains")
    shown.close()


def test_any_text_fits_on_a_line() -> None:
    assert plain('a "quoted"\n\x1b[31mtext|with=signs') == "a quoted [31mtext with signs"
    assert len(plain("x" * 999)) == MAX_LENGTH
