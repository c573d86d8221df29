"""`k25-convert import`: a Hugging Face folder as a checkpoint of weights, in bounded memory."""

import argparse
from typing import Any

from rich.console import Console

from k25_train.errors import CheckpointError


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "import",
        help="weights of a Hugging Face folder as a checkpoint to start from",
        description=__doc__.partition(":")[2].strip() if __doc__ else None,
    )
    parser.add_argument("source", metavar="SRC", help="folder with config.json and safetensors files")
    parser.add_argument("out", metavar="OUT", help="folder to make; the same command goes on with it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Import and print a summary; returns the exit status."""
    raise CheckpointError(f"{options.source}: the importer is not there yet")
