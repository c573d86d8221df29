"""Kill -9 at random moments, resume in another layout each time: samples as without any of it.

A job of 1, 2 or 4 replicas reads text, captions, pages and videos and saves where it is as checkpoints do.
It is killed 20 times, while it starts, reads, or saves, and goes on each time with another number of
replicas, micro-batch size and prefetching. Compared with a run of one replica that nothing disturbed: the
identity (sample, first token, length) of all pieces of all sequences, and the bytes of tokens, labels, masks
and pixels. Run it as `python -m tests.bench.data_resume [--kills N] [--seed N]`.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.data_job import Job, Layout, differences, run_with_kills
from tests.helpers.runs import layout, overrides
from tests.helpers.tiny_shards import write_tiny_shard_set

NUM_STEPS = 60
LAYOUTS = (
    Layout(1, ("data.read_in=process", "data.prefetch_steps=3", "train.micro_batch_size=2")),
    Layout(4, ("data.read_in=process", "data.prefetch_steps=1", "train.micro_batch_size=1")),
    Layout(2, ("data.read_in=process", "data.prefetch_steps=0", "train.micro_batch_size=4")),
    Layout(2, ("data.read_in=thread", "data.prefetch_steps=2", "train.micro_batch_size=1")),
)


def main() -> None:
    """Run, compare, print, and end with status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = write_tiny_shard_set(root / "set")
        common = tuple(
            overrides(data, root / "run", "dep.mode=coupled", *layout(), f"train.steps={NUM_STEPS}")
        )
        reference = Job(root / "whole", common, NUM_STEPS, interval=NUM_STEPS)
        reference.finish(0, Layout(1, ("data.read_in=thread", "data.prefetch_steps=0")))
        job = Job(root / "killed", common, NUM_STEPS)
        for line in run_with_kills(job, LAYOUTS, arguments.kills, random.Random(arguments.seed)):
            print(line)
        found = differences(job, reference)
        state_bytes = max(path.stat().st_size for path in job.checkpoints.glob("*/data_state.json"))
    for line in found:
        print(line)
    print(
        f"{arguments.kills} kills over {NUM_STEPS} steps, {len(found)} differences from the run without any, "
        f"{state_bytes:,} bytes of state, {time.perf_counter() - started:.0f} s"
    )
    sys.exit(1 if found or state_bytes > 8192 else 0)


if __name__ == "__main__":
    main()
