"""The picture of `tests.bench.dep_simulation`: both schedules of a step with few micro-batches."""

from __future__ import annotations

from pathlib import Path

from k25_train.plan.time.step import StepTimes
from parallel.dep.bubbles import plan_upfront
from parallel.pipeline.timeline import Timeline
from tests.bench.dep_simulation import NODES, Batch, bubbles, build_job, draw_batch, place_items

PICTURE_MICRO_BATCHES, PICTURE_SHARE = 32, 0.3
COLORS = {
    "text forward": "#9ecae1",
    "text backward": "#4a86b8",
    "vision forward": "#fdae45",
    "vision recompute and backward": "#d94f2b",
    "exchange and weights": "#7a5aa6",
    "idle": "#f2f2f2",
}
Bars = dict[tuple[int, str], list[tuple[float, float]]]
"""(stage, what) -> (start, duration), seconds."""


def draw_picture(path: Path) -> None:
    """Both schedules of a step with few micro-batches, one replica's ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    job = build_job(NODES[0], PICTURE_MICRO_BATCHES)
    batch = draw_batch(job.config, PICTURE_SHARE, job.config.dp * job.num_micro_batches)
    panels = {"upfront": upfront_bars(job, batch), "bubbles": bubbles_bars(job, batch)}
    ends_s = {name: max(sum(each[-1]) for each in bars.values()) for name, bars in panels.items()}
    figure, axes = pyplot.subplots(2, 1, figsize=(20, 11), sharex=True, layout="constrained")
    for axis, (name, bars) in zip(axes, panels.items(), strict=True):
        for stage in range(job.config.parallelism.pp):
            axis.broken_barh([(0, ends_s[name])], (stage - 0.45, 0.9), color=COLORS["idle"])
        for (stage, what), spans in bars.items():
            axis.broken_barh(
                spans, (stage - 0.45, 0.9), color=COLORS[what], edgecolor="white", linewidth=0.25
            )
        axis.set_title(
            f"{name}: {ends_s[name]:.2f} s, {job.text.makespan_s / ends_s[name]:.3f} of the text-only step's "
            f"throughput ({job.text.makespan_s:.2f} s)"
        )
        axis.set_ylabel("pipeline stage")
        axis.set_yticks(range(job.config.parallelism.pp))
        axis.invert_yaxis()
        axis.set_xlim(0, max(ends_s.values()))
    axes[1].set_xlabel("seconds")
    numbers = f"{job.num_micro_batches} micro-batches, {PICTURE_SHARE:.0%} vision tokens"
    figure.suptitle(f"{numbers}, {job.config.world_size} ranks, of which one replica's are shown")
    figure.legend(
        handles=[Patch(color=color, label=what) for what, color in COLORS.items()],
        loc="outside lower center",
        ncols=len(COLORS),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def text_bars(run: Timeline, from_s: float, first: int) -> Bars:
    """Passes of every `first`-th rank, so those of one replica; two that run as one share their time."""
    bars: Bars = {}
    for stage, passes in enumerate(run.schedules):
        for position, each in enumerate(passes):
            start_s, end_s = (times[stage * first][position] for times in (run.starts_s, run.ends_s))
            if each.overlaps_next:
                end_s = start_s + (end_s - start_s) / 3
            elif position and passes[position - 1].overlaps_next:
                start_s += (end_s - start_s) / 3
            what = "text forward" if each.is_forward else "text backward"
            bars.setdefault((stage, what), []).append((from_s + start_s, end_s - start_s))
    return bars


def upfront_bars(job: StepTimes, batch: Batch) -> Bars:
    """The tower ahead of the pipeline and behind it, items whole."""
    items, tokens = place_items(job, batch, is_calm=False)
    plan = plan_upfront(job.text, items, job.config.dp)
    # All but the last micro-batch's features travel while ranks encode.
    exchange_s = job.exchange_s(max(tokens.values()))
    text_s = job.gather_s + plan.start_delay_s + exchange_s
    done_s = text_s + job.text.makespan_s
    backward_s = done_s + exchange_s
    bars = text_bars(job.text, text_s, 1)
    waits = [(0.0, job.gather_s), (text_s - exchange_s, exchange_s), (done_s, exchange_s)]
    waits.append((backward_s + plan.end_delay_s, job.reduce_s))
    ranks = [place.rank for place in plan.placements]
    for stage in range(job.config.parallelism.pp):
        own = [item for item, rank in zip(items, ranks, strict=True) if rank == stage * job.config.dp]
        bars[stage, "vision forward"] = [(job.gather_s, sum(item.forward_s for item in own))]
        bars[stage, "vision recompute and backward"] = [(backward_s, sum(item.backward_s for item in own))]
        bars[stage, "exchange and weights"] = waits
    return bars


def bubbles_bars(job: StepTimes, batch: Batch) -> Bars:
    """The tower between the passes; what is exchanged travels meanwhile."""
    filled = bubbles(job, batch)
    bars = text_bars(filled.run, 0.0, job.config.dp)
    for (rank, position), starts_s in filled.run.work_starts_s.items():
        if rank % job.config.dp == 0:
            for work, start_s in zip(filled.before[rank, position], starts_s, strict=True):
                what = "vision forward" if work.is_forward else "vision recompute and backward"
                bars.setdefault((rank // job.config.dp, what), []).append((start_s, work.seconds))
    return bars


if __name__ == "__main__":
    draw_picture(Path("runs/dep_simulation.png"))
