"""A plan as one HTML page, for light and dark screens of any width; it needs no network, file or script."""

from collections.abc import Iterator, Sequence
from importlib import resources

from k25_train.parameters.released import count_parameters
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.verdict import Fit
from k25_train.plan.report.bars import amount
from k25_train.plan.report.html.elements import bars, escaped, section, stacked, table
from k25_train.plan.report.html.timeline import Row, timeline_svg
from k25_train.plan.report.labels import memory_amounts, time_amounts
from k25_train.plan.report.planned import Planned
from k25_train.plan.report.screen import exposed_share, remedy_lines, verdict_text
from k25_train.plan.report.text import format_gb, format_layers
from k25_train.plan.report.words import (
    assumed_text,
    layout_text,
    overlapped_text,
    shared_text,
    sizes_text,
    title_text,
)
from k25_train.plan.time.communication import communication
from k25_train.units import GB

CLASSES = {Fit.fits: "fits", Fit.tight: "tight", Fit.does_not_fit: "not"}
PARTS = ("states", "passes in the pipeline", "encoder", "optimizer's rounds", "gaps, CUDA, NCCL")


def page(planned: Planned, rows: Sequence[Row], variants: Sequence[str], config_yaml: str) -> str:
    """The whole page.

    Args:
        planned: what it is about.
        rows: what each stage does when.
        variants: sections about plans of other configurations.
        config_yaml: the configuration, shown at the end.
    """
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    title = title_text(planned.pipeline)
    parts = [*_top(planned), _time(planned), *_memory(planned), _timeline(planned, rows), *variants]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{style}</style></head><body><h1>{escaped(title)}</h1>"
        f"{''.join(parts)}{''.join(_tables(planned))}<section><details><summary>Configuration</summary>"
        f"<pre>{escaped(config_yaml)}</pre></details></section></body></html>\n"
    )


def _top(planned: Planned) -> Iterator[str]:
    """The verdict, and the figures that people ask for first."""
    verdict, step, pipeline = planned.verdict, planned.step, planned.pipeline
    texts = "".join(f"<p>{escaped(text)}</p>" for text in verdict_text(planned))
    what, *overrides = [*remedy_lines(verdict)] or [""]
    remedy = f"<p>{escaped(what)} <code>{escaped(' '.join(overrides).strip())}</code></p>" if what else ""
    yield (
        f'<section class="verdict {CLASSES[verdict.fit]}"><h2>{escaped(verdict.fit.value.upper())}</h2>'
        f"{texts}{remedy}</section>"
    )
    cards = {
        "tokens/s per GPU": amount(step.tokens_per_s_per_gpu),
        "TFLOP/s per GPU": amount(step.tflops),
        "MFU": f"{step.mfu:.1%}",
        "seconds per step": amount(step.step_s),
        "days for 15T tokens": amount(step.days()),
        "GPU-hours for 15T tokens": f"{step.gpu_hours():,.0f}",
        "pipeline's idle share": f"{step.bubble_share:.1%}",
        "exposed communication": f"{exposed_share(planned):.1%}",
    }
    written = (f"<div><b>{escaped(v)}</b><span>{escaped(k)}</span></div>" for k, v in cards.items())
    yield f"<div class=cards>{''.join(written)}</div>"
    lines = [
        sizes_text(pipeline),
        *shared_text(pipeline),
        f"layout {layout_text(pipeline.layout)}{overlapped_text(pipeline)}",
        assumed_text(pipeline),
        "Everything here is computed; nothing of it was measured on a GPU.",
    ]
    yield section("What was planned", *(f"<p class=note>{escaped(line)}</p>" for line in lines))


def _time(planned: Planned) -> str:
    parts = sorted(planned.step.parts, key=lambda part: -part.seconds)
    amounts = sorted(time_amounts(planned.step), key=lambda each: -each.value)
    return section(
        "Where the time of a step goes",
        bars(amounts, "s", [part.how for part in parts]),
        note="As the ranks of the stage see it that computes the longest; the rows add up to the step.",
    )


def _memory(planned: Planned) -> Iterator[str]:
    verdict, memories = planned.verdict, planned.memories
    held = sorted(
        (each for each in memory_amounts(planned.fullest) if each.value > 0), key=lambda e: -e.value
    )
    yield section(f"On a device of stage {verdict.stage}, the fullest", bars(held, "GB"))
    limit = None if verdict.limit_bytes is None else verdict.limit_bytes / GB
    rows = [(f"stage {each.stage}", _parts(each), f"{format_gb(each.device)} GB") for each in memories]
    most = max([sum(values) for _, values, _ in rows] + ([limit] if limit else [])) * 1.02
    note = "Each stage at its fullest moment."
    if limit is not None:
        note += f" The line is at {limit:g} GB, what a device has."
    yield section("Memory of every stage", stacked(rows, PARTS, most, limit), note=note)


def _parts(memory: StageMemory) -> list[float]:
    """GB of each of `PARTS`."""
    phases = [most if memory.fullest_phase == phase else 0 for phase, most in memory.phases.items()]
    return [each / GB for each in (memory.states, *phases, memory.device - memory.tensors)]


def _timeline(planned: Planned, rows: Sequence[Row]) -> str:
    drawn, total = planned.step.timeline.num_micro_batches, planned.pipeline.num_micro_batches
    note = "Each row is a stage of one replica."
    if drawn < total:
        note += f" {drawn:,} of the {total:,} micro-batches of a step are drawn; the others repeat them."
    return section("One step", timeline_svg(rows), note=note)


def _tables(planned: Planned) -> Iterator[str]:
    config, step = planned.pipeline.config, planned.step
    yield section(
        "Stages",
        table(
            ["stage", "layers", "passes held", "states", "fullest phase", "", "in all", "host"],
            [
                (
                    str(each.stage),
                    " | ".join(map(format_layers, each.layers)),
                    str(each.num_held),
                    format_gb(each.states),
                    each.fullest_phase,
                    format_gb(max(each.phases.values())),
                    format_gb(each.device),
                    format_gb(each.host + each.snapshot),
                )
                for each in planned.memories
            ],
            words=(0, 1, 4),
        ),
        note="GB per rank.",
    )
    sent = {
        kind: volume.sent_bytes / config.world_size / GB for kind, volume in communication(config).items()
    }
    yield section(
        "Sent in a step",
        table(["kind", "GB per rank"], [(kind, f"{size:,.3f}") for kind, size in sent.items()]),
    )
    if step.busy_s:
        busy = [(name, f"{s:,.2f}", f"{s / step.step_s:.0%}") for name, s in step.busy_s.items()]
        yield section("How busy a rank is", table(["resource", "seconds of a step", "share"], busy))
    counts = count_parameters(config.model)
    modules = [(each.module, f"{each.total:,}", f"{each.active:,}") for each in counts.modules]
    modules.append(("total", f"{counts.total:,}", f"{counts.active:,}"))
    yield section("Parameters", table(["module", "all", "used by a text token"], modules))
