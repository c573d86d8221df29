"""Which dispatchers of tokens a configuration can have."""

import pytest

from k25_train.compose.resolve import compose
from parallel.dispatcher import Dispatcher
from tests.helpers.illegal_configs import as_arguments
from tests.helpers.illegal_dispatchers import TWO_NODES


@pytest.mark.parametrize(
    "more",
    [
        {"parallelism.dispatcher": "alltoall"},
        {"parallelism.dispatcher": "deepep", "parallelism.dispatcher_sms": 20},
        {"parallelism.dispatcher": "deepep", "parallelism.ep": 8},
        {"parallelism.dispatcher": "hybridep", "cluster.nodes": 4, "cluster.gpus_per_node": 4},
        {
            "parallelism.dispatcher": "ncclep",
            "parallelism.dispatcher_capacity": 2,
            "train.transformer_engine": True,
        },
    ],
)
def test_every_dispatcher_has_a_legal_place(more: dict[str, object]) -> None:
    config = compose(["experiment=smoke", *as_arguments(TWO_NODES | more)])
    assert config.parallelism.dispatcher is Dispatcher(more["parallelism.dispatcher"])


def test_the_flagship_takes_any_of_them() -> None:
    for kind in Dispatcher:
        more = ["parallelism.dispatcher_capacity=2"] if kind is Dispatcher.ncclep else []
        config = compose(["experiment=k25_pretrain_4k", f"parallelism.dispatcher={kind.value}", *more])
        assert config.parallelism.dispatcher is kind
