"""Show what becomes of runs, from any machine that sees their folders: k25-status

    python -m launch.status runs/x        one run: state, steps, attempts, what went wrong
    python -m launch.status               all runs in ./runs, and those of your jobs in SLURM's queue

It reads files and asks squeue once; nothing is written to a run, no rank is asked, and torch is not needed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from k25_train.entry import run_command
from k25_train.errors import ConfigError
from launch.status import prometheus
from launch.status.facts import Facts, is_run, look
from launch.status.judging import GOING_ON, TROUBLED, State
from launch.status.queue import Queue, jobs_of, jobs_of_user, run_folders
from launch.status.report import RunStatus, conclude
from launch.status.table import print_run, print_runs

RUNS = Path("runs")
DONE, GOES_ON, ENDED_EARLY, TROUBLE = 0, 10, 20, 30
"""Exit statuses with --check: all runs are finished; some go on by themselves; one ended early, as it was
asked to; one needs somebody."""


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run)


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="k25-status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON; with --watch one line each time")
    form.add_argument(
        "--prometheus", metavar="FILE", help="write a text file for node_exporter's collector; - prints it"
    )
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="repeat until all runs ended")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"end with {DONE} if all runs are finished, {GOES_ON} if some go on by themselves, "
        f"{ENDED_EARLY} if one ended before its last step as asked, {TROUBLE} if one needs somebody",
    )
    arguments = parser.parse_args()
    if arguments.watch is not None and not 0.1 <= arguments.watch <= 86400:
        raise ConfigError(f"--watch {arguments.watch:g}: must be within 0.1 and 86400 seconds")
    while True:
        statuses = statuses_of(arguments.runs)
        show(statuses, arguments)
        # A file for a collector is kept up to date also after the end, or it would tell of the past.
        is_over = arguments.prometheus is None and not any(each.state in GOING_ON for each in statuses)
        if arguments.watch is None or is_over:
            return exit_status(statuses) if arguments.check else 0
        time.sleep(arguments.watch)


def statuses_of(runs: Sequence[Path]) -> list[RunStatus]:
    """The status of these runs, or of all that are found. Raises `ConfigError` where there is none."""
    if runs:
        for run in runs:
            # One that may not be read is shown as such.
            may_be_read = os.access(run, os.R_OK | os.X_OK)
            if not run.is_dir() or (may_be_read and not is_run(run)):
                raise ConfigError(
                    f"{run}: is not the folder of a run: give the run.dir of one, such as runs/smoke"
                )
        facts = [look(run) for run in runs]
        queue = jobs_of({each.job_id for each in facts if each.job_id is not None})
        return [conclude(each, queue) for each in facts]
    queue = jobs_of_user()
    folders = found_runs(queue)
    if not folders:
        raise ConfigError(
            f"{RUNS.absolute()}: no run was found there, and no job of yours has one: name its folder"
        )
    return [conclude(each, known(queue, each)) for each in map(look, folders)]


def known(queue: Queue, facts: Facts) -> Queue:
    """The queue with the run's job, which may be another user's."""
    if facts.job_id is None or facts.job_id in queue.jobs or queue.trouble or not facts.is_alive:
        return queue
    return jobs_of({facts.job_id})


def found_runs(queue: Queue) -> list[Path]:
    """Runs in ./runs and of jobs, each once, those that changed last at the end."""
    here = [path for path in RUNS.iterdir() if path.is_dir() and is_run(path)] if RUNS.is_dir() else []
    by_place = {path.resolve(): path for path in [*run_folders(queue), *here] if path.is_dir()}
    return sorted(by_place.values(), key=lambda path: (path.stat().st_mtime, path))


def show(statuses: Sequence[RunStatus], arguments: argparse.Namespace) -> None:
    """Print or write the statuses in the form that was asked for."""
    if arguments.json:
        indent = None if arguments.watch else 1
        found = {"runs": [status.as_json() for status in statuses]}
        print(json.dumps(found, indent=indent, allow_nan=False), flush=True)
    elif arguments.prometheus == "-":
        print(prometheus.as_text(statuses), end="", flush=True)
    elif arguments.prometheus is not None:
        path = Path(arguments.prometheus)
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(f"--prometheus {path}: is no file; - prints instead of writing one")
        prometheus.write(path, prometheus.as_text(statuses))
    else:
        console = Console(highlight=False)
        if arguments.watch and console.is_terminal:
            console.clear()
        if len(statuses) == 1:
            print_run(console, statuses[0])
        else:
            print_runs(console, statuses)
        sys.stdout.flush()


def exit_status(statuses: Sequence[RunStatus]) -> int:
    """What scripts can use; the most serious of all runs'."""
    return max(serious(status.state) for status in statuses)


def serious(state: State) -> int:
    """The exit status of a state."""
    if state in TROUBLED:
        return TROUBLE
    if state in GOING_ON:
        return GOES_ON
    return DONE if state is State.finished else ENDED_EARLY


if __name__ == "__main__":
    main()
