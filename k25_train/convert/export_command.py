"""`k25-convert export`: a checkpoint as a Hugging Face folder with the release's names, files and formats."""

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.convert.arguments import folder, positive
from k25_train.errors import CheckpointError

MOST_WORKERS = 8
"""Processes, unless more are asked for: each holds a tensor of up to 2.4 GB, and one disk is busy by then."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "export",
        help="a checkpoint, of any layout, as a folder that transformers, vLLM and SGLang load",
        description=__doc__.partition(":")[2].strip() if __doc__ else None,
    )
    add_option = parser.add_argument
    add_option("checkpoint", metavar="CHECKPOINT", type=folder, help="step_N of a run, or an import")
    add_option("out", metavar="OUT", type=folder, help="folder to make; the same command goes on with it")
    add_option("--dtype", choices=("bf16", "int4", "float32"), default="bf16", help="of the weights")
    add_option(
        "--like",
        metavar="DIR",
        type=Path,
        help="released folder of the same model: its config.json, tokenizer, processor and code are taken, "
        "and with --dtype int4 its bytes wherever weights are unchanged",
    )
    add_option("--tokenizer", metavar="FILE", type=Path, help="vocabulary of the data, without --like")
    add_option("--text-only", action="store_true", help="leave the vision part out, as Kimi-K2 and Moonlight")
    add_option("--from-masters", action="store_true", help="round the float32 masters of the optimizer")
    add_option(
        "--shard-gb",
        metavar="GB",
        type=positive(float),
        help="most 10^9 bytes in a file; by layer without it",
    )
    add_option("--workers", metavar="N", type=positive(int), help="processes (as many as cores, 8 at most)")
    add_option("--node", type=int, default=0, metavar="I", help="number of this node, from 0")
    add_option("--num-nodes", type=positive(int), default=1, metavar="N", help="nodes (%(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Export and print a summary; returns the exit status."""
    # torch is not needed to print the help.
    from k25_train.checkpoint.files.stored import StoredCheckpoint
    from k25_train.checkpoint.integrity import check_is_checkpoint
    from k25_train.config.model import Quantization
    from k25_train.export.folder import ExportOrder, export_folder
    from k25_train.export.like import ReleasedFolder
    from k25_train.export.listing import Contents, WeightFormat
    from k25_train.export.model_of import check_tensors, contents_of, model_of, source_of
    from k25_train.export.small_files import files_like, other_rope, own_files

    if not 0 <= options.node < options.num_nodes:
        rule = f"must be 0 to {options.num_nodes - 1}, as --num-nodes says"
        raise CheckpointError(f"--node {options.node}: {rule}")
    check_is_checkpoint(options.checkpoint)
    model = model_of(options.checkpoint)
    checkpoint = StoredCheckpoint.open(options.checkpoint)
    weights = WeightFormat(options.dtype)
    contents = Contents.text if options.text_only else contents_of(checkpoint)
    like = options.like
    if like is None and options.tokenizer is None and (like := source_of(checkpoint)):
        console.print(f"tokenizer and other small files: from {like}, of which it is an import")
    if model.quantization is Quantization.int4_qat and weights is not WeightFormat.int4:
        console.print("experts were trained as INT4: --dtype int4 alone writes what they computed with")
    order = ExportOrder(
        checkpoint=options.checkpoint,
        out=options.out,
        model=model,
        weights=weights,
        contents=contents,
        shard_gb=options.shard_gb,
        like=like,
        from_masters=options.from_masters,
    )
    check_tensors(checkpoint, model, contents, from_masters=options.from_masters)
    if like is None:
        texts = own_files(model, contents, weights, options.tokenizer, checkpoint.manifest.facts)
    else:
        texts = files_like(ReleasedFolder(like), model, contents, weights)
        if other_rope(ReleasedFolder(like), model):
            console.print(f"config.json: of {like}, but the rotary embedding, which is the checkpoint's")
    is_complete = export_folder(
        order,
        texts,
        node=options.node,
        num_nodes=options.num_nodes,
        num_workers=options.workers or min(MOST_WORKERS, len(os.sched_getaffinity(0))),
        say=console.print,
    )
    if is_complete:
        files = order.files()
        num_tensors = sum(len(file.entries) for file in files)
        num_bytes = sum(file.num_bytes for file in files)
        console.print(
            f"{options.out}: {num_tensors:,} tensors in {len(files)} files, {num_bytes / 1e9:,.3f} GB"
        )
    return 0
