"""A preparation from its arguments to its result."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k25_train.data.formats.prepared import MADE_BY
from k25_train.data.prepare.assemble import Shard, into_shards, shard_is_written, slices_of, write_shard
from k25_train.data.prepare.duplicates import find_duplicates
from k25_train.data.prepare.existing import check_ours, finished, remove
from k25_train.data.prepare.inputs import InputFile, find_inputs
from k25_train.data.prepare.lock import heartbeat, locked
from k25_train.data.prepare.manifest import FORMAT_VERSION, Output, Plan, difference, read_json, write_json
from k25_train.data.prepare.parts import PartReport, Parts
from k25_train.data.prepare.skips import Skips
from k25_train.data.prepare.stages import make_parts, write_shards
from k25_train.data.prepare.tokenize import Tokenization, token_dtype
from k25_train.data.prepare.units import UNIT_BYTES, Unit, cut, unit_size
from k25_train.data.prepare.view import View
from k25_train.data.prepare.workers import Report, Workers
from k25_train.data.storage.attempts import describe
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError, MachineError
from k25_train.run_folder.record import LOCK

SHARD_TOKENS = 10_000_000_000
"""Tokens of a shard: 40 GB of 4-byte ids. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked for."""

    inputs: Sequence[str]
    out: str
    tokenizer: str
    field: str = "text"
    id_field: str = ""
    append_eod: bool = False
    num_workers: int = 0
    shard_tokens: int = SHARD_TOKENS
    unit_bytes: int = UNIT_BYTES
    max_skipped: float = 0.001
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What there is at the end."""

    record: dict[str, Any]
    """Content of `OUT.json`."""
    existed: bool
    """Whether nothing was to be done."""
    new_tokens: int
    """Tokens made by this command, not by one before it."""


