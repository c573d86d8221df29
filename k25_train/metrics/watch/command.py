"""`k25-metrics watch`: a live view of a run in the terminal, while its metrics.jsonl is appended to."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live

from k25_train.errors import ConfigError, MachineError
from k25_train.metrics.watch.files import File, file_of
from k25_train.metrics.watch.following import Followed
from k25_train.metrics.watch.seen import Seen, Settings, seen, settings_of
from k25_train.metrics.watch.view import view_of

INTERVAL_S = 5.0
CONFIG = "config.yaml"


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "watch",
        help="show a run while it goes on",
        description=(__doc__ or "").partition(":")[2].strip(),
        epilog="It ends with the run's last step, or with Ctrl-C. Nothing is written to the run.",
    )
    parser.add_argument(
        "where",
        metavar="RUN",
        help="run folder or a file of JSON lines, as a path or a URL that fsspec knows (s3://…)",
    )
    parser.add_argument("--once", action="store_true", help="show it once, as it is now")
    parser.add_argument("--json", action="store_true", help="print JSON, an object per change")
    parser.add_argument(
        "--interval",
        type=float,
        default=INTERVAL_S,
        metavar="SECONDS",
        help="time between two looks (%(default)s)",
    )
    parser.set_defaults(run=watch)


class Watched:
    """A run that is looked at again and again."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.trouble = ""
        """Why the latest look told nothing; empty if it did."""
        self._followed = Followed(file_of(run))
        self._config: File = file_of(run, CONFIG)
        self._settings = Settings()

    @property
    def exists(self) -> bool:
        """Whether it has metrics."""
        return self._followed.exists

    def look(self) -> bool:
        """Read what is new; returns whether anything changed."""
        before = self.trouble
        try:
            is_new = self._followed.poll()
            self.trouble = "" if self.exists else f"{self._followed.file.name}: is not there yet"
        except MachineError as error:
            is_new, self.trouble = False, str(error)
        # A run that goes on may have more steps than before.
        if is_new or self._settings.steps is None:
            self._settings = settings_of(self._config)
        return is_new or self.trouble != before

    def seen(self) -> Seen:
        """What is known of it."""
        rows = list(self._followed.rows)
        return seen(self.run, rows, self._settings, self._followed.num_damaged)


def watch(options: argparse.Namespace, console: Console) -> int:
    """Show the run until its last step. Raises `ConfigError` or `MachineError` where `--once` finds none."""
    if not 0.1 <= options.interval <= 86400:
        raise ConfigError(f"--interval {options.interval:g}: must be within 0.1 and 86400 seconds")
    watched = Watched(options.where)
    if options.once:
        watched.look()
        if not watched.exists:
            raise ConfigError(
                f"{watched.trouble or options.where}\n  -> name the folder of a run that has begun"
            )
        show(console, watched, as_json=options.json)
        return 0
    if options.json or not console.is_terminal:
        return follow_in_lines(console, watched, options)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            watched.look()
            found = watched.seen()
            live.update(view_of(found, console.width, console.encoding, watched.trouble), refresh=True)
            if found.is_done:
                return 0
            time.sleep(options.interval)


def follow_in_lines(console: Console, watched: Watched, options: argparse.Namespace) -> int:
    """Print what changes, for a file or a pipe."""
    while True:
        if watched.look():
            show(console, watched, as_json=options.json)
            sys.stdout.flush()
        if watched.seen().is_done:
            return 0
        time.sleep(options.interval)


def show(console: Console, watched: Watched, *, as_json: bool) -> None:
    """Print what is known."""
    if as_json:
        print(json.dumps(watched.seen().as_json(), allow_nan=False))
    else:
        console.print(view_of(watched.seen(), console.width, console.encoding, watched.trouble))
