"""The passes of a step as a row of rectangles for each stage."""

from k25_train.plan.report.html.elements import legend
from parallel.pipeline.timeline import Timeline

KINDS = {"forward": "k0", "backward": "k1", "forward and backward at once": "k2", "idle": "idle"}
"""What a stage does -> its class in the style sheet."""
RESOLUTION = 100_000
"""Units of the whole width; a page shows a few thousand."""
NUM_TICKS = 5


def timeline_svg(timeline: Timeline) -> str:
    """One replica's stages, first on top; time to the right."""
    end_s = timeline.makespan_s or 1.0
    rows = []
    for stage, shapes in enumerate(_shapes(timeline, RESOLUTION / end_s)):
        paths = "".join(f'<path class="k{kind}" d="{path}"/>' for kind, path in enumerate(shapes) if path)
        rows.append(
            f"<div class=label>{stage}</div>"
            f'<svg viewBox="0 0 {RESOLUTION} 1" preserveAspectRatio="none" role="img" '
            f'aria-label="passes of stage {stage}">{paths}</svg>'
        )
    ticks = "".join(
        f'<span style="left:{100 * n / NUM_TICKS:.0f}%">{end_s * n / NUM_TICKS:.3g} s</span>'
        for n in range(NUM_TICKS + 1)
    )
    return (
        f"{legend(list(KINDS), list(KINDS.values()))}<div class=timeline>{''.join(rows)}"
        f"<div class=label>stage</div><div class=ticks>{ticks}</div></div>"
    )


def _shapes(timeline: Timeline, scale: float) -> list[list[str]]:
    """[stage][kind] -> path of its rectangles; idle time is what no path covers."""
    found = []
    for stage, passes in enumerate(timeline.schedules):
        rank, paths = stage * timeline.num_replicas, ["", "", ""]
        starts, ends = timeline.starts_s[rank], timeline.ends_s[rank]
        for position, each in enumerate(passes):
            # Two that overlap have the same times, and are drawn once.
            if position and passes[position - 1].overlaps_next:
                continue
            kind = 2 if each.overlaps_next else 0 if each.is_forward else 1
            start, end = round(scale * starts[position]), round(scale * ends[position])
            paths[kind] += f"M{start} 0h{max(end - start, 1)}v1H{start}z"
        found.append(paths)
    return found
