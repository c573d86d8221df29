"""`k25-data chat`: conversations, code and tool use to fine-tune the shrunk model on."""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from k25_train.data.chat_set.build import ChatSetOptions, build_chat_set

DEFAULT_OUT = "chat"
"""Next to the set whose vocabulary is taken."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", smoke: Path) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "chat", help="make conversations to fine-tune on, and a vocabulary with their tokens"
    )
    parser.add_argument(
        "--smoke", type=Path, default=smoke, help="shard set whose vocabulary is taken (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help=f"folder to make ({DEFAULT_OUT} next to --smoke)")
    parser.add_argument("--downloads", type=Path, help="folder that keeps the packages (next to --out)")
    parser.add_argument("--traces", type=int, default=1_500, help="traces to make (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that make them (%(default)s)")
    parser.add_argument("--force", action="store_true", help="build again even if the set exists")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, console: Console) -> int:
    started_s = time.monotonic()
    out = options.out or options.smoke.parent / DEFAULT_OUT
    asked = ChatSetOptions(
        smoke=options.smoke,
        out=out,
        downloads=options.downloads or out.parent / "downloads",
        num_traces=options.traces,
        workers=options.workers,
        force=options.force,
    )
    with console.status("building"):
        built = build_chat_set(asked, lambda line: console.print(escape(line)))
    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    took = (
        f"built in {time.monotonic() - started_s:.0f} s"
        if built
        else "exists already (--force builds it again)"
    )
    console.print(f"{out}: {took}, {num_bytes / 1e6:.1f} MB")
    return 0
