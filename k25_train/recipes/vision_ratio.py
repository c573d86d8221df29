"""`python -m k25_train.recipes.vision_ratio [dir=FOLDER] [KEY=VALUE …]`: when images should come in.

K2.5's ablation, shrunk: one budget of text and vision tokens, a tenth of it vision, which comes from the
first step on at 10:90, from half of the run on at 20:80, or from four fifths on at 50:50. A KEY=VALUE is for
all three runs, which start from the same random weights. What is finished is skipped.

Prints a table of held-out losses next to the report's scores, and draws the losses into DIR/vision_ratio.png.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from k25_train.compose.resolve import compose
from k25_train.entry import run_command
from k25_train.metrics.ratio_plot import Curve, plot_ratios
from k25_train.metrics.sinks import number, read_rows
from k25_train.recipes.chain import Chain, Stage
from k25_train.recipes.composed import Composed, compose_chain
from k25_train.recipes.running import check_order, run_stage
from k25_train.tables import fitting_table

EXPERIMENT, DIR = "smoke_ratio", "runs/vision_ratio"
LOSSES = {
    "text": "eval_text_loss",
    "captions": "eval_loss/caption",
    "OCR": "eval_loss/ocr",
    "video": "eval_loss/video",
}
"""Kind of data -> its held-out loss in the rows of a run."""
ALMOST_NONE = 1e-9
"""Factor on the weights of images while there are none: with none, they would not be evaluated either, and in
other proportions, other images would be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """When images come in, and the report's scores for it (K2.5, table 1)."""

    name: str
    """In the report."""
    start: float
    """Share of the run before it."""
    ratio: float
    """Share of images among the tokens from there on."""
    vision_knowledge: float
    vision_reasoning: float
    ocr: float
    text_knowledge: float
    text_reasoning: float
    code: float


INJECTIONS = (
    Injection(name="early", start=0.0, ratio=0.1, vision_knowledge=25.8, vision_reasoning=43.8, ocr=65.7,
              text_knowledge=45.5, text_reasoning=58.5, code=24.8),
    Injection(name="mid", start=0.5, ratio=0.2, vision_knowledge=25.0, vision_reasoning=40.7, ocr=64.1,
              text_knowledge=43.9, text_reasoning=58.6, code=24.0),
    Injection(name="late", start=0.8, ratio=0.5, vision_knowledge=24.2, vision_reasoning=39.0, ocr=61.5,
              text_knowledge=43.1, text_reasoning=57.8, code=24.0),
)  # fmt: skip
"""Source: the figures of K2.5's ablation at a fixed budget of vision and text tokens."""


def chain_of(folder: str, settings: Sequence[str]) -> Chain:
    """The three runs. Raises ConfigError for settings that do not compose."""
    config = compose([f"experiment={EXPERIMENT}", *settings])
    images = [name for name, source in config.data.sources.items() if source.may_have_media]
    weights = {name: config.data.sources[name].weight for name in images}
    stages = [
        Stage(
            name=each.name,
            experiment=EXPERIMENT,
            overrides=(*settings, *mixture(each, config.train.steps, weights)),
        )
        for each in INJECTIONS
    ]
    return Chain(name="vision_ratio", dir=folder, stages=tuple(stages))


def mixture(injection: Injection, num_steps: int, weights: dict[str, float]) -> list[str]:
    """Settings that have images come in as `injection` says.

    Args:
        weights: of the sources with images.
    """
    if not injection.start:
        return [f"data.vision_ratio={injection.ratio}"]
    before = [f"data.sources.{name}.weight={ALMOST_NONE * weight}" for name, weight in weights.items()]
    step = round(num_steps * injection.start) + 1
    then = ", ".join(f"{name}: {weight}" for name, weight in weights.items())
    mix = f"from_step: {step}, vision_ratio: {injection.ratio}, weights: {{{then}}}"
    return [*before, f"data.schedule={{images: {{{mix}}}}}"]


def table_rows(stages: Sequence[Composed]) -> list[dict[str, str]]:
    """A row for each run: what it read, its last held-out losses, the report's scores."""
    rows = []
    for injection, stage in zip(INJECTIONS, stages, strict=True):
        found = read_rows(Path(stage.config.run.dir) / "metrics.jsonl")
        vision, text = (
            sum(number(row.get(f"{kind}_tokens", 0)) for row in found) for kind in ("vision", "text")
        )
        last = {kind: [number(row[key]) for row in found if key in row][-1:] for kind, key in LOSSES.items()}
        rows.append(
            {
                "images": injection.name,
                "from": f"{injection.start:.0%}",
                "ratio": f"{injection.ratio:.0%}",
                "tokens": f"{vision + text:,.0f}",
                "vision": f"{vision / max(vision + text, 1):.1%}",
                **{kind: f"{values[0]:.3f}" if values else "-" for kind, values in last.items()},
                "K2.5 vision": f"{injection.vision_knowledge} {injection.vision_reasoning}",
                "K2.5 OCR": f"{injection.ocr}",
                "K2.5 text": f"{injection.text_knowledge} {injection.text_reasoning}",
                "K2.5 code": f"{injection.code}",
            }
        )
    return rows


def main() -> None:
    """Console entry point."""
    run_command(_run, output_goes_on=True)


def _run() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    folders = [each.removeprefix("dir=") for each in arguments if each.startswith("dir=")]
    folder = folders[-1] if folders else DIR
    stages = compose_chain(chain_of(folder, [each for each in arguments if not each.startswith("dir=")]))
    check_order(stages)
    for position, stage in enumerate(stages, start=1):
        run_stage(stage, position, len(stages), say)
    rows = table_rows(stages)
    table = fitting_table(
        "When images come in: held-out losses, and K2.5's scores", rows, 130, left=("images",)
    )
    Console(soft_wrap=True, width=130).print(table)
    (Path(folder) / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    path = Path(folder) / "vision_ratio.png"
    plot_ratios([curve_of(each, stage) for each, stage in zip(INJECTIONS, stages, strict=True)], path)
    print(f"picture: {path}")


def curve_of(injection: Injection, stage: Composed) -> Curve:
    """The held-out losses of a run over its tokens."""
    rows = read_rows(Path(stage.config.run.dir) / "metrics.jsonl")
    train = stage.config.train
    return Curve(
        label=f"{injection.name}, {injection.ratio:.0%} from {injection.start:.0%} on",
        rows=rows,
        tokens_per_step=train.global_batch_size * train.seq_len,
        start=injection.start * stage.num_tokens,
    )


def say(line: str) -> None:
    """Print a line at once, before what a child process prints."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
