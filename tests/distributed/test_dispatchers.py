"""megatron-core's flex dispatcher with our experts, router and padding, over a twin of DeepEP's kernels.

DeepEP itself needs GPUs, and no test runs it.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, train
from tests.helpers.tiny_shards import write_tiny_shard_set

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("shards"))


def train_over_the_twin(context: RankContext, arguments: Sequence[str]) -> list[tuple[float, float]]:
    """Train with DeepEP's dispatcher, which the configuration rightly refuses on the CPU."""
    from parallel.megatron.platform import use_platform

    use_platform("cpu")
    from k25_train.model import megatron_config
    from tests.helpers import deepep_twin

    deepep_twin.install()
    megatron_config._dispatch = lambda _: {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "deepep",
    }
    return train(context, arguments)


def test_deepep_trains_as_the_all_to_all_does(data: Path, tmp_path: Path) -> None:
    """Sequences end with padding, which goes nowhere with either."""
    sizes = [*layout(ep=2, dp=2), "train.steps=4", "optim.warmup=1", "optim.decay=1"]
    arguments = overrides(data, tmp_path, *sizes)
    plain = run_ranks(train, 2, arguments)[0]
    twin = run_ranks(train_over_the_twin, 2, arguments)[0]
    for ours, theirs in zip(twin, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
