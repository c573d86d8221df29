"""The report: a table for people and JSON for programs."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.preflight.findings import Finding, Verdict, worst

STYLES = {
    Verdict.passed: ("pass", "green"),
    Verdict.skipped: ("skipped", "dim"),
    Verdict.warned: ("warn", "yellow"),
    Verdict.failed: ("FAIL", "bold red"),
}
FILE = "preflight.json"

MAX_SIMILAR = 4
"""Faults of one rule, in other numbers, of which each has a line; of more, the first have one each and the
others share one."""

Findings = Mapping[str, Sequence[Finding]]
"""Node -> its findings."""


class Row(NamedTuple):
    """A line of the report."""

    check: str
    verdict: Verdict
    nodes: str
    text: str


def print_report(console: Console, nodes: Findings) -> None:
    """Print a line per check for the nodes that pass, one per distinct fault, and a verdict per node."""
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "nodes", "found"):
        table.add_column(heading, overflow="fold")
    for row in _without_repeats(_rows(nodes)):
        word, style = STYLES[row.verdict]
        table.add_row(row.check, Text(word, style), row.nodes, Text(row.text))
    console.print(table)
    console.print()
    console.print(_verdicts(nodes))


def _rows(nodes: Findings) -> Iterator[Row]:
    """The lines of all checks, in the order in which they were made."""
    checks = dict.fromkeys(finding.check for findings in nodes.values() for finding in findings)
    for check in checks:
        outcomes: dict[Finding, list[str]] = {}
        for node, findings in nodes.items():
            for finding in findings:
                if finding.check == check:
                    outcomes.setdefault(finding, []).append(node)
        # The worst first: among hundreds of nodes it is the one to look at.
        bad = [finding for finding in outcomes if finding.verdict > Verdict.skipped]
        for similar in _similar(sorted(bad, key=lambda finding: -finding.verdict)):
            first = similar[0]
            names = [name for finding in similar for name in outcomes[finding]]
            found = first.found if len(similar) == 1 else f"{first.found}, and similar on the others"
            text = "; ".join((found, first.rule, first.remedy))
            yield Row(check, first.verdict, name_nodes(names, len(nodes)), text)
        for verdict in (Verdict.skipped, Verdict.passed):
            equal = {finding.found: own for finding, own in outcomes.items() if finding.verdict is verdict}
            if equal:
                names = [name for own in equal.values() for name in own]
                yield Row(check, verdict, name_nodes(names, len(nodes)), _shorten(list(equal)))


def _similar(bad: Sequence[Finding]) -> list[list[Finding]]:
    """The faults of a check, each on its own; those that follow `MAX_SIMILAR` of one rule are together."""
    groups: list[list[Finding]] = []
    by_rule: dict[tuple[Verdict, str, str], list[list[Finding]]] = {}
    for finding in bad:
        own = by_rule.setdefault((finding.verdict, finding.rule, finding.remedy), [])
        if len(own) <= MAX_SIMILAR:
            own.append([finding])
            groups.append(own[-1])
        else:
            own[-1].append(finding)
    return groups


def _without_repeats(rows: Iterable[Row]) -> Iterator[Row]:
    """Lines of checks that were skipped one after the other for one reason become one line."""
    for (verdict, names, text), equal in itertools.groupby(rows, key=lambda row: row[1:]):
        checks = [row.check for row in equal]
        if verdict is Verdict.skipped and len(checks) > 2:
            checks = [f"{checks[0]} and {len(checks) - 1} more, to {checks[-1]}"]
        yield from (Row(check, verdict, names, text) for check in checks)


def name_nodes(names: Sequence[str], num_nodes: int) -> str:
    """The nodes' names, abbreviated if there are many."""
    if len(names) == num_nodes and num_nodes > 1:
        return f"all {num_nodes}"
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def summary(nodes: Findings) -> str:
    """Verdict on the whole job, with the names of nodes that fail."""
    by_verdict = {node: worst(findings) for node, findings in nodes.items()}
    failed = [node for node, verdict in by_verdict.items() if verdict is Verdict.failed]
    if failed:
        return f"preflight FAILED on {len(failed)} of {len(nodes)} node(s): {', '.join(failed)}"
    warned = Counter(by_verdict.values())[Verdict.warned]
    return f"preflight passed on {len(nodes)} node(s)" + (f", {warned} with warnings" if warned else "")


def write_report(folder: Path, nodes: Findings, facts: Mapping[str, Any]) -> Path:
    """Write everything that was read, measured and judged to the folder, and return the file."""
    report = {
        "verdict": worst(finding for findings in nodes.values() for finding in findings).name,
        "nodes": {
            node: {
                "verdict": worst(findings).name,
                "findings": [asdict(finding) | {"verdict": finding.verdict.name} for finding in findings],
                "facts": facts.get(node),
            }
            for node, findings in nodes.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def plain(value: Any) -> Any:
    """`value` with mappings and sequences as JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def _shorten(texts: Sequence[str]) -> str:
    """Text for nodes without a fault: the first one's if they differ."""
    return texts[0] if len(texts) == 1 else f"{texts[0]} and similar"


def _verdicts(nodes: Findings) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "verdict", "failed", "warned", "passed", "skipped"):
        table.add_column(heading)
    rows: dict[tuple[str, ...], list[str]] = {}
    for node, findings in nodes.items():
        by_verdict = Counter(finding.verdict for finding in findings)
        bad = [
            ", ".join(finding.check for finding in findings if finding.verdict is verdict) or "-"
            for verdict in (Verdict.failed, Verdict.warned)
        ]
        word = STYLES[worst(findings)][0]
        row = (word, *bad, str(by_verdict[Verdict.passed]), str(by_verdict[Verdict.skipped]))
        rows.setdefault(row, []).append(node)
    for row, names in rows.items():
        style = next(style for word, style in STYLES.values() if word == row[0])
        # Nodes with equal results share a line; each failed one has its own.
        for label in names if row[0] == STYLES[Verdict.failed][0] else [name_nodes(names, 0)]:
            table.add_row(label, Text(row[0], style), *row[1:])
    return table
