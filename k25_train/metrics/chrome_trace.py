"""A step's timeline as a file for Perfetto (ui.perfetto.dev) or chrome://tracing: one track per rank.

The format is Chrome's "Trace Event Format", its JSON object form.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from k25_train.metrics.timeline import RankRecord, in_order

PROCESS = 0
"""Number of the one process in the file that all ranks are shown in."""
Event = dict[str, object]


def write_chrome_trace(records: Sequence[RankRecord], path: Path, title: str) -> None:
    """Write a JSON file.

    Args:
        records: aligned, in the order of the tracks.
        path: of the file; an existing one is replaced.
        title: heading above the tracks.
    """
    events = [*names(records, title), *sorted(complete_events(records), key=start_us)]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def names(records: Sequence[RankRecord], title: str) -> Iterator[Event]:
    """The names of the tracks, and their order."""
    yield _metadata("process_name", 0, name=title)
    for position, record in enumerate(records):
        yield _metadata("thread_name", record.rank, name=record.label)
        yield _metadata("thread_sort_index", record.rank, sort_index=position)


def _metadata(what: str, track: int, **values: str | int) -> Event:
    return {"ph": "M", "name": what, "pid": PROCESS, "tid": track, "args": values}


def complete_events(records: Sequence[RankRecord]) -> Iterator[Event]:
    """Every phase of every rank, in microseconds, those of a rank as they began."""
    for record in records:
        ends_s: list[float] = []
        for span in in_order(record.spans):
            while ends_s and ends_s[-1] <= span.start_s:
                ends_s.pop()
            # Viewers want events of a track nested: one that outlives the phase it began in ends with it.
            ends_s.append(min([span.end_s, *ends_s[-1:]]))
            yield {
                "ph": "X",
                "name": span.name,
                "cat": "phase",
                "pid": PROCESS,
                "tid": record.rank,
                "ts": 1e6 * span.start_s,
                "dur": 1e6 * (ends_s[-1] - span.start_s),
                "args": {"peers": span.peers} if span.peers else {},
            }


def start_us(event: Event) -> float:
    """When an event begins."""
    started = event["ts"]
    assert isinstance(started, float)
    return started
