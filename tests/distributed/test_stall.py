"""A job that hangs says where and because of whom, writes every rank's stacks, and ends."""

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from k25_train.checkpoint.folders import newest_checkpoint
from k25_train.checkpoint.integrity import verify
from tests.helpers.interrupted_runs import FOUR_RANKS, SHORT, cut_off, rows, short_run, without_times
from tests.helpers.ranks import RankContext, RankError, run_ranks
from tests.helpers.runs import fit, start_run
from tests.helpers.torchrun_jobs import Job

pytestmark = pytest.mark.distributed

STEP = 1
"""The step in which a rank hangs."""
TIMEOUT_S = 2.0

SLOW_S = 1.2
"""Several of these, one after the other, exceed the timeout of a run that is slow; one does not."""


def stall_after(timeout_s: float) -> tuple[str, str]:
    """Overrides; what is read has to fail before."""
    return f"train.stall_timeout_s={timeout_s}", f"data.read_timeout_s={timeout_s / 4}"


def hang() -> None:
    """What a broken file system or a deadlock looks like; its name is to be found in the stacks."""
    time.sleep(600)


def hang_in_data(run: Any) -> None:
    read = run.data.loader.micro_batches

    def micro_batches(plan: Any, **place: Any) -> Any:
        # The plan of an evaluation, which comes before the first step, has a number as well.
        if run.tracker.state().step == STEP:
            hang()
        return read(plan, **place)

    run.data.loader.micro_batches = micro_batches


def before_forward(run: Any, act: Callable[[], None]) -> None:
    """Let a rank `act` in every forward pass of the step."""
    from k25_train.training import step as module

    forward = module.forward_micro_batch

    def forward_micro_batch(*args: Any, **kwargs: Any) -> Any:
        if run.tracker.state().step == STEP:
            act()
        return forward(*args, **kwargs)

    module.forward_micro_batch = forward_micro_batch


def hang_in_forward(run: Any) -> None:
    before_forward(run, hang)


def hang_in_backward(run: Any) -> None:
    for parameter in run.chunks[0].parameters():
        parameter.register_hook(lambda _: hang() if run.tracker.state().step == STEP else None)


def hang_in_all_to_all(run: Any) -> None:
    from torch.distributed import distributed_c10d

    options = distributed_c10d.AllToAllOptions

    def all_to_all_options() -> Any:
        if run.tracker.state().step == STEP:
            hang()
        return options()

    distributed_c10d.AllToAllOptions = all_to_all_options


def hang_in_optimizer(run: Any) -> None:
    step = run.optimizer.step

    def hang_or_step() -> Any:
        if run.tracker.state().step == STEP:
            hang()
        return step()

    run.optimizer.step = hang_or_step


def slow_in_forward(run: Any) -> None:
    before_forward(run, lambda: time.sleep(SLOW_S))


def fit_with(
    context: RankContext, arguments: Sequence[str], prepare: Callable[[Any], None], rank: int, folder: str
) -> float:
    """Train with one rank prepared to misbehave; what each rank prints to stderr goes to a file.

    Returns the seconds that it took.
    """
    from k25_train.metrics.report import Report
    from k25_train.training.trainer import Trainer

    os.dup2(os.open(f"{folder}/stderr_{context.rank}", os.O_CREAT | os.O_WRONLY), 2)
    run = start_run(context, arguments)
    if context.rank == rank:
        prepare(run)
    started = time.monotonic()
    with run.data:
        Trainer(run, Report(run.config, is_main=False, device_name="CPU")).fit()
    return time.monotonic() - started


def report_of(folder: Path) -> str:
    """The one report that the ranks printed."""
    printed = [path.read_text() for path in folder.glob("stderr_*")]
    (report,) = [text[text.index("STALL: ") :] for text in printed if "STALL: " in text]
    return report


def stacks_of(logs: Path, rank: int) -> str:
    return (logs / f"rank_{rank}.stall.txt").read_text()


CASES = {
    "data": (hang_in_data, 1, r"culprit: rank 1, step 1: train > read data, for \d\.\d s\n"),
    "forward": (hang_in_forward, 1, r"culprit: rank 1, step 1: train > forward, for \d\.\d s\n"),
    "backward": (hang_in_backward, 2, r"culprit: rank 2, step 1: train > backward, for \d\.\d s\n"),
    "all-to-all": (hang_in_all_to_all, 2, r"culprit: none alone; ranks 2-3 wait for each other"),
    "optimizer": (hang_in_optimizer, 3, r"culprit: rank 3, step 1: train > optimizer, for \d\.\d s\n"),
}
"""What a rank does -> the rank, what the report says of it. Of 4 ranks, 0 and 1 are the first pipeline stage
and exchange tokens of experts with each other, as do 2 and 3."""


