"""What was skipped, where, and whether it is too much."""

from collections.abc import Mapping, Sequence

from k25_train.data.prepare.documents import DUPLICATE, NO_FIELD
from k25_train.data.prepare.inputs import PARQUET, InputFile
from k25_train.data.prepare.parts import PartReport
from k25_train.data.prepare.units import Unit
from k25_train.errors import DataError

MAX_SHOWN = 10
"""Skipped records that an error or a summary describes."""
JUDGED_FROM = 0.1
"""Share of the input from which on a rate is judged before the end. Our choice."""
HOPELESS_RECORDS = 100
"""Records without a document among them after which nothing more is tried. Our choice."""


class Skips:
    """Counts records of finished units. Its limit is a number, or a share of all records if it is below 1."""

    def __init__(self, files: Sequence[InputFile], units: Sequence[Unit], limit: float) -> None:
        self._files, self._units = files, units
        self._limit = limit
        self._reports: dict[int, PartReport] = {}
        self._input_bytes = sum(unit.num_bytes for unit in units)
        self.done_bytes = 0
        """Input of the units that are done."""
        self.num_documents = 0
        self.num_tokens = 0
        self.text_bytes = 0
        self.reasons: dict[str, int] = {}

    @property
    def num_skipped(self) -> int:
        """All that was skipped."""
        return sum(self.reasons.values())

    def add(self, unit: Unit, report: PartReport) -> None:
        """Count a unit."""
        self._reports[unit.number] = report
        self.done_bytes += unit.num_bytes
        self.num_documents += report.num_documents
        self.num_tokens += report.num_tokens
        self.text_bytes += report.text_bytes
        for reason, number in report.skipped.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + number

    def drop_duplicates(self, number: int, num_tokens: int) -> None:
        """Count documents that are left out because their id was there before."""
        if number:
            self.reasons[DUPLICATE] = number
            self.num_documents -= number
            self.num_tokens -= num_tokens

    def check(self, *, at_end: bool) -> None:
        """Raise DataError if too much was skipped, or nothing is left."""
        skipped, total = self.num_skipped, self.num_documents + self.num_skipped
        if at_end and not total:
            raise DataError("the inputs hold no document: all lines are blank. Name other inputs.")
        is_hopeless = not self.num_documents and (at_end or total >= HOPELESS_RECORDS)
        if not is_hopeless and not self._is_beyond(skipped, total, at_end):
            return
        share = (
            f"{skipped:,} of {total:,} records so far are"
            if not at_end
            else f"{skipped:,} of {total:,} records are"
        )
        remedy = "Correct the inputs, or allow more with --max-skipped; what is done is kept."
        if self.reasons.get(NO_FIELD, 0) == skipped:
            remedy = "Name the field that holds the text with --field, or allow more with --max-skipped."
        raise DataError(
            f"{share} no documents, --max-skipped={self._limit:g} allows fewer: "
            f"{describe_reasons(self.reasons)}.\n  " + "\n  ".join(self.examples()) + f"\n  -> {remedy}"
        )

    def _is_beyond(self, skipped: int, total: int, at_end: bool) -> bool:
        if self._limit >= 1 or self._limit == 0:
            return skipped > self._limit
        is_judged = at_end or self.done_bytes >= JUDGED_FROM * self._input_bytes
        return is_judged and skipped > self._limit * total

    def examples(self) -> list[str]:
        """The first records that were skipped, each with its place."""
        found: list[str] = []
        for number in sorted(self._reports):
            for record, reason, detail in self._reports[number].examples:
                if len(found) == MAX_SHOWN:
                    return found
                found.append(f"{self._place(number, record)}: {reason}{f' ({detail})' if detail else ''}")
        return found

    def _place(self, number: int, record: int) -> str:
        unit = self._units[number]
        file = self._files[unit.file]
        if file.kind == PARQUET:
            return f"{file.url}, row {record}"
        before, first = 0, number
        while first > 0 and self._units[first - 1].file == unit.file:
            first -= 1
            report = self._reports.get(first)
            if report is None:
                return f"{file.url}, line {record} behind byte {unit.start:,}"
            before += report.num_records
        return f"{file.url}:{before + record}"


def describe_reasons(reasons: Mapping[str, int]) -> str:
    """Counts by reason, most first."""
    return ", ".join(
        f"{number:,} {reason}" for reason, number in sorted(reasons.items(), key=lambda each: -each[1])
    )
