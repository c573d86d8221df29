"""Ranks that share sequences: what they send, how evenly they work, what exchanges cost at 262,144 tokens.

    python -m tests.bench.context_parallel

1. Attention with heads and latents of K2.5's sizes, of 4 gloo ranks next to one process: bytes that leave a
   rank, counted at torch's calls, next to the formula and to keys and values; and how far results are apart.
2. The plan of `k25_midtrain_262k` with either exchange: what a layer's takes, and what of a step is exposed.
3. Attention's work of the busiest rank over the mean, for mixes of documents: as they are shared, and zig-zag
   over the sequence whatever documents it has.

The last line has the figures next to their bars; a missed one ends with 1.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.plan.cause import Cause
from k25_train.plan.kernels.work import Setting
from k25_train.plan.memory.latents import key_value_width, latent_width
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.time.sequence_exchange import sequence_exchange
from parallel.config import ContextExchange
from parallel.context.plan import plan_context
from tests.helpers.context_ranks import Compared, Documents, compare
from tests.helpers.ranks import RankContext, run_ranks

NUM_RANKS = 4
NEAR_CASE = Documents((150, 64, 42), (2,))
CASE = Documents((1400, 330, 318), (2,))
"""2,048 tokens: a document in pieces, a whole one, and padding."""
SIZES = {
    "num_attention_heads": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_layers": 1,
    "num_dense_layers": 1,
}
"""K2.5's heads and latents, of one narrow layer."""
FLOAT_BYTES = 4
PARITY_BAR = 1e-5
EXPOSED_BAR = 0.02
"""Share of a step at 262,144 tokens in which nothing but the exchange of latents takes place."""
BALANCE_BAR = 1.25
"""Pairs of tokens of the busiest rank over the mean, on average over micro-batches of each mix. Plans even
out pairs and the keys that ranks make for them, so that neither is quite even."""
MIXES: dict[str, Callable[[random.Random], float]] = {
    "one document": lambda _: 1e9,
    "books and code": lambda draw: draw.lognormvariate(10.0, 1.2),
    "web": lambda draw: draw.lognormvariate(6.9, 1.1),
    "web, a tenth long": lambda draw: draw.lognormvariate(10.5 if draw.random() < 0.1 else 6.9, 1.0),
}
"""Mix -> length of a document. Source: our choice; medians 1,000 tokens of web pages, 22,000 of books."""
LAYOUTS = ((32_768, 8), (131_072, 32), (262_144, 64))
"""Tokens of a micro-batch, and ranks that share it."""
NUM_DRAWN = 20


@dataclass(frozen=True)
class Counted:
    """What one rank sent in a forward and a backward pass, and how its results compare."""

    sent_bytes: int
    compared: Compared


