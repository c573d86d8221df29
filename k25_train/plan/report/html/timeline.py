"""What each stage does in a step, as a row of rectangles for each."""

from collections.abc import Sequence

from k25_train.plan.report.html.elements import escaped, legend

KINDS = {
    "backbone forward": "k0",
    "backbone backward": "k1",
    "backbone forward and backward at once": "k2",
    "vision forward": "k4",
    "vision recompute and backward": "k5",
    "optimizer": "k3",
    "read data": "k6",
    "gradients, weights, other collectives": "k7",
    "idle or not announced": "idle",
}
"""What a rank can do, in the words of `metrics/timeline.py` -> its class in the style sheet."""
IDLE = "idle or not announced"
RESOLUTION = 100_000
"""Units of the whole width; a page shows a few thousand."""
NUM_TICKS = 4

Row = Sequence[tuple[str, float, float]]
"""(what a stage does, from, to), in seconds."""


def timeline_svg(rows: Sequence[Row]) -> str:
    """One replica's stages, first on top; time to the right."""
    end_s = max((end for row in rows for _, _, end in row), default=0.0) or 1.0
    seen = {kind for row in rows for kind, _, _ in row} | {IDLE}
    written = []
    for stage, row in enumerate(rows):
        shapes = _paths(row, RESOLUTION / end_s).items()
        paths = "".join(f'<path class="{KINDS[kind]}" d="{path}"/>' for kind, path in shapes)
        written.append(
            f"<div class=label>{stage}</div>"
            f'<svg viewBox="0 0 {RESOLUTION} 1" preserveAspectRatio="none" role="img" '
            f'aria-label="{escaped(f"what stage {stage} does")}">{paths}</svg>'
        )
    ticks = "".join(
        f'<span style="left:{100 * n / NUM_TICKS:.0f}%">{end_s * n / NUM_TICKS:.3g} s</span>'
        for n in range(NUM_TICKS + 1)
    )
    kinds = [kind for kind in KINDS if kind in seen]
    names = [kind.removesuffix(" or not announced") for kind in kinds]
    return (
        f"{legend(names, [KINDS[kind] for kind in kinds])}<div class=timeline>{''.join(written)}"
        f"<div class=label>stage</div><div class=ticks>{ticks}</div></div>"
    )


def _paths(row: Row, scale: float) -> dict[str, str]:
    """Kind -> path of its rectangles; idle time is what no path covers."""
    paths: dict[str, str] = {}
    for kind, start_s, end_s in row:
        if kind in KINDS and kind != IDLE:
            start, end = round(scale * start_s), round(scale * end_s)
            paths[kind] = paths.get(kind, "") + f"M{start} 0h{max(end - start, 1)}v1H{start}z"
    return paths
