"""Outcome of a check: one line with a verdict and, if the verdict is bad, the rule and a remedy."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Verdict(IntEnum):
    """How much a finding matters; the larger, the worse."""

    passed = 0
    skipped = 1
    """The check could not be made here; the finding says why."""
    warned = 2
    """The job runs, but slower, or with fewer clues when something breaks."""
    failed = 3
    """The job would not start, would break, or would waste most of the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check on one node or between nodes."""

    check: str
    """Name of the check, the same on every node."""
    verdict: Verdict
    found: str
    """What was observed, with its unit; the reason if the check was skipped."""
    rule: str = ""
    """What was expected; empty unless warned or failed."""
    remedy: str = ""
    """How to fix it; empty unless warned or failed."""

    def __str__(self) -> str:
        parts = [f"{self.check}: {self.found}", self.rule, self.remedy]
        return "; ".join(part for part in parts if part)


def passed(check: str, found: str) -> Finding:
    """A finding without objection."""
    return Finding(check=check, verdict=Verdict.passed, found=found)


def skipped(check: str, reason: str) -> Finding:
    """A check that could not be made."""
    return Finding(check=check, verdict=Verdict.skipped, found=reason)


def warned(check: str, found: str, rule: str, remedy: str) -> Finding:
    """A finding with which the job still runs."""
    return Finding(check=check, verdict=Verdict.warned, found=found, rule=rule, remedy=remedy)


def failed(check: str, found: str, rule: str, remedy: str) -> Finding:
    """A finding with which the job must not run."""
    return Finding(check=check, verdict=Verdict.failed, found=found, rule=rule, remedy=remedy)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The worst verdict; passed if there are no findings or all were skipped."""
    verdicts = [finding.verdict for finding in findings if finding.verdict is not Verdict.skipped]
    return max(verdicts, default=Verdict.passed)
