"""What makes the host wait for a GPU in a step and in its modules, seen on fake CUDA tensors.

    python -m tests.bench.blocking_copies

Two ranks train two steps of a shrunk model as `k25_pretrain_4k` does: bfloat16, overlapped experts, deferred
weight gradients, FP8 storage and offloading. Prints each place that blocks, with its calls in a step, by
part; last the number of calls that may not.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.helpers.blocking_parts import GPU, LAYERS, PARTS, blocking_by_part, is_allowed, not_allowed
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import layout, overrides
from tests.helpers.tiny_shards import write_tiny_shard_set


def main() -> int:
    """Print the table; 1 if something blocks that may not."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_tiny_shard_set(Path(folder))
        arguments = overrides(data, Path(folder) / "run", *GPU, *layout(ep=2, dp=2))
        found = run_ranks(blocking_by_part, 2, arguments, timeout_s=600.0)[0]
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("part", "calls", "what blocks", "where", ""):
        table.add_column(name)
    for part in (*LAYERS, *PARTS):
        if not found[part]:
            table.add_row(part, "0", "nothing", "", "")
        for blocking, calls in Counter(found[part]).most_common():
            verdict = "" if is_allowed(part, blocking) else "MAY NOT"
            table.add_row(part, str(calls), f"{blocking.what}: {blocking.why}", blocking.where, verdict)
    Console(width=170).print(table)
    wrong = not_allowed(found)
    print(f"calls that block and may not: {len(wrong)} (bar 0)")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
