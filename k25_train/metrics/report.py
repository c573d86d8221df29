"""What a run reports: files in the run folder, and lines on the terminal.

Only rank 0 reports; on other ranks every method returns at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from k25_train.compose.resolve import to_yaml
from k25_train.config.schema import Config
from k25_train.data.mix.mixture import planned_tokens
from k25_train.data.served import SourceSummary, with_media
from k25_train.metrics import utilisation
from k25_train.metrics.alarms import Alarms
from k25_train.metrics.chrome_trace import write_chrome_trace
from k25_train.metrics.mix_plot import plot_mix
from k25_train.metrics.pace import Pace, pace_of
from k25_train.metrics.plots import plot_losses
from k25_train.metrics.progress import Progress
from k25_train.metrics.sinks import JsonlSink, Row, SteadySink, TensorBoardSink, number, read_rows
from k25_train.metrics.sources_table import table_after, table_before
from k25_train.metrics.summary import Peak, summary_table
from k25_train.metrics.throughput import Throughput
from k25_train.metrics.timeline import RankRecord, aligned, step_s
from k25_train.metrics.timeline_plot import plot_timeline
from k25_train.metrics.trackers.background import BackgroundSink
from k25_train.metrics.trackers.build import build_trackers
from k25_train.run_folder import alarm_rows
from k25_train.run_folder.rows_file import METRICS_FILE, latest_rows
from k25_train.terminal import table_width

RECALLED_BYTES = 1 << 20
"""What is read of the metrics' end when a run goes on: more rows than alarms compare with."""
NOTHING_HELD_OUT = (
    "nothing is held out, so no held-out loss is reported; a run with data.sources.NAME.heldout=N "
    "keeps N items of a source for that"
)


