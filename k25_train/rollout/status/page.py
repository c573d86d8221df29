"""The status page: one HTML text from two snapshots, with no script and no other file."""

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from k25_train.rollout.manager.snapshot import Snapshot


def page(title: str, seen: Snapshot, before: Snapshot) -> str:
    """The whole page.

    Args:
        title: names the run.
        seen: how everything is.
        before: how it was a while ago: rates are the difference.
    """
    style = resources.files(__package__).joinpath("status.css").read_text(encoding="utf-8")
    body = "".join(
        (
            f"<h1>{_text(title)}</h1>",
            f'<p class="when">rollouts for {_duration(seen.uptime_s)}; cap set by '
            f"{_text(seen.cap_reason or 'nothing')}</p>",
            _tiles(seen, before),
            _counted("Rollouts by phase", "phase", seen.phases, "no rollout lives"),
            _counted("Waiting by source", "source", seen.queued, "nothing waits"),
            _engines(seen),
            _slowest(seen),
            _counted("Failures by cause", "cause", seen.failures, "none so far"),
            _seconds(seen),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def rate(kind: str, seen: Snapshot, before: Snapshot) -> float:
    """Events of a kind per second, between two snapshots."""
    seconds = seen.uptime_s - before.uptime_s
    return (seen.events.get(kind, 0) - before.events.get(kind, 0)) / seconds if seconds > 0 else 0.0


def _tiles(seen: Snapshot, before: Snapshot) -> str:
    tiles = (
        ("live", f"{seen.live:,} of {seen.cap:,}"),
        ("waiting", f"{sum(seen.queued.values()):,}"),
        ("ended", f"{seen.events.get('ended', 0):,}"),
        ("turns/s", f"{rate('turns', seen, before):,.1f}"),
        ("tokens/s", f"{rate('tokens', seen, before):,.0f}"),
        ("sandboxes", f"{seen.sandboxes:,} of {seen.max_sandboxes:,}"),
        ("teardowns", f"{seen.closing:,}"),
        ("lag p50, p99", f"{seen.lag_p50_s * 1e3:.1f}, {seen.lag_p99_s * 1e3:.1f} ms"),
    )
    shown = (f'<div class="tile"><b>{_text(value)}</b><span>{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{"".join(shown)}</div>'


def _counted(title: str, column: str, counts: Mapping[str, int], nothing: str) -> str:
    most = max(counts.values(), default=1)
    rows = [
        (_cell(name), _number(f"{count:,}"), f'<td class="meter">{_bar(count / max(most, 1))}</td>')
        for name, count in sorted(counts.items(), key=lambda each: -each[1])
    ]
    return _table(title, ((column, False), ("number", True), ("", False)), rows, nothing)


def _engines(seen: Snapshot) -> str:
    rows: list[tuple[str, ...]] = []
    for name, use in sorted(seen.engines.items()):
        if use.fenced:
            why = f'<td class="text bad" colspan="5">fenced off: {_text(use.fenced)}</td>'
            rows.append((_cell(name), why))
            continue
        rows.append(
            (
                _cell(name),
                _number(f"{use.version:,}"),
                _number(f"{use.running:,}"),
                _number(f"{use.waiting:,}"),
                f'<td class="meter">{_bar(use.kv_use)} {use.kv_use:.0%}</td>',
                f'<td class="meter">{_bar(use.busy_share)} {use.busy_share:.0%}</td>',
            )
        )
    columns = (
        ("engine", False),
        ("version", True),
        ("running", True),
        ("waiting", True),
        ("keys and values", False),
        ("busy", False),
    )
    return _table("Engines", columns, rows, "none is known")


def _slowest(seen: Snapshot) -> str:
    rows = [
        (
            _cell(each.name),
            _cell(each.source),
            _cell(f"{each.phase}: {each.detail}" if each.detail else each.phase),
            _number(_duration(each.phase_s)),
            _number(_duration(each.total_s)),
        )
        for each in seen.slowest
    ]
    columns = (("rollout", False), ("source", False), ("phase", False), ("for", True), ("in all", True))
    return _table("Slowest rollouts", columns, rows, "no rollout lives")


def _seconds(seen: Snapshot) -> str:
    total = sum(seen.phase_seconds.values())
    rows = [
        (_cell(name), _number(_duration(seconds)), f'<td class="meter">{_bar(seconds / total)}</td>')
        for name, seconds in sorted(seen.phase_seconds.items(), key=lambda each: -each[1])
        if total > 0
    ]
    columns = (("phase", False), ("time", True), ("", False))
    return _table("Time of all rollouts by phase", columns, rows, "none yet")


def _table(
    title: str, columns: Iterable[tuple[str, bool]], rows: Sequence[Sequence[str]], nothing: str
) -> str:
    if not rows:
        return f'<h2>{title}</h2><p class="none">{_text(nothing)}</p>'
    head = "".join(f"<th{' class=number' if is_number else ''}>{name}</th>" for name, is_number in columns)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{title}</h2><div class="wide">{table}</div>'


def _cell(text: str) -> str:
    return f'<td class="text">{_text(text)}</td>'


def _number(text: str) -> str:
    return f'<td class="number">{_text(text)}</td>'


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{min(max(share, 0.0), 1.0) * 7:.2f}rem"></span>'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _text(text: str) -> str:
    return html.escape(text)