@contextmanager
def counted_sends() -> Iterator[list[int]]:
    """Bytes that leave this rank by the calls of an exchange, one number for each."""
    import torch.distributed as dist

    sent: list[int] = []
    gather, exchange, messages = dist.all_gather_into_tensor, dist.all_to_all_single, dist.batch_isend_irecv

    def gathered(output: Any, own: Any, group: Any = None, **more: Any) -> Any:
        sent.append(own.nbytes * (group.size() - 1))
        return gather(output, own, group=group, **more)

    def exchanged(output: Any, given: Any, group: Any = None, **more: Any) -> Any:
        sent.append(given.nbytes // group.size() * (group.size() - 1))
        return exchange(output, given, group=group, **more)

    def sent_to_neighbours(operations: Sequence[Any]) -> Any:
        sent.extend(each.tensor.nbytes for each in operations if each.op is dist.isend)
        return messages(operations)

    dist.all_gather_into_tensor, dist.all_to_all_single = gathered, exchanged
    dist.batch_isend_irecv = sent_to_neighbours
    try:
        yield sent
    finally:
        dist.all_gather_into_tensor, dist.all_to_all_single = gather, exchange
        dist.batch_isend_irecv = messages


def counted(context: RankContext, kind: ContextExchange) -> Counted:
    """On a rank: one pass forward and one backward."""
    with counted_sends() as sent:
        (compared,) = compare(context, [CASE], [kind], overrides=SIZES)
    return Counted(sum(sent), compared)


def apart_of_tiny(context: RankContext, kind: ContextExchange) -> float:
    """On a rank: how far attention of the tiny model's sizes is from that of one process."""
    (compared,) = compare(context, [NEAR_CASE], [kind], overrides={})
    return _apart(compared)


def formula_bytes(width: int, tokens: int, ranks: int) -> int:
    """Of a rank in float32: its tokens' numbers to all others, forward and backward; gradients of theirs."""
    return 3 * (ranks - 1) * tokens // ranks * width * FLOAT_BYTES


def traffic(console: Console) -> list[str]:
    """Print what ranks send, and how far they are from one process; returns what is missed.

    With K2.5's sizes and random weights logits are in the tens, which float32 rounds by 1e-5 whoever adds
    up: the bar is for the tiny model's.
    """
    model = compose(["experiment=k25_pretrain_4k"]).model
    latent, keys = latent_width(model), key_value_width(model)
    expected = formula_bytes(latent, CASE.tokens, NUM_RANKS)
    table = Table(title=f"{CASE.tokens:,} tokens over {NUM_RANKS} ranks: MB that each sends in a layer")
    for name in ("exchange", "counted", "formula", "keys and values", "apart", "apart, tiny model"):
        table.add_column(name, justify="right")
    missed = []
    for kind in ContextExchange:
        by_rank = run_ranks(counted, NUM_RANKS, kind)
        sent = {each.sent_bytes for each in by_rank}
        apart = max(_apart(each.compared) for each in by_rank)
        of_tiny = max(run_ranks(apart_of_tiny, NUM_RANKS, kind))
        of_keys = formula_bytes(keys, CASE.tokens, NUM_RANKS)
        row = (max(sent) / 1e6, expected / 1e6, of_keys / 1e6)
        table.add_row(kind.value, *(f"{each:,.2f}" for each in row), f"{apart:.1e}", f"{of_tiny:.1e}")
        if sent != {expected}:
            missed.append(f"{kind.value}: {sorted(sent)} bytes, by the formula {expected}")
        if of_tiny > PARITY_BAR:
            missed.append(f"{kind.value}: {of_tiny:.1e} from one process (bar {PARITY_BAR:g})")
    console.print(table)
    console.print(f"{latent} numbers a token against {keys:,}: {keys / latent:.1f} times fewer")
    return missed


def _apart(compared: Compared) -> float:
    return max(compared.output, compared.of_hidden, *compared.of_weights.values())


def exposed(console: Console) -> tuple[float, list[str]]:
    """Print the planned exchange of the longest stage; returns its share of the step, and what is missed."""
    table = Table(title="k25_midtrain_262k by plan: one layer's exchange on a rank, and a step")
    for name in (
        "exchange",
        "forward ms",
        "backward ms",
        "attends meanwhile",
        "step s",
        "exposed s",
        "share",
    ):
        table.add_column(name, justify="right")
    shares: dict[ContextExchange, float] = {}
    for kind in ContextExchange:
        config = compose(["experiment=k25_midtrain_262k", f"parallelism.cp_exchange={kind.value}"])
        pipeline = plan_pipeline(config)
        setting, step = Setting.of(pipeline.stages[0]), plan_step(pipeline)
        ahead, back = (sequence_exchange(setting, is_forward=each) for each in (True, False))
        waited_s = step.exposed_s.get(Cause.context, 0.0)
        shares[kind] = waited_s / step.step_s
        table.add_row(
            kind.value,
            f"{1e3 * ahead.seconds:.2f}",
            f"{1e3 * back.seconds:.2f}",
            "yes" if ahead.hides else "no",
            f"{step.step_s:,.1f}",
            f"{waited_s:.2f}",
            f"{shares[kind]:.2%}",
        )
    console.print(table)
    worst = max(shares.values())
    missed = [f"exposed {worst:.1%} of a step (bar {EXPOSED_BAR:.0%})"] if worst > EXPOSED_BAR else []
    return worst, missed


def drawn_documents(tokens: int, length: Callable[[random.Random], float], draw: random.Random) -> list[int]:
    """Documents of a mix, one after another until a micro-batch is full; the last one is cut."""
    found: list[int] = []
    while (left := tokens - sum(found)) > 0:
        found.append(min(left, max(1, int(length(draw)))))
    return found


def by_documents(lengths: Sequence[int], ranks: int) -> float:
    """Pairs of the busiest rank over the mean, as ranks share documents."""
    plan = plan_context(lengths, (), ranks)
    pairs = [plan.num_pairs(rank) for rank in range(ranks)]
    return max(pairs) / fmean(pairs)


def by_zig_zag(lengths: Sequence[int], ranks: int) -> float:
    """The same if the sequence is cut into 2n pieces, of which rank r has r and 2n - 1 - r."""
    share, pairs = sum(lengths) // (2 * ranks), [0.0] * (2 * ranks)
    begin = 0
    for length in lengths:
        # What a document has in each piece.
        for piece in range(begin // share, (begin + length - 1) // share + 1):
            first = max(begin, piece * share) - begin
            last = min(begin + length, (piece + 1) * share) - begin
            pairs[piece] += (last * (last + 1) - first * (first + 1)) / 2
        begin += length
    of_ranks = [pairs[rank] + pairs[2 * ranks - 1 - rank] for rank in range(ranks)]
    return max(of_ranks) / fmean(of_ranks)


def balance(console: Console) -> tuple[float, list[str]]:
    """Print how evenly attention is spread; returns the worst mix's mean, and what is missed."""
    table = Table(title=f"attention of the busiest rank over the mean, {NUM_DRAWN} micro-batches of each mix")
    for name in ("mix", "tokens", "ranks", "documents", "by documents", "zig-zag"):
        table.add_column(name, justify="right")
    worst, missed = 0.0, []
    for name, length in MIXES.items():
        for tokens, ranks in LAYOUTS:
            draw = random.Random(tokens)
            batches = [drawn_documents(tokens, length, draw) for _ in range(NUM_DRAWN)]
            ours = fmean(by_documents(each, ranks) for each in batches)
            theirs = fmean(by_zig_zag(each, ranks) for each in batches)
            number = fmean(map(len, batches))
            table.add_row(name, f"{tokens:,}", str(ranks), f"{number:.0f}", f"{ours:.3f}", f"{theirs:.3f}")
            worst = max(worst, ours)
            if ours > BALANCE_BAR or ours > theirs + 1e-3:
                missed.append(
                    f"{name}, {tokens:,} tokens: {ours:.3f} (bar {BALANCE_BAR:g}, zig-zag {theirs:.3f})"
                )
    console.print(table)
    return worst, missed


def main() -> int:
    """Print tables and figures; 1 if a bar is missed."""
    console = Console(width=110, highlight=False)
    missed = traffic(console)
    share, of_time = exposed(console)
    worst, of_balance = balance(console)
    missed += [*of_time, *of_balance]
    for each in missed:
        print(f"MISSED: {each}")
    print(
        f"latents as counted; exposed at 262,144 tokens {share:.2%} (bar {EXPOSED_BAR:.0%}); busiest rank "
        f"{worst:.3f} times the mean (bar {BALANCE_BAR:g})"
    )
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