class Report:
    """A context manager around training."""

    def __init__(self, config: Config, *, is_main: bool, device_name: str) -> None:
        self.config = config
        self.is_main = is_main
        self.device_name = device_name
        self.folder = Path(config.run.dir)
        self.console = Console(width=table_width(), soft_wrap=True)
        self.progress = Progress(config.train.steps, self.console)
        self.throughput = Throughput(config.train.steps, config.train.batches)
        self.pace = Pace(lambda _step: None)
        self.alarms = Alarms(config.metrics.alarms, config.model)
        self.sinks: list[SteadySink | BackgroundSink] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_main:
            return
        if self.sinks:
            self.progress.__exit__(kind, error, trace)
        for sink in self.sinks:
            sink.close()

    def start(self, finished_steps: int) -> None:
        """Print and save the configuration, open the sinks; `finished_steps` of them were done before."""
        if not self.is_main:
            return
        text = to_yaml(self.config)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "config.yaml", text)
        self.console.print(text, markup=False, highlight=False)
        first = finished_steps + 1 if finished_steps else 0
        metrics, events = self.folder / METRICS_FILE, self.folder / "tensorboard"
        lines = SteadySink(str(metrics), lambda step: JsonlSink(metrics, step, self.warn), self.warn)
        lines.start(first)
        scalars = SteadySink(str(events), lambda step: TensorBoardSink(events, step), self.warn)
        self.sinks = [lines, scalars, *build_trackers(self.config, self.folder, self.warn)]
        self.alarms.recall(latest_rows(metrics, RECALLED_BYTES))
        self.pace = pace_of(self.config)
        if finished_steps:
            self.progress.print(f"resuming after step {finished_steps} of {self.config.train.steps}")
        self.progress.__enter__()

    def sources(self, sources: Sequence[SourceSummary]) -> None:
        """What the data are made of, and how often the run draws them."""
        # Rollouts have no number of documents beforehand, and it is them that are trained on.
        if not self.is_main or self.config.algorithm is not None:
            return
        train = self.config.train
        tokens = planned_tokens(
            self.config.data, with_media(sources), train.steps, train.batches.tokens_after
        )
        self.progress.console.print(table_before(sources, tokens))
        if not any(source.num_heldout for source in sources):
            self.progress.print(NOTHING_HELD_OUT)

    def alarms_of(self, row: Row, *, is_disturbed: bool) -> Row:
        """Tell what in the row of a step is an alarm; returns what the row has of it, mostly nothing.

        `is_disturbed`: whether an evaluation or a save has slowed the step down.
        """
        if not self.is_main:
            return {}
        found = self.alarms.judge(row, is_disturbed=is_disturbed)
        for alarm in found:
            self.progress.print(alarm.text)
        return alarm_rows.figures(found)

    def add(self, row: Row) -> None:
        """One finished step, or the evaluation before the first."""
        if not self.is_main:
            return
        step, is_off = int(number(row["step"])), ""
        if "loss" in row:
            step_time_s = number(row["step_time_s"])
            self.throughput.add(step, step_time_s)
            row = {**row, **self.pace.figures(step), "time_left_s": self.throughput.time_left_s(step)}
            is_off = self.pace.add(step_time_s)
        for sink in self.sinks:
            sink.write(row)
        if is_off:
            self.progress.print(f"step {step}: {is_off}")
        self.progress.show(row, self.throughput.time_left_s(step))

    def timeline(self, step: int, records: Sequence[RankRecord]) -> None:
        """Write what all ranks did in a step, as `trace/step_<N>.json` for Perfetto and as a picture."""
        if not self.is_main:
            return
        of_all, folder = aligned(records), self.folder / "trace"
        what = f"step {step}: what {len(records)} ranks did in {step_s(of_all):.3f} s"
        title = f"{self.config.model.name}, {what}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_chrome_trace(of_all, folder / f"step_{step}.json", title)
            plot_timeline(of_all, folder / f"step_{step}.png", title)
        except OSError as error:
            self.warn(f"{folder}: the timeline of step {step} cannot be written ({error}); the run goes on")

    def warn(self, text: str) -> None:
        """Print what went wrong with a file, without ending the run."""
        self.progress.print(f"warning: {text}")

    def already_finished(self, steps: int) -> None:
        """The run had all its steps when it was started; nothing is written."""
        if self.is_main:
            self.progress.print(
                f"{self.folder}: all {steps} steps are done, nothing to train; raise train.steps to go on, "
                "or choose another run.dir to start again"
            )

    def skipped(self, step: int, where: str) -> None:
        """A step changed nothing, because a gradient was not finite."""
        if self.is_main:
            self.progress.print(f"step {step} skipped: the gradient is not finite in {where}")

    def notice(self, text: str) -> None:
        """Something to know about the run's checkpoints."""
        if self.is_main:
            self.progress.print(text)

    def stopped(self, step: int, signal_name: str) -> None:
        """The run saved a checkpoint and ends because a signal asked it to."""
        if self.is_main:
            self.progress.print(
                f"{signal_name}: checkpoint of step {step} saved; the same command goes on from there"
            )

    def finish(self) -> None:
        """Draw `loss.png` and `mix.png`, and print the summary."""
        if not self.is_main:
            return
        self.progress.__exit__(None, None, None)
        name = f"{self.config.model.name}, {self.folder}"
        try:
            rows = read_rows(self.folder / METRICS_FILE)
            plot_losses(rows, self.folder / "loss.png", name)
            plot_mix(rows, self.folder / "mix.png", name)
        except OSError as error:
            self.warn(f"{self.folder}: no summary, the metrics or their plot are out of reach ({error})")
            return
        self.console.print(summary_table(rows, name, peak_of(self.config, self.device_name)))
        self.console.print(table_after(rows))
        self.console.print(f"metrics, plot and checkpoints: {self.folder}", markup=False, highlight=False)


def peak_of(config: Config, device_name: str) -> Peak | None:
    """What all devices of a run compute at most, as `cluster.rates` has it; None where they are CPUs."""
    cluster, peak = config.cluster, utilisation.peak_of(config)
    if peak is None:
        return None
    devices = f"{config.world_size:,} x {cluster.rates.device}"
    if cluster.rates.device.lower() not in device_name.lower():
        devices += f" as in cluster.rates, though the device is {device_name}"
    return Peak(peak, devices)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file such that neither a reader nor a full disk ever leaves half of it."""
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
