"""Phases of ranks become what each was doing when, a picture, and a file that Perfetto reads."""

import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from k25_train.metrics.chrome_trace import complete_events, write_chrome_trace
from k25_train.metrics.timeline import (
    Kind,
    RankRecord,
    Segment,
    aligned,
    computing_share,
    in_order,
    kind_of,
    segments,
    step_s,
)
from k25_train.metrics.timeline_plot import COLORS, MOST_ROWS, plot_timeline
from parallel.watchdog.recorder import Span

NAMES = ("train", "forward", "backward", "vision forward", "all-to-all", "pipeline recv", "optimizer")


def span(name: str, start_s: float, end_s: float, depth: int = 0, peers: str = "") -> Span:
    return Span(name, start_s, end_s, depth, peers)


def path(*names: str) -> list[Span]:
    """Phases inside each other; a name with a `*` has peers."""
    return [
        span(name.rstrip("*"), 0, 9, depth, "rank 1" if name.endswith("*") else "")
        for depth, name in enumerate(names)
    ]


def record(
    rank: int, spans: list[Span], *, num_replicas: int = 2, node: str = "a", ready_s: float = 0.0
) -> RankRecord:
    """A rank's record; ranks of one stage are neighbours."""
    return RankRecord(
        rank=rank,
        stage=rank // num_replicas,
        replica=rank % num_replicas,
        node=node,
        ready_s=ready_s,
        spans=tuple(spans),
    )


@st.composite
def any_spans(draw: st.DrawFn) -> list[Span]:
    """Spans of whole seconds that may touch, nest, overlap, coincide and be empty."""
    times = st.tuples(st.integers(0, 12), st.integers(0, 5))
    drawn = draw(st.lists(st.tuples(st.sampled_from(NAMES), times), max_size=8))
    return [
        span(name, float(start), float(start + length), depth, "rank 1" if name == "all-to-all" else "")
        for depth, (name, (start, length)) in enumerate(drawn)
    ]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("train", Kind.other),
        ("train > forward", Kind.forward),
        ("train > forward > all-to-all*", Kind.experts),
        ("train > forward > all-to-all", Kind.forward),
        ("train > backward > reduce gradients* > reduce-scatter*", Kind.collective),
        ("train > forward > gather parameters*", Kind.collective),
        ("train > vision forward > features*", Kind.features),
        ("train > vision forward > keys and values*", Kind.features),
        ("train > vision backward > feature gradients*", Kind.features),
        ("train > meet*", Kind.features),
        ("train > vision forward > broadcast*", Kind.collective),
        ("train > pipeline recv* > vision forward", Kind.vision_forward),
        ("train > vision backward > reduce gradients* > all-reduce*", Kind.collective),
        ("train > optimizer > all-to-all*", Kind.collective),
        ("train > read data > all-reduce*", Kind.collective),
        ("train > pipeline recv* > broadcast*", Kind.pipeline),
        ("train > forward and backward > all-to-all*", Kind.experts),
        ("train > forward > latents* > all-gather*", Kind.contexts),
        ("train > backward > latents*", Kind.contexts),
    ],
)
def test_the_innermost_phase_says_what_a_rank_does(names: str, kind: Kind) -> None:
    assert kind_of(path(*names.split(" > "))) == kind


def test_segments_of_nested_phases_and_of_one_that_outlives_its_outer_one() -> None:
    spans = [
        span("all-to-all", 3, 4, 2, "rank 1"), span("forward", 2, 6, 1), span("backward", 5, 8, 2),
        span("train", 0, 9, 0),
    ]  # fmt: skip
    assert segments(spans) == [
        Segment(Kind.other, 0, 2),
        Segment(Kind.forward, 2, 3),
        Segment(Kind.experts, 3, 4),
        Segment(Kind.forward, 4, 5),
        Segment(Kind.backward, 5, 6),
        Segment(Kind.backward, 6, 8),
        Segment(Kind.other, 8, 9),
    ]
    assert computing_share(spans, 10) == 0.5


