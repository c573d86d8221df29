"""Alarms: planted spikes are told once, and nothing else is told at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.metrics import AlarmConfig
from k25_train.metrics.alarms import Alarms
from k25_train.metrics.baseline import NEEDED, WINDOW
from k25_train.metrics.report import Report
from k25_train.metrics.sinks import Row, read_rows
from k25_train.run_folder.alarm_rows import Alarm, AlarmKind, alarms_of, figures

CONFIG = compose(["experiment=smoke"])
LIMITS = AlarmConfig(loss_spike=8.0, grad_spike=5.0, expert_load=4.0, throughput=1.5, checkpoint=False)
SPIKES: dict[str, tuple[Row, AlarmKind, str]] = {
    "loss": ({"loss": 6.0}, AlarmKind.loss_spike, ""),
    "gradient": ({"grad_norm/vision_tower": 12.0}, AlarmKind.grad_spike, "vision_tower"),
    "load": ({"expert_load": 4.5}, AlarmKind.expert_load, ""),
    "dead": ({"dead_experts": 2}, AlarmKind.dead_experts, ""),
}


def row_of(step: int, **changed: float) -> Row:
    """A step like all others, with a little noise."""
    wave = 1 + 0.01 * ((step * 7) % 5 - 2)
    return {
        "step": step,
        "loss": 3.0 * wave,
        "grad_norm": 2.0,
        "grad_norm/language_model": 1.0 * wave,
        "grad_norm/vision_tower": 2.0 * wave,
        "expert_load": 1.5,
        "dead_experts": 0,
        "tokens": 4096,
        "tokens_per_s": 1000.0 * wave,
    } | changed


def judged(
    rows: list[Row], limits: AlarmConfig = LIMITS, disturbed: frozenset[int] = frozenset()
) -> list[Alarm]:
    alarms = Alarms(limits, CONFIG.model)
    found = [alarms.judge(row, is_disturbed=row["step"] in disturbed) for row in rows]
    return [alarm for of_row in found for alarm in of_row]


@pytest.mark.parametrize("name", SPIKES)
def test_a_planted_spike_is_told_with_its_step_value_and_what_is_usual(name: str) -> None:
    changed, kind, part = SPIKES[name]
    rows = [row_of(step) for step in range(1, 61)]
    rows[49] = {**rows[49], **changed}
    [alarm] = judged(rows)
    assert (alarm.step, alarm.kind, alarm.part) == (50, kind, part)
    assert alarm.value == next(iter(changed.values())) > alarm.usual
    assert alarm.text.startswith("alarm: step 50: ") and "; " in alarm.text
    off = replace(LIMITS, loss_spike=None, grad_spike=None, expert_load=None, throughput=None)
    assert judged(rows, off) == []


def test_the_first_images_are_no_spike_of_the_tower() -> None:
    rows = [row_of(step, **{"grad_norm/vision_tower": 2.0 * (step > 40)}) for step in range(1, 61)]
    assert judged(rows) == []


def test_a_drop_of_throughput_is_told_once_while_it_lasts() -> None:
    rows = [row_of(step) for step in range(1, 41)] + [row_of(s, tokens_per_s=500.0) for s in range(41, 200)]
    [alarm] = judged(rows)
    assert alarm.kind is AlarmKind.throughput and alarm.value == pytest.approx(500.0)
    # The second slow step makes the median of three one of a slow step.
    assert alarm.step == 42


def test_single_slow_steps_and_those_beside_evaluations_and_saves_are_no_drop() -> None:
    slow = {30, 40, 50, 60, 61, 62, 63}
    rows = [row_of(s, **({"tokens_per_s": 100.0} if s in slow else {})) for s in range(1, 90)]
    assert judged(rows, disturbed=frozenset({60, 61, 62, 63})) == []
    assert [each.step for each in judged(rows)] == [61]


def test_a_spike_is_told_again_after_a_rest() -> None:
    rows = [row_of(step, **({"loss": 6.0} if step in (40, 41, 43, 60) else {})) for step in range(1, 70)]
    assert [alarm.step for alarm in judged(rows)] == [40, 60]


def test_a_large_spike_does_not_hide_the_next() -> None:
    rows = [row_of(step, **({"loss": 1e4} if step == 40 else {})) for step in range(1, 70)]
    rows[59] = {**rows[59], "loss": 6.0}
    assert [(alarm.step, alarm.usual < 3.1) for alarm in judged(rows)] == [(40, True), (60, True)]


def test_nothing_is_usual_at_the_beginning() -> None:
    rows = [row_of(step) for step in range(1, NEEDED + 1)]
    rows[-1] = {
        **rows[-1],
        "loss": 9.0,
        "grad_norm/vision_tower": 99.0,
        "expert_load": 9.0,
        "dead_experts": 3,
    }
    assert judged(rows) == []
    assert len(judged([*rows, {**rows[-1], "step": NEEDED + 1}])) == 4


def test_a_falling_loss_and_a_new_mixture_are_no_spikes() -> None:
    falling = [row_of(step, loss=8.0 / step**0.3) for step in range(1, 400)]
    assert judged(falling) == []
    other = [row_of(step, loss=5.0) for step in range(41, 120)]
    other[0] = {**other[0], "source_weight/text": 0.5}
    steps = [row_of(step) for step in range(1, 41)]
    assert judged([*steps, *other]) == []
    assert [each.kind for each in judged([*steps, *other[1:]])] == [AlarmKind.loss_spike]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_not_finite_says_nothing(value: float | None) -> None:
    rows = [row_of(step) for step in range(1, 60)]
    for index in range(30, 40):
        rows[index] = {**rows[index], "loss": value, "grad_norm/vision_tower": value, "expert_load": value}
    assert judged(rows) == []


def test_few_tokens_leave_experts_without_any() -> None:
    rows = [row_of(step, tokens=16, dead_experts=3) for step in range(1, 60)]
    assert judged(rows) == []


def test_rows_of_earlier_versions_have_one_norm_and_no_experts() -> None:
    old: list[Row] = [{"step": step, "loss": 3.0, "grad_norm": 1.0} for step in range(1, 50)]
    old.append({"step": 50, "loss": 3.0, "grad_norm": 9.0})
    [alarm] = judged(old)
    assert (alarm.kind, alarm.part, alarm.value, alarm.usual) == (AlarmKind.grad_spike, "", 9.0, 1.0)


@pytest.mark.parametrize("cut", [10, 30, 45])
def test_a_run_that_goes_on_tells_what_an_uninterrupted_one_does(cut: int) -> None:
    rows = [row_of(step, **({"loss": 6.0} if step in (40, 41, 43, 60) else {})) for step in range(1, 70)]
    first, second = Alarms(LIMITS, CONFIG.model), Alarms(LIMITS, CONFIG.model)
    found = [each for row in rows[:cut] for each in first.judge(row, is_disturbed=False)]
    second.recall(json.loads(json.dumps(rows[:cut])))
    found += [each for row in rows[cut:] for each in second.judge(row, is_disturbed=False)]
    assert found == judged(rows)


def test_what_is_usual_moves_with_the_run() -> None:
    rows = [row_of(step, loss=3.0 if step < 200 else 6.0) for step in range(1, 200 + 2 * WINDOW)]
    rows.append(row_of(200 + 2 * WINDOW, loss=6.5))
    assert [alarm.step for alarm in judged(rows)] == [200, 200 + 2 * WINDOW]


def test_rows_hold_alarms_as_numbers() -> None:
    alarms = [
        Alarm(7, AlarmKind.grad_spike, "vision_tower", 12.0, 2.0),
        Alarm(7, AlarmKind.loss_spike, "", 6.0, 3.0),
    ]
    row = {"step": 7, **figures(alarms)}
    assert list(alarms_of(row)) == alarms
    assert (
        list(alarms_of({"step": 7, "alarm/of later versions": 1.0, "alarm_usual/of later versions": 1.0}))
        == []
    )
    assert list(alarms_of({"step": 7, "alarm/loss_spike": None, "alarm_usual/loss_spike": 1.0})) == []
    assert alarms[0].text == (
        "alarm: step 7: grad spike of vision_tower: the gradient norm is 12, 2 is usual; "
        "if it comes again, clip this part by itself, or lower its rate (lr_scale)"
    )


def test_a_report_tells_and_recalls_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(["experiment=smoke", f"run.dir={tmp_path}"])

    def run(start: int, stop: int, spike: int) -> None:
        with Report(config, is_main=True, device_name="CPU") as report:
            report.start(start)
            for step in range(start + 1, stop + 1):
                row = row_of(step, step_time_s=0.1, **({"loss": 6.0} if step == spike else {}))
                report.add({**row, **report.alarms_of(row, is_disturbed=False)})

    run(0, 30, 25)
    # Fewer steps than are needed to know what is usual, but for those before.
    run(30, 40, 35)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm: ")]
    assert [line.split(":")[1].strip() for line in told] == ["step 25", "step 35"]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "alarm/loss_spike" in row] == [25, 35]
    other = Report(config, is_main=False, device_name="CPU")
    assert other.alarms_of({}, is_disturbed=False) == {}


@pytest.mark.parametrize(("loss", "told"), [(3.2, []), (3.3, [50])])
def test_a_loss_that_never_moved_may_move_a_little(loss: float, told: list[int]) -> None:
    rows = [row_of(step, loss=loss if step == 50 else 3.0) for step in range(1, 60)]
    assert [alarm.step for alarm in judged(rows)] == told


@pytest.mark.parametrize("slow", [{41, 42, 43}, {44}, {43, 44}])
def test_the_first_steps_after_a_resume_are_no_drop(slow: set[int]) -> None:
    alarms = Alarms(LIMITS, CONFIG.model)
    alarms.recall([row_of(step) for step in range(1, 41)])
    rows = [row_of(step, tokens_per_s=100.0 if step in slow else 1000.0) for step in range(41, 50)]
    assert [alarm for row in rows for alarm in alarms.judge(row, is_disturbed=False)] == []
