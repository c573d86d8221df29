"""`k25-data prepare`: text as JSON lines or Parquet, tokenised once into megatron-core's indexed form."""

import argparse
import os
import time
from typing import Any

from rich.console import Console

from k25_train.data.prepare.job import SHARD_TOKENS, Options, Preparation
from k25_train.data.prepare.progress import Bar, print_plan, print_result
from k25_train.data.prepare.units import UNIT_BYTES

_EPILOG = """\
A command that was interrupted goes on where it was when it is given again. The result has the documents in
the order of the inputs, byte for byte the same whatever the number of workers.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "prepare",
        help="tokenise JSON lines or Parquet into megatron-core's .bin and .idx",
        description=__doc__.partition(":")[2].strip() if __doc__ else None,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder (all .jsonl, .ndjson and .parquet below it, also .gz, .zst and .bz2), glob, or "
        "a URL of these",
    )
    parser.add_argument(
        "--out", required=True, help="folder, or prefix of the files: PREFIX-00000.bin, PREFIX-00000.idx, …"
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, or Kimi's tiktoken .model file")
    parser.add_argument("--field", default="text", help="field or column with the text (%(default)s)")
    parser.add_argument(
        "--id-field", default="", metavar="FIELD", help="skip documents whose id an earlier one has"
    )
    parser.add_argument(
        "--append-eod",
        action="store_true",
        help="end each document with [EOS], as Megatron-LM's loaders want it; this project's adds it itself",
    )
    parser.add_argument(
        "--workers", type=_not_negative, help="processes (all cores); 0 works in this one", metavar="N"
    )
    parser.add_argument(
        "--shard-tokens",
        type=_positive,
        default=SHARD_TOKENS,
        metavar="N",
        help="most tokens of a shard (%(default)s)",
    )
    parser.add_argument(
        "--max-skipped",
        type=_limit,
        default=0.001,
        metavar="N",
        help="records that may be skipped: a number, or below 1 a share of all (%(default)s)",
    )
    parser.add_argument(
        "--unit-bytes",
        type=_positive,
        default=UNIT_BYTES,
        metavar="N",
        help="input that a worker takes at a time (%(default)s)",
    )
    parser.add_argument("--restart", action="store_true", help="replace what is at --out")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Prepare and print a summary; returns the exit status."""
    started_s = time.monotonic()
    num_workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    prepared = Preparation(
        Options(
            inputs=options.inputs,
            out=options.out,
            tokenizer=options.tokenizer,
            field=options.field,
            id_field=options.id_field,
            append_eod=options.append_eod,
            num_workers=num_workers,
            shard_tokens=options.shard_tokens,
            unit_bytes=options.unit_bytes,
            max_skipped=options.max_skipped,
            restart=options.restart,
        )
    )
    if options.dry_run:
        print_plan(prepared, console)
        return 0
    try:
        result = prepared.run(Bar(console))
    except KeyboardInterrupt:
        console.print("what is done is kept: the same command goes on from there", soft_wrap=True)
        raise
    print_result(result, prepared, time.monotonic() - started_s, console)
    return 0


def _positive(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be positive")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be negative")
    return value


def _limit(text: str) -> float:
    value = float(text)
    if not (0 <= value < 1 or value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text}: is neither a share below 1 nor a whole number")
    return value
