"""What it costs thousands of ranks to find out that they are of one job, through a real store of torch.

    python -m tests.bench.same_job [RANKS]

One client says for all ranks what each would say, one request after another, so the times are what the store
and rank 0 need at the most. One node of eight ranks has another learning rate.
"""

import json
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from k25_train.compose.resolve import compose
from k25_train.joining.agreement import Statement, describe, differences, digest, to_ask
from k25_train.joining.council import Council
from k25_train.joining.facts import AT_START, facts_at_start
from tests.helpers.ranks import free_port

RANKS, PER_NODE, ODD_NODE = 4096, 8, 97


def statement(rank: int, digests: dict[str, str]) -> Statement:
    """What a rank states."""
    node, local_rank = divmod(rank, PER_NODE)
    return Statement(rank=rank, node=node, host=f"node-{node:03}", local_rank=local_rank, digests=digests)


def timed(what: str, start_s: float) -> float:
    """Print the time since then; returns the time now."""
    now_s = time.perf_counter()
    print(f"{now_s - start_s:8.3f} s  {what}", flush=True)
    return now_s


def main() -> None:
    """Compare, and print what each part took."""
    num_ranks = int(sys.argv[1]) if len(sys.argv) > 1 else RANKS
    port, limit = free_port(), timedelta(seconds=600)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=limit)
    others = dist.PrefixStore("bench", dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit))
    council = Council(dist.PrefixStore("bench", store), 0, num_ranks)
    # 1. Each rank reads its facts, in parallel with the others.
    start_s = time.perf_counter()
    facts = facts_at_start(compose(["experiment=smoke"]))
    start_s = timed("a rank reads its facts (in parallel)", start_s)
    odd = facts_at_start(compose(["experiment=smoke", "optim.lr=9e-3"]))
    digests, of_odd = ({kind: digest(own) for kind, own in each.items()} for each in (facts, odd))
    said = [statement(rank, of_odd if rank // PER_NODE == ODD_NODE else digests) for rank in range(num_ranks)]
    # 2. All state their digests, rank 0 compares them, all read what it decides.
    start_s = time.perf_counter()
    for rank in range(1, num_ranks):
        others.set(f"topic/{rank}", json.dumps(asdict(said[rank])))
    start_s = timed(f"{num_ranks} ranks state {len(json.dumps(asdict(said[0])))} bytes each", start_s)
    heard = [Statement(**values) for values in council.tell("topic", asdict(said[0]))]
    asked = to_ask(heard, AT_START)
    start_s = timed("rank 0 reads and compares them", start_s)
    council.decide("asked", asked, None)
    for _ in range(1, num_ranks):
        others.get("asked")
    start_s = timed("all read what it decides", start_s)
    # 3. Two ranks tell their values.
    ranks = sorted({rank for own in asked.values() for rank in own})
    values = {
        rank: {kind: (odd if rank // PER_NODE == ODD_NODE else facts)[kind] for kind in asked}
        for rank in ranks
    }
    for rank in ranks[1:]:
        others.set(f"values/{rank}", json.dumps(values[rank]))
    heard_values = council.ask("values", ranks, values[0])
    found = differences(heard, dict(zip(ranks, heard_values, strict=True)), AT_START)
    text = describe(found, heard)
    timed(f"{len(ranks)} ranks tell {len(json.dumps(values[0]))} bytes, rank 0 finds the difference", start_s)
    print(text)


if __name__ == "__main__":
    main()
