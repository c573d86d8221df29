"""Weights from the trainer to engines: the same bits from every layout, seconds, and a proof of arrival.

    make data && python -m tests.bench.rl_weight_sync            # with vLLM, too, where `make engine` was run

1. A checkpoint is loaded in layouts that cover pipelines, virtual stages, experts, replicas, shared sequences
   and both places of the tower, and pushed to two engines, of which one misses a push.
2. The tiny model is pushed to the engine in process; the probe compares log-probabilities with the trainer's,
   and has to notice a weight that only the trainer has.
3. The same on vLLM: `tests.bench.vllm_engine`, whose tests plant a reload that leaves old experts behind.
4. What a push of the 1T model to 256 H800 is planned to take, next to published ones.

The last lines have the figures next to their bars; the status is 1 where one is missed.
"""

import sys
import tempfile
from pathlib import Path

from rich.console import Console

from k25_train.compose.resolve import compose
from k25_train.config.rollout import EngineWeights
from k25_train.plan.report.weight_push import print_pushes
from k25_train.plan.weight_push import plan_pushes
from tests.bench import vllm_engine
from tests.helpers.probed_pushes import TINY, probed_pushes
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import fit, layout, overrides
from tests.helpers.tiny_shards import write_tiny_shard_set
from tests.helpers.weight_pushes import LAYOUTS, REINFORCED, SHORT, expected, push_checkpoint

MOST_PUSH_S = 1.0
MOST_GAP = 1e-5
PUBLISHED_S = 20.0
"""checkpoint-engine's own words for K2 on thousands of GPUs."""


def layouts_with_other_bits() -> list[str]:
    """Names of the layouts from which engines get other bits than the checkpoint has."""
    other = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_tiny_shard_set(Path(folder) / "shards")
        run_ranks(fit, 1, overrides(data, Path(folder) / "run", *SHORT, *layout()), timeout_s=900.0)
        checkpoint = Path(folder) / "run/checkpoints/step_2"
        for name, (sizes, *more) in LAYOUTS.items():
            arguments = overrides(data, Path(folder) / name, *SHORT, *REINFORCED, *sizes, *more)
            world = int(sizes[-1].partition("=")[2])
            first, second, _ = run_ranks(
                push_checkpoint, world, arguments, checkpoint, "shared_memory", timeout_s=900.0
            )[0]
            same = first == second == expected(checkpoint, arguments)
            print(f"{'same bits' if same else 'OTHER BITS'}: {len(first)} tensors from {name}", flush=True)
            other += [] if same else [name]
    return other


def main() -> int:
    """Measure; returns the exit status."""
    other = layouts_with_other_bits()
    (tiny,) = run_ranks(probed_pushes, 1, TINY, timeout_s=900.0)
    seconds = sorted(tiny.seconds)
    push_s = seconds[len(seconds) // 2]
    has_vllm = (REPO / ".venv-engine/.installed").exists()
    vllm_status = vllm_engine.main() if has_vllm else 0
    config = compose(["experiment=k25_pretrain_4k", "cluster.nodes=32"])
    print_pushes(config, EngineWeights.int4, Console(width=100, highlight=False))
    by_way = {plan.way: plan for plan in plan_pushes(config, EngineWeights.int4)}
    planned_s = by_way["checkpoint_engine"].seconds

    print(f"layouts with other bits: {len(other)} of {len(LAYOUTS)} (bar 0)")
    print(f"push of the tiny model to the engine in process: median {push_s:.2f} s (bar {MOST_PUSH_S:g} s)")
    print(f"probe after it: largest difference {tiny.gap:.1e} (bar {MOST_GAP:g})")
    print(f"a weight that only the trainer has: {'noticed' if tiny.noticed else 'NOT NOTICED'}")
    print(f"push to vLLM: {('kept', 'MISSED')[vllm_status] if has_vllm else 'not run, no .venv-engine'}")
    print(f"1T in INT4 to 256 H800: planned {planned_s:.1f} s (published for K2: {PUBLISHED_S:g} s)")
    kept = not other and push_s <= MOST_PUSH_S and tiny.gap <= MOST_GAP and tiny.noticed
    return 0 if kept and not vllm_status and planned_s <= PUBLISHED_S else 1


if __name__ == "__main__":
    sys.exit(main())
