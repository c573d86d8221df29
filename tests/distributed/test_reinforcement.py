"""Whole runs of reinforcement learning: with a real engine, on two ranks, killed and gone on with."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k25_train.data.trajectories.reading import StepFile
from k25_train.metrics.sinks import number, read_rows
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.rl_crashes import CrashingRun, start_server
from tests.helpers.rl_runs import REAL, fit_rl, replace_engine, rl_overrides, write_rl_data
from tests.helpers.rl_served_runs import ServedRun, wrong_tokens
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.turned_runs import FORKING, fit_in_turns


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rl_data(tmp_path_factory.mktemp("rl") / "data")


def files_of(run: Path, num_steps: int) -> list[StepFile]:
    return [StepFile(run / f"rollouts/step_{step}.safetensors") for step in range(1, num_steps + 1)]


def test_a_run_trains_on_what_it_rolled_out_and_goes_on_bitwise(data: Path, tmp_path: Path) -> None:
    """Engine and all: the second half of a run that stopped is that of one that did not."""
    whole = rl_overrides(data, tmp_path / "whole", "train.steps=4", "train.eval_interval=2")
    assert run_ranks(fit_rl, 1, whole, REAL) == [4]
    rows = read_rows(tmp_path / "whole/metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(5)]
    for row in rows[1:]:
        assert number(row["staleness_max"]) == 0
        assert number(row["policy/gap_max"]) <= 1e-5
        assert number(row["probe_gap_max"]) <= 1e-5
        assert number(row["rollout/groups"]) == 2
    assert all(0 <= number(row["eval_reward"]) <= 1 for row in (rows[0], rows[2], rows[4]))
    groups = [facts["group"] for file in files_of(tmp_path / "whole", 4) for facts in file.facts]
    assert groups == [group for group in range(8) for _ in range(3)]

    halves = rl_overrides(data, tmp_path / "halves", "train.eval_interval=2")
    assert run_ranks(fit_rl, 1, [*halves, "train.steps=2"], REAL) == [2]
    assert run_ranks(fit_rl, 1, [*halves, "train.steps=4"], REAL) == [4]
    runs = [CrashingRun(tmp_path / name, [], trains=True) for name in ("whole", "halves")]
    assert runs[0].weights() == runs[1].weights()
    again = read_rows(tmp_path / "halves/metrics.jsonl")
    assert [row["loss"] for row in again[1:]] == [row["loss"] for row in rows[1:]]


@pytest.mark.parametrize("kind", ["turns", pytest.param(FORKING, marks=pytest.mark.slow)])
def test_what_was_only_seen_is_context_and_has_no_loss(kind: str, data: Path, tmp_path: Path) -> None:
    """Engine and trainer give the drawn tokens of every branch the same log-probabilities, so both have the
    same tokens before them."""
    room = ("rollout.max_tokens=96", "rollout.max_prompt_tokens=32", "train.seq_len=128", "train.steps=2")
    settings = rl_overrides(data, tmp_path, *room)
    assert run_ranks(fit_in_turns, 1, settings, kind) == [2]
    for row in read_rows(tmp_path / "metrics.jsonl")[1:]:
        assert number(row["policy/gap_max"]) <= 1e-5
        assert number(row["turns"]) > 1 and number(row["observed_tokens"]) > 3
    for file in files_of(tmp_path, 2):
        rows = file.everything()
        parts = [slice(*pair) for pair in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
        assert (
            not rows.policy_weights[~rows.generated].any() and not rows.ratio_weights[~rows.generated].any()
        )
        edges = [int((np.diff(rows.generated[part].astype(np.int8)) == 1).sum()) for part in parts]
        assert max(edges) > (kind != FORKING), "something is seen between two turns"
        by_response = np.bincount(rows.responses)
        assert (by_response == (2 if kind == FORKING else 1)).all() and len(by_response) == 6


def test_two_ranks_reinforce_as_one_does(data: Path, tmp_path: Path) -> None:
    one = rl_overrides(data, tmp_path / "one", "train.steps=2")
    two = rl_overrides(
        data, tmp_path / "two", "train.steps=2", "cluster.gpus_per_node=2", "train.micro_batch_size=1"
    )
    assert run_ranks(fit_rl, 1, one) == [2]
    assert run_ranks(fit_rl, 2, two) == [2, 2]
    rows = read_rows(tmp_path / "one/metrics.jsonl")
    assert all(("hack/same" in row) == (number(row["reward"]) > 0) for row in rows[1:])
    assert any("hack/same" in row for row in rows)
    losses = [[number(row["loss"]) for row in read_rows(tmp_path / name / "metrics.jsonl")[1:]]
              for name in ("one", "two")]  # fmt: skip
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-5)
    first = [files_of(tmp_path / name, 1)[0].everything() for name in ("one", "two")]
    assert (first[0].tokens == first[1].tokens).all(), "what is rolled out knows no layout"


@pytest.mark.slow
def test_engines_that_get_int4_experts_compute_what_the_trainer_does(data: Path, tmp_path: Path) -> None:
    """Codes are the forward's, and all else keeps the trainer's dtype."""
    quantized = ("train.steps=2", "model.quantization=int4_qat")
    pushed = []
    for weights in ("float32", "int4"):
        settings = rl_overrides(data, tmp_path / weights, *quantized, f"rollout.weights={weights}")
        assert run_ranks(fit_rl, 1, settings, REAL) == [2]
        rows = read_rows(tmp_path / weights / "metrics.jsonl")[1:]
        assert all(number(row["probe_gap_max"]) <= 1e-4 for row in rows)
        assert all(number(row["policy/gap_max"]) <= 1e-4 for row in rows)
        pushed.append(number(rows[0]["sync_bytes"]))
    assert pushed[1] < pushed[0]


def order_of_calls(context: RankContext, arguments: list[str]) -> list[str]:
    """What a run does in which order: `push`, `probe`, `roll out` and `train`, each with its step."""
    from k25_train.rl import loop, probe, weight_sync
    from k25_train.training import trainer

    called: list[str] = []

    def noting(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            called.append(f"{what} {given[-1]}" if isinstance(given[-1], int) else what)
            return call(*given)

        return noted

    loop.roll_out = noting("roll out", loop.roll_out)
    trainer.train_step = noting("train", trainer.train_step)
    weight_sync.WeightSync.push = noting("push", weight_sync.WeightSync.push)  # type: ignore[method-assign]
    replace_engine(ScriptedEngine)
    probe.Probe.check = noting("probe", probe.Probe.check)  # type: ignore[method-assign]
    fit_rl(context, arguments, REAL)
    return called


def test_engines_have_proven_weights_before_they_generate_also_after_a_resume(
    data: Path, tmp_path: Path
) -> None:
    settings = rl_overrides(data, tmp_path, "algorithm.steps_per_rollout=2", "rollout.eval_tasks=0")
    (first,) = run_ranks(order_of_calls, 1, [*settings, "train.steps=2"])
    phase = ["roll out 1", "train 1", "roll out 2", "train 2"]
    assert first == ["push 0", "probe", *phase, "push 2", "probe"]
    (second,) = run_ranks(order_of_calls, 1, [*settings, "train.steps=3"])
    assert second == ["push 2", "probe", "roll out 3", "train 3"]


def refusal(context: RankContext, arguments: list[str]) -> str:
    """What a run says whose tasks have no answers; engines are not to be asked for."""
    from k25_train.environments.families.sums import Sums
    from k25_train.errors import ConfigError
    from k25_train.rl import build

    made = Sums.make
    Sums.make = lambda *given: replace(made(*given), reference=None)  # type: ignore[method-assign]
    del build.open_engines
    try:
        fit_rl(context, arguments, REAL)
    except ConfigError as error:
        return str(error)
    return ""


def test_tasks_that_no_judge_can_judge_end_the_run_on_all_ranks_before_it_has_engines(
    data: Path, tmp_path: Path
) -> None:
    settings = rl_overrides(data, tmp_path, "cluster.gpus_per_node=2", "train.micro_batch_size=1")
    for text in run_ranks(refusal, 2, settings):
        assert "its judge 'answer' cannot read its reference: malformed reference: None is no answer" in text


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param([], id="synchronous", marks=pytest.mark.slow),
        pytest.param(["algorithm.token_cap=3"], id="partial"),
        pytest.param(["algorithm.steps_per_rollout=2"], id="two steps", marks=pytest.mark.slow),
    ],
)
def test_loops_that_are_killed_go_on_to_the_same_weights(kind: list[str], data: Path, tmp_path: Path) -> None:
    start_server()
    settings = ["train.steps=6", *kind]
    reference = CrashingRun(
        tmp_path / "whole", rl_overrides(data, tmp_path / "whole", *settings), trains=False
    )
    life_s = reference.to_the_end()
    run = CrashingRun(tmp_path / "killed", rl_overrides(data, tmp_path / "killed", *settings), trains=False)
    run.killed_to_the_end(random.Random(1), life_s / 2, most=3)
    assert run.check(reference, num_steps=6, per_step=2, size=3) == []


def test_servers_that_are_killed_cost_no_token_and_come_back_with_the_next_push(
    data: Path, tmp_path: Path
) -> None:
    """One in the middle of generating, the other in a commit, each while the other one goes on."""
    start_server()
    paths = [tmp_path / name for name in ("whole", "killed")]
    reference, run = (
        kind(path, rl_overrides(data, path, "train.steps=6"), trains=False)
        for kind, path in zip((CrashingRun, ServedRun), paths, strict=True)
    )
    reference.to_the_end()
    assert isinstance(run, ServedRun)
    try:
        run.servers.restart([("generate", 4), ("commit", 4)])
        run.to_the_end()
    finally:
        run.close()
    assert sorted(run.servers.deaths) == ["commit", "generate"]
    assert run.check(reference, num_steps=6, per_step=2, size=3) == [] == wrong_tokens(run, 6)
    told = run.folder.with_suffix(".log").read_text(encoding="utf-8")
    assert told.count("is fenced off") == told.count("again; it was fenced off") > 0
