"""What a check says: one line with a verdict, and what to do where the verdict is bad."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Verdict(IntEnum):
    """How much a finding matters; the larger, the worse."""

    passed = 0
    skipped = 1
    """Could not be looked at here; the finding says why."""
    warned = 2
    """The job runs, but slower or with less to tell it when something breaks."""
    failed = 3
    """The job would not start, would break, or would waste most of the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check on one node or between nodes."""

    check: str
    """Name of the check, the same on every node."""
    verdict: Verdict
    found: str
    """What was seen, with its unit; where the check was skipped, why."""
    rule: str = ""
    """What should have been seen; empty unless warned or failed."""
    remedy: str = ""
    """What to do about it; empty unless warned or failed."""

    def __str__(self) -> str:
        parts = [f"{self.check}: {self.found}", self.rule, self.remedy]
        return "; ".join(part for part in parts if part)


def passed(check: str, found: str) -> Finding:
    """All is as it should be."""
    return Finding(check=check, verdict=Verdict.passed, found=found)


def skipped(check: str, reason: str) -> Finding:
    """The check could not be made here."""
    return Finding(check=check, verdict=Verdict.skipped, found=reason)


def warned(check: str, found: str, rule: str, remedy: str) -> Finding:
    """Not as it should be; the job runs all the same."""
    return Finding(check=check, verdict=Verdict.warned, found=found, rule=rule, remedy=remedy)


def failed(check: str, found: str, rule: str, remedy: str) -> Finding:
    """Not as it must be."""
    return Finding(check=check, verdict=Verdict.failed, found=found, rule=rule, remedy=remedy)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict over all of them; passed if there are none or they were skipped."""
    verdicts = [finding.verdict for finding in findings if finding.verdict is not Verdict.skipped]
    return max(verdicts, default=Verdict.passed)
