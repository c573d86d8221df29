"""The command's options: JSON, files, assumptions, exit statuses; and what it refuses."""

import argparse
import json
from pathlib import Path

import pytest

import k25_train.plan.__main__ as command
from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from k25_train.plan.assumption_flags import FLAGS, add_flags, assumptions_of
from k25_train.plan.assumptions import AS_CONFIGURED, Assumptions
from k25_train.plan.cause import Cause
from k25_train.plan.memory.verdict import Fit
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.as_json import plan_as_dict
from k25_train.plan.report.planned import Planned
from tests.helpers.hand_made_plans import (
    SECONDS,
    hand_made_plan,
    hand_made_remedy,
    hand_made_verdict,
    with_verdict,
)
from tests.helpers.in_process import status_of_command
from tests.helpers.project_sources import REPO

SMALL = "experiment=smoke"


@pytest.fixture(scope="module")
def pretrain() -> Planned:
    """The 1T model on 256 ranks, in a step of 60 seconds."""
    return hand_made_plan("experiment=k25_pretrain_4k")


@pytest.fixture
def answers(pretrain: Planned, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """What the command then plans whatever it is given."""
    monkeypatch.setattr(command, "planned_of", lambda _: pretrain)
    return pretrain


def run(*arguments: str) -> int:
    """The command in this process; returns its exit status."""
    return status_of_command(command.main, *arguments)


def test_json_has_what_scripts_ask_for(pretrain: Planned) -> None:
    plan = json.loads(json.dumps(plan_as_dict(pretrain), allow_nan=False))
    assert plan["version"] == 1
    assert plan["tokens_per_s_per_gpu"] == pytest.approx(16384 * 4096 / 60 / 256)
    assert plan["step_s"] == 60 and plan["run"]["days"] == pytest.approx(15e12 / (16384 * 4096) * 60 / 86400)
    assert plan["peak_gb"] == 72.0 and plan["limit_gb"] == 84.9
    assert plan["margin_gb"] == pytest.approx(12.9)
    assert plan["fits"] is True and plan["verdict"] == "fits" and plan["remedy"] is None
    assert [part["cause"] for part in plan["parts"]] == [cause.name for cause in SECONDS]
    assert sum(part["seconds"] for part in plan["parts"]) == pytest.approx(plan["step_s"])
    assert plan["exposed_s"] == {
        cause.name: seconds for cause, seconds in SECONDS.items() if cause.is_communication
    }
    assert len(plan["stages"]) == 16
    for stage in plan["stages"]:
        assert sum(stage["items_gb"].values()) == pytest.approx(stage["peak_gb"])
    assert plan["stages"][0]["layers"] == [[0, 2], [31, 33]]
    assert plan["assumptions"]["code"]["compute"] == "as trained"


def test_every_key_is_described(pretrain: Planned) -> None:
    text = (REPO / "k25_train/plan/README.md").read_text(encoding="utf-8")
    missing = [key for key in plan_as_dict(pretrain) if f"`{key}`" not in text]
    assert missing == []


def test_json_of_what_does_not_fit(pretrain: Planned) -> None:
    remedy = hand_made_remedy("optim.offload=cpu", left_gb=3)
    verdict = hand_made_verdict(Fit.does_not_fit, device_gb=92, remedy=remedy)
    plan = plan_as_dict(with_verdict(pretrain, verdict))
    assert plan["fits"] is False and plan["margin_gb"] == pytest.approx(-7.1)
    assert plan["remedy"] == {
        "overrides": ["optim.offload=cpu"],
        "verdict": "fits",
        "left_gb": 3.0,
        "times_cost": 1.03,
    }
    # Where the device is the CPU there is no limit.
    plan = plan_as_dict(with_verdict(pretrain, hand_made_verdict(limit_gb=None)))
    assert plan["fits"] is True and plan["limit_gb"] is plan["margin_gb"] is None


@pytest.mark.parametrize(("fit", "status"), [(Fit.fits, 0), (Fit.tight, 10), (Fit.does_not_fit, 20)])
def test_a_script_asks_with_check(
    pretrain: Planned, monkeypatch: pytest.MonkeyPatch, fit: Fit, status: int
) -> None:
    planned = with_verdict(pretrain, hand_made_verdict(fit, device_gb=80))
    monkeypatch.setattr(command, "planned_of", lambda _: planned)
    assert run(SMALL) == 0, "what could be planned is no error"
    assert run(SMALL, "--check", "--json") == status


def test_files_are_written_and_stdout_stays_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = hand_made_plan(SMALL)
    monkeypatch.setattr(command, "planned_of", lambda _: planned)
    page, trace = tmp_path / "plan.html", tmp_path / "step.json"
    assert run(SMALL, "--json", "--html", str(page), "--perfetto", str(trace)) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["model"] == "k25_tiny"
    assert output.err.splitlines() == [f"written: {page}", f"written: {trace}"]
    assert page.read_text(encoding="utf-8").count("<section") > 8
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    tracks = {event["tid"] for event in events if event["ph"] == "X"}
    assert tracks == {0, 2}, "the first rank of each stage"


def test_what_is_assumed_reaches_the_plan(
    monkeypatch: pytest.MonkeyPatch, pretrain: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    monkeypatch.setattr(command, "planned_of", lambda pipeline: found.append(pipeline) or pretrain)
    assert run(SMALL, "--vision-share", "0.5", "--slow-node=1.25", "--expert-imbalance", "2") == 0
    assert run(SMALL, "--document-tokens", "100") == 0
    assert found[0].assumptions == Assumptions(vision_share=0.5, slow_node=1.25, expert_imbalance=2.0)
    assert found[1].assumptions == Assumptions(document_tokens=100)


def assumed(*arguments: str) -> tuple[Assumptions, list[str]]:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    found, problems = assumptions_of(parser.parse_args(arguments), compose([SMALL]))
    return found, [problem.key for problem in problems]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.field)
@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-1", "1e9", "-0.1", "1,5", "0x2", "٣٫٥"])
def test_what_is_no_such_number_is_refused(flag: object, text: str) -> None:
    assert assumed(f"{flag.name}={text}") == (AS_CONFIGURED, [flag.name])  # type: ignore[attr-defined]


def test_limits_are_those_of_the_configuration() -> None:
    assert assumed("--expert-imbalance=2", "--document-tokens=256", "--vision-share=1")[1] == []
    # Two ranks share the experts, a sequence has 256 tokens.
    wrong = ("--expert-imbalance=2.1", "--document-tokens=257", "--document-tokens=1.5", "--slow-node=0.9")
    assert all(assumed(each)[1] == [each.partition("=")[0]] for each in wrong)


def test_all_that_is_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SMALL, "--vision-share", "7", "--slow-node", "fast") == 2
    error = capsys.readouterr().err
    assert "ConfigError: 2 problems in the command line\n  --vision-share=7\n" in error
    assert "must be a number within 0 and 1, all tokens" in error
    assert "--slow-node=fast" in error and "-> e.g. --slow-node" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--details", "--optimizer"],
        ["--html"],
        ["--json=yes"],
        ["--activations", "--details"],
    ],
    ids=" ".join,
)
def test_options_that_contradict_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(SMALL, *arguments) == 2
    assert "usage: k25-plan" in capsys.readouterr().err