class Preparation:
    """One command."""

    def __init__(self, options: Options) -> None:
        """Looks at inputs, tokenizer and output. Raises DataError for what cannot be right."""
        self.options = options
        self.output = Output.of(options.out)
        self.tokenizer: Tokenizer = load_tokenizer(options.tokenizer)
        self.files: list[InputFile] = find_inputs(options.inputs, options.field, options.id_field)
        unit_bytes = unit_size(self.files, options.unit_bytes)
        self.units: list[Unit] = cut(self.files, unit_bytes)
        if not self.units:
            raise DataError(f"{self.files[0].url}: is empty, and so are all inputs. Name other inputs.")
        self.plan = Plan(
            inputs=self.files,
            tokenizer=options.tokenizer,
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            field=options.field,
            id_field=options.id_field,
            append_eod=options.append_eod,
            eod=self.tokenizer.eos,
            shard_tokens=options.shard_tokens,
            unit_bytes=unit_bytes,
        ).to_json()
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.parts = Parts(self.output.work / "parts")
        self._facts = {
            "format_version": FORMAT_VERSION,
            "made_by": MADE_BY,
            "tokenizer_sha256": self.tokenizer.sha256,
            "vocab_size": self.tokenizer.vocab_size,
            "ends_with_eod": options.append_eod,
            "eod": self.tokenizer.eos,
            "plan_sha256": hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest(),
        }

    def finished(self) -> dict[str, Any] | None:
        """The record of a result that is there already, of these inputs; None if there is none.

        Raises DataError if what is there belongs to another command.
        """
        return finished(self.output, self.plan)

    def done_units(self) -> dict[int, PartReport]:
        """Reports of units that are done by an earlier command of the same plan.

        Raises DataError if the work that was begun belongs to another command.
        """
        begun = read_json(self.output.plan)
        if begun is None:
            return {}
        differs = difference(begun, self.plan)
        if differs:
            raise DataError(
                f"{self.output.work}: holds work that was begun on others: {differs}. Give the same "
                "arguments to go on, choose another --out, or start over with --restart."
            )
        reports = {
            unit.number: report for unit in self.units if (report := self.parts.report(unit)) is not None
        }
        written: set[int] = set()
        if len(reports) == len(self.units):
            # Tokens of parts that are in shards have been removed.
            shards = self._shards(reports)[0]
            is_open = {
                each.unit.number for shard in shards if not self._is_written(shard) for each in shard.slices
            }
            written = reports.keys() - is_open
        return {
            unit.number: reports[unit.number]
            for unit in self.units
            if unit.number in reports
            and (unit.number in written or self._has_tokens(unit, reports[unit.number]))
        }

    def run(self, view: View) -> Result:
        """Do what is not done yet.

        Raises DataError for inputs that are damaged, or of which too much is skipped; OSError or MachineError
        if something cannot be written. The same command then goes on from what is done.
        """
        restart = self.options.restart
        if not restart and (record := self.finished()) is not None and not self.output.work.exists():
            return Result(record, True, 0)
        with locked(self.output.work) as held:
            if not restart and (record := self.finished()) is not None:
                self._clear_work()
                return Result(record, True, 0)
            if restart:
                # The plan claims what is there before any of it goes: a kill leaves nothing unclaimed.
                check_ours(self.output)
                self._clear_work()
                write_json(self.output.plan, self.plan)
                remove(self.output, from_shard=0)
            reports = self.done_units()
            write_json(self.output.plan, self.plan)
            num_tasks = max(len(self.units) - len(reports), 1)
            workers = Workers(min(self.options.num_workers, num_tasks), self._work)
            try:
                held.enter_context(heartbeat(self.output.work))
                record, new_tokens = self._run(workers, reports, view)
            finally:
                view.stop()
                workers.close()
            write_json(self.output.whole, record)
            self._clear_work()
        return Result(record, False, new_tokens)

    def _run(
        self, workers: Workers, reports: dict[int, PartReport], view: View
    ) -> tuple[dict[str, Any], int]:
        # 1. Units to parts.
        skips = Skips(self.files, self.units, self.options.max_skipped)
        for number, report in reports.items():
            skips.add(self.units[number], report)
        old_tokens = skips.num_tokens
        make_parts(workers, self.units, reports, skips, view)
        new_tokens = skips.num_tokens - old_tokens

        # 2. Parts to shards; a part is removed when all shards with tokens of it are on disk.
        shards, dropped_tokens, num_dropped = self._shards(reports)
        skips.drop_duplicates(num_dropped, dropped_tokens)
        skips.check(at_end=True)
        written = {shard.number for shard in shards if self._is_written(shard)}
        write_shards(workers, shards, written, self.parts, self.dtype.itemsize, skips, view)
        remove(self.output, from_shard=len(shards))
        return {
            "format_version": FORMAT_VERSION,
            "num_documents": skips.num_documents,
            "num_tokens": skips.num_tokens,
            "text_bytes": skips.text_bytes,
            "skipped": dict(sorted(skips.reasons.items())),
            "skipped_examples": skips.examples(),
            "shards": [self.output.shard(shard.number).name for shard in shards],
            "tokenizer": self.options.tokenizer,
            "plan": self.plan,
        }, new_tokens

    def _work(self, task: Unit | Shard, report: Report) -> PartReport | None:
        """What a worker does."""
        try:
            return self._done(task, report)
        except OSError as error:
            # What fails in reading the inputs has another name by now.
            raise MachineError(
                f"{error.filename or self.output.folder}: cannot be written: {describe(error)}\n  -> "
                "make room or correct what is wrong there; the same command goes on from what is done"
            ) from error

    def _done(self, task: Unit | Shard, report: Report) -> PartReport | None:
        if isinstance(task, Shard):
            write_shard(self.output.shard(task.number), task, self.parts, self.dtype, self._facts, report)
            return None
        how = Tokenization(self.tokenizer, self.options.field, self.options.id_field, self.options.append_eod)
        return how.run(self.files[task.file], task, self.parts, lambda done, tokens: report((done, tokens)))

    def _shards(self, reports: dict[int, PartReport]) -> tuple[list[Shard], int, int]:
        """All shards, and how many tokens and documents are left out as duplicates."""
        dropped: dict[int, list[int]] = {}
        if self.options.id_field:
            num_documents = sum(report.num_documents for report in reports.values())
            dropped = find_duplicates(self.units, num_documents, self.parts)
        num_tokens = sum(
            int(self.parts.lengths(self.units[number])[positions].sum())
            for number, positions in dropped.items()
        )
        slices = slices_of(((unit, reports[unit.number]) for unit in self.units), dropped, self.parts)
        shards = into_shards(slices, self.options.shard_tokens, self.parts)
        return shards, num_tokens, sum(map(len, dropped.values()))

    def _is_written(self, shard: Shard) -> bool:
        return shard_is_written(self.output.shard(shard.number), shard, self.dtype, self._facts)

    def _has_tokens(self, unit: Unit, report: PartReport) -> bool:
        try:
            return os.stat(self.parts.tokens(unit)).st_size == report.num_tokens * self.dtype.itemsize
        except FileNotFoundError:
            return False

    def _clear_work(self) -> None:
        """Remove all but the lock: the plan last, and what commands left that were killed."""
        shutil.rmtree(self.parts.folder, ignore_errors=True)
        for path in self.output.work.iterdir():
            if path.name != LOCK:
                path.unlink(missing_ok=True)
