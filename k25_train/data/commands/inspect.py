"""`inspect data=NAME`: packed sequences of a step as an HTML page, exactly as training computes on them;
`inspect FOLDER`: what a shard set holds, in the terminal."""

import argparse
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.config.schema import Config
from k25_train.data.batch import Reads
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import SequencePlan, StepPlan
from k25_train.data.overview.page import PageTop, page
from k25_train.data.overview.shown import ShownSequence, show
from k25_train.data.smoke_set.overview import print_samples, print_tables, write_contact_sheet
from k25_train.errors import ConfigError

EVERYTHING = Reads(tokens=True, labels=True, pixels=True)
CONTACT_SHEET_SAMPLES = 60
KINDS_WITH_MEDIA = ("caption", "ocr", "video")


def add(commands: Any, folder: str, config_of: Callable[[Sequence[str]], Config]) -> None:
    """Declare the command; `folder`: the shard set that is shown by default."""
    parser = commands.add_parser(
        "inspect", help="a page of what a step trains on, or in the terminal what a shard set holds"
    )
    parser.add_argument(
        "what", nargs="*", default=[folder], help="data=NAME and other overrides, or a shard set's folder"
    )
    page = parser.add_argument_group("with data=NAME")
    page.add_argument("--html", default="inspect.html", metavar="FILE", help="page to write (%(default)s)")
    page.add_argument("--step", type=int, default=1, help="step whose batch is shown, from 1 (%(default)s)")
    page.add_argument(
        "--sequences", type=int, default=16, metavar="N", help="most that are shown (%(default)s)"
    )
    page.add_argument("--source", help="only sequences of this source")
    of_set = parser.add_argument_group("with a folder")
    of_set.add_argument("--show", type=int, metavar="N", help="print N samples of each split")
    of_set.add_argument(
        "--contact-sheet", type=Path, metavar="PNG", help="write images with their captions to this file"
    )
    of_set.add_argument("--kind", choices=("text", *KINDS_WITH_MEDIA), help="only samples of this kind")
    parser.set_defaults(run=_run, config_of=config_of)


def _run(options: argparse.Namespace, console: Console) -> int:
    are_overrides = ["=" in each for each in options.what]
    if all(are_overrides):
        return write_page(options, console)
    if len(options.what) > 1:
        raise ConfigError(
            f"{' '.join(options.what)}: is neither one folder nor overrides alone: give data=NAME or a folder"
        )
    return show_shard_set(options, options.what[0], console)


def show_shard_set(options: argparse.Namespace, folder: str, console: Console) -> int:
    """Tables of a shard set, some of its samples, or a sheet of its images."""
    dataset = load_dataset(folder)
    if options.show is None and options.contact_sheet is None:
        print_tables(dataset, console)
    if options.show is not None:
        print_samples(dataset, console, options.show, options.kind)
    if options.contact_sheet is not None:
        write_contact_sheet(dataset, options.contact_sheet, CONTACT_SHEET_SAMPLES, options.kind)
        console.print(f"wrote {options.contact_sheet}")
    return 0


def write_page(options: argparse.Namespace, console: Console) -> int:
    """Draw the step and write the page."""
    config: Config = options.config_of(options.what)
    if options.step < 1 or options.sequences < 1:
        raise ConfigError("--step and --sequences: count from 1")
    if options.source is not None and options.source not in config.data.sources:
        raise ConfigError(
            f"--source {options.source}: is none of data.sources: {', '.join(config.data.sources)}"
        )
    with DataLoader(config.data, config.train, config.model.vision) as loader:
        plan = loader.plan(options.step - 1)
        wanted = (each for each in plan.sequences if options.source in (None, each.source))
        shown = [_shown(loader, config, each) for each in islice(wanted, options.sequences)]
        top = PageTop(
            title=f"Step {options.step}, as it is trained on",
            facts={
                "sequences": f"{len(shown)} of {len(plan.sequences):,}, {config.train.seq_len:,} tokens each",
                "tokenizer": f"{loader.tokenizer.vocab_size:,} ids, sha256 {loader.tokenizer.sha256[:12]}…",
                "seed": str(config.train.seed),
                "given": " ".join(options.what) or "nothing",
            },
            shares=_shares(plan),
        )
    if not shown:
        raise ConfigError(
            f"--source {options.source}: no sequence of step {options.step} is of it: take another --step "
            "or raise its weight"
        )
    path = Path(options.html)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(top, shown, config.train.seq_len), encoding="utf-8")
    console.print(f"wrote {path}: {len(shown)} sequences, open it in a browser")
    return 0


def _shown(loader: DataLoader, config: Config, sequence: SequencePlan) -> ShownSequence:
    [batch] = loader.read_sequences([sequence], EVERYTHING)
    return show(sequence, batch, loader.tokenizer, config.model.vision, sequence.source)


def _shares(plan: StepPlan) -> dict[str, float]:
    """Source -> its share of the step's tokens."""
    counts: dict[str, int] = {}
    for sequence in plan.sequences:
        counts[sequence.source] = counts.get(sequence.source, 0) + sequence.num_tokens
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items(), key=lambda item: -item[1])}
