"""Plan a job before a GPU hour is spent: will it fit, how fast is it, where do time and memory go. No torch.

    python -m k25_train.plan experiment=k25_pretrain_4k [SECTION.KEY=VALUE ...]     one screen
    python -m k25_train.plan experiment=k25_pretrain_4k --html plan.html            a page with plots
    python -m k25_train.plan calibrate RUN [RUN ...]                                constants from short runs
    python -m k25_train.plan rl experiment=k25_pretrain_4k                          weights to engines

Everything is computed; nothing of it was measured on a GPU. A configuration that training would refuse is
refused with the same words.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from k25_train.compose.command_line import read_arguments
from k25_train.compose.offer import offer
from k25_train.compose.resolve import compose, describe, load, to_yaml
from k25_train.config.schema import Config
from k25_train.entry import run_command
from k25_train.errors import ConfigError, MachineError
from k25_train.metrics.planned_timeline import planned_rows, write_planned_trace
from k25_train.plan.assumption_flags import add_flags, assumptions_of
from k25_train.plan.context import with_exchange
from k25_train.plan.memory.verdict import Fit
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.report.as_json import plan_as_dict
from k25_train.plan.report.html.page import page
from k25_train.plan.report.html.variants import mechanism_section, vision_section
from k25_train.plan.report.optimizer import optimizer_as_dict
from k25_train.plan.report.planned import Planned, planned_of
from k25_train.plan.report.ranking import Progress, print_ranking, ranking_as_dict
from k25_train.plan.report.views import (
    activations_as_dict,
    optimizer_lines,
    print_activations,
    print_details,
    print_json,
    print_lines,
    print_screen,
    print_words,
)
from k25_train.plan.report.weight_push import add_push_arguments, show_pushes
from k25_train.plan.report.what_ifs import what_if_as_dict, what_if_table
from k25_train.plan.search.ranking import ranking_of
from k25_train.plan.search.search import search_layouts
from k25_train.plan.variants import WhatIfKind
from k25_train.plan.what_if import what_if
from k25_train.terminal import table_width
from parallel.config import Problem

WHAT_IFS = tuple(kind.value for kind in WhatIfKind)
CHECKED = {Fit.fits: 0, Fit.tight: 10, Fit.does_not_fit: 20}
"""Exit statuses with --check. Without, whatever could be planned ends with 0: what does not fit is an answer,
and scripts that print or search would end at it."""


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run)


def _run() -> int:
    if sys.argv[1:2] == ["calibrate"]:
        return _calibrate(sys.argv[2:])
    if sys.argv[1:2] == ["rl"]:
        return _plan_pushes(sys.argv[2:])
    options = read_arguments(_parser())
    _check_files(options)
    config = compose(options.overrides)
    assumptions, problems = assumptions_of(options, config)
    if options.what_if is not None and options.what_if not in WHAT_IFS:
        remedy = f"one of {', '.join(WHAT_IFS)}"
        problems.append(Problem("--what-if", options.what_if, "is not what can be otherwise", remedy))
    if problems:
        raise ConfigError(describe(problems, "the command line"))
    pipeline = plan_pipeline(with_exchange(config), assumptions=assumptions)
    if options.search:
        return _search(pipeline, options)
    if options.activations or options.optimizer or options.what_if:
        _print_part(pipeline, options)
        return 0
    planned = planned_of(pipeline)
    # Before a reader such as `head` leaves.
    _write_files(planned, options)
    _print(planned, options)
    return CHECKED[planned.verdict.fit] if options.check else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="k25-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for k25-train")
    views = parser.add_mutually_exclusive_group()
    views.add_argument("--details", action="store_true", help="print every table")
    views.add_argument(
        "--what-if", metavar="KIND", help=f"print what would be with other {', '.join(WHAT_IFS)}"
    )
    views.add_argument(
        "--search", action="store_true", help="find the fastest layouts that fit, and why others lose"
    )
    views.add_argument("--optimizer", action="store_true", help="print rules and state of the optimizer")
    views.add_argument("--activations", action="store_true", help="print activations and memory by stage")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, tables, timeline")
    parser.add_argument(
        "--perfetto", type=Path, metavar="FILE", help="write the planned step's passes for ui.perfetto.dev"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="end with {} if it fits, {} if that is tight, {} if it does not".format(*CHECKED.values()),
    )
    add_flags(parser)
    return parser


def _search(pipeline: PipelinePlan, options: argparse.Namespace) -> int:
    """Print the fastest layouts; whether anything fits is an answer."""
    result = search_layouts(pipeline, offer(), told=Progress())
    ranking = ranking_of(result, lambda overrides: compose([*options.overrides, *overrides]))
    if options.json:
        print_json(ranking_as_dict(ranking))
    else:
        print_ranking(ranking)
    return 0


def _print_part(pipeline: PipelinePlan, options: argparse.Namespace) -> None:
    """One of the views that have no verdict on one plan."""
    if options.what_if:
        found = what_if(WhatIfKind(options.what_if), pipeline, offer())
        if options.json:
            print_json(what_if_as_dict(found))
        else:
            print_words(what_if_table(found))
    elif options.json:
        as_dict = activations_as_dict if options.activations else optimizer_as_dict
        print_json(as_dict(pipeline))
    elif options.activations:
        print_activations(pipeline)
    else:
        print_lines([*optimizer_lines(pipeline)])


def _print(planned: Planned, options: argparse.Namespace) -> None:
    if options.json:
        print_json(plan_as_dict(planned))
    elif options.details:
        print_details(planned)
    else:
        print_screen(planned)


def _check_files(options: argparse.Namespace) -> None:
    """Whether the files that are asked for could be written; before anything is planned.

    Raises:
        ConfigError: one of them has no folder, is one, or is not wanted with this view.
    """
    if options.html is not None and options.html == options.perfetto:
        raise ConfigError(f"--html and --perfetto {options.html}: are two files: give each a name of its own")
    for name in ("html", "perfetto"):
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        if options.activations or options.optimizer or options.what_if or options.search:
            raise ConfigError(f"--{name} {path}: is of one whole plan: leave out every other view")
        if path.is_dir():
            raise ConfigError(f"--{name} {path}: is a folder: give the name of a file in it")
        if not path.parent.is_dir():
            raise ConfigError(
                f"--{name} {path}: {path.parent} is no folder: make it first, or write elsewhere"
            )


def _write_files(planned: Planned, options: argparse.Namespace) -> None:
    """The files that are asked for; what was written is said on stderr, so that stdout stays what it is.

    Raises:
        MachineError: one of them cannot be written.
    """
    writers: dict[Path, Callable[[Path], object]] = {}
    if options.html is not None:
        writers[options.html] = lambda path: _write_page(planned, path)
    if options.perfetto is not None:
        writers[options.perfetto] = lambda path: write_planned_trace(planned.step, path)
    for path, write in writers.items():
        try:
            write(path)
        except OSError as error:
            raise MachineError(
                f"{path}: cannot be written: {error.strerror}\n  -> make room, or write it elsewhere"
            ) from error
        print(f"written: {path}", file=sys.stderr)


def _write_page(planned: Planned, path: Path) -> None:
    """The page, with what mechanisms are worth and what images cost."""
    pipeline, choices = planned.pipeline, offer()
    mechanisms, images = (
        what_if(kind, pipeline, choices, seeks_remedy=False)
        for kind in (WhatIfKind.mechanisms, WhatIfKind.vision)
    )
    variants = [mechanism_section(mechanisms), vision_section(images)]
    text = page(planned, planned_rows(planned.step), variants, to_yaml(pipeline.config))
    path.write_text(text, encoding="utf-8")


def _calibrate(arguments: Sequence[str]) -> int:
    # It needs numpy, which takes longer to import than a plan to make.
    from k25_train.plan.report.calibration import add_arguments, run_calibrate

    parser = argparse.ArgumentParser(
        prog="k25-plan calibrate", description="Fit the constants of a device to runs of it."
    )
    add_arguments(parser)
    console = Console(width=table_width(), highlight=False)
    return run_calibrate(parser.parse_args(arguments), console, _loaded)


def _plan_pushes(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="k25-plan rl", description="Plan pushes of weights from the trainer to its engines."
    )
    add_push_arguments(parser)
    options = parser.parse_args(arguments)
    show_pushes(compose(options.overrides), options, Console(width=table_width(), highlight=False))
    return 0


def _loaded(path: Path) -> Config:
    return load(path).config


if __name__ == "__main__":
    main()
