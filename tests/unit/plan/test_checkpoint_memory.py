"""What a checkpoint takes: all ranks together write it once, whatever the layout."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.memory.checkpoint import checkpoint_bytes, fullest_shard, shard_bytes
from k25_train.plan.memory.stage import stage_memories
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.memory import memory_as_dict
from k25_train.plan.report.memory_lines import checkpoint_line


@pytest.mark.parametrize("nodes", [32, 512])
@pytest.mark.parametrize(
    "choice",
    [
        "dep.mode=coupled dep.schedule=upfront",
        "optim.vision_tower.trained=false",
        "",
    ],
)
def test_all_ranks_write_everything_once(nodes: int, choice: str) -> None:
    config = compose(["experiment=k25_pretrain_4k", f"cluster.nodes={nodes}", *choice.split()])
    stages = plan_pipeline(config).stages
    ranks_per_stage = config.world_size // len(stages)
    written = sum(ranks_per_stage * shard_bytes(stage) for stage in stages)
    assert written == pytest.approx(checkpoint_bytes(config), rel=1e-12)


def test_the_flagship_writes_ten_terabytes_in_even_shards() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    pipeline = plan_pipeline(config)
    # bf16 weights, float32 masters and momenta; AdamW's second moments of embeddings and norms.
    assert 10.2e12 < checkpoint_bytes(config) < 10.4e12
    assert fullest_shard(pipeline) < 1.1 * checkpoint_bytes(config) / config.world_size
    told = memory_as_dict(config, stage_memories(pipeline))["checkpoint"]
    assert told == {
        "bytes": checkpoint_bytes(config),
        "rank_bytes": round(fullest_shard(pipeline)),
        # 128 MiB of staging, and 32 for each of 4 readers.
        "load_buffer_bytes": 2**28,
    }
    assert "10,278 GB, of which a rank writes 42.67" in checkpoint_line(pipeline)
