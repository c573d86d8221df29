"""`k25-rollout list` and `show` tell what a run has rolled out, trained or in progress."""

import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from k25_train.data.trajectories.rows import Trajectories, Trajectory
from k25_train.data.trajectories.step_file import step_path, write_step_file
from k25_train.environments.base import scored
from k25_train.rollout.__main__ import main
from k25_train.rollout.journal import Journal
from k25_train.rollout.journal_state import admitted, consumed
from k25_train.rollout.response_records import judged, medium
from tests.helpers.browser import opened
from tests.helpers.made_groups import extended, group, segment, stopped
from tests.helpers.tiny_shards import write_shard_set


def _image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (200, 40, 40)).save(file, "PNG")
    return file.getvalue()


IMAGE = _image()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One group in a step file, one in progress."""
    journal = Journal(tmp_path / "rollouts/journal")
    for number in range(2):
        journal.append(admitted(group(number)))
        journal.append(extended(number, 0, 0, segment([70, 71, 72])))
        journal.append(stopped(number, 0))
        journal.append(judged(number, 0, scored(0.5, {"answer": 0.5})))
    journal.append(consumed(1, (0,)))
    journal.close()
    facts = {
        "group": 0, "task": "t/0", "sample": 0, "finish_reason": "stop", "reward": 0.5,
        "trained_reward": 0.0, "parts": {"answer": 0.5}, "reason": "",
    }  # fmt: skip
    made = Trajectory(
        name="t/0#0", response=0, tokens=np.array([65, 66, 70, 71], np.int32),
        generated=np.array([False, False, True, True]), rollout_logprobs=np.array([0, 0, -1, -3], np.float32),
        versions=np.array([-1, -1, 4, 5], np.int32), facts=facts,
    )  # fmt: skip
    rows = Trajectories.of([made])
    ones = rows.generated.astype(np.float32)
    write_step_file(step_path(tmp_path / "rollouts", 1), rows.weighted(ones, ones, ones), {})
    return tmp_path


def test_list_has_trained_groups_and_those_under_way(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A narrow terminal has no room for versions.
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["list", str(run)]) == 0
    trained, under_way = [
        line for line in capsys.readouterr().out.splitlines() if " t/" in line and "groups" not in line
    ]
    assert "t/0" in trained and " 0.500 " in trained and "4 to 5" in trained and "1 stop" in trained
    assert "t/1" in under_way and "in progress" in under_way and "1 no token yet" in under_way


def test_show_has_tokens_versions_and_what_they_earned(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = write_shard_set(tmp_path / "set", {"train": []}) / "tokenizer.json"
    assert main(["show", str(run), "t/0", "--tokens", "--tokenizer", str(tokenizer)]) == 0
    out = capsys.readouterr().out
    assert "group 0, task t/0, step 1" in out
    assert "reward 0.5 (answer 0.5), 2 tokens, ended by stop, trained with reward 0" in out
    assert "mean log-probability -2.000, weights of steps 4 to 5" in out
    assert out.count("version ") == 2 and "-3.0000" in out
    assert main(["show", str(run), "1", "--tokenizer", str(tokenizer)]) == 0
    assert "not begun" in capsys.readouterr().out


def test_what_is_not_there_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run), "t/9"]) == 2
    assert "has no group of t/9" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["list", str(tmp_path / "empty")]) == 2
    assert "has no rollouts: name the run.dir" in capsys.readouterr().err


def test_stats_are_of_the_journal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["stats", str(run)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for line in ("trained 2", "judged 1", "waiting 1", "groups 2", "turns 2", "tokens 6", "stop 2"):
        assert line in words, (line, words)


def test_replay_names_what_differs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The fixture's file has other tokens than its journal.
    assert main(["replay", str(run)]) == 1
    out = capsys.readouterr().out
    assert "step 1, group 0, response 0: 3 drawn token ids in the journal, 2 in the step file" in out
    assert "1 responses of 1 steps compared" in out


def test_replay_of_what_agrees_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_path(run / "rollouts", 1).unlink()
    made = Trajectory(
        name="t/0#0", response=0, tokens=np.array([65, 66, 70, 71, 72], np.int32),
        generated=np.array([False, False, True, True, True]),
        rollout_logprobs=np.concatenate([[0, 0], segment([70, 71, 72]).logprobs]).astype(np.float32),
        versions=np.array([-1, -1, *[segment([70]).spans[0].version] * 3], np.int32),
        facts={
            "group": 0, "task": "t/0", "sample": 0, "finish_reason": "stop", "reward": 0.5, "parts": {},
            "reason": "",
        },
    )  # fmt: skip
    rows = Trajectories.of([made])
    ones = rows.generated.astype(np.float32)
    write_step_file(step_path(run / "rollouts", 1), rows.weighted(ones, ones, ones), {})
    assert main(["replay", str(run)]) == 0, capsys.readouterr().out
    assert "1 responses of 1 steps compared" in capsys.readouterr().out


def test_the_page_of_a_task_in_a_browser(run: Path, tmp_path: Path) -> None:
    vocabulary = write_shard_set(tmp_path / "set", {"train": []}) / "tokenizer.json"
    journal = Journal(run / "rollouts/journal")
    journal.append(medium(0, IMAGE))
    journal.append(medium(0, IMAGE))
    journal.close()
    file = tmp_path / "task.html"
    tokenizer = str(vocabulary)
    assert main(["show", str(run), "t/0", "--html", str(file), "--tokenizer", tokenizer]) == 0
    script = """
      const marks = [...document.querySelectorAll(".drawn i")];
      document.title = JSON.stringify([marks.map(each => each.title), document.images[0].naturalWidth,
        document.images.length, document.querySelector(".facts b").textContent]);
    """
    shown = opened(file, script, tmp_path / "profile")
    (title,) = re.findall("<title>(.*?)</title>", shown)
    marks, width, number, worth = json.loads(html.unescape(title))
    assert marks == [
        "id 70, log-probability -1.000 (36.8%), step 4", "id 71, log-probability -3.000 (5.0%), step 5"
    ]  # fmt: skip
    assert (width, number) == (2, 1) and "group 0, trained by step 1" in shown and "step 5</span>" in shown
    assert worth == "reward 0.5"
