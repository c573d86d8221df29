"""How closely the implementation agrees: with transformers' `kimi_k25`, and every layout with one process.

    python -m tests.bench.agreement

Prints the figures that tests/distributed/test_against_transformers.py, test_parity.py and
test_smoke_dimensions.py hold to their bars.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.helpers.hf_comparison import TOLERANCE as LOGIT_BAR
from tests.helpers.hf_comparison import compare
from tests.helpers.parity import BFLOAT16_CASES, CASES, Parity, worst_difference
from tests.helpers.parity import BFLOAT16_TOLERANCE as BFLOAT16_BAR
from tests.helpers.parity import TOLERANCE as PARITY_BAR
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import losses_of
from tests.helpers.smoke_dimensions import SMOKE_LAYOUTS, SMOKE_TOLERANCE, smoke_overrides
from tests.helpers.tiny_shards import write_tiny_shard_set


def print_smoke_dimensions() -> None:
    """The smoke experiment's own model in its layouts, against one process."""
    table = Table(
        "smoke's dimensions", "largest relative difference", title=f"5 steps, bar {SMOKE_TOLERANCE:g}"
    )
    with tempfile.TemporaryDirectory() as folder:
        data, run = write_tiny_shard_set(Path(folder, "shards")), Path(folder, "run")
        alone = losses_of([*smoke_overrides(data, run), "dep.mode=coupled"], 1)
        for name, sizes in SMOKE_LAYOUTS.items():
            found = losses_of(smoke_overrides(data, run, **sizes), 4)
            table.add_row(name, f"{worst_difference(found, alone):.1e}")
    Console().print(table)


def main() -> None:
    """Measure both and print two tables."""
    logits = Table(
        "batch", "largest difference", "largest logit", "same experts", title=f"logits, bar {LOGIT_BAR:g}"
    )
    for name, result in run_ranks(compare, 1, {})[0].items():
        difference, scale = f"{result['difference']:.1e}", f"{result['scale']:.1f}"
        logits.add_row(name, difference, scale, f"{result['same_experts']:.0%}")
    Console().print(logits)

    print_smoke_dimensions()
    layouts = Table("layout", "largest relative difference", title=f"20 steps, bar {PARITY_BAR:g}")
    with tempfile.TemporaryDirectory() as folder:
        parity = Parity(write_tiny_shard_set(Path(folder, "shards")), Path(folder, "run"))
        for case in CASES:
            layouts.add_row(case.name, f"{parity.difference(case):.1e}")
        for case in BFLOAT16_CASES:
            found = parity.difference(case, "train.dtype=bfloat16")
            layouts.add_row(f"{case.name}, bfloat16, bar {BFLOAT16_BAR:g}", f"{found:.1e}")
    Console().print(layouts)


if __name__ == "__main__":
    main()