@given(any_spans())
def test_segments_cover_what_is_recorded_once(spans: list[Span]) -> None:
    found = segments(spans)
    for one, next_one in itertools.pairwise(found):
        assert one.end_s <= next_one.start_s
    covered = [second for each in found for second in range(int(each.start_s), int(each.end_s))]
    assert covered == [s for s in range(20) if any(span.start_s <= s < span.end_s for span in spans)]
    for each in found:
        in_flight = [span for span in spans if span.start_s <= each.start_s and span.end_s >= each.end_s]
        assert each.kind == kind_of(in_order(in_flight))


def test_records_stand_pipeline_after_pipeline() -> None:
    found = aligned([record(rank, []) for rank in range(4)])
    assert [(each.replica, each.stage) for each in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [each.rank for each in found] == [0, 2, 1, 3]


def test_nodes_with_clocks_of_their_own_are_brought_together() -> None:
    """On each node the first rank is ready half a second before the second one."""
    clocks = {"a": 1000.0, "b": 50.0}
    records = [
        record(rank, [span("train", base + 1, base + 3)], node=node, ready_s=base + later)
        for rank, (node, later) in enumerate([("a", 0.0), ("a", 0.5), ("b", 0.0), ("b", 0.5)])
        for base in [clocks[node]]
    ]
    found = aligned(records)
    assert {(each.spans[0].start_s, each.spans[0].end_s) for each in found} == {(1.0, 3.0)}
    assert sorted(each.ready_s for each in found) == [0.0, 0.0, 0.5, 0.5]
    assert step_s(found) == 3.0


@given(st.lists(any_spans(), min_size=1, max_size=3))
def test_events_of_a_track_are_nested(spans_by_rank: list[list[Span]]) -> None:
    records = [record(rank, spans) for rank, spans in enumerate(spans_by_rank)]
    by_track = defaultdict(list)
    for event in complete_events(records):
        by_track[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, by_track.values())) == sum(map(len, spans_by_rank))
    for times in by_track.values():
        assert times == sorted(times, key=lambda time: time[0]), "as they began"
        for place, (start, end) in enumerate(times):
            for later_start, later_end in times[place + 1 :]:
                assert later_start >= end or later_end <= end, (start, end, later_start, later_end)


def test_the_file_has_every_rank_sorted_and_named(tmp_path: Path) -> None:
    file = tmp_path / "step_5.json"
    records = aligned(
        [
            record(rank, [span("train", 0, 2.5), span("all-reduce", rank / 4, 2, 1, "ranks 0-3")])
            for rank in range(4)
        ]
    )
    write_chrome_trace(records, file, "k25_tiny, step 5")
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names[3] == "rank 3 · stage 1 · replica 1"
    assert len(names) == 4
    order = {
        event["tid"]: event["args"]["sort_index"] for event in events if event["name"] == "thread_sort_index"
    }
    assert order == {0: 0, 2: 1, 1: 2, 3: 3}
    complete = [event for event in events if event["ph"] == "X"]
    assert all({"name", "ph", "ts", "dur", "pid", "tid", "args"} <= set(event) for event in complete)
    assert [event["ts"] for event in complete] == sorted(event["ts"] for event in complete)
    last = complete[-1]
    assert (last["name"], last["tid"], last["ts"], last["dur"]) == ("all-reduce", 3, 0.75e6, 1.25e6)
    assert last["args"] == {"peers": "ranks 0-3"}


@pytest.mark.parametrize("num_ranks", [1, MOST_ROWS + 8])
def test_the_picture_has_a_row_a_rank(tmp_path: Path, num_ranks: int) -> None:
    spans = [span("train", 0, 4), span("vision forward", 0, 1, 1), span("backward", 1, 4, 1)]
    records = aligned([record(rank, spans, num_replicas=4) for rank in range(num_ranks)])
    file = tmp_path / "step_1.png"
    plot_timeline(records, file, "step 1")
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    is_vision, is_backward = (
        (pixels == [int(COLORS[kind][at : at + 2], 16) for at in (1, 3, 5)]).all(axis=2)
        for kind in (Kind.vision_forward, Kind.backward)
    )
    column = is_vision[:, np.flatnonzero(is_vision.any(axis=0))[0] + 3]
    num_rows = np.count_nonzero(np.diff(column.astype(int)) == 1)
    assert num_rows == min(num_ranks, MOST_ROWS)
    assert 2.5 < is_backward.sum() / is_vision.sum() < 3.1, "three quarters, and a quarter; and the legend"
