"""How a preparation goes on, on a terminal as a bar, elsewhere in a line now and then; and its tables."""

import os
import time
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from k25_train.config.basics import is_url
from k25_train.data.prepare.job import Preparation, Result
from k25_train.data.prepare.skips import Skips
from k25_train.units import format_count, format_duration

LINE_S = 30.0
"""Seconds between two lines where there is no terminal."""


class Bar:
    """A bar for each stage, with tokens, their rate, what is skipped, and the time that is left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None

    def start(self, stage: str, total: int, done: int) -> None:
        """A stage begins, of which some bytes were done before."""
        self.stop()
        self._stage, self._total, self._before = stage, total, done
        self._started_s = self._told_s = time.monotonic()
        self._tokens_before: int | None = None
        self._live = Progress(
            TextColumn(f"[bold]{stage}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._live.add_task(stage, total=max(total, 1), completed=done, status="")
        self._live.start()
        if done and stage == "tokenise":
            self._console.print(
                f"going on from {decimal(done)} of {decimal(total)} that are done", soft_wrap=True
            )

    def show(self, done: int, skips: Skips, tokens: int) -> None:
        """Bytes done of the stage, and tokens of units that are being made."""
        now_s = time.monotonic()
        if self._tokens_before is None:
            self._tokens_before = skips.num_tokens if done == self._before else 0
        status = self._status(done, skips, tokens, now_s - self._started_s)
        if self._live is not None:
            self._live.update(self._task, completed=done, status=status)
        if not self._console.is_terminal and now_s - self._told_s >= LINE_S:
            self._told_s = now_s
            share = done / max(self._total, 1)
            self._console.print(f"{self._stage} {share:.1%}  {status}", soft_wrap=True)

    def stop(self) -> None:
        """The stage is over."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _status(self, done: int, skips: Skips, tokens: int, took_s: float) -> str:
        new = done - self._before
        left = f"{format_duration((self._total - done) * took_s / new)} left" if new > 0 else ""
        rate = f"{decimal(round(new / max(took_s, 1e-3)))}/s"
        if self._stage != "tokenise":
            return "  ".join([rate, left])
        parts = [f"{format_count(skips.num_tokens + tokens)} tokens", rate]
        if skips.num_skipped:
            parts.append(f"{skips.num_skipped:,} skipped")
        return "  ".join([*parts, left])


def print_result(result: Result, prepared: Preparation, took_s: float, console: Console) -> None:
    """The summary at the end."""
    record = result.record
    table = Table("", "", show_header=False, box=None)
    rows = [
        ("documents", f"{record['num_documents']:,}"),
        ("tokens", f"{record['num_tokens']:,}"),
        ("bytes of text", f"{record['text_bytes']:,}  ({_per_token(record):.2f} per token)"),
    ]
    if result.new_tokens:
        rows.append(("tokens/s", f"{result.new_tokens / took_s:,.0f}  (in {format_duration(took_s)})"))
    rows += [(f"skipped: {reason}", f"{number:,}") for reason, number in record["skipped"].items()]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    for example in record["skipped_examples"]:
        console.print(f"  {escape(example)}", soft_wrap=True)
    prefix = escape(str(prepared.output.prefix))
    names = record["shards"]
    shards = f"{len(names)} shard{'s' * (len(names) != 1)}"
    existed = "exists already: " if result.existed else ""
    console.print(f"{existed}{prefix}-*: {shards}, {names[0]}.bin to {names[-1]}.bin", soft_wrap=True)
    tokenizer = prepared.options.tokenizer
    tokenizer = tokenizer if is_url(tokenizer) else os.path.abspath(tokenizer)
    for line in (
        "to train on it, write a FILE.yaml, then `python -m k25_train.data index data=FILE.yaml`:",
        f"  dir: {escape(str(prepared.output.folder))}",
        f"  tokenizer: {escape(tokenizer)}",
        f"  sources: {{NAME: {{format: indexed, path: '{escape(prepared.output.name)}-*'}}}}",
    ):
        console.print(line, soft_wrap=True)


def print_plan(prepared: Preparation, console: Console) -> None:
    """What a command would do."""
    done = {} if prepared.options.restart else prepared.done_units()
    finished = None if prepared.options.restart else prepared.finished()
    total = sum(unit.num_bytes for unit in prepared.units)
    done_bytes = sum(prepared.units[number].num_bytes for number in done)
    table = Table("", "", show_header=False, box=None)
    kinds = sorted({f"{file.kind}{f' in {file.codec}' if file.codec else ''}" for file in prepared.files})
    for name, value in (
        (
            "inputs",
            f"{len(prepared.files):,}, {decimal(total)} ({', '.join(kinds)})",
        ),
        ("first, last", f"{prepared.files[0].url}, {prepared.files[-1].url}"),
        ("units of work", f"{len(prepared.units):,}, on {prepared.options.num_workers} workers"),
        ("done already", f"{len(done):,} units, {decimal(done_bytes)}" if finished is None else "all of it"),
        (
            "tokenizer",
            f"{prepared.options.tokenizer}, {prepared.tokenizer.vocab_size:,} ids, {prepared.dtype.name}",
        ),
        ("output", f"{prepared.output.prefix}-00000.bin, … of {prepared.options.shard_tokens:,} tokens each"),
    ):
        table.add_row(name, escape(value))
    console.print(table)
    large = max(
        (file for file in prepared.files if file.codec), key=lambda file: file.num_bytes, default=None
    )
    if large is not None and large.num_bytes > total / max(prepared.options.num_workers, 1):
        console.print(
            f"{escape(large.url)} is compressed, so one worker reads all its {decimal(large.num_bytes)}: "
            "cut it into several files to use more cores",
            soft_wrap=True,
        )
    console.print("nothing was written: this was a dry run")


def _per_token(record: dict[str, Any]) -> float:
    return float(record["text_bytes"] / max(record["num_tokens"], 1))
