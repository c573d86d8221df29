"""A run writes the timeline of one step, of all ranks, and what devices did; it trains as without them."""

import json
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
from PIL import Image

from k25_train.compose.resolve import load
from k25_train.plan.calibrate.traced import spans_by_rank
from k25_train.plan.memory.activations import num_held
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from tests.helpers.interrupted_runs import FOUR_RANKS, rows, short_run, without_times
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import fit

pytestmark = pytest.mark.distributed

NUM_RANKS, NUM_CHUNKS, NUM_MICRO_BATCHES, NUM_REPLICAS = 4, 2, 2, 2
FIRST_OF_STAGES = (0, 2)
NO_DECAY = ("train.steps=4", "optim.decay=0")
"""As long as the learning rate is raised, a step does not depend on how many there are."""


def test_a_step_is_traced_and_no_number_changes(data: Path, run_as_smoke: Path, tmp_path: Path) -> None:
    traced = tmp_path / "traced"
    run_ranks(fit, NUM_RANKS, short_run(data, traced, *FOUR_RANKS, *NO_DECAY, "train.trace_step=2"))
    assert without_times(rows(traced))[:4] == without_times(rows(run_as_smoke))[:4]
    assert not (run_as_smoke / "trace").exists()

    of_devices = {f"step_2.rank_{rank}.json" for rank in FIRST_OF_STAGES}
    assert {path.name for path in (traced / "trace").iterdir()} == {"step_2.json", "step_2.png", *of_devices}
    for name in of_devices:
        profiled = json.loads((traced / "trace" / name).read_text())["traceEvents"]
        counts = Counter(event["name"] for event in profiled if event["ph"] == "X")
        assert counts["forward"] == counts["backward"] == NUM_MICRO_BATCHES * NUM_CHUNKS
        assert counts["train"] == counts["optimizer"] == counts["vision forward"] == 1
        assert {"features", "all-to-all", "aten::mm"} <= set(counts)
    with Image.open(traced / "trace/step_2.png") as image:
        assert len(image.convert("RGB").getcolors(2**24) or []) > 20
    events = json.loads((traced / "trace/step_2.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    counts = Counter((event["tid"], event["name"]) for event in complete)
    for rank in range(NUM_RANKS):
        assert counts[rank, "train"] == 1, "one step, nothing around it"
        assert counts[rank, "forward"] == counts[rank, "backward"] == NUM_MICRO_BATCHES * NUM_CHUNKS
        for once in ("read data", "vision forward", "vision backward", "optimizer"):
            assert counts[rank, once] == 1
    check_order(traced)
    step_time_s = rows(traced)[2]["step_time_s"]
    (of_first,) = (event for event in complete if event["name"] == "train" and event["tid"] == 0)
    assert step_time_s <= of_first["dur"] / 1e6


def check_order(folder: Path) -> None:
    """Each rank starts its passes in the order of the simulated timeline, with as many between forward and
    backward as memory is planned for."""
    pipeline = plan_pipeline(load(folder / "config.yaml").config)
    timeline = plan_step(pipeline).timeline
    assert timeline.num_replicas * len(timeline.schedules) * NUM_REPLICAS == NUM_RANKS
    for rank, spans in spans_by_rank(folder / "trace" / "step_2.json").items():
        stage = rank // NUM_REPLICAS
        starts = sorted(zip(timeline.starts_s[stage], timeline.schedules[stage], strict=True))
        names = [name for name, _ in spans]
        assert names == ["forward" if each.is_forward else "backward" for _, each in starts]
        held = list(accumulate(1 if name == "forward" else -1 for name in names))
        assert held[-1] == 0
        assert max(held) == num_held(pipeline.stages[stage])


@pytest.mark.slow
def test_the_first_step_can_be_traced(data: Path, tmp_path: Path) -> None:
    run_ranks(fit, NUM_RANKS, short_run(data, tmp_path, *FOUR_RANKS, *NO_DECAY, "train.trace_step=1"))
    written = sorted(path.name for path in (tmp_path / "trace").iterdir())
    assert written == ["step_1.json", "step_1.png", "step_1.rank_0.json", "step_1.rank_2.json"]
    for path in (tmp_path / "trace").glob("*.json"):
        names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
        assert {"train", "forward", "backward", "vision forward", "optimizer"} <= names
