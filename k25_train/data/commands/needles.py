"""`k25-data needles`: long documents with facts and questions, made of the text of a shard set."""

import argparse
import time
from pathlib import Path

from rich.console import Console

from k25_train.data.formats.dataset import MANIFEST
from k25_train.data.needles.build import LENGTHS, NeedleOptions, build_needles
from k25_train.errors import DataError

DEFAULT_OUT = "needles"
"""Next to the set whose text is taken."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", text: Path) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "needles", help="make documents to learn retrieval from, and to search for needles in"
    )
    parser.add_argument("--text", type=Path, default=text, help="shard set whose text is taken (%(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder to make ({DEFAULT_OUT} next to --text)")
    parser.add_argument(
        "--length",
        type=int,
        action="append",
        metavar="TOKENS",
        help="of documents with facts; may be repeated (256, 1024, 4096)",
    )
    parser.add_argument(
        "--searched", type=int, default=16, help="documents to search in, of each length (16)"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, console: Console) -> int:
    started_s = time.monotonic()
    out = options.out or options.text.parent / DEFAULT_OUT
    if out.exists() and not _is_ours(out):
        raise DataError(f"{out}: is there but holds something else; choose another folder with --out.")
    lengths = tuple(options.length or LENGTHS)
    build_needles(NeedleOptions(text=options.text, out=out, lengths=lengths, num_searched=options.searched))
    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    console.print(f"{out}: built in {time.monotonic() - started_s:.0f} s, {num_bytes / 1e6:.1f} MB")
    return 0


def _is_ours(out: Path) -> bool:
    return out.is_dir() and (not any(out.iterdir()) or (out / "lists" / MANIFEST).is_file())
