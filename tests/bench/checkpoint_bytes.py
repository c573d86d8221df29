"""Bytes that all ranks of the 1T job ask of storage to load a checkpoint, of their own layout and of others.

    python -m tests.bench.checkpoint_bytes

Ranks are those of the dry run, ranges and reads those of a run: `dryrun/checkpoint_parts.py` has what each
rank saves and loads, `checkpoint/loading.py` and `files/reader.py` plan the reads. Counted are data in whole
blocks, tables of checksums, headers, and the manifest once. Then the host memory that a save takes of a rank,
next to what the rank writes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import cache

from rich.console import Console
from rich.table import Table

from k25_train.checkpoint.files.parts import Part
from k25_train.compose.resolve import compose
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from parallel.megatron.platform import use_platform

MOST_READ, MOST_COPIED = 1.05, 1.1
LAYOUTS = {
    "256": ["cluster.nodes=32"],
    "2,048": ["cluster.nodes=256"],
    "4,096": ["cluster.nodes=512"],
    "4,096, pp 8, ep 32": [
        "cluster.nodes=512", "parallelism.pp=8", "parallelism.vpp=4", "parallelism.ep=32", "dep.mode=coupled",
    ],
}  # fmt: skip
"""Name -> overrides of `experiment=k25_pretrain_4k`; pp 16, vpp 2 and ep 16 unless they say otherwise."""
LOADS = (
    ("256", "256"), ("2,048", "2,048"), ("4,096", "4,096"), ("256", "4,096"), ("4,096", "256"),
    ("256", "4,096, pp 8, ep 32"), ("4,096, pp 8, ep 32", "2,048"),
)  # fmt: skip
"""Written by, loaded by."""


@cache
def config_of(name: str) -> Config:
    """The configuration of a layout."""
    return compose(["experiment=k25_pretrain_4k", *LAYOUTS[name]])


@cache
def parts_of(name: str) -> Sequence[Sequence[Part]]:
    """[rank] -> its parts."""
    from k25_train.dryrun.checkpoint_parts import parts_by_rank
    from k25_train.dryrun.rank import build_rank
    from k25_train.plan.pipeline import layout_of

    config = config_of(name)
    layout = layout_of(config)
    stages = range(config.parallelism.pp)
    return parts_by_rank([build_rank(config, layout, stage * config.dp) for stage in stages])


def is_state(part: Part) -> bool:
    """Whether masters and moments that rest in the host are read straight to where they belong."""
    return part.name.startswith("optimizer.")


def is_on_device(_: Part) -> bool:
    """Nothing is read straight to a device."""
    return False


def main() -> None:
    """Print the figures next to the bars; ends non-zero if one is missed."""
    use_platform("meta")
    from k25_train.checkpoint.snapshot import places
    from tests.helpers.virtual_checkpoint import asked_by, written_by

    console, started = Console(), time.perf_counter()
    table = Table("written by", "loaded by", "checkpoint, TB", "asked, TB", "times", f"bar {MOST_READ}")
    worst = 0.0
    for writer, reader in LOADS:
        checkpoint = written_by(parts_of(writer), config_of(writer).checkpoint.writers)
        in_host = config_of(reader).optim.offload is not OptimizerOffload.none
        is_direct = is_state if in_host else is_on_device
        asked = checkpoint.header_bytes + len(checkpoint.stored.manifest.to_text())
        asked += sum(asked_by(checkpoint, parts, is_direct) for parts in parts_of(reader))
        times = asked / checkpoint.num_bytes
        worst = max(worst, times)
        verdict = "kept" if times <= MOST_READ else "MISSED"
        figures = (f"{checkpoint.num_bytes / 1e12:.3f}", f"{asked / 1e12:.3f}", f"{times:.4f}", verdict)
        table.add_row(writer, reader, *figures)
        console.print(f"{writer} to {reader}: {times:.4f}, {time.perf_counter() - started:.0f} s so far")
    console.print(table)
    copied = max(
        places(parts)[1] / max(1, sum(part.num_bytes for part in parts))
        for name in LAYOUTS
        for parts in parts_of(name)
    )
    console.print(f"a save takes at most {copied:.4f} times what the rank writes; bar {MOST_COPIED}")
    console.print(f"at most {worst:.4f} times the checkpoint is asked of storage")
    sys.exit(worst > MOST_READ or copied > MOST_COPIED)


if __name__ == "__main__":
    main()