def test_a_page_and_a_trace_are_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "plan")
    assert run(SMALL, "--html", path, "--perfetto", path) == 2
    assert "are two files: give each a name of its own" in capsys.readouterr().err


def test_a_contradictory_configuration_is_refused_as_by_training(capsys: pytest.CaptureFixture[str]) -> None:
    broken = [SMALL, "parallelism.pp=3", "train.micro_batch_size=0"]
    with pytest.raises(ConfigError) as of_training:
        compose(broken)
    assert run(*broken) == 2
    assert capsys.readouterr().err == f"ConfigError: {of_training.value}\n"


def test_details_have_every_table(
    answers: Planned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(SMALL, "--details") == 0
    text = capsys.readouterr().out
    for words in (
        "FITS  12.90 GB left",
        "computed from",
        "In use during a step",
        "GB in the host of a node",
        "Parameters of k25_1t",
        "Sent in a step",
        "MoE layer, 4,096 tokens",
        "stage 0, item by item",
        "page-locked host memory",
        "layout over pp 16 x vpp 2: Ett|tt|",
    ):
        assert words in text, words
    assert "…" not in text, "nothing is cut short"
    causes = [line for line in text.splitlines() if Cause.compute.value in line]
    assert causes[0].split()[-3:] == ["63.3%", "written", "down"]


def test_every_view_plans_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "k25_tiny on 4 x cpu (1 node), 256 tokens per sequence"
    assert lines[1].startswith("FITS  ") and "the device is the CPU" in lines[1]
    pipeline = plan_pipeline(compose([SMALL]))
    assert run(SMALL, "--activations", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["stages"]) == pipeline.layout.pp
    assert run(SMALL, "--optimizer", "--json") == 0
    assert "state_bytes_per_parameter" in json.loads(capsys.readouterr().out)