SLOW = ("forward", "optimizer")
"""Phases like the others, for `make test-slow`."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES]
)
def test_a_hang_is_reported_with_its_phase_and_culprit(case: str, data: Path, tmp_path: Path) -> None:
    prepare, rank, expected = CASES[case]
    command = short_run(data, tmp_path / "run", *FOUR_RANKS, *stall_after(TIMEOUT_S))

    with pytest.raises(RankError):
        run_ranks(fit_with, 4, command, prepare, rank, str(tmp_path), timeout_s=60)

    report = report_of(tmp_path)
    assert re.search(expected, report)
    logs = tmp_path / "run/logs"
    for number in range(4):
        assert re.search(r'k25_train/training/step.py", line \d+ in train_step', stacks_of(logs, number))
        assert ("in hang\n" in stacks_of(logs, number)) == (number == rank)


def phases_of_a_step(context: RankContext, arguments: Sequence[str]) -> set[str]:
    """Phases that this rank is in during a step, with whether they wait for others."""
    run = start_run(context, arguments)
    seen: set[str] = set()
    phase = run.tracker.phase

    def remember(name: str, peers: Any = (), **options: Any) -> Any:
        begun = phase(name, peers, **options)
        seen.add(f"{name} with {', '.join(map(str, begun.ranks()))}" if begun.ranks() else name)
        return begun

    engine = run.tower.engine
    run.tracker.phase = engine._phase = engine._exchange._phase = remember
    from k25_train.training.step import train_step

    with run.data:
        train_step(run, 1)
    return seen


def test_every_phase_is_traced_with_its_peers(data: Path, tmp_path: Path) -> None:
    """Of rank 0: 1 has the other experts and the other half of the optimizer state, 2 is the next stage."""
    by_rank = run_ranks(phases_of_a_step, 4, short_run(data, tmp_path / "run", *FOUR_RANKS))
    assert by_rank[0] >= {
        *("read data", "vision forward", "vision backward", "forward", "backward", "optimizer"),
        *("pipeline send with 2", "pipeline recv with 2", "all-to-all with 1", "all-gather with 1"),
        *("reduce gradients with 1", "gather parameters with 1", "all-reduce with 1, 2, 3"),
    }
    sent = {name for seen in by_rank for name in seen if name.startswith("features with")}
    assert sent, "features go to other ranks, and gradients back"


def hang_without_a_watchdog(context: RankContext, folder: str) -> None:
    """A watchdog that cannot check, as when native code keeps the interpreter's lock."""
    from parallel.watchdog import stall_watchdog
    from parallel.watchdog.phases import PhaseTracker
    from parallel.watchdog.rank_states import RankStateStore

    os.dup2(os.open(f"{folder}/stderr_{context.rank}", os.O_CREAT | os.O_WRONLY), 2)
    stall_watchdog._DEAD_INTERPRETER_S = 0.5
    held = stall_watchdog.StallWatchdog(
        PhaseTracker(0),
        RankStateStore(torch.distributed.HashStore(), 0, 1),
        timeout_s=0.5,
        folder=Path(folder),
        device_is_busy=lambda: False,
    )
    held.check = hang  # type: ignore[method-assign]
    with held:
        time.sleep(60)


def test_a_dead_interpreter_is_ended_with_its_stacks(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died"):
        run_ranks(hang_without_a_watchdog, 1, str(tmp_path), timeout_s=40)
    printed = (tmp_path / "stderr_0").read_text()
    assert "Timeout (0:00:01)!" in printed
    assert "in hang_without_a_watchdog\n" in printed


def test_a_slow_run_that_makes_progress_goes_on(data: Path, tmp_path: Path) -> None:
    arguments = [*stall_after(4), "train.steps=1", "optim.warmup=0", "optim.decay=0"]
    command = short_run(data, tmp_path / "run", *FOUR_RANKS, *arguments)

    assert min(run_ranks(fit_with, 4, command, slow_in_forward, 2, str(tmp_path))) > 4
    assert not (tmp_path / "run/logs").exists()


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_which_goes_on_bitwise(
    data: Path, run_as_smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stopped process does not hear SIGTERM; torchrun waits this long, 30 s by default, before it kills.
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    run = cut_off(run_as_smoke, tmp_path / "run")
    command = short_run(data, run, *FOUR_RANKS, *stall_after(3))

    with Job(command, 4, tmp_path / "stopped.log") as job:
        job.wait_until(lambda: f"step {SHORT.saved_at + 1}/" in job.output, 120)
        os.kill(job.rank(2), signal.SIGSTOP)
        assert job.wait(60) != 0

    assert job.output.count("STALL: ") == 1
    assert "likely culprit: rank 2 does not answer" in job.output
    assert "exitcode  : 75" in job.output
    for number in (0, 1, 3):
        assert re.search(r'k25_train/\w+.py", line \d+ in ', stacks_of(run / "logs", number))
    assert verify(newest_checkpoint(run / "checkpoints")).step == SHORT.saved_at

    run_ranks(fit, 4, command)

    assert without_times(rows(run)) == without_times(rows(run_as_smoke))
