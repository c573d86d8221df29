"""How far ranks that share sequences are from one process, and their logits from transformers'.

    python -m tests.bench.context_parity [--drawn N]

1. Losses and gradient norms over 20 steps in float32: the layouts of `tests/helpers/parity.py:CONTEXT_CASES`,
   then N that are drawn with policies, towers, exchanges and update rules.
2. Logits at 8,192 tokens of a tiny model that YaRN stretches, of text and of text with images, on one process
   and on two that share the tokens.

The last line has the worst figures next to their bars; the status is 1 where one is missed.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from parallel.config import ContextExchange
from tests.helpers.context_draws import RULES, legal_cases
from tests.helpers.hf_comparison import TOLERANCE as LOGITS_BAR
from tests.helpers.hf_comparison import compare, compare_shared
from tests.helpers.long_logits import LONG, stretched
from tests.helpers.parity import CONTEXT_CASES, TOLERANCE, Parity
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_shards import write_tiny_shard_set


def training(num_drawn: int) -> Iterator[float]:
    """The largest relative difference of each layout, printed as it is found."""
    with tempfile.TemporaryDirectory() as folder:
        parity = Parity(write_tiny_shard_set(Path(folder) / "shards"), Path(folder) / "runs")
        cases = [(case, "muonclip") for case in CONTEXT_CASES]
        cases += [next(legal_cases(number, parity)) for number in range(num_drawn)]
        for case, rule in cases:
            difference = parity.difference(case, *RULES[rule])
            print(f"{difference:.1e}  {rule}  {case.name}", flush=True)
            yield difference


def logits() -> Iterator[float]:
    """The largest difference from transformers of each batch, printed as it is found."""
    for name, result in run_ranks(compare, 1, stretched(2), LONG, timeout_s=900.0)[0].items():
        print(f"{result['difference']:.1e}  logits of 8,192 tokens, {name}", flush=True)
        yield result["difference"]
    for kind in ContextExchange:
        shared = run_ranks(compare_shared, 2, stretched(2), "text and images", LONG, kind, timeout_s=900.0)
        print(f"{max(shared):.1e}  the same of two ranks, text and images, {kind.value}", flush=True)
        yield max(shared)


def main() -> int:
    """Print all differences; 1 if one is above its bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drawn", type=int, default=0, help="layouts that are drawn")
    num_drawn = parser.parse_args().drawn
    of_logits, of_training = max(logits()), max(training(num_drawn))
    print(
        f"training {of_training:.1e} (bar {TOLERANCE:g}); logits at 8,192 tokens {of_logits:.1e} "
        f"(bar {LOGITS_BAR:g})"
    )
    return int(of_training > TOLERANCE or of_logits > LOGITS_BAR)


if __name__ == "__main__":
    sys.exit(main())
